//! How fast pages of a stream get into guest memory: `cargo run --release -p vmferry-ram --example load`.
//!
//! Loads a stream in memory whose pages are random, through the whole decoder, several times: into
//! memory that was never touched, and into the same memory again. Prints both rates beside that of
//! copying the bytes alone. With the argument `huge`, memory may have huge pages.
//! The time is that of the processor.

use std::error::Error;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use vmferry_ram::{
    AnonymousRam, GuestRam, PAGE_BYTES, RamDestination, RamDestinationOptions, SECTION_NAME,
    SECTION_VERSION,
};
use vmferry_savevm::{LoadMachine, LoadOptions, Registration, Registry, load_cleanup};
use vmferry_stream::{
    Encoder, InstanceId, Name, RamPage, RamRecord, Record, Section, SectionId, SectionKind,
};

const BYTES: u64 = 1 << 30;
const PAGES_OF_A_PART: u64 = 64;

fn main() -> Result<(), Box<dyn Error>> {
    let stream = stream()?;
    for round in 0..3 {
        let ram = Arc::new(AnonymousRam::new(&[("pc.ram", BYTES)])?);
        if std::env::args().nth(1).is_some() {
            ram.blocks()[0].allow_huge_pages();
        }
        let fresh = load(&stream, ram.clone())?;
        let again = load(&stream, ram)?;
        let mut copy = vec![0_u8; stream.len()];
        copy.copy_from_slice(&stream);
        let start = cpu_time();
        copy.copy_from_slice(&stream);
        let copied = cpu_time() - start;
        black_box(copy);
        println!(
            "round {round}: fresh memory {}, again {}, memcpy alone {}",
            rate(fresh),
            rate(again),
            rate(copied)
        );
    }
    Ok(())
}

/// Of this thread: what others do here meanwhile does not count.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

fn rate(time: Duration) -> String {
    format!("{:.2} GB/s", BYTES as f64 / time.as_secs_f64() / 1e9)
}

fn load(stream: &[u8], ram: Arc<dyn GuestRam>) -> Result<Duration, Box<dyn Error>> {
    let handler = RamDestination::new(ram, RamDestinationOptions::default())?;
    let mut registry = Registry::new();
    let versions = SECTION_VERSION..=SECTION_VERSION;
    registry.register(Registration::loading(
        SECTION_NAME,
        versions,
        Box::new(handler),
    ))?;
    let start = cpu_time();
    LoadMachine::new(LoadOptions::default()).load_slice(stream, &mut registry)?;
    let time = cpu_time() - start;
    load_cleanup(&mut registry);
    Ok(time)
}

/// A stream of [`BYTES`] of random pages.
fn stream() -> Result<Vec<u8>, Box<dyn Error>> {
    let block = Name::new("pc.ram")?;
    let mut encoder = Encoder::new(true);
    let mut out = Vec::new();
    let mut section = Section {
        kind: SectionKind::Start,
        id: SectionId(2),
        name: Name::new(SECTION_NAME)?,
        instance: InstanceId(0),
        version: SECTION_VERSION,
    };
    let end = |encoder: &mut Encoder, out: &mut Vec<u8>| {
        encoder.record(&Record::Ram(RamRecord::EndOfSection), out);
        encoder.record(&Record::SectionEnd { id: SectionId(2) }, out);
    };
    encoder.record(&Record::Header { version: 3 }, &mut out);
    encoder.record(&Record::Section(section.clone()), &mut out);
    let list = [
        RamRecord::BlockList { total_bytes: BYTES },
        RamRecord::Block {
            name: block.clone(),
            used_bytes: BYTES,
            page_bytes: None,
            guest_address: None,
            mapped: None,
        },
    ];
    for record in list {
        encoder.record(&Record::Ram(record), &mut out);
    }
    end(&mut encoder, &mut out);
    section.kind = SectionKind::Part;
    let mut rng = fastrand::Rng::with_seed(1);
    let mut page = [0; PAGE_BYTES as usize];
    for index in 0..BYTES / PAGE_BYTES {
        if index % PAGES_OF_A_PART == 0 {
            encoder.record(&Record::Section(section.clone()), &mut out);
        }
        let record = RamRecord::Page {
            page: RamPage {
                block: block.clone(),
                offset_bytes: index * PAGE_BYTES,
            },
            bytes: PAGE_BYTES as u32,
        };
        encoder.record(&Record::Ram(record), &mut out);
        rng.fill(&mut page);
        out.extend(page);
        if index % PAGES_OF_A_PART == PAGES_OF_A_PART - 1 {
            end(&mut encoder, &mut out);
        }
    }
    encoder.record(&Record::Eof, &mut out);
    Ok(out)
}
