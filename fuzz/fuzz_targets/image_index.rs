//! An index that is anything, beside an image that is right; and images that are anything.

#![no_main]

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use vmferry_image::{Identity, Image, IndexPlace, Storage};
use vmferry_inspect::{Blocks, MemoryImage, walk};
use vmferry_ram::BlockIndex;

const PAGE: usize = 4096;
const HEADER_BYTES: usize = 4096;
const CHUNK_BYTES: usize = 512 * 12 + 16;
/// Of larger machines only the first pages of each block are read.
const PAGES_MAX: u64 = 2048;

/// An image in memory.
struct Bytes(Vec<u8>);

impl Storage for Bytes {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = self.0.get(start..).and_then(|rest| rest.get(..into.len()));
        into.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn start(&self) -> u64 {
        0
    }

    fn length(&self) -> u64 {
        self.0.len() as u64
    }

    fn identity(&self) -> Identity {
        Identity {
            bytes: self.length(),
            modified_ns: 7,
            tag: 0,
        }
    }

    fn name(&self) -> String {
        "an image".into()
    }

    fn index_path(&self) -> Option<PathBuf> {
        None
    }

    fn mode(&self) -> u32 {
        0o600
    }
}

type Memory = Vec<Vec<Option<Vec<u8>>>>;

/// The image that is right, its memory, and its index.
struct Right {
    image: Vec<u8>,
    memory: Memory,
    index: Vec<u8>,
}

