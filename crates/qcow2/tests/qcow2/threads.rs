//! Many threads on one disk.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use fastrand::Rng;
use vmferry_disk::{BlockDevice, Cached, Unmap};
use vmferry_qcow2::{
    CreateOptions, FileStorage, OpenOptions, Qcow2Disk, Repair, Storage, check, create,
};

use crate::support::{MemoryFile, rounds, seed};

/// Nothing that is awaited here takes so long, unless it never comes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Each thread owns every n-th unit, so that most clusters belong to several.
fn work(disk: &Qcow2Disk, mut rng: Rng, owner: usize, owners: usize, unit: usize) {
    let length = disk.disk_bytes() as usize;
    let mut values = vec![0_u8; length / unit / owners];
    for round in 0..200 {
        let index = rng.usize(..values.len());
        let offset = ((index * owners + owner) * unit) as u64;
        match rng.u8(..10) {
            0..=4 => {
                values[index] = rng.u8(1..);
                let data = vec![values[index]; unit];
                disk.write_at(&data, offset).unwrap();
            }
            5 => {
                let unmap = if rng.bool() { Unmap::May } else { Unmap::Never };
                disk.write_zeroes(offset, unit as u64, unmap, false)
                    .unwrap();
                values[index] = 0;
            }
            6 if round % 4 == 0 => disk.flush().unwrap(),
            7 if values[index] == 0 => disk.discard(offset, unit as u64).unwrap(),
            _ => {}
        }
        let index = rng.usize(..values.len());
        let offset = ((index * owners + owner) * unit) as u64;
        let mut read = vec![0xEE; unit];
        if let Cached::Hit(hit) = disk.read_cached_at(&mut read, offset).unwrap() {
            assert!(read[..hit].iter().all(|byte| *byte == values[index]));
        }
        disk.read_at(&mut read, offset).unwrap();
        let wrong = read.iter().find(|byte| **byte != values[index]);
        assert_eq!(
            wrong, None,
            "unit {index} of {owner} must be {}",
            values[index]
        );
    }
}

fn hammer(storage: &Arc<dyn Storage>, rng: &mut Rng) {
    let owners = 4;
    let options = CreateOptions {
        cluster_bits: rng.u32(9..=16),
        refcount_order: rng.u32(0..=6),
        ..CreateOptions::new(2 << 20)
    };
    create(&**storage, &options).unwrap();
    let options = OpenOptions {
        l2_cache_bytes: if rng.bool() { 0 } else { 1 << 20 },
        ..OpenOptions::default()
    };
    let disk = Qcow2Disk::open(Arc::clone(storage), options, None).unwrap();
    let unit = rng.usize(500..20000);
    thread::scope(|scope| {
        for owner in 0..owners {
            let (disk, rng) = (&disk, rng.fork());
            scope.spawn(move || work(disk, rng, owner, owners, unit));
        }
    });
    disk.close().unwrap();
    let report = check(&**storage, Repair::None).unwrap();
    assert!(report.is_clean(), "{report:?}");
}

#[test]
fn threads_do_not_step_on_each_other() {
    let seed = seed();
    println!("VMFERRY_SEED={seed}");
    let mut rng = Rng::with_seed(seed);
    for _ in 0..rounds(20) {
        let file: Arc<dyn Storage> = Arc::new(MemoryFile::default());
        hammer(&file, &mut rng);
    }
    let folder = tempfile::tempdir().unwrap();
    let file = FileStorage::create(folder.path().join("image.qcow2"), true).unwrap();
    let file: Arc<dyn Storage> = Arc::new(file);
    hammer(&file, &mut rng);
}

/// A file whose next data write, or next flush, waits until the test lets it go on.
struct Gate {
    file: MemoryFile,
    armed: AtomicBool,
    on_flush: bool,
    arrived: Sender<()>,
    go_on: Mutex<Receiver<()>>,
}

