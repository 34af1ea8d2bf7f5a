//! What goes wrong inside: panics, streams that end early, disks that do not match.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;
use vmferry_channel::{Listener, Uri};
use vmferry_daemon::{Disk, Incoming};
use vmferry_disk::simulated::MemoryDisk;
use vmferry_disk::{Allocation, BlockDevice, Cached, DiskError, Extent, Hold, Limits, Node, Unmap};
use vmferry_migration::{Residence, Start};
use vmferry_qmp::types::{HandOver, MigrationStatus};

use crate::host::{Host, MIB, OVER, Running, Settings, migrate_to, random, run};

/// A disk whose migration side panics while it is armed. (Only data of whole chunks is touched by
/// migrations here, so guests' small requests pass.)
struct Panicking {
    disk: MemoryDisk,
    armed: Arc<AtomicBool>,
}

impl Panicking {
    fn panic_if_armed(&self, length: u64) {
        assert!(
            length < MIB || !self.armed.load(Ordering::SeqCst),
            "a disk that panics, as the test wants"
        );
    }
}

impl BlockDevice for Panicking {
    fn limits(&self) -> Limits {
        self.disk.limits()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), DiskError> {
        self.panic_if_armed(buf.len() as u64);
        self.disk.read_at(buf, offset)
    }

    fn read_cached_at(&self, buf: &mut [u8], offset: u64) -> Result<Cached, DiskError> {
        self.disk.read_cached_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<(), DiskError> {
        self.panic_if_armed(buf.len() as u64);
        self.disk.write_at(buf, offset)
    }

    fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        unmap: Unmap,
        fast_only: bool,
    ) -> Result<(), DiskError> {
        self.disk.write_zeroes(offset, length, unmap, fast_only)
    }

    fn discard(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.disk.discard(offset, length)
    }

    fn status(&self, offset: u64, length: u64) -> Result<Extent, DiskError> {
        self.disk.status(offset, length)
    }

    fn allocation(&self, offset: u64, length: u64) -> Result<Allocation, DiskError> {
        self.disk.allocation(offset, length)
    }

    fn below(&self) -> Option<&dyn BlockDevice> {
        None
    }

    fn start_writeback(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.disk.start_writeback(offset, length)
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.disk.flush()
    }
}

/// A daemon over one disk in memory, and the switch that makes it panic.
fn over_memory(content: &[u8], waits: bool) -> (Running, MemoryDisk, Arc<AtomicBool>) {
    let disk = MemoryDisk::from_bytes(content);
    let armed = Arc::new(AtomicBool::new(true));
    let device = Box::new(Panicking {
        disk: disk.clone(),
        armed: Arc::clone(&armed),
    });
    let (start, resting) = match waits {
        true => (Start::Waiting, Hold::Writes),
        false => (Start::Live, Hold::Nothing),
    };
    let disks = vec![Disk {
        node: Node::new("root", device, resting),
        record: None,
        start,
        peer: String::new(),
        taken_back: false,
        path: "root.raw".into(),
        format: "raw",
        image: None,
    }];
    let listener = waits.then(|| Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap());
    let at = listener.as_ref().map(|listener| listener.local().clone());
    let dir = tempfile::tempdir().unwrap().keep();
    let running = run(dir, disks, Vec::new(), listener.map(Incoming::Listener), at);
    (running, disk, armed)
}

#[test]
fn a_panic_fails_its_migration_and_nothing_else() {
    let content = random(31, 8 * MIB);
    let (from, _, source_panics) = over_memory(&content, false);
    let (to, arrived, destination_panics) = over_memory(&vec![0; content.len()], true);
    let uri = to.incoming.clone().unwrap();
    let mut qmp = from.patient_qmp();

    qmp.run("migrate", migrate_to(&uri));
    let info = qmp.wait_status(&OVER);
    assert_eq!(info.status, Some(MigrationStatus::Failed), "{info:?}");
    assert_eq!(info.x_hand_over, Some(HandOver::Kept));
    from.nbd("root").write(0, &content[..512], false).unwrap();
    to.qmp().wait_status(&[MigrationStatus::Failed]);

    source_panics.store(false, Ordering::SeqCst);
    qmp.run("migrate", migrate_to(&uri));
    let info = qmp.wait_status(&OVER);
    assert_eq!(info.status, Some(MigrationStatus::Failed), "{info:?}");
    assert_eq!(info.x_hand_over, Some(HandOver::Kept));
    to.qmp().wait_status(&[MigrationStatus::Failed]);

    destination_panics.store(false, Ordering::SeqCst);
    qmp.run("migrate", migrate_to(&uri));
    let info = qmp.wait_status(&OVER);
    assert_eq!(info.status, Some(MigrationStatus::Completed), "{info:?}");
    assert!(
        arrived.snapshot() == content,
        "the destination's disk differs"
    );
    for daemon in [from, to] {
        let dir = daemon.dir.clone();
        daemon.end().unwrap();
        std::fs::remove_dir_all(dir).unwrap();
    }
}

