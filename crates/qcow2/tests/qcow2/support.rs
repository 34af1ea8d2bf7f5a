//! What the tests share: a file in memory that records what was done to it and can crash, a
//! generator with a printed seed, and `qemu-img`.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use vmferry_disk::Cached;
use vmferry_qcow2::Storage;

pub(crate) const SECTOR: u64 = 512;

/// Sparse bytes; what is missing is zero.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bytes {
    sectors: BTreeMap<u64, Arc<[u8; SECTOR as usize]>>,
    pub(crate) length: u64,
}

impl Bytes {
    pub(crate) fn read(&self, buf: &mut [u8], offset: u64) {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let skip = (at % SECTOR) as usize;
            let length = (SECTOR as usize - skip).min(buf.len() - done);
            let part = &mut buf[done..done + length];
            match self.sectors.get(&(at / SECTOR)) {
                Some(sector) => part.copy_from_slice(&sector[skip..skip + length]),
                None => part.fill(0),
            }
            done += length;
        }
    }

    pub(crate) fn write(&mut self, buf: &[u8], offset: u64) {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let skip = (at % SECTOR) as usize;
            let length = (SECTOR as usize - skip).min(buf.len() - done);
            let sector = self
                .sectors
                .entry(at / SECTOR)
                .or_insert_with(|| Arc::new([0; SECTOR as usize]));
            Arc::make_mut(sector)[skip..skip + length].copy_from_slice(&buf[done..done + length]);
            done += length;
        }
        self.length = self.length.max(offset + buf.len() as u64);
    }

    pub(crate) fn set_length(&mut self, length: u64) {
        if length < self.length {
            self.zero(length, self.length - length);
        }
        self.length = length;
    }

    pub(crate) fn zero(&mut self, offset: u64, length: u64) {
        let end = (offset + length).min(self.length);
        let mut at = offset;
        while at < end {
            let sector_end = (at / SECTOR + 1) * SECTOR;
            if at.is_multiple_of(SECTOR) && (sector_end <= end || end == self.length) {
                self.sectors.remove(&(at / SECTOR));
            } else if self.sectors.contains_key(&(at / SECTOR)) {
                let kept = self.length;
                self.write(&vec![0; (sector_end.min(end) - at) as usize], at);
                self.length = kept;
            }
            at = sector_end;
        }
    }

    pub(crate) fn from_file(path: &Path) -> Self {
        let content = std::fs::read(path).unwrap();
        let mut bytes = Self::default();
        for (chunk, at) in content
            .chunks(SECTOR as usize)
            .zip((0..).step_by(SECTOR as usize))
        {
            if chunk.iter().any(|byte| *byte != 0) {
                bytes.write(chunk, at);
            }
        }
        bytes.length = content.len() as u64;
        bytes
    }

    /// Bytes that take space.
    pub(crate) fn allocated(&self) -> u64 {
        self.sectors.len() as u64 * SECTOR
    }

    pub(crate) fn to_file(&self, path: &Path) {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::create(path).unwrap();
        file.set_len(self.length).unwrap();
        for (number, sector) in &self.sectors {
            let at = number * SECTOR;
            let length = self.length.saturating_sub(at).min(SECTOR) as usize;
            file.write_all_at(&sector[..length], at).unwrap();
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) enum Event {
    Write { offset: u64, bytes: Vec<u8> },
    SetLength(u64),
    Punch { offset: u64, length: u64 },
    Flush,
}

impl Event {
    pub(crate) fn apply(&self, bytes: &mut Bytes) {
        match self {
            Self::Write { offset, bytes: new } => bytes.write(new, *offset),
            Self::SetLength(length) => bytes.set_length(*length),
            Self::Punch { offset, length } => bytes.zero(*offset, *length),
            Self::Flush => {}
        }
    }
}

#[derive(Debug, Default)]
struct Inner {
    now: Bytes,
    log: Vec<Event>,
    recording: bool,
    syncs: usize,
    /// So many more writes work; then there is no space.
    writes_left: Option<usize>,
}

/// A file in memory. Every clone is the same file.
#[derive(Clone, Debug, Default)]
pub(crate) struct MemoryFile(Arc<Mutex<Inner>>);

impl MemoryFile {
    pub(crate) fn new(bytes: Bytes) -> Self {
        let file = Self::default();
        file.0.lock().unwrap().now = bytes;
        file
    }

    pub(crate) fn record(&self) {
        self.0.lock().unwrap().recording = true;
    }

    pub(crate) fn bytes(&self) -> Bytes {
        self.0.lock().unwrap().now.clone()
    }

    pub(crate) fn log(&self) -> Vec<Event> {
        self.0.lock().unwrap().log.clone()
    }

    pub(crate) fn log_length(&self) -> usize {
        self.0.lock().unwrap().log.len()
    }

    pub(crate) fn syncs(&self) -> usize {
        self.0.lock().unwrap().syncs
    }

    pub(crate) fn fail_writes_after(&self, writes: Option<usize>) {
        self.0.lock().unwrap().writes_left = writes;
    }

    fn event(&self, event: Event) {
        let mut inner = self.0.lock().unwrap();
        event.apply(&mut inner.now);
        if inner.recording {
            inner.log.push(event);
        }
    }
}

impl Storage for MemoryFile {
    fn length(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().now.length)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.lock().unwrap().now.read(buf, offset);
        Ok(())
    }

    fn read_cached_at(&self, buf: &mut [u8], offset: u64) -> io::Result<Cached> {
        self.read_at(buf, offset)?;
        Ok(Cached::Hit(buf.len()))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        assert!(offset < 1 << 40, "a write at byte {offset}");
        if let Some(left) = &mut self.0.lock().unwrap().writes_left {
            *left = match left.checked_sub(1) {
                Some(left) => left,
                None => return Err(io::ErrorKind::StorageFull.into()),
            };
        }
        self.event(Event::Write {
            offset,
            bytes: buf.to_vec(),
        });
        Ok(())
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.event(Event::SetLength(length));
        Ok(())
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        self.event(Event::Punch { offset, length });
        Ok(())
    }

    fn start_writeback(&self, _offset: u64, _length: u64) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.0.lock().unwrap().syncs += 1;
        self.event(Event::Flush);
        Ok(())
    }
}

