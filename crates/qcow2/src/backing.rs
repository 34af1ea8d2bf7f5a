//! Images with what lies below them.
//!
//! Names of backing files are relative to the image that names them. The header must say which
//! format a backing file has: the first bytes of a raw disk belong to its guest, who could write a
//! qcow2 header there that leads to any file of the host.
#![deny(clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vmferry_disk::{BlockDevice, OpenError, RawDisk};

use crate::disk::{OpenOptions, Qcow2Disk};
use crate::error::Error;
use crate::header::{BackingFormat, Header};
use crate::limits::CHAIN_IMAGES_MAX;
use crate::storage::FileStorage;

/// How to open an image and its chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChainOptions {
    /// Refuse writes. What is below is never written to.
    pub read_only: bool,
    /// Take the image locks that QEMU's programs respect, on every file of the chain. Several
    /// images may have one backing file, but nobody may write to it.
    pub lock: bool,
}

/// Open an image and everything below it.
pub fn open(path: impl AsRef<Path>, options: ChainOptions) -> Result<Qcow2Disk, Error> {
    let path = path.as_ref();
    let storage = FileStorage::open(path, options.read_only, options.lock)?;
    open_layer(path, storage, options, &mut Vec::new())
}

/// The files of a chain so far: a file that comes again is a loop.
type Seen = Vec<(u64, u64)>;

fn open_layer(
    path: &Path,
    storage: FileStorage,
    options: ChainOptions,
    seen: &mut Seen,
) -> Result<Qcow2Disk, Error> {
    let metadata = storage
        .file()
        .metadata()
        .map_err(Error::storage("stat", "image", 0))?;
    seen.push((metadata.dev(), metadata.ino()));
    let header = Header::read(&storage)?;
    let backing = match (&header.backing_name, header.backing_format()?) {
        (Some(name), Some(format)) => Some(open_below(path, name, format, options, seen)?),
        _ => None,
    };
    let options = OpenOptions {
        read_only: options.read_only,
        ..OpenOptions::default()
    };
    Qcow2Disk::open(Arc::new(storage), options, backing)
}

fn open_below(
    image: &Path,
    name: &str,
    format: BackingFormat,
    options: ChainOptions,
    seen: &mut Seen,
) -> Result<Arc<dyn BlockDevice>, Error> {
    let refused = |problem: String| Error::Backing {
        name: name.to_owned(),
        problem,
    };
    let path = resolve(image, name).map_err(refused)?;
    let metadata = std::fs::metadata(&path).map_err(|error| refused(error.to_string()))?;
    if seen.contains(&(metadata.dev(), metadata.ino())) {
        return Err(refused("the chain comes back to this file".into()));
    }
    if seen.len() >= CHAIN_IMAGES_MAX {
        return Err(refused(format!("more than {CHAIN_IMAGES_MAX} images")));
    }
    let below = ChainOptions {
        read_only: true,
        ..options
    };
    Ok(match format {
        BackingFormat::Qcow2 => {
            let mut storage = FileStorage::open(&path, true, false)?;
            if options.lock {
                storage.freeze(&path)?;
            }
            Arc::new(open_layer(&path, storage, below, seen)?)
        }
        BackingFormat::Raw => {
            let disk = RawDisk::open(
                &path,
                vmferry_disk::OpenOptions {
                    read_only: true,
                    lock: false,
                },
            )?;
            if options.lock {
                disk.freeze_image().map_err(OpenError::from)?;
            }
            Arc::new(disk)
        }
    })
}

/// The path that a name in a header means.
fn resolve(image: &Path, name: &str) -> Result<PathBuf, String> {
    let name = name.strip_prefix("file:").unwrap_or(name);
    // A word and a colon before the first slash name a protocol.
    let first = name.split('/').next().unwrap_or_default();
    if let Some((protocol, _)) = first.split_once(':') {
        return Err(format!("protocol {protocol:?} is not supported"));
    }
    let folder = image.parent().unwrap_or(Path::new(""));
    Ok(folder.join(name))
}