/// A stream of one migration, in a file.
fn stream_of(content: &[u8]) -> (Host, std::path::PathBuf) {
    use std::os::fd::AsFd;
    let host = Host::new();
    host.make("root", content);
    let daemon = host.start(&["root"], &Settings::default());
    let path = host.dir.path().join("stream");
    let file = std::fs::File::create(&path).unwrap();
    let mut qmp = daemon.qmp();
    qmp.0.getfd("out", file.as_fd()).unwrap();
    qmp.run("migrate", json!({"uri": "fd:out", "x-one-way": true}));
    let info = qmp.wait_status(&OVER);
    assert_eq!(info.status, Some(MigrationStatus::Completed), "{info:?}");
    daemon.end().unwrap();
    (host, path)
}

#[test]
fn a_stream_from_a_file_is_taken_once() {
    let content = random(32, 2 * MIB);
    let (_source, stream) = stream_of(&content);
    let length = std::fs::metadata(&stream).unwrap().len();
    for whole in [false, true] {
        let host = Host::new();
        host.make("root", &vec![0; content.len()]);
        let cut = host.dir.path().join("stream");
        std::fs::copy(&stream, &cut).unwrap();
        if !whole {
            let file = std::fs::File::options().write(true).open(&cut).unwrap();
            file.set_len(length / 2).unwrap();
        }
        let uri: Uri = format!("file:{}", cut.display()).parse().unwrap();
        let settings = Settings {
            once: Some(uri),
            ..Settings::default()
        };
        let daemon = host.start(&["root"], &settings);
        let mut qmp = daemon.qmp();
        let info = qmp.wait(|info| {
            // A failure is final only once nothing more can come.
            info.status == Some(MigrationStatus::Completed) && info.blocked_reasons.is_none()
                || info
                    .blocked_reasons
                    .as_ref()
                    .is_some_and(|reasons| reasons[0].contains("once"))
        });
        if whole {
            assert_eq!(info.status, Some(MigrationStatus::Completed));
            assert!(std::fs::read(host.image("root")).unwrap() == content);
            assert_eq!(host.residence("root"), Some(Residence::Arrived));
            daemon.nbd("root").write(0, b"live", false).unwrap();
        } else {
            assert_eq!(info.status, Some(MigrationStatus::Failed));
            assert_eq!(host.residence("root"), Some(Residence::Incoming));
            assert_eq!(qmp.run("query-status", json!({}))["status"], "inmigrate");
            qmp.run("migrate_cancel", json!({}));
        }
    }
}

#[test]
fn a_disk_that_the_destination_lacks_is_named() {
    let (source, destination) = (Host::new(), Host::new());
    source.make("root", &random(33, MIB));
    source.make("data", &random(34, MIB));
    destination.make("root", &vec![0; 1 << 20]);
    let from = source.start(&["root", "data"], &Settings::default());
    let settings = Settings {
        incoming: true,
        ..Settings::default()
    };
    let to = destination.start(&["root"], &settings);
    let uri = to.incoming.clone().unwrap();
    let mut qmp = from.patient_qmp();
    qmp.run("migrate", migrate_to(&uri));
    let info = qmp.wait_status(&OVER);
    assert_eq!(info.status, Some(MigrationStatus::Failed), "{info:?}");
    let info = to.qmp().wait_status(&[MigrationStatus::Failed]);
    let error = info.error_desc.unwrap();
    assert!(error.contains("'data'"), "{error}");

    // One disk can go alone; the other one stays.
    let one = json!({"uri": uri.to_string(), "x-disks": ["root"]});
    qmp.run("migrate", one);
    let info = qmp.wait_status(&OVER);
    assert_eq!(info.status, Some(MigrationStatus::Completed), "{info:?}");
    assert_eq!(qmp.run("query-status", json!({}))["status"], "running");
    from.nbd("data").write(0, b"still here", false).unwrap();
    let error = qmp.refused("migrate", json!({"uri": "unix:/x", "x-disks": ["root"]}));
    assert!(error.contains("moved away"), "{error}");
}
