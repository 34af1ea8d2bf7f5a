//! Disk images: raw or qcow2, locked against other programs while they are open.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use vmferry_disk::{BlockDevice, OpenOptions, RawDisk};
use vmferry_qcow2::{ChainOptions, CreateOptions, FileStorage, Qcow2Disk};

/// `NAME=PATH[,format=raw|qcow2][,size=BYTES]`; a size makes the image if it is not there.
#[derive(Clone, Debug)]
pub(crate) struct DiskFlag {
    pub(crate) name: String,
    path: PathBuf,
    is_qcow2: bool,
    bytes: Option<u64>,
}

impl FromStr for DiskFlag {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, rest) = text.split_once('=').ok_or("NAME=PATH is expected")?;
        let mut parts = rest.split(',');
        let path = parts.next().unwrap_or_default().into();
        let mut flag = Self {
            name: name.into(),
            path,
            is_qcow2: false,
            bytes: None,
        };
        for part in parts {
            match part.split_once('=') {
                Some(("format", "raw")) => flag.is_qcow2 = false,
                Some(("format", "qcow2")) => flag.is_qcow2 = true,
                Some(("size", bytes)) => flag.bytes = Some(crate::bytes(bytes)?),
                _ => return Err(format!("'{part}' is not understood")),
            }
        }
        Ok(flag)
    }
}

#[derive(Clone)]
pub(crate) enum Image {
    Raw(Arc<RawDisk>),
    Qcow2(Arc<Qcow2Disk>),
}

impl Image {
    pub(crate) fn open(flag: &DiskFlag) -> Result<Self> {
        let image = match (flag.path.exists(), flag.bytes) {
            (false, Some(bytes)) => Self::create(&flag.path, flag.is_qcow2, bytes),
            _ => Self::open_existing(&flag.path, flag.is_qcow2),
        };
        let image = image.with_context(|| format!("disk '{}'", flag.name))?;
        if image.device().limits().length == 0 {
            bail!("disk '{}' is empty", flag.name);
        }
        Ok(image)
    }

    fn open_existing(path: &Path, is_qcow2: bool) -> Result<Self> {
        let (read_only, lock) = (false, true);
        Ok(match is_qcow2 {
            false => Self::Raw(Arc::new(RawDisk::open(
                path,
                OpenOptions { read_only, lock },
            )?)),
            true => {
                let disk = vmferry_qcow2::open(path, ChainOptions { read_only, lock })?;
                Self::Qcow2(Arc::new(disk))
            }
        })
    }

    fn create(path: &Path, is_qcow2: bool, bytes: u64) -> Result<Self> {
        Ok(match is_qcow2 {
            false => Self::Raw(Arc::new(RawDisk::create(path, bytes, true)?)),
            true => {
                let storage = FileStorage::create(path, true)?;
                vmferry_qcow2::create(&storage, &CreateOptions::new(bytes))?;
                let options = vmferry_qcow2::OpenOptions::default();
                Self::Qcow2(Arc::new(Qcow2Disk::open(Arc::new(storage), options, None)?))
            }
        })
    }

    /// As a node has it.
    pub(crate) fn device(&self) -> Arc<dyn BlockDevice> {
        match self {
            Self::Raw(disk) => Arc::<RawDisk>::clone(disk),
            Self::Qcow2(disk) => Arc::<Qcow2Disk>::clone(disk),
        }
    }

    /// Only these have snapshots.
    pub(crate) fn qcow2(&self) -> Option<&Qcow2Disk> {
        match self {
            Self::Raw(_) => None,
            Self::Qcow2(disk) => Some(disk),
        }
    }
}
