//! What a guest and its operator do to an open image, as the input says.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::sync::Arc;

use vmferry_disk::simulated::MemoryDisk;
use vmferry_disk::{BlockDevice, DiskError, Unmap};
use vmferry_qcow2::header::Header;
use vmferry_qcow2::{Error, NewSnapshot, OpenOptions, Qcow2Disk, Repair, check};

use crate::file::MemoryFile;
use crate::images::Input;

/// So much of a disk is looked at, from either end.
const SEEN_BYTES_MAX: u64 = 1 << 20;
const OPERATIONS_MAX: usize = 48;

/// Whatever is below an image that names something.
fn backing(file: &MemoryFile) -> Option<Arc<dyn BlockDevice>> {
    Header::read(file).ok()?.backing_name?;
    let bytes: Vec<u8> = (0..50_000_u32).map(|at| (at / 7) as u8 | 1).collect();
    Some(Arc::new(MemoryDisk::from_bytes(&bytes)))
}

pub fn open(file: &MemoryFile, read_only: bool, small: bool) -> Result<Qcow2Disk, Error> {
    let options = OpenOptions {
        read_only,
        l2_cache_bytes: if small { 0 } else { 1 << 20 },
    };
    Qcow2Disk::open(Arc::new(file.clone()), options, backing(file))
}

/// All of a short disk, both ends of a long one.
pub fn read_ends(disk: &Qcow2Disk) -> Vec<u8> {
    let length = disk.disk_bytes().min(SEEN_BYTES_MAX);
    let mut bytes = vec![0xee; length as usize];
    let last = disk.read_at(&mut bytes, disk.disk_bytes() - length).is_ok();
    let first = disk.read_at(&mut bytes, 0).is_ok();
    if first && last { bytes } else { Vec::new() }
}

/// Every snapshot's VM state, as far as it can be read.
pub fn read_states(disk: &Qcow2Disk) {
    for snapshot in disk.snapshots().iter().take(8) {
        let Ok(reader) = disk.vm_state_reader(&snapshot.id) else {
            continue;
        };
        let length = reader.length();
        let mut state = Vec::new();
        if reader.take(SEEN_BYTES_MAX).read_to_end(&mut state).is_ok() {
            assert_eq!(state.len() as u64, length.min(SEEN_BYTES_MAX));
        }
    }
}

/// What the disk must hold, as long as the image was not broken.
struct Model {
    bytes: Vec<u8>,
    snapshots: HashMap<String, Vec<u8>>,
}

pub struct Work<'a> {
    file: &'a MemoryFile,
    disk: Option<Qcow2Disk>,
    small: bool,
    model: Option<Model>,
    made: u32,
}

impl<'a> Work<'a> {
    pub fn new(file: &'a MemoryFile, disk: Qcow2Disk, is_good: bool, small: bool) -> Self {
        let model = is_good.then(|| Model {
            bytes: read_ends(&disk),
            snapshots: HashMap::new(),
        });
        Self {
            file,
            disk: Some(disk),
            small,
            model,
            made: 0,
        }
    }

    /// Nothing fails in an image that is not broken.
    fn must<T>(&self, result: Result<T, DiskError>) -> Option<T> {
        if let (Some(_), Err(error)) = (&self.model, &result) {
            panic!("{error}");
        }
        result.ok()
    }

    /// The same, but for a refcount that can count no further.
    fn may_overflow<T>(&self, result: Result<T, Error>) -> Option<T> {
        match (&self.model, result) {
            (_, Ok(value)) => Some(value),
            (None, _) | (_, Err(Error::RefcountOverflow { .. })) => None,
            (Some(_), Err(error)) => panic!("{error}"),
        }
    }

    fn range(disk: &Qcow2Disk, input: &mut Input<'_>) -> (u64, u64) {
        let length = disk.disk_bytes();
        if length == 0 {
            return (0, 0);
        }
        let (start, size) = (input.u16(), input.u16());
        // From the end, too: a long disk has its last table there.
        let start = match size & 1 {
            0 => start * 8 % length,
            _ => length - 1 - start * 8 % length,
        };
        let start = if size & 2 == 0 { start } else { start & !511 };
        (start, (size * 4).min(length - start))
    }

