//! What a disk's file cannot say itself: does it live here?
//!
//! A record is a small file beside the disk (or in a state folder) that survives a crash. It is
//! written before the step that it tells of:
//!
//! | state | written | a restarted daemon |
//! |---|---|---|
//! | `incoming` | before the first byte of an incoming migration | waits for a new one, never serves |
//! | `arrived` | when everything is durable, before SHUT 0 | serves, also if told to wait |
//! | `leaving` | before EOF is sent | holds the disk until `resolve` |
//! | `moved` | after SHUT 0 | refuses the disk |
//!
//! A disk without a record lives here. Writing is atomic: a new file, synced, renamed over the old
//! one, the folder synced.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Longest record file that is read, in bytes.
const RECORD_BYTES_MAX: u64 = 4096;

/// Where a disk stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Residence {
    /// A migration into this disk has begun and not ended: its content is not whole.
    Incoming,
    /// A migration into this disk has ended well: it lives here.
    Arrived,
    /// It may live here or there; only a person (or the peer's late answer) can tell.
    Leaving,
    /// It lives elsewhere.
    Moved,
}

impl std::fmt::Display for Residence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Incoming => "incoming",
            Self::Arrived => "arrived",
            Self::Leaving => "leaving",
            Self::Moved => "moved",
        })
    }
}

/// Content of a record file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Format of this file.
    pub version: u32,
    /// Name of the disk.
    pub disk: String,
    /// Where it stands.
    pub residence: Residence,
    /// The other side, as far as it is known.
    pub peer: String,
    /// Which attempt to fill it; disks that arrive together have the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempt: Option<u64>,
    /// It was taken back once: doing so again, after it has moved again, wants a person.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub taken_back: bool,
    /// Its image, where the record is not beside it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<PathBuf>,
}

/// A record could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The host refused.
    #[error("record '{}': cannot {operation}: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What was tried.
        operation: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
    /// Two disks of one name share a state folder.
    #[error(
        "record '{}' is that of another disk of this name, {}; give each its own state folder",
        path.display(),
        image.display()
    )]
    OtherImage {
        /// Which file.
        path: PathBuf,
        /// The image that it is about.
        image: PathBuf,
    },
    /// The file is not a record.
    #[error("record '{}' is damaged ({reason}); remove it only if you know where the disk lives", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

/// The record of one disk.
#[derive(Clone, Debug)]
pub struct RecordFile {
    disk: String,
    path: PathBuf,
    /// The image, where the record is not beside it.
    image: Option<PathBuf>,
}

impl RecordFile {
    /// The record of the disk `name` whose image is `image`: beside it, or in `state_dir`.
    #[must_use]
    pub fn new(name: &str, image: &Path, state_dir: Option<&Path>) -> Self {
        let path = match state_dir {
            Some(folder) => folder.join(format!("{}.vmferry", escape(name))),
            None => {
                let mut path = image.as_os_str().to_owned();
                path.push(".vmferry");
                PathBuf::from(path)
            }
        };
        let absolute = || std::path::absolute(image).unwrap_or_else(|_| image.to_owned());
        Self {
            disk: name.to_owned(),
            path,
            image: state_dir.map(|_| absolute()),
        }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it says; `None` if there is no record.
    ///
    /// # Errors
    /// A file that cannot be read, or is no record of this version.
    pub fn read(&self) -> Result<Option<Record>, RecordError> {
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(self.io("read", source)),
        };
        let mut text = Vec::new();
        file.take(RECORD_BYTES_MAX + 1)
            .read_to_end(&mut text)
            .map_err(|source| self.io("read", source))?;
        if text.len() as u64 > RECORD_BYTES_MAX {
            return Err(self.damaged(format!("longer than {RECORD_BYTES_MAX} bytes")));
        }
        let record: Record =
            serde_json::from_slice(&text).map_err(|error| self.damaged(error.to_string()))?;
        if record.version != 1 {
            return Err(self.damaged(format!("version {}", record.version)));
        }
        match (&record.image, &self.image) {
            (Some(theirs), Some(ours)) if theirs != ours => Err(RecordError::OtherImage {
                path: self.path.clone(),
                image: theirs.clone(),
            }),
            _ => Ok(Some(record)),
        }
    }

    /// Say where the disk stands. Durable when this returns.
    ///
    /// # Errors
    /// What the host said. The old record is then still there, unless only syncing the folder failed.
    pub fn write(&self, residence: Residence, peer: &str) -> Result<(), RecordError> {
        self.write_attempt(residence, peer, None)
    }

    /// [`RecordFile::write`], for a disk that arrives together with others.
    ///
    /// # Errors
    /// As there.
    pub fn write_attempt(
        &self,
        residence: Residence,
        peer: &str,
        attempt: Option<u64>,
    ) -> Result<(), RecordError> {
        let taken_back = self.read()?.is_some_and(|record| record.taken_back);
        self.put(&self.record(residence, peer, attempt, taken_back))
    }

    /// Say that the disk lives here because somebody has said so, against the record.
    ///
    /// # Errors
    /// As [`RecordFile::write`].
    pub fn take_back(&self, peer: &str) -> Result<(), RecordError> {
        self.put(&self.record(Residence::Arrived, peer, None, true))
    }