impl Gate {
    fn new(on_flush: bool) -> (Arc<Self>, Receiver<()>, Sender<()>) {
        let file = MemoryFile::default();
        create(&file, &CreateOptions::new(64 << 20)).unwrap();
        let (arrived, has_arrived) = channel();
        let (let_go, go_on) = channel();
        let gate = Self {
            file,
            armed: AtomicBool::new(false),
            on_flush,
            arrived,
            go_on: Mutex::new(go_on),
        };
        (Arc::new(gate), has_arrived, let_go)
    }

    fn pass(&self) {
        if self.armed.swap(false, Ordering::SeqCst) {
            self.arrived.send(()).unwrap();
            self.go_on.lock().unwrap().recv_timeout(PATIENCE).unwrap();
        }
    }
}

impl Storage for Gate {
    fn length(&self) -> io::Result<u64> {
        self.file.length()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_at(buf, offset)
    }

    fn read_cached_at(&self, buf: &mut [u8], offset: u64) -> io::Result<Cached> {
        self.file.read_cached_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        if !self.on_flush {
            self.pass();
        }
        self.file.write_at(buf, offset)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.file.set_length(length)
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        self.file.punch_hole(offset, length)
    }

    fn start_writeback(&self, offset: u64, length: u64) -> io::Result<()> {
        self.file.start_writeback(offset, length)
    }

    fn flush(&self) -> io::Result<()> {
        if self.on_flush {
            self.pass();
        }
        self.file.flush()
    }
}

#[test]
fn a_write_waits_for_no_other_cluster() {
    let (gate, has_arrived, let_go) = Gate::new(false);
    let disk = Qcow2Disk::open(gate.clone(), OpenOptions::default(), None).unwrap();
    thread::scope(|scope| {
        gate.armed.store(true, Ordering::SeqCst);
        let stuck = scope.spawn(|| disk.write_at(&[1; 4096], 0));
        has_arrived.recv_timeout(PATIENCE).unwrap();
        // New clusters, in the same table and in another; in place; a read; a flush.
        disk.write_at(&[2; 100_000], 1 << 20).unwrap();
        disk.write_at(&[3; 4096], 1 << 20).unwrap();
        disk.write_zeroes(2 << 20, 1 << 20, Unmap::May, false)
            .unwrap();
        let mut read = [0xEE; 4096];
        disk.read_at(&mut read, 0).unwrap();
        assert_eq!(read, [0; 4096], "what is not acknowledged is not seen");
        disk.flush().unwrap();
        // The same cluster waits.
        let (done, is_done) = channel();
        let disk = &disk;
        scope.spawn(move || {
            disk.write_at(&[4; 4096], 8192).unwrap();
            done.send(()).unwrap();
        });
        assert!(is_done.try_recv().is_err());
        let_go.send(()).unwrap();
        stuck.join().unwrap().unwrap();
        is_done.recv_timeout(PATIENCE).unwrap();
    });
    let mut read = [0xEE; 12288];
    disk.read_at(&mut read, 0).unwrap();
    assert_eq!(read[..4096], [1; 4096]);
    assert_eq!(read[4096..8192], [0; 4096]);
    assert_eq!(read[8192..], [4; 4096]);
}

#[test]
fn nothing_waits_for_a_flush() {
    let (gate, has_arrived, let_go) = Gate::new(true);
    let disk = Qcow2Disk::open(gate.clone(), OpenOptions::default(), None).unwrap();
    disk.write_at(&[1; 4096], 0).unwrap();
    thread::scope(|scope| {
        gate.armed.store(true, Ordering::SeqCst);
        let stuck = scope.spawn(|| disk.flush());
        has_arrived.recv_timeout(PATIENCE).unwrap();
        disk.write_at(&[2; 4096], 0).unwrap();
        disk.write_at(&[3; 4096], 1 << 20).unwrap();
        disk.discard(1 << 20, 1 << 16).unwrap();
        disk.read_at(&mut [0; 4096], 0).unwrap();
        let_go.send(()).unwrap();
        stuck.join().unwrap().unwrap();
    });
    disk.close().unwrap();
    let report = check(&gate.file, Repair::None).unwrap();
    assert!(report.is_clean(), "{report:?}");
}