static RIGHT: LazyLock<Right> = LazyLock::new(|| {
    let packed = include_bytes!("../../crates/stream/tests/captures/xbzrle-72.xz");
    let mut image = Vec::new();
    let mut decoder = xz2::read::XzDecoder::new(&packed[..]);
    io::Read::read_to_end(&mut decoder, &mut image).expect("a capture");
    // Once in a folder, for the index.
    let folder = std::env::temp_dir().join(format!("vmferry-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let path = folder.join("index");
    let storage = Arc::new(Bytes(image.clone()));
    let opened = Image::open(storage, &IndexPlace::At(path.clone()), &mut |_| {});
    let memory = read(&opened.expect("a capture")).expect("its memory");
    let index = std::fs::read(&path).expect("its index");
    std::fs::remove_dir_all(folder).expect("our folder");
    Right {
        image,
        memory,
        index,
    }
});

/// The first pages of each block.
fn read(image: &Image) -> Result<Memory, String> {
    let blocks = image.head().blocks.iter().enumerate();
    blocks
        .map(|(number, block)| {
            let mut pages = Vec::new();
            let end = block.pages().min(PAGES_MAX);
            let mut into = [0; 64 * PAGE];
            while (pages.len() as u64) < end {
                let first = pages.len() as u64;
                let count = usize::try_from(end - first).unwrap_or(64).min(64);
                let into = &mut into[..count * PAGE];
                let found = image
                    .read_pages(BlockIndex(number), first, into)
                    .map_err(|error| error.to_string())?;
                for (step, page) in into.chunks(PAGE).enumerate() {
                    let has = |bits: u64| bits >> step & 1 != 0;
                    pages.push(match (has(found.zero), has(found.absent)) {
                        (true, true) => panic!("zero and absent"),
                        (true, false) => Some(vec![0; PAGE]),
                        (false, true) => None,
                        (false, false) => Some(page.to_vec()),
                    });
                }
            }
            Ok(pages)
        })
        .collect()
}

fuzz_target!(|data: &[u8]| {
    match data.split_first() {
        Some((0, changes)) => wrong_index(changes, false),
        Some((1, changes)) => wrong_index(changes, true),
        Some((_, image)) => any_image(image),
        None => {}
    }
});

/// Three bytes of place, one of content. Made up: its checksums are right.
fn wrong_index(changes: &[u8], is_made_up: bool) {
    let right = &*RIGHT;
    let mut index = right.index.clone();
    for change in changes.chunks_exact(4) {
        let place = u32::from_be_bytes([0, change[0], change[1], change[2]]) as usize;
        let length = index.len();
        index[place % length] ^= change[3];
    }
    if is_made_up {
        repair(&mut index);
    }
    let file = nameless(&index);
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let storage = Arc::new(Bytes(right.image.clone()));
    let image = Image::open(storage, &IndexPlace::At(path.into()), &mut |_| {});
    let image = image.expect("the image is right");
    let memory = read(&image);
    let head = image.head();
    for section in head
        .devices
        .iter()
        .chain(head.live.iter().flat_map(|live| &live.bodies))
    {
        let _ = image.section_body(section);
    }
    let _ = (image.description(), image.verify(&mut |_| {}));
    if !is_made_up {
        assert!(memory.expect("the image is right") == right.memory);
    }
}

fn nameless(bytes: &[u8]) -> File {
    let path = std::env::temp_dir().join(format!("vmferry-fuzz-{}.index", std::process::id()));
    let mut options = File::options();
    let file = options.read(true).write(true).create_new(true).open(&path);
    let file = file.expect("a file");
    std::fs::remove_file(path).expect("our file");
    file.write_all_at(bytes, 0).expect("a file");
    file
}

/// Make all checksums right, see the layout of an index.
fn repair(index: &mut [u8]) {
    let u64_at = |index: &[u8], at: usize| {
        let bytes = index
            .get(at..at + 8)
            .and_then(|bytes| bytes.first_chunk::<8>());
        bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
    };
    let nonce = index[16..24].to_vec();
    let seeded = |bytes: &[u8]| crc32fast::hash(&[&nonce, bytes].concat()).to_le_bytes();
    let chunks = usize::try_from(u64_at(index, 48)).unwrap_or(usize::MAX);
    for number in 0..chunks.min(1000) {
        let start = HEADER_BYTES + number * CHUNK_BYTES;
        if let Some(chunk) = index.get_mut(start..start + CHUNK_BYTES) {
            let (body, crc) = chunk.split_at_mut(CHUNK_BYTES - 4);
            crc.copy_from_slice(&seeded(body));
        }
    }
    let start = usize::try_from(u64_at(index, 64)).unwrap_or(usize::MAX);
    let bytes = usize::try_from(u64_at(index, 72)).unwrap_or(usize::MAX);
    let contents = index.get(start..start.saturating_add(bytes)).map(seeded);
    if let Some(crc) = contents {
        index[80..84].copy_from_slice(&crc);
    }
    let crc = crc32fast::hash(&index[..HEADER_BYTES - 4]).to_le_bytes();
    index[HEADER_BYTES - 4..HEADER_BYTES].copy_from_slice(&crc);
}

/// What is read is what a walk paints.
fn any_image(stream: &[u8]) {
    let storage = Arc::new(Bytes(stream.to_vec()));
    let Ok(image) = Image::open(storage, &IndexPlace::Beside, &mut |_| {}) else {
        return;
    };
    let memory = read(&image).expect("it was indexed just now");
    let is_small = image
        .head()
        .blocks
        .iter()
        .all(|block| block.pages() <= PAGES_MAX);
    if !is_small {
        return;
    }
    image.verify(&mut |_| {}).expect("it was indexed just now");
    let Some(painted) = painted(stream) else {
        assert!(memory.is_empty(), "there are no blocks");
        return;
    };
    for (block, pages) in image.head().blocks.iter().zip(&memory) {
        let painted = &painted[block.name.as_str()];
        for (page, expected) in pages.iter().zip(painted.chunks(PAGE)) {
            match page {
                Some(page) => assert!(page == expected),
                None => assert!(expected.iter().all(|byte| *byte == 0)),
            }
        }
    }
}

fn painted(stream: &[u8]) -> Option<BTreeMap<String, Vec<u8>>> {
    let mut canvas = MemoryImage::new(nameless(&[]), Blocks::All { start_bytes: 0 });
    walk(stream, &mut canvas).ok()?;
    let (file, images) = canvas.finish().ok()?;
    let blocks = images.into_iter().map(|image| {
        let mut bytes = vec![0; usize::try_from(image.length_bytes).expect("it is small")];
        let start = image.file_offset.expect("all are wanted");
        file.read_exact_at(&mut bytes, start)
            .expect("it was painted");
        (image.name.as_str().to_owned(), bytes)
    });
    Some(blocks.collect())
}