    pub fn run(mut self, input: &mut Input<'_>) {
        for _ in 0..OPERATIONS_MAX {
            if input.is_empty() {
                break;
            }
            let Some(disk) = self.disk.take() else {
                break;
            };
            self.step(disk, input);
        }
        self.end();
    }

    fn step(&mut self, disk: Qcow2Disk, input: &mut Input<'_>) {
        match input.u8() % 14 {
            0..=2 => self.write(&disk, input),
            3 => self.write_zeroes(&disk, input),
            4 => self.discard(&disk, input),
            5 => self.resize(&disk, input),
            6 => drop(self.must(disk.flush())),
            7 => self.create_snapshot(&disk, input),
            8 => self.apply_snapshot(&disk, input),
            9 => self.delete_snapshot(&disk, input),
            10 => return self.reopen(disk, input),
            11 => self.look(&disk, input),
            12 => self.compare(&disk),
            _ => read_states(&disk),
        }
        self.disk = Some(disk);
    }

    fn write(&mut self, disk: &Qcow2Disk, input: &mut Input<'_>) {
        let (start, size) = Self::range(disk, input);
        let data = vec![input.u8() | 1; size as usize];
        let written = self.must(disk.write_at(&data, start));
        if written.is_some() {
            self.expect(start, &data);
        }
    }

    fn expect(&mut self, start: u64, data: &[u8]) {
        if let Some(model) = &mut self.model {
            model.bytes[start as usize..][..data.len()].copy_from_slice(data);
        }
    }

    fn write_zeroes(&mut self, disk: &Qcow2Disk, input: &mut Input<'_>) {
        let (start, size) = Self::range(disk, input);
        let how = input.u8();
        let unmap = if how & 1 == 0 {
            Unmap::May
        } else {
            Unmap::Never
        };
        let fast = how & 2 != 0;
        let written = disk.write_zeroes(start, size, unmap, fast);
        let written = if fast {
            written.ok()
        } else {
            self.must(written)
        };
        if written.is_some() {
            self.expect(start, &vec![0; size as usize]);
        }
    }

    /// What it reads as afterwards is either, for each cluster.
    fn discard(&mut self, disk: &Qcow2Disk, input: &mut Input<'_>) {
        let (start, size) = Self::range(disk, input);
        self.must(disk.discard(start, size));
        if self.model.is_some() {
            let mut now = vec![0; size as usize];
            self.must(disk.read_at(&mut now, start));
            self.expect(start, &now);
        }
    }

    fn resize(&mut self, disk: &Qcow2Disk, input: &mut Input<'_>) {
        let value = input.u16();
        let wanted = match (self.model.is_some(), value & 7) {
            (false, 0) => value << 16,
            _ => (value * 13).min(SEEN_BYTES_MAX),
        };
        match (disk.resize(wanted), &mut self.model) {
            (Ok(()), Some(model)) => model.bytes.resize(wanted as usize, 0),
            // Version 2 can't, with snapshots.
            (Ok(()), None) | (Err(Error::Option { .. }), _) | (Err(_), None) => {}
            (Err(error), Some(_)) => panic!("{error}"),
        }
    }

    fn create_snapshot(&mut self, disk: &Qcow2Disk, input: &mut Input<'_>) {
        self.made += 1;
        let name = format!("made-{}", self.made);
        let mut new = NewSnapshot {
            name: &name,
            date: (1_700_000_000, 5),
            guest_nanoseconds: input.u16(),
            vm_state_bytes: 0,
            icount: None,
        };
        let state = vec![7; (input.u16() as usize).saturating_sub(40_000)];
        if !state.is_empty() {
            let writer = disk.vm_state_writer();
            let Some(mut writer) = self.may_overflow(writer) else {
                return;
            };
            let written = writer.write_all(&state);
            assert!(self.model.is_none() || written.is_ok(), "{written:?}");
            match self.may_overflow(writer.finish()) {
                Some(length) => new.vm_state_bytes = length,
                None => return,
            }
        }
        let made = disk.create_snapshot(&new);
        if let (Some(made), Some(model)) = (self.may_overflow(made), &mut self.model) {
            let content = model.bytes.clone();
            model.snapshots.insert(made.id, content);
        }
    }

