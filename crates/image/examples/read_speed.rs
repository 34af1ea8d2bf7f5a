//! How fast an image is indexed, opened and read, against reading a file of that length.
//!
//! `cargo run --release -p vmferry-image --example read_speed -- MIB [FOLDER]`

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmferry_image::{FileStorage, Image, IndexPlace};
use vmferry_ram::{BlockIndex, PAGE_BYTES};
use vmferry_stream::{
    Configuration, Encoder, InstanceId, Name, RamPage, RamRecord, Record, Section, SectionId,
    SectionKind,
};

const PAGE: usize = 4096;
const PAGES: usize = 64;
const RAM: SectionId = SectionId(1);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let mib: u64 = arguments.next().map_or(Ok(1024), |mib| mib.parse())?;
    let folder = arguments
        .next()
        .map_or_else(std::env::temp_dir, PathBuf::from);
    let folder = tempfile::tempdir_in(folder)?;
    let path = folder.path().join("vm");
    let pages = mib * 256;
    write(&path, pages)?;

    let (image, time) = timed(|| open(&path))?;
    let bytes = fs::metadata(&path)?.len();
    println!("indexed: {:.0} MiB/s", rate(bytes, time));
    drop(image);
    let rounds = 1000;
    let before = cpu();
    let (_, time) = timed(|| (0..rounds).try_for_each(|_| open(&path).map(drop)))?;
    let spent = cpu() - before;
    println!(
        "opened with its index: {:?}, {:?} of CPU",
        time / rounds,
        spent / rounds
    );

    let image = open(&path)?;
    let mut into = vec![0; PAGES * PAGE];
    let sweep = |image: &Image, into: &mut [u8]| -> Result<(), Box<dyn std::error::Error>> {
        for first in (0..pages).step_by(PAGES) {
            image.read_pages(BlockIndex(0), first, into)?;
        }
        Ok(())
    };
    sweep(&image, &mut into)?;
    let (_, time) = timed(|| sweep(&image, &mut into))?;
    println!(
        "64 pages at once: {:.0} MiB/s",
        rate(pages * PAGE_BYTES, time)
    );
    let (_, plain) = timed(|| plain(&path, &mut into))?;
    println!(
        "the same by pread and crc32: {:.0} MiB/s; ratio {:.2}",
        rate(pages * PAGE_BYTES, plain),
        time.as_secs_f64() / plain.as_secs_f64()
    );
    let mut rng = fastrand::Rng::with_seed(1);
    let one = into.get_mut(..PAGE).ok_or("no page")?;
    let count = 200_000;
    let (_, time) = timed(|| {
        for _ in 0..count {
            image.read_pages(BlockIndex(0), rng.u64(..pages), one)?;
        }
        Ok(())
    })?;
    println!("one page anywhere: {:?}", time / count);
    Ok(())
}

fn open(path: &Path) -> Result<Image, Box<dyn std::error::Error>> {
    let storage = Arc::new(FileStorage::open(path, 0)?);
    Ok(Image::open(storage, &IndexPlace::Beside, &mut |_| {})?)
}

/// Read the file in as large pieces, with a checksum of each page.
fn plain(path: &Path, into: &mut [u8]) -> Result<(), Box<dyn std::error::Error>> {
    let file = File::open(path)?;
    let end = file.metadata()?.len();
    let mut at = 0;
    let mut sum = 0;
    while at + into.len() as u64 <= end {
        file.read_exact_at(into, at)?;
        for page in into.chunks(PAGE) {
            sum ^= crc32fast::hash(page);
        }
        at += into.len() as u64;
    }
    std::hint::black_box(sum);
    Ok(())
}

fn timed<T>(
    work: impl FnOnce() -> Result<T, Box<dyn std::error::Error>>,
) -> Result<(T, Duration), Box<dyn std::error::Error>> {
    let start = Instant::now();
    let result = work()?;
    Ok((result, start.elapsed()))
}

fn rate(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / f64::from(1 << 20) / time.as_secs_f64()
}

fn cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(
        time.tv_sec.unsigned_abs(),
        time.tv_nsec.unsigned_abs() as u32,
    )
}

/// A machine of random pages.
fn write(path: &Path, pages: u64) -> Result<(), Box<dyn std::error::Error>> {
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let mut encoder = Encoder::new(true);
    let mut rng = fastrand::Rng::with_seed(7);
    let mut record = |record: &Record, out: &mut BufWriter<File>| {
        let mut bytes = Vec::new();
        encoder.record(record, &mut bytes);
        out.write_all(&bytes)
    };
    let section = |kind| {
        Record::Section(Section {
            kind,
            id: RAM,
            name: Name::new("ram").unwrap_or_default(),
            instance: InstanceId(0),
            version: 4,
        })
    };
    let name = Name::new("pc.ram")?;
    let eos = Record::Ram(RamRecord::EndOfSection);
    let end = Record::SectionEnd { id: RAM };
    record(&Record::Header { version: 3 }, &mut out)?;
    let configuration = Configuration::of_machine(Name::new("pc")?);
    record(&Record::Configuration(configuration), &mut out)?;
    record(&section(SectionKind::Start), &mut out)?;
    let total_bytes = pages * PAGE_BYTES;
    record(&Record::Ram(RamRecord::BlockList { total_bytes }), &mut out)?;
    let block = RamRecord::Block {
        name: name.clone(),
        used_bytes: total_bytes,
        page_bytes: None,
        guest_address: None,
        mapped: None,
    };
    record(&Record::Ram(block), &mut out)?;
    record(&eos, &mut out)?;
    record(&end, &mut out)?;
    record(&section(SectionKind::Part), &mut out)?;
    let mut content = vec![0; PAGE];
    rng.fill(&mut content);
    for page in 0..pages {
        let page = RamPage {
            block: name.clone(),
            offset_bytes: page * PAGE_BYTES,
        };
        let bytes = PAGE as u32;
        record(&Record::Ram(RamRecord::Page { page, bytes }), &mut out)?;
        content.rotate_left(8);
        out.write_all(&content)?;
    }
    record(&eos, &mut out)?;
    record(&end, &mut out)?;
    record(&Record::Eof, &mut out)?;
    out.flush()?;
    Ok(())
}
