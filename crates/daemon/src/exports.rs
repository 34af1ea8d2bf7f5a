//! The disks as NBD sees them.

use vmferry_nbd::{Exports, Unavailable};

use std::sync::Arc;

use vmferry_disk::Node;

use crate::config::Disk;

/// Every disk, exported under its name.
pub(crate) struct DiskExports {
    disks: Arc<[Disk]>,
}

impl DiskExports {
    pub(crate) fn new(disks: Arc<[Disk]>) -> Self {
        Self { disks }
    }
}

impl Exports for DiskExports {
    fn list(&self) -> Vec<String> {
        let here = self.disks.iter().filter(|disk| disk.node.held().is_some());
        here.map(|disk| disk.node.name().to_owned()).collect()
    }

    fn open(&self, name: &str) -> Result<Arc<Node>, Unavailable> {
        let mut disks = self.disks.iter();
        let disk = disks
            .find(|disk| disk.node.name() == name)
            .ok_or(Unavailable::Unknown)?;
        match disk.node.held() {
            Some(_) => Ok(Arc::clone(&disk.node)),
            None => Err(Unavailable::Departed),
        }
    }

    fn description(&self, name: &str) -> Option<String> {
        let mut disks = self.disks.iter();
        let disk = disks.find(|disk| disk.node.name() == name)?;
        Some(format!("{} ({})", disk.path.display(), disk.format))
    }
}
