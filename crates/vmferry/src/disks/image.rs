//! Images: what a disk lies in, in whichever format.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use vmferry_disk::{BlockDevice, DiskError, Limits, OpenError, RawDisk};
use vmferry_qcow2::{
    ChainOptions, CreateOptions, Error as Qcow2Error, FileStorage, LayerKind, Qcow2Disk,
};

/// Formats of images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// The content of the file is that of the disk.
    Raw,
    Qcow2,
}

impl Format {
    /// QEMU's name for it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// An open image, locked against other programs until it is dropped. Dropping it closes it in
/// order.
#[derive(Debug)]
pub(crate) enum Image {
    Raw(RawDisk),
    Qcow2(Box<Qcow2Disk>),
}

/// An image could not be opened, made, or looked at.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImageError {
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Without the path: the message would say it twice where a part of it has it.
    #[error(transparent)]
    Qcow2(Qcow2Error),
    #[error(transparent)]
    Disk(#[from] DiskError),
}

impl From<Qcow2Error> for ImageError {
    fn from(error: Qcow2Error) -> Self {
        match error {
            Qcow2Error::Open(error) => Self::Open(error),
            error => Self::Qcow2(error),
        }
    }
}

impl Image {
    /// Open an existing image, with what lies below it.
    pub(crate) fn open(path: &Path, format: Format, read_only: bool) -> Result<Self, ImageError> {
        let lock = true;
        Ok(match format {
            Format::Raw => {
                let options = vmferry_disk::OpenOptions { read_only, lock };
                Self::Raw(RawDisk::open(path, options)?)
            }
            Format::Qcow2 => {
                let options = ChainOptions { read_only, lock };
                Self::Qcow2(Box::new(vmferry_qcow2::open(path, options)?))
            }
        })
    }

    /// Make an image of a disk of so many bytes that reads as zeroes; a qcow2 is as QEMU makes it.
    /// It is durable when this returns; after an error there is no file.
    pub(crate) fn create(path: &Path, format: Format, bytes: u64) -> Result<Self, ImageError> {
        match format {
            Format::Raw => Ok(Self::Raw(RawDisk::create(path, bytes, true)?)),
            Format::Qcow2 => {
                let storage = FileStorage::create(path, true)?;
                let disk = Self::fill_new(path, storage, bytes);
                if disk.is_err() {
                    // That it was not made is what is told.
                    let _ = std::fs::remove_file(path);
                }
                disk
            }
        }
    }

    fn fill_new(path: &Path, storage: FileStorage, bytes: u64) -> Result<Self, ImageError> {
        vmferry_qcow2::create(&storage, &CreateOptions::new(bytes))?;
        sync_folder_of(path).map_err(|source| OpenError::Io {
            path: path.to_owned(),
            operation: "sync the folder",
            source,
        })?;
        let options = vmferry_qcow2::OpenOptions::default();
        let disk = Qcow2Disk::open(Arc::new(storage), options, None)?;
        Ok(Self::Qcow2(Box::new(disk)))
    }

    pub(crate) fn format(&self) -> Format {
        match self {
            Self::Raw(_) => Format::Raw,
            Self::Qcow2(_) => Format::Qcow2,
        }
    }

    /// Of the disk, not of the file.
    pub(crate) fn limits(&self) -> Limits {
        match self {
            Self::Raw(disk) => disk.limits(),
            Self::Qcow2(disk) => disk.limits(),
        }
    }

    /// Is there anything that writing could destroy? In a qcow2: has it any cluster of its own, or
    /// one that hides what lies below?
    pub(crate) fn holds_data(&self) -> Result<bool, ImageError> {
        match self {
            Self::Raw(disk) => Ok(disk.holds_data()?),
            Self::Qcow2(disk) => Ok(has_clusters(disk)?),
        }
    }

    /// Does it look like a qcow2 image, but was opened as a raw one?
    pub(crate) fn looks_like_qcow2(&self) -> Result<bool, ImageError> {
        match self {
            Self::Raw(disk) => Ok(disk.starts_with_qcow2_magic()?),
            Self::Qcow2(_) => Ok(false),
        }
    }

    /// As a node has it, and once more as what it is if it can have internal snapshots.
    pub(crate) fn into_shared_device(self) -> (Box<dyn BlockDevice>, Option<Arc<Qcow2Disk>>) {
        match self {
            Self::Raw(disk) => (Box::new(disk), None),
            Self::Qcow2(disk) => {
                let disk: Arc<Qcow2Disk> = Arc::from(disk);
                (Box::new(Arc::clone(&disk)), Some(disk))
            }
        }
    }

    /// As a node has it.
    pub(crate) fn into_device(self) -> Box<dyn BlockDevice> {
        match self {
            Self::Raw(disk) => Box::new(disk),
            Self::Qcow2(disk) => disk,
        }
    }
}

fn has_clusters(disk: &Qcow2Disk) -> Result<bool, Qcow2Error> {
    let length = disk.disk_bytes();
    let is_overlay = disk.backing().is_some();
    let mut at = 0;
    while at < length {
        let extent = disk.layer_status(at, length - at)?;
        match extent.kind {
            LayerKind::Unallocated => {}
            LayerKind::Zero if !is_overlay => {}
            LayerKind::Zero
            | LayerKind::ZeroAllocated
            | LayerKind::Data
            | LayerKind::Compressed => return Ok(true),
        }
        at += extent.length;
    }
    Ok(false)
}

/// So that a new file is there after a crash.
fn sync_folder_of(path: &Path) -> io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    File::open(folder)?.sync_all()
}
