//! Snapshots in the model: copies of it, and of what was written as VM state.

use fastrand::Rng;
use vmferry_qcow2::Error;

use super::{Case, random_bytes};
use crate::snapshots::{new_snapshot, read_state};
use crate::support::qemu_img_ok;

pub(super) struct Kept {
    name: String,
    model: Vec<u8>,
    state: Vec<u8>,
}

impl Case {
    pub(super) fn snapshot_step(&mut self, rng: &mut Rng) {
        match rng.u8(..5) {
            0 | 1 => self.create_snapshot(rng),
            _ if self.kept.is_empty() => {}
            2 => {
                let index = rng.usize(..self.kept.len());
                let (id, name) = self.id_and_name(index);
                let key = if rng.bool() { id } else { name };
                match self.disk().apply_snapshot(&key) {
                    Ok(()) => self.model = self.kept[index].model.clone(),
                    Err(error) => self.assert_overflow(&error),
                }
                self.compare(0, self.model.len());
            }
            3 => {
                let index = rng.usize(..self.kept.len());
                let (id, name) = self.id_and_name(index);
                let key = if rng.bool() { id } else { name };
                self.disk().delete_snapshot(&key).unwrap();
                self.kept.remove(index);
            }
            _ => {
                let index = rng.usize(..self.kept.len());
                let name = self.kept[index].name.clone();
                let state = read_state(self.disk(), &name);
                assert!(state == self.kept[index].state, "state of {name}");
            }
        }
        self.compare_list();
    }

    fn create_snapshot(&mut self, rng: &mut Rng) {
        let name = format!("s{}", rng.u32(..));
        let length = match rng.u8(..4) {
            0 => rng.usize(1..=3 << self.options.cluster_bits),
            1 => rng.usize(1..=300_000),
            _ => 0,
        };
        let state = random_bytes(rng, length);
        let disk = self.disk();
        if length > 0 || rng.u8(..4) == 0 {
            let mut writer = disk.vm_state_writer().unwrap();
            std::io::Write::write_all(&mut writer, &state).unwrap();
            assert_eq!(writer.finish().unwrap(), length as u64);
        }
        let mut new = new_snapshot(&name);
        new.vm_state_bytes = length as u64;
        match disk.create_snapshot(&new) {
            Ok(made) => {
                assert_eq!(made.name, name);
                let model = self.model.clone();
                self.kept.push(Kept { name, model, state });
            }
            Err(error) => self.assert_overflow(&error),
        }
    }

    /// Narrow refcounts can't count many snapshots.
    fn assert_overflow(&self, error: &Error) {
        let narrow = self.options.refcount_order < 3;
        let overflows = matches!(error, Error::RefcountOverflow { .. });
        assert!(narrow && overflows, "{error}: {:?}", self.options);
    }

    fn id_and_name(&mut self, index: usize) -> (String, String) {
        let snapshot = self.disk().snapshots().remove(index);
        (snapshot.id, snapshot.name)
    }

    fn compare_list(&mut self) {
        let found = self.disk().snapshots();
        assert_eq!(found.len(), self.kept.len());
        for (found, kept) in found.iter().zip(&self.kept) {
            assert_eq!(found.name, kept.name);
            assert_eq!(found.vm_state_bytes, kept.state.len() as u64);
            assert_eq!(found.disk_bytes, Some(kept.model.len() as u64));
        }
    }

    /// Every snapshot's state, and at the end the content of one.
    pub(super) fn compare_snapshots(&mut self) {
        self.compare_list();
        for index in 0..self.kept.len() {
            let name = self.kept[index].name.clone();
            let state = read_state(self.disk(), &name);
            assert!(state == self.kept[index].state, "state of {name}");
        }
    }
}

/// Apply each snapshot with `qemu-img`, then delete them all with it.
pub(super) fn compare_with_qemu(case: &Case, path: &dyn Fn(&str) -> String, comparable: bool) {
    let image = path("image.qcow2");
    // QEMU needs another user, where we may have used up what narrow refcounts can count.
    let comparable = comparable && case.options.refcount_order >= 3;
    // QEMU does not see the last bytes of a disk that ends within a sector, and leaks their cluster
    // when it makes the disk shorter.
    let comparable = comparable && case.model.len().is_multiple_of(512);
    let list = qemu_img_ok(&["snapshot", "-l", &image]);
    for kept in &case.kept {
        assert!(list.contains(&kept.name), "{list}");
        if comparable && kept.model.len().is_multiple_of(512) {
            qemu_img_ok(&["snapshot", "-q", "-a", &kept.name, &image]);
            let model = path("kept.raw");
            std::fs::write(&model, &kept.model).unwrap();
            qemu_img_ok(&["compare", "-f", "qcow2", "-F", "raw", &image, &model]);
        }
    }
    if case.kept.is_empty() {
        return;
    }
    qemu_img_ok(&["check", "-q", "-f", "qcow2", &image]);
    for kept in &case.kept {
        qemu_img_ok(&["snapshot", "-q", "-d", &kept.name, &image]);
    }
    qemu_img_ok(&["check", "-q", "-f", "qcow2", &image]);
}