    fn record(
        &self,
        residence: Residence,
        peer: &str,
        attempt: Option<u64>,
        taken_back: bool,
    ) -> Record {
        Record {
            version: 1,
            disk: self.disk.clone(),
            residence,
            peer: peer.chars().take(1024).collect(),
            attempt,
            taken_back,
            image: self.image.clone(),
        }
    }

    /// Write this record as it is.
    pub(crate) fn put(&self, record: &Record) -> Result<(), RecordError> {
        let text = serde_json::to_vec(record).map_err(|e| self.damaged(e.to_string()))?;
        let mut fresh = self.path.as_os_str().to_owned();
        fresh.push(".new");
        let fresh = PathBuf::from(fresh);
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&fresh)
            .map_err(|source| self.io("create", source))?;
        file.write_all(&text)
            .and_then(|()| file.write_all(b"\n"))
            .and_then(|()| file.sync_all())
            .map_err(|source| self.io("write", source))?;
        fs::rename(&fresh, &self.path).map_err(|source| self.io("rename", source))?;
        self.sync_folder()
    }

    /// The disk lives here and nothing needs to be remembered. Durable when this returns.
    ///
    /// # Errors
    /// What the host said.
    pub fn clear(&self) -> Result<(), RecordError> {
        match fs::remove_file(&self.path) {
            Ok(()) => self.sync_folder(),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(source) => Err(self.io("remove", source)),
        }
    }

    fn sync_folder(&self) -> Result<(), RecordError> {
        let folder = match self.path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(|source| self.io("sync the folder of", source))
    }

    fn io(&self, operation: &'static str, source: std::io::Error) -> RecordError {
        RecordError::Io {
            path: self.path.clone(),
            operation,
            source,
        }
    }

    fn damaged(&self, reason: String) -> RecordError {
        RecordError::Damaged {
            path: self.path.clone(),
            reason,
        }
    }
}

/// A disk name as a file name: everything but letters, digits, `-`, `_` and `.` as `%xx`.
fn escape(name: &str) -> String {
    let mut escaped = String::with_capacity(name.len());
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => escaped.push(char::from(byte)),
            b'.' if !escaped.is_empty() => escaped.push('.'),
            _ => escaped.push_str(&format!("%{byte:02x}")),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_was_written_last() {
        let folder = tempfile::tempdir().expect("a folder");
        let record = RecordFile::new("disk0", &folder.path().join("disk.raw"), None);
        assert_eq!(record.read().expect("readable"), None);
        for residence in [
            Residence::Incoming,
            Residence::Arrived,
            Residence::Leaving,
            Residence::Moved,
        ] {
            record
                .write(residence, "tcp:127.0.0.1:1")
                .expect("writable");
            let read = record.read().expect("readable").expect("a record");
            assert_eq!((read.residence, read.disk.as_str()), (residence, "disk0"));
        }
        record.clear().expect("removable");
        record.clear().expect("nothing to remove is fine");
        assert_eq!(record.read().expect("readable"), None);
    }

    #[test]
    fn a_state_folder_tells_disks_of_one_name_apart() {
        let folder = tempfile::tempdir().expect("a folder");
        let record = |image: &str| RecordFile::new("root", Path::new(image), Some(folder.path()));
        record("/vm/a")
            .write(Residence::Moved, "b")
            .expect("writable");
        assert!(record("/vm/a").read().expect("readable").is_some());
        let error = record("/vm/b")
            .read()
            .expect_err("the record of another disk");
        assert!(error.to_string().contains("/vm/a"), "{error}");
        record("/vm/b")
            .write(Residence::Arrived, "b")
            .expect_err("not ours to overwrite");
    }

    #[test]
    fn being_taken_back_is_remembered() {
        let folder = tempfile::tempdir().expect("a folder");
        let record = RecordFile::new("root", &folder.path().join("root"), None);
        record.take_back("b").expect("writable");
        record.write(Residence::Moved, "c").expect("writable");
        let read = record.read().expect("readable").expect("a record");
        assert_eq!((read.residence, read.taken_back), (Residence::Moved, true));
    }

    #[test]
    fn a_damaged_record_is_not_taken_for_none() {
        let folder = tempfile::tempdir().expect("a folder");
        let record = RecordFile::new("a/b", &folder.path().join("x"), Some(folder.path()));
        assert_eq!(
            record.path().file_name().and_then(|n| n.to_str()),
            Some("a%2fb.vmferry")
        );
        for damage in [
            "",
            "{}",
            "nonsense",
            "{\"version\":2,\"disk\":\"a\",\"residence\":\"moved\",\"peer\":\"\"}",
        ] {
            fs::write(record.path(), damage).expect("writable");
            assert!(
                matches!(record.read(), Err(RecordError::Damaged { .. })),
                "{damage}"
            );
        }
        fs::write(record.path(), vec![b' '; 5000]).expect("writable");
        assert!(matches!(record.read(), Err(RecordError::Damaged { .. })));
    }

    #[test]
    fn two_names_never_share_a_file() {
        assert_ne!(escape("a.b"), escape("a%2eb"));
        assert_ne!(escape("../x"), escape("..%2fx"));
        assert!(!escape("..").starts_with('.'));
    }
}
