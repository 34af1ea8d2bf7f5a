//! Where an image lies.

use std::fs::{File, Metadata};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vmferry_qcow2::VmState;
use vmferry_stream::Shown;

use crate::error::ImageError;

/// Bytes at places. Several threads read at the same time.
///
/// Offsets are those of the file, wherever in it the stream begins: mapped-ram files say offsets of
/// that kind.
pub trait Storage: Send + Sync {
    /// Fill `into` from byte `offset` on.
    ///
    /// # Errors
    /// The host refuses, or there are too few bytes ([`io::ErrorKind::UnexpectedEof`]).
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// Where the stream, or what stands before it, begins.
    fn start(&self) -> u64;

    /// Where the last byte ends, as of now.
    fn length(&self) -> u64;

    /// What makes an index stale when it changes.
    fn identity(&self) -> Identity;

    /// For messages.
    fn name(&self) -> String;

    /// Where its index lies, if it lies beside it.
    fn index_path(&self) -> Option<PathBuf>;

    /// Who may read it: permission bits, of which an index gets those for reading and writing.
    fn mode(&self) -> u32;
}

/// What must be equal for an index to be this image's. Its bytes are compared in samples, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Length in bytes.
    pub bytes: u64,
    /// When it was changed last, in nanoseconds since 1970.
    pub modified_ns: u64,
    /// Tells images in one file apart: where they start, or which snapshot.
    pub tag: u64,
}

/// Where an index is, or is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IndexPlace {
    /// Beside the image: `FILE.index`, or `IMAGE.ID.index` for the snapshot with that id.
    Beside,
    /// Here.
    At(PathBuf),
}

impl IndexPlace {
    /// The path that this means for an image. `None` if it has no place of its own.
    #[must_use]
    pub fn path(&self, storage: &dyn Storage) -> Option<PathBuf> {
        match self {
            Self::Beside => storage.index_path(),
            Self::At(path) => Some(path.clone()),
        }
    }
}

/// A file, or a block device.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    path: PathBuf,
    start: u64,
}

impl FileStorage {
    /// Open a file whose stream begins at byte `start`.
    ///
    /// # Errors
    /// It cannot be opened, is a pipe or a folder, or ends before `start`.
    pub fn open(path: &Path, start: u64) -> Result<Self, ImageError> {
        let open = |source| ImageError::Open {
            image: path.display().to_string(),
            source,
        };
        // Asked first: opening a pipe would wait for its other end.
        check_kind(path, &std::fs::metadata(path).map_err(open)?)?;
        let file = File::open(path).map_err(open)?;
        let storage = Self::of(file, path, start)?;
        let bytes = storage.length();
        if start > bytes {
            return Err(ImageError::StartBehindEnd {
                image: path.display().to_string(),
                bytes,
                start,
            });
        }
        Ok(storage)
    }

    /// A file that is open, perhaps because it is being written; it must be readable.
    ///
    /// # Errors
    /// It is a pipe or a folder.
    pub fn of(file: File, path: &Path, start: u64) -> Result<Self, ImageError> {
        let metadata = file.metadata().map_err(|source| ImageError::Open {
            image: path.display().to_string(),
            source,
        })?;
        check_kind(path, &metadata)?;
        Ok(Self {
            file,
            path: path.to_owned(),
            start,
        })
    }
}

fn check_kind(path: &Path, metadata: &Metadata) -> Result<(), ImageError> {
    let kind = metadata.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(());
    }
    Err(ImageError::NotAFile {
        image: path.display().to_string(),
    })
}

impl Storage for FileStorage {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, offset)
    }

    fn start(&self) -> u64 {
        self.start
    }

    fn length(&self) -> u64 {
        match self.file.metadata() {
            Ok(metadata) if metadata.is_file() => metadata.len(),
            // A block device.
            _ => (&self.file).seek(SeekFrom::End(0)).unwrap_or(0),
        }
    }

    fn identity(&self) -> Identity {
        let metadata = self.file.metadata().ok();
        let modified_ns = metadata.filter(Metadata::is_file).map_or(0, |metadata| {
            let seconds = u64::try_from(metadata.mtime()).unwrap_or(0);
            let nanoseconds = u64::try_from(metadata.mtime_nsec()).unwrap_or(0);
            seconds
                .saturating_mul(1_000_000_000)
                .saturating_add(nanoseconds)
        });
        Identity {
            bytes: self.length(),
            modified_ns,
            tag: self.start,
        }
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn index_path(&self) -> Option<PathBuf> {
        let mut path = self.path.clone().into_os_string();
        path.push(".index");
        Some(path.into())
    }

    fn mode(&self) -> u32 {
        self.file
            .metadata()
            .map_or(0o600, |metadata| metadata.mode())
    }
}

/// The VM state of a snapshot in a qcow2 image.
///
/// The image is opened for reading, without its locks: a machine that runs on it does no harm to the
/// snapshot, unless it is deleted.
#[derive(Debug)]
pub struct SnapshotStorage {
    state: VmState,
    path: PathBuf,
    id: String,
    mode: u32,
}

