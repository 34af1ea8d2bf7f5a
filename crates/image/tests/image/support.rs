//! What the tests share.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vmferry_image::{FileStorage, Image, ImageError, IndexPlace};
use vmferry_inspect::{Blocks, MemoryImage, WalkError};
use vmferry_ram::{BlockIndex, StoredPages, StoredRam};

/// What every page of an image is, by block: its content, `None` if it is not there.
pub(crate) type Memory = BTreeMap<String, Vec<Option<Vec<u8>>>>;

pub(crate) const PAGE: usize = 4096;

/// Captures of real streams, by name; without those of other directions and channels.
pub(crate) fn captures() -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../stream/tests/captures");
    let mut found: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|file| file.unwrap().path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "xz"))
        .map(|path| (path.file_stem().unwrap().to_str().unwrap().to_owned(), path))
        .filter(|(name, _)| {
            !name.ends_with(".rp") && !name.contains("conn1") && !name.contains("conn2")
        })
        .map(|(name, path)| (name, unpack(&path)))
        .collect();
    found.sort();
    assert!(found.len() > 40, "{} captures", found.len());
    found
}

pub(crate) fn capture(name: &str) -> Vec<u8> {
    let file = format!("../stream/tests/captures/{name}.xz");
    unpack(&Path::new(env!("CARGO_MANIFEST_DIR")).join(file))
}

/// An image that QEMU made.
pub(crate) fn qcow2_capture(name: &str) -> Vec<u8> {
    let file = format!("../qcow2/tests/captures/{name}.qcow2.xz");
    unpack(&Path::new(env!("CARGO_MANIFEST_DIR")).join(file))
}

fn unpack(path: &Path) -> Vec<u8> {
    let mut stream = Vec::new();
    let packed = File::open(path).unwrap();
    xz2::read::XzDecoder::new(packed)
        .read_to_end(&mut stream)
        .unwrap();
    stream
}

/// An image in a folder of its own.
pub(crate) struct Parked {
    folder: tempfile::TempDir,
}

impl Parked {
    pub(crate) fn new(stream: &[u8]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("vm"), stream).unwrap();
        Self { folder }
    }

    /// Where writing is quick, if there is such a place.
    pub(crate) fn in_memory(stream: &[u8]) -> Self {
        let Ok(folder) = tempfile::tempdir_in("/dev/shm") else {
            return Self::new(stream);
        };
        fs::write(folder.path().join("vm"), stream).unwrap();
        Self { folder }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.folder.path().join("vm")
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn index(&self) -> PathBuf {
        self.folder.path().join("vm.index")
    }

    pub(crate) fn open(&self) -> Result<Image, ImageError> {
        self.open_with(&mut Vec::new())
    }

    /// Also says how many bytes were gone through.
    pub(crate) fn open_counting(&self) -> (Result<Image, ImageError>, u64) {
        let mut told = Vec::new();
        let image = self.open_with(&mut told);
        (image, told.last().copied().unwrap_or(0))
    }

    fn open_with(&self, told: &mut Vec<u64>) -> Result<Image, ImageError> {
        let storage = Arc::new(FileStorage::open(&self.path(), 0)?);
        let mut progress = |progress: vmferry_image::Progress| told.push(progress.done_bytes);
        Image::open(storage, &IndexPlace::Beside, &mut progress)
    }
}

/// All pages, read `at_once` at a time.
pub(crate) fn try_read_all(image: &dyn StoredRam, at_once: usize) -> Result<Memory, String> {
    let mut memory = Memory::new();
    for (index, block) in image.blocks().iter().enumerate() {
        let mut pages = Vec::new();
        let count = usize::try_from(block.used_bytes).unwrap() / PAGE;
        while pages.len() < count {
            let now = at_once.min(count - pages.len());
            let mut into = vec![0x5a; now * PAGE];
            let first = pages.len() as u64;
            let StoredPages { zero, absent } = image
                .read(BlockIndex(index), first, &mut into)
                .map_err(|error| error.to_string())?;
            assert_eq!(zero & absent, 0);
            for (step, page) in into.chunks(PAGE).enumerate() {
                let has = |bits: u64| bits >> step & 1 != 0;
                if has(zero) || has(absent) {
                    assert!(page.iter().all(|byte| *byte == 0x5a), "it was written to");
                }
                pages.push(if has(zero) {
                    Some(vec![0; PAGE])
                } else if has(absent) {
                    None
                } else {
                    Some(page.to_vec())
                });
            }
        }
        memory.insert(block.idstr.as_str().to_owned(), pages);
    }
    Ok(memory)
}

pub(crate) fn read_all(image: &dyn StoredRam) -> Memory {
    try_read_all(image, 64).unwrap()
}

/// The same, by another way: the stream's memory, painted into a file. Pages that did not come are
/// zeroes there.
pub(crate) fn painted(stream: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let file = tempfile::tempfile().unwrap();
    let blocks = Blocks::All { start_bytes: 0 };
    let mut canvas = MemoryImage::new(file, blocks);
    match vmferry_inspect::walk(stream, &mut canvas) {
        // A machine without memory.
        Err(WalkError::Visitor(error)) if error.to_string().contains("no guest memory") => {
            return BTreeMap::new();
        }
        walked => walked.unwrap(),
    };
    let (file, images) = canvas.finish().unwrap();
    let blocks = images.into_iter().map(|image| {
        let mut bytes = vec![0; usize::try_from(image.length_bytes).unwrap()];
        file.read_exact_at(&mut bytes, image.file_offset.unwrap())
            .unwrap();
        (image.name.as_str().to_owned(), bytes)
    });
    blocks.collect()
}

/// Compare with what was painted; how many pages are absent.
pub(crate) fn assert_same(
    memory: &Memory,
    painted: &BTreeMap<String, Vec<u8>>,
    what: &str,
) -> usize {
    assert_eq!(memory.len(), painted.len(), "{what}");
    let mut absent = 0;
    for (name, pages) in memory {
        let expected = painted
            .get(name)
            .unwrap_or_else(|| panic!("{what}: {name}"));
        assert_eq!(pages.len() * PAGE, expected.len(), "{what}: {name}");
        for (number, (page, expected)) in pages.iter().zip(expected.chunks(PAGE)).enumerate() {
            match page {
                Some(page) => assert!(page == expected, "{what}: {name}, page {number}"),
                None => {
                    absent += 1;
                    assert!(
                        expected.iter().all(|byte| *byte == 0),
                        "{what}: {name}, {number}"
                    );
                }
            }
        }
    }
    absent
}

/// Of a seed that is told, so that a failure can be seen again.
pub(crate) fn rng() -> fastrand::Rng {
    let seed = std::env::var("VMFERRY_SEED").ok();
    let seed = seed.and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("VMFERRY_SEED={seed}");
    fastrand::Rng::with_seed(seed)
}

/// More of them with `VMFERRY_LONG=1`.
pub(crate) fn rounds(rounds: u64) -> u64 {
    let is_long = std::env::var_os("VMFERRY_LONG").is_some();
    if is_long { 50 * rounds } else { rounds }
}