    /// The id of one of the snapshots, or one that there is not.
    fn choose(disk: &Qcow2Disk, input: &mut Input<'_>) -> Option<String> {
        let snapshots = disk.snapshots();
        let index = usize::from(input.u8()) % snapshots.len().max(1);
        snapshots.into_iter().nth(index).map(|snapshot| snapshot.id)
    }

    fn apply_snapshot(&mut self, disk: &Qcow2Disk, input: &mut Input<'_>) {
        let Some(id) = Self::choose(disk, input) else {
            return;
        };
        let before = read_ends(disk);
        let applied = disk.apply_snapshot(&id);
        let now = read_ends(disk);
        match (self.may_overflow(applied), &mut self.model) {
            (Some(()), Some(model)) => {
                let kept = model.snapshots.get(&id);
                assert!(kept.is_none_or(|kept| *kept == now), "snapshot {id}");
                model.bytes = now;
            }
            (Some(()), None) => {}
            (None, _) => assert!(before == now, "a refusal changes nothing"),
        }
    }

    fn delete_snapshot(&mut self, disk: &Qcow2Disk, input: &mut Input<'_>) {
        let Some(id) = Self::choose(disk, input) else {
            return;
        };
        let before = self.model.is_some().then(|| disk.snapshots().len());
        let deleted = disk.delete_snapshot(&id);
        if self.may_overflow(deleted).is_some() && before.is_some() {
            assert_eq!(Some(disk.snapshots().len() + 1), before);
            if let Some(model) = &mut self.model {
                model.snapshots.remove(&id);
            }
        }
    }

    fn reopen(&mut self, disk: Qcow2Disk, input: &mut Input<'_>) {
        let closed = disk.close();
        if self.model.is_some() {
            closed.expect("an image that is not broken can be closed");
            let report = check(self.file, Repair::None).expect("it can be checked");
            assert!(report.is_clean(), "{report:?}");
        } else if input.u8() & 1 == 0 {
            drop(check(self.file, Repair::All));
        }
        let opened = open(self.file, false, self.small);
        assert!(self.model.is_none() || opened.is_ok(), "{opened:?}");
        self.disk = opened.ok();
    }

    fn look(&self, disk: &Qcow2Disk, input: &mut Input<'_>) {
        let (start, size) = Self::range(disk, input);
        if size == 0 {
            return;
        }
        if let Some(extent) = self.must(disk.status(start, size)) {
            assert!(extent.length >= 1 && extent.length <= size, "{extent:?}");
        }
        if let Ok(extent) = disk.layer_status(start, size) {
            assert!(extent.length >= 1 && extent.length <= size, "{extent:?}");
        }
        let mut bytes = vec![0; size as usize];
        self.must(disk.read_at(&mut bytes, start));
        drop(disk.read_cached_at(&mut bytes, start));
    }

    fn compare(&self, disk: &Qcow2Disk) {
        let now = read_ends(disk);
        if let Some(model) = &self.model {
            let differs = model.bytes.iter().zip(&now).position(|(a, b)| a != b);
            assert_eq!(differs, None, "they differ at this byte");
            assert_eq!(model.bytes.len(), now.len());
        }
    }

    fn end(mut self) {
        let Some(disk) = self.disk.take() else {
            return;
        };
        self.compare(&disk);
        let closed = disk.close();
        // Whatever was broken, nobody wrote over the header.
        Header::read(self.file).expect("the header was good when the image was opened");
        if self.model.is_some() {
            closed.expect("an image that is not broken can be closed");
            let report = check(self.file, Repair::None).expect("it can be checked");
            assert!(report.is_clean(), "{report:?}");
        }
    }
}