impl SnapshotStorage {
    /// Open the VM state of `snapshot`, an id, or else a name.
    ///
    /// # Errors
    /// The image cannot be opened, or has no such snapshot, or only one of the disk alone.
    pub fn open(path: &Path, snapshot: &str) -> Result<Self, ImageError> {
        let failed = |source| ImageError::Snapshot {
            image: path.display().to_string(),
            source,
        };
        let options = vmferry_qcow2::ChainOptions {
            read_only: true,
            lock: false,
        };
        let disk = Arc::new(vmferry_qcow2::open(path, options).map_err(failed)?);
        let state = disk.vm_state(snapshot).map_err(failed)?;
        if state.entry().vm_state_bytes == 0 {
            return Err(ImageError::NoVmState {
                image: path.display().to_string(),
                snapshot: Shown(snapshot).to_string(),
            });
        }
        let metadata = std::fs::metadata(path).map_err(|source| ImageError::Open {
            image: path.display().to_string(),
            source,
        })?;
        Ok(Self {
            id: String::from_utf8_lossy(&state.entry().id).into_owned(),
            state,
            path: path.to_owned(),
            mode: metadata.mode(),
        })
    }
}

impl Storage for SnapshotStorage {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.state.read_at(into, offset)
    }

    fn start(&self) -> u64 {
        0
    }

    fn length(&self) -> u64 {
        self.state.entry().vm_state_bytes
    }

    /// That of the snapshot: the rest of the image may change.
    fn identity(&self) -> Identity {
        let entry = self.state.entry();
        let mut low = crc32fast::Hasher::new();
        low.update(&entry.id);
        low.update(&[0]);
        low.update(&entry.name);
        let mut high = crc32fast::Hasher::new();
        high.update(&entry.l1_offset.to_le_bytes());
        high.update(&entry.l1_entries.to_le_bytes());
        high.update(&entry.guest_nanoseconds.to_le_bytes());
        high.update(&entry.extra);
        Identity {
            bytes: entry.vm_state_bytes,
            modified_ns: u64::from(entry.date_seconds)
                .saturating_mul(1_000_000_000)
                .saturating_add(u64::from(entry.date_nanoseconds)),
            tag: u64::from(high.finalize()) << 32 | u64::from(low.finalize()),
        }
    }

    fn name(&self) -> String {
        format!("{}, snapshot {}", self.path.display(), Shown(&self.id))
    }

    /// `None` for an id that makes no name of a file.
    fn index_path(&self) -> Option<PathBuf> {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if self.id.is_empty() || !self.id.bytes().all(is_plain) {
            return None;
        }
        let mut path = self.path.clone().into_os_string();
        path.push(format!(".{}.index", self.id));
        Some(path.into())
    }

    fn mode(&self) -> u32 {
        self.mode
    }
}

/// Reads a storage from its start on, and steps over what is not wanted.
pub(crate) struct Reader<'a> {
    storage: &'a dyn Storage,
    at: u64,
    end: u64,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(storage: &'a dyn Storage) -> Self {
        Self {
            storage,
            at: storage.start(),
            end: storage.length(),
        }
    }
}

impl Read for Reader<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let length = left.min(into.len());
        let part = into.get_mut(..length).unwrap_or_default();
        self.storage.read_at(self.at, part)?;
        let read = u64::try_from(length).unwrap_or(u64::MAX);
        self.at = self.at.saturating_add(read);
        Ok(length)
    }
}

impl Seek for Reader<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let to = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.end.checked_add_signed(by),
        };
        let to = to.filter(|to| *to <= self.end);
        self.at = to.ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok(self.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_of_a_known_length_are_opened() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        assert!(matches!(
            FileStorage::open(&path, 0),
            Err(ImageError::Open { .. })
        ));
        assert!(matches!(
            FileStorage::open(folder.path(), 0),
            Err(ImageError::NotAFile { .. })
        ));
        assert!(matches!(
            FileStorage::open(Path::new("/dev/zero"), 0),
            Err(ImageError::NotAFile { .. })
        ));
        std::fs::write(&path, b"12345").unwrap();
        FileStorage::open(&path, 5).unwrap();
        let error = FileStorage::open(&path, 6).unwrap_err().to_string();
        assert!(
            error.contains("5 bytes") && error.contains("byte 6"),
            "{error}"
        );
    }

    #[test]
    fn an_index_lies_beside_or_elsewhere() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image.vm");
        std::fs::write(&path, b"").unwrap();
        let storage = FileStorage::open(&path, 0).unwrap();
        let beside = IndexPlace::Beside.path(&storage).unwrap();
        assert_eq!(beside, folder.path().join("image.vm.index"));
        let at = IndexPlace::At("/elsewhere".into());
        assert_eq!(at.path(&storage), Some("/elsewhere".into()));
    }

    #[test]
    fn a_reader_does_not_leave_the_image() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        std::fs::write(&path, b"0123456789").unwrap();
        let storage = FileStorage::open(&path, 3).unwrap();
        let mut reader = Reader::new(&storage);
        let mut bytes = [0; 4];
        reader.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"3456");
        assert!(reader.seek_relative(4).is_err());
        reader.seek_relative(2).unwrap();
        assert_eq!(reader.read(&mut bytes).unwrap(), 1);
        assert_eq!(reader.read(&mut bytes).unwrap(), 0);
    }
}