/// The seed of `VMFERRY_SEED`, or a random one.
pub(crate) fn seed() -> u64 {
    let given = std::env::var("VMFERRY_SEED").ok();
    given
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| fastrand::u64(..))
}

/// `rounds`, or many more if `VMFERRY_LONG` is 1.
pub(crate) fn rounds(rounds: u64) -> u64 {
    match std::env::var("VMFERRY_LONG").as_deref() {
        Ok("1") => rounds * 20,
        _ => rounds,
    }
}

/// Run `qemu-img`; status and output.
pub(crate) fn qemu_img(arguments: &[&str]) -> (i32, String) {
    let output = Command::new("qemu-img")
        .args(arguments)
        .output()
        .expect("qemu-img is installed");
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    (output.status.code().unwrap_or(-1), text)
}

/// Run `qemu-img`, which must succeed.
pub(crate) fn qemu_img_ok(arguments: &[&str]) -> String {
    let (status, text) = qemu_img(arguments);
    assert_eq!(status, 0, "qemu-img {arguments:?}: {text}");
    text
}

/// A folder for images that goes away with it.
pub(crate) struct Folder(tempfile::TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }
}

/// Bytes of which some runs are zero, some compress well and some do not at all.
pub(crate) fn mixed_bytes(rng: &mut fastrand::Rng, length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        let run = rng.usize(1..100_000).min(length - bytes.len());
        match rng.u8(..3) {
            0 => bytes.resize(bytes.len() + run, 0),
            1 => bytes.extend((0..run).map(|index| (index / 100) as u8)),
            _ => bytes.extend(std::iter::repeat_with(|| rng.u8(..)).take(run)),
        }
    }
    bytes
}
