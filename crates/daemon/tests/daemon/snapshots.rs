//! Snapshots of disks while guests write to them.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use serde_json::{Value, json};
use vmferry_daemon::{Disk, Incoming};
use vmferry_disk::{BlockDevice, Cached, Hold, Node};
use vmferry_migration::Start;
use vmferry_qcow2::{CreateOptions, FileStorage, OpenOptions, Qcow2Disk, Repair, Storage};
use vmferry_qmp::types::{HoldLevel, MigrationStatus};

use crate::host::{Host, MIB, OVER, PATIENCE, Qmp, Running, Settings, run};

/// A guest's bytes that a [`Switches`] can stop on their way.
const STUCK: u8 = 0xab;
const LENGTH: u64 = 4 * MIB;

/// What a test does to an image's file.
#[derive(Debug, Default)]
struct Switches {
    /// Writes fail.
    fail: AtomicBool,
    /// A write that fails makes those of these fail, too.
    then: Mutex<Option<Arc<Switches>>>,
    /// Guests' data of [`STUCK`] do not get through.
    shut: Mutex<bool>,
    opened: Condvar,
    stuck: AtomicUsize,
    /// Writes of the header.
    switches: AtomicUsize,
}

impl Switches {
    fn set_shut(&self, shut: bool) {
        *self.shut.lock().unwrap() = shut;
        self.opened.notify_all();
    }
}

struct Faulty {
    file: FileStorage,
    switches: Arc<Switches>,
}

impl Storage for Faulty {
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
        if self.switches.fail.load(Ordering::SeqCst) {
            if let Some(then) = &*self.switches.then.lock().unwrap() {
                then.fail.store(true, Ordering::SeqCst);
            }
            return Err(io::Error::from_raw_os_error(5));
        }
        if buf.iter().all(|byte| *byte == STUCK) {
            self.switches.stuck.fetch_add(1, Ordering::SeqCst);
            let shut = self.switches.shut.lock().unwrap();
            drop(self.switches.opened.wait_while(shut, |shut| *shut).unwrap());
        }
        if offset == 0 {
            self.switches.switches.fetch_add(1, Ordering::SeqCst);
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
        self.file.flush()
    }
}

/// A folder with empty images, whose daemon can be started again.
struct Images {
    dir: tempfile::TempDir,
    names: &'static [&'static str],
    switches: Vec<Arc<Switches>>,
}

impl Images {
    fn new(names: &'static [&'static str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in names {
            let file = FileStorage::create(dir.path().join(name), true).unwrap();
            vmferry_qcow2::create(&file, &CreateOptions::new(LENGTH)).unwrap();
        }
        let switches = names.iter().map(|_| Arc::default()).collect();
        Self {
            dir,
            names,
            switches,
        }
    }

    fn open(&self, index: usize, read_only: bool) -> Arc<Qcow2Disk> {
        let path = self.dir.path().join(self.names[index]);
        let storage = Faulty {
            file: FileStorage::open(path, read_only, true).unwrap(),
            switches: Arc::clone(&self.switches[index]),
        };
        let options = OpenOptions {
            read_only,
            ..OpenOptions::default()
        };
        Arc::new(Qcow2Disk::open(Arc::new(storage), options, None).unwrap())
    }

    fn disk(&self, index: usize) -> Disk {
        live(self.names[index], self.open(index, false))
    }

    fn start(&self) -> Running {
        let disks = (0..self.names.len()).map(|index| self.disk(index));
        run(
            self.dir.path().to_owned(),
            disks.collect(),
            Vec::new(),
            None,
            None,
        )
    }

    fn path(&self, index: usize) -> std::path::PathBuf {
        self.dir.path().join(self.names[index])
    }
}

fn live(name: &str, image: Arc<Qcow2Disk>) -> Disk {
    Disk {
        node: Node::new(name, Box::new(Arc::clone(&image)), Hold::Nothing),
        record: None,
        start: Start::Live,
        peer: String::new(),
        taken_back: false,
        path: name.into(),
        format: "qcow2",
        image: Some(image),
    }
}

fn assert_clean(path: &Path) {
    let file = FileStorage::open(path, true, true).unwrap();
    let report = vmferry_qcow2::check(&file, Repair::None).unwrap();
    let found = report.errors + report.leaks + report.flags;
    assert_eq!(found, 0, "{}: {:?}", path.display(), report.findings);
}

/// Arguments of a job called as what it does, for QEMU's clients.
fn asked(job: &str, tag: &str, devices: &[&str]) -> Value {
    json!({"job-id": job, "tag": tag, "vmstate": devices[0], "devices": devices})
}

impl Qmp {
    /// Run a job to its end and dismiss it: its events, and its error.
    fn job(&mut self, command: &str, tag: &str, devices: &[&str]) -> (Vec<String>, Option<String>) {
        let mut arguments = asked("job", tag, devices);
        if command == "snapshot-delete" {
            arguments.as_object_mut().unwrap().remove("vmstate");
        }
        self.run(command, arguments);
        self.job_end("job")
    }

    fn job_end(&mut self, id: &str) -> (Vec<String>, Option<String>) {
        let mut events = self
            .events_until(|event| event.data["id"] == id && event.data["status"] == "concluded");
        let jobs = self.run("query-jobs", json!({}));
        let mut jobs = jobs.as_array().unwrap().iter();
        let job = jobs.find(|job| job["id"] == id).unwrap().clone();
        assert_eq!(job["current-progress"], 1, "{job}");
        self.run("job-dismiss", json!({"id": id}));
        events.extend(self.events_until(|event| event.data["status"] == "null"));
        for event in &mut events {
            *event = event.replace("JOB_STATUS_CHANGE ", "");
        }
        (events, job["error"].as_str().map(str::to_owned))
    }

    fn job_well(&mut self, command: &str, tag: &str, devices: &[&str]) {
        let (_, error) = self.job(command, tag, devices);
        assert_eq!(error, None, "{command} {tag}");
    }

    fn snapshots(&mut self, index: usize) -> Vec<String> {
        let image = self.blocks()[index].inserted.clone().unwrap().image;
        let snapshots = image.snapshots.into_iter().flatten();
        snapshots.map(|snapshot| snapshot.name).collect()
    }

    fn holds(&mut self) -> Vec<HoldLevel> {
        let blocks = self.blocks().into_iter();
        blocks.filter_map(|block| block.inserted?.x_hold).collect()
    }

    fn run_state(&mut self) -> String {
        self.run("query-status", json!({}))["status"]
            .as_str()
            .unwrap()
            .to_owned()
    }
}

#[test]
fn jobs_go_the_way_of_qemu() {
    let images = Images::new(&["a", "b"]);
    let daemon = images.start();
    let mut qmp = daemon.qmp();
    let mut nbd = daemon.nbd("a");
    nbd.write(0, &[1; 4096], false).unwrap();
    let both = ["a", "b"];
    let (events, error) = qmp.job("snapshot-save", "old", &both);
    assert_eq!(error, None);
    let well = [
        "created",
        "running",
        "STOP",
        "RESUME",
        "waiting",
        "pending",
        "concluded",
        "null",
    ];
    assert_eq!(events, well);
    assert_eq!(
        (qmp.snapshots(0), qmp.snapshots(1)),
        (vec!["old".to_owned()], vec!["old".to_owned()])
    );
    let info = qmp.blocks()[0]
        .inserted
        .clone()
        .unwrap()
        .image
        .snapshots
        .unwrap();
    assert_eq!(
        (info[0].vm_state_size, info[0].x_disk_size),
        (0, Some(LENGTH))
    );
    assert!(info[0].date_sec > 1_700_000_000);

    let (events, error) = qmp.job("snapshot-save", "old", &both);
    assert_eq!(
        error.as_deref(),
        Some("disk 'a' has a snapshot 'old' already")
    );
    let badly = [
        "created",
        "running",
        "STOP",
        "RESUME",
        "aborting",
        "concluded",
        "null",
    ];
    assert_eq!(events, badly);

    nbd.write(0, &[2; 4096], false).unwrap();
    let (events, error) = qmp.job("snapshot-load", "old", &both);
    assert_eq!((events, error), (well.map(str::to_owned).to_vec(), None));
    let mut found = [0; 4096];
    nbd.read(0, &mut found).unwrap();
    assert_eq!(found, [1; 4096]);
    let info = qmp.blocks()[1].inserted.clone().unwrap();
    assert_eq!(
        info.x_dirty_bytes,
        Some(LENGTH),
        "all of it may have changed"
    );
    nbd.write(0, &[3; 4096], false).unwrap();

    let (_, error) = qmp.job("snapshot-load", "new", &both);
    assert_eq!(error.as_deref(), Some("disk 'a' has no snapshot 'new'"));
    let (events, error) = qmp.job("snapshot-delete", "old", &both);
    assert_eq!(error, None);
    assert_eq!(
        events,
        [
            "created",
            "running",
            "waiting",
            "pending",
            "concluded",
            "null"
        ]
    );
    // QEMU does not mind.
    qmp.job_well("snapshot-delete", "old", &both);
    assert!(qmp.snapshots(0).is_empty());
    assert_eq!(qmp.run_state(), "running");
    nbd.read(0, &mut found).unwrap();
    assert_eq!(found, [3; 4096]);
    assert_eq!(qmp.run("query-jobs", json!({})), json!([]));
    daemon.end().unwrap();
    assert_clean(&images.path(0));
    assert_clean(&images.path(1));
}

#[test]
fn what_cannot_be_is_refused_at_once() {
    let images = Images::new(&["a", "b", "c"]);
    let disks = vec![
        images.disk(0),
        Disk {
            format: "raw",
            image: None,
            ..live("raw", images.open(1, false))
        },
        live("c", images.open(2, true)),
    ];
    let node = Arc::clone(&disks[0].node);
    let daemon = run(images.dir.path().to_owned(), disks, Vec::new(), None, None);
    let mut qmp = daemon.qmp();
    let mut refused = |arguments: Value| qmp.refused("snapshot-save", arguments);
    for (devices, why) in [
        (&["zz"][..], "snapshot-save: Device 'zz' not found"),
        (
            &["a", "raw"],
            "snapshot-save: disk 'raw' is raw, and only qcow2 images can have snapshots",
        ),
        (&["a", "c"], "snapshot-save: disk 'c' is read-only"),
        (&["a", "a"], "snapshot-save: disk 'a' is named twice"),
    ] {
        assert_eq!(refused(asked("job", "tag", devices)), why);
    }
    let none = json!({"job-id": "job", "tag": "tag", "vmstate": "a", "devices": []});
    let why = "snapshot-save: At least one device is required for snapshot";
    assert_eq!(refused(none), why);
    let elsewhere = json!({"job-id": "job", "tag": "tag", "vmstate": "b", "devices": ["a"]});
    let why = "snapshot-save: 'vmstate' names 'b', which is none of 'devices'";
    assert_eq!(refused(elsewhere), why);
    let why = "snapshot-save: Invalid job ID '1 job'";
    assert_eq!(refused(asked("1 job", "tag", &["a"])), why);
    let lease = node.lease("a test").unwrap();
    let why = "snapshot-save: disk 'a' is in use by a test";
    assert_eq!(refused(asked("job", "tag", &["a"])), why);
    drop(lease);
    assert_eq!(qmp.run("query-jobs", json!({})), json!([]));
    assert!(qmp.snapshots(0).is_empty());

    qmp.run("snapshot-save", asked("job", "tag", &["a"]));
    qmp.events_until(|event| event.data["status"] == "concluded");
    let again = qmp.refused("snapshot-save", asked("job", "other", &["a"]));
    assert_eq!(again, "snapshot-save: Job ID 'job' already in use");
    daemon.end().unwrap();
}

#[test]
fn a_disk_that_waits_for_a_migration_has_no_snapshots_yet() {
    let images = Images::new(&["a"]);
    let image = images.open(0, false);
    let disk = Disk {
        node: Node::new("a", Box::new(Arc::clone(&image)), Hold::Writes),
        start: Start::Waiting,
        ..live("a", image)
    };
    let dir = images.dir.path().to_owned();
    let daemon = run(dir, vec![disk], Vec::new(), Some(Incoming::Deferred), None);
    let refused = daemon
        .qmp()
        .refused("snapshot-save", asked("job", "tag", &["a"]));
    assert_eq!(refused, "snapshot-save: disk 'a' waits for a migration");
    daemon.end().unwrap();
}

#[test]
fn a_disk_that_migrates_has_no_snapshots_meanwhile() {
    let images = Images::new(&["a", "b"]);
    let daemon = images.start();
    let destination = Host::new();
    destination.make("a", &vec![0; usize::try_from(LENGTH).unwrap()]);
    let settings = Settings {
        incoming: true,
        ..Settings::default()
    };
    let to = destination.start(&["a"], &settings);
    let mut qmp = daemon.patient_qmp();
    let pause = json!([{"capability": "pause-before-switchover", "state": true}]);
    qmp.run("migrate-set-capabilities", json!({ "capabilities": pause }));
    let uri = to.incoming.clone().unwrap().to_string();
    qmp.run("migrate", json!({"uri": uri, "x-disks": ["a"]}));
    qmp.wait_status(&[MigrationStatus::PreSwitchover]);
    for command in ["snapshot-save", "snapshot-load"] {
        let refused = qmp.refused(command, asked("job", "tag", &["b", "a"]));
        assert_eq!(
            refused,
            format!("{command}: disk 'a' is in use by a migration")
        );
    }
    // What stays may have them.
    qmp.job_well("snapshot-save", "tag", &["b"]);
    qmp.run("migrate_cancel", json!({}));
    qmp.wait_status(&OVER);
    qmp.job_well("snapshot-delete", "tag", &["a", "b"]);
    drop(to);
    daemon.end().unwrap();
}

#[test]
fn disks_that_are_stopped_stay_stopped() {
    let images = Images::new(&["a", "b"]);
    let daemon = images.start();
    let mut qmp = daemon.qmp();
    qmp.run("stop", json!({}));
    qmp.events_until(|event| event.name == "STOP");
    for command in ["snapshot-save", "snapshot-load", "snapshot-delete"] {
        let (events, error) = qmp.job(command, "tag", &["b"]);
        assert_eq!(error, None, "{command}");
        let quiet = [
            "created",
            "running",
            "waiting",
            "pending",
            "concluded",
            "null",
        ];
        assert_eq!(events, quiet, "{command}");
        assert_eq!(qmp.run_state(), "paused");
        assert_eq!(qmp.holds(), [HoldLevel::Writes; 2]);
    }
    qmp.run("cont", json!({}));
    assert_eq!(qmp.holds(), [HoldLevel::Nothing; 2]);
    daemon.end().unwrap();
}

#[test]
fn a_disk_that_fails_takes_back_what_was_made_before() {
    let images = Images::new(&["a", "b", "c"]);
    let daemon = images.start();
    let mut qmp = daemon.qmp();
    let all = ["a", "b", "c"];
    qmp.job_well("snapshot-save", "first", &all);
    let made_before = images.switches[0].switches.load(Ordering::SeqCst);
    images.switches[1].fail.store(true, Ordering::SeqCst);
    let (events, error) = qmp.job("snapshot-save", "second", &all);
    let error = error.unwrap();
    assert!(error.starts_with("disk 'b': "), "{error}");
    assert!(!error.contains("stays"), "{error}");
    assert!(events.contains(&"RESUME".to_owned()), "{events:?}");
    // Made, and taken back.
    let made = images.switches[0].switches.load(Ordering::SeqCst) - made_before;
    assert_eq!(made, 2);
    for index in 0..3 {
        assert_eq!(qmp.snapshots(index), ["first"]);
    }
    // Guests go on, and another try is fine.
    daemon.nbd("a").write(0, &[1; 4096], false).unwrap();
    images.switches[1].fail.store(false, Ordering::SeqCst);
    qmp.job_well("snapshot-save", "second", &all);
    qmp.job_well("snapshot-delete", "second", &all);

    // What cannot be taken back is told.
    *images.switches[1].then.lock().unwrap() = Some(Arc::clone(&images.switches[0]));
    images.switches[1].fail.store(true, Ordering::SeqCst);
    let (_, error) = qmp.job("snapshot-save", "third", &all);
    let error = error.unwrap();
    assert!(error.starts_with("disk 'b': "), "{error}");
    assert!(
        error.contains("and snapshot 'third' stays on disk 'a': "),
        "{error}"
    );
    for switches in &images.switches {
        switches.fail.store(false, Ordering::SeqCst);
    }
    assert_eq!(qmp.snapshots(0), ["first", "third"]);
    assert_eq!(qmp.snapshots(1), ["first"]);
    qmp.job_well("snapshot-delete", "third", &all);
    daemon.end().unwrap();
    for index in 0..3 {
        let file = FileStorage::open(images.path(index), true, true).unwrap();
        let report = vmferry_qcow2::check(&file, Repair::None).unwrap();
        assert_eq!(report.errors, 0, "{:?}", report.findings);
    }
}

#[test]
fn disks_that_do_not_fit_together_any_more_stay_stopped() {
    let images = Images::new(&["a", "b"]);
    let daemon = images.start();
    let mut qmp = daemon.qmp();
    qmp.job_well("snapshot-save", "old", &["a", "b"]);
    let mut nbd = daemon.nbd("a");
    nbd.write(0, &[1; 512], false).unwrap();
    nbd.flush().unwrap();
    images.switches[1].fail.store(true, Ordering::SeqCst);
    let (events, error) = qmp.job("snapshot-load", "old", &["a", "b"]);
    let error = error.unwrap();
    assert!(error.starts_with("disk 'b': "), "{error}");
    assert!(
        error.ends_with("; and snapshot 'old' was applied before to 'a'"),
        "{error}"
    );
    assert!(!events.contains(&"RESUME".to_owned()), "{events:?}");
    assert_eq!(qmp.holds(), [HoldLevel::Writes; 2]);
    assert_eq!(qmp.run_state(), "paused");
    images.switches[1].fail.store(false, Ordering::SeqCst);
    let (events, error) = qmp.job("snapshot-load", "old", &["a", "b"]);
    assert_eq!(error, None);
    assert!(!events.contains(&"RESUME".to_owned()), "{events:?}");
    qmp.run("cont", json!({}));
    qmp.events_until(|event| event.name == "RESUME");
    let mut found = [7; 512];
    nbd.read(0, &mut found).unwrap();
    assert_eq!(found, [0; 512]);
    daemon.end().unwrap();
}

#[test]
fn a_disk_whose_length_was_another_is_not_taken_back_in_use() {
    let images = Images::new(&["a"]);
    let daemon = images.start();
    daemon.qmp().job_well("snapshot-save", "short", &["a"]);
    daemon.end().unwrap();
    images.open(0, false).resize(2 * LENGTH).unwrap();
    let daemon = images.start();
    let (events, error) = daemon.qmp().job("snapshot-load", "short", &["a"]);
    let why = "disk 'a' had 4194304 bytes when snapshot 'short' was taken and has 8388608; that \
               cannot change while it is in use";
    assert_eq!(error.as_deref(), Some(why));
    assert!(!events.contains(&"STOP".to_owned()), "{events:?}");
    daemon.end().unwrap();
}

/// The patience for writes in flight has an end, and so has this test: after ten seconds.
#[test]
fn a_write_that_does_not_end_ends_the_job() {
    let images = Images::new(&["a", "b"]);
    let daemon = images.start();
    let mut qmp = daemon.qmp();
    images.switches[1].set_shut(true);
    let stuck: JoinHandle<()> = {
        let mut nbd = daemon.nbd("b");
        std::thread::spawn(move || nbd.write(0, &[STUCK; 65536], false).unwrap())
    };
    let end = Instant::now() + PATIENCE;
    while images.switches[1].stuck.load(Ordering::SeqCst) == 0 {
        assert!(Instant::now() < end, "the write does not get there");
        std::thread::yield_now();
    }
    qmp.run("snapshot-save", asked("job", "tag", &["a", "b"]));
    qmp.events_until(|event| event.name == "STOP");
    assert_eq!(qmp.run_state(), "save-vm");
    let busy = "snapshot job 'job' is at work";
    for (command, arguments) in [
        ("snapshot-save", asked("other", "tag", &["a"])),
        ("migrate", json!({"uri": "tcp:127.0.0.1:1"})),
        ("stop", json!({})),
    ] {
        let refused = qmp.refused(command, arguments);
        assert_eq!(refused, format!("{command}: {busy}"));
    }
    let refused = qmp.refused("job-dismiss", json!({"id": "job"}));
    assert!(
        refused.contains("in state 'running' cannot accept"),
        "{refused}"
    );
    let (_, error) = qmp.job_end("job");
    let why = "disk 'b' has writes in flight that do not end";
    assert_eq!(error.as_deref(), Some(why));
    assert_eq!(qmp.holds(), [HoldLevel::Nothing; 2]);
    assert!(qmp.snapshots(0).is_empty());
    images.switches[1].set_shut(false);
    stuck.join().unwrap();
    qmp.job_well("snapshot-save", "tag", &["a", "b"]);
    daemon.end().unwrap();
}

/// Writes a counter to one disk after the other, each acknowledged before the next.
fn count_on(
    daemon: &Running,
    names: &[&str],
) -> (JoinHandle<()>, Arc<AtomicBool>, Arc<AtomicUsize>) {
    let mut disks: Vec<_> = names.iter().map(|name| daemon.nbd(name)).collect();
    let (finish, count) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicUsize::new(0)),
    );
    let thread = {
        let (finish, count) = (Arc::clone(&finish), Arc::clone(&count));
        std::thread::spawn(move || {
            let mut number = 0_u64;
            while !finish.load(Ordering::SeqCst) {
                number += 1;
                for disk in &mut disks {
                    disk.write(8192, &number.to_be_bytes(), false).unwrap();
                }
                // Something to allocate, so that the metadata change, too.
                let at = number * 65536 % (LENGTH - MIB) + MIB;
                disks[0].write(at, &[9; 4096], false).unwrap();
                count.store(usize::try_from(number).unwrap(), Ordering::SeqCst);
            }
        })
    };
    (thread, finish, count)
}

fn counter(image: &Qcow2Disk) -> u64 {
    let mut number = [0; 8];
    image.read_at(&mut number, 8192).unwrap();
    u64::from_be_bytes(number)
}

#[test]
fn snapshots_of_several_disks_are_of_one_moment() {
    let images = Images::new(&["a", "b", "c"]);
    let daemon = images.start();
    let all = ["a", "b", "c"];
    let (writer, finish, _) = count_on(&daemon, &all);
    let mut qmp = daemon.qmp();
    let rounds = 40;
    for round in 0..rounds {
        qmp.job_well("snapshot-save", &format!("round {round}"), &all);
        if round % 4 == 3 {
            qmp.job_well("snapshot-delete", &format!("round {round}"), &all);
        }
    }
    finish.store(true, Ordering::SeqCst);
    writer.join().unwrap();
    daemon.end().unwrap();
    let open: Vec<_> = (0..3).map(|index| images.open(index, false)).collect();
    let mut last = 0;
    for round in (0..rounds).filter(|round| round % 4 != 3) {
        let counters = open.iter().map(|image| {
            image.apply_snapshot(&format!("round {round}")).unwrap();
            counter(image)
        });
        let counters: Vec<u64> = counters.collect();
        assert!(
            counters.is_sorted_by(|a, b| a >= b),
            "{round}: {counters:?}"
        );
        assert!(counters[0] - counters[2] <= 1, "{round}: {counters:?}");
        assert!(counters[0] >= last, "{round}: {counters:?} after {last}");
        last = counters[0];
    }
    assert!(last > 0, "the writer got nowhere");
    drop(open);
    (0..3).for_each(|index| assert_clean(&images.path(index)));
}

#[test]
fn snapshots_without_a_pause_do_not_starve_a_writer() {
    let images = Images::new(&["a", "b"]);
    let daemon = images.start();
    let (writer, finish, count) = count_on(&daemon, &["a", "b"]);
    let mut qmp = daemon.qmp();
    let end = Instant::now() + PATIENCE;
    let mut rounds = 0;
    while count.load(Ordering::SeqCst) < 500 || rounds < 20 {
        assert!(
            Instant::now() < end,
            "{rounds} rounds, and {count:?} writes"
        );
        qmp.job_well("snapshot-save", "tag", &["a", "b"]);
        qmp.job_well("snapshot-delete", "tag", &["a", "b"]);
        rounds += 1;
    }
    println!("{rounds} rounds, and {count:?} writes");
    finish.store(true, Ordering::SeqCst);
    writer.join().unwrap();
    daemon.end().unwrap();
    (0..2).for_each(|index| assert_clean(&images.path(index)));
}

#[test]
fn a_daemon_that_ends_finishes_the_job_at_work() {
    let images = Images::new(&["a", "b"]);
    for round in 0..5 {
        let daemon = images.start();
        let mut qmp = daemon.qmp();
        qmp.run(
            "snapshot-save",
            asked("job", &format!("{round}"), &["a", "b"]),
        );
        qmp.run("quit", json!({}));
        let events = qmp.events_until(|event| event.name == "SHUTDOWN");
        assert_eq!(events[events.len() - 2], "JOB_STATUS_CHANGE concluded");
        daemon.end().unwrap();
        let (a, b) = (images.open(0, true), images.open(1, true));
        let names = |image: &Qcow2Disk| {
            let snapshots = image.snapshots().into_iter();
            snapshots.map(|snapshot| snapshot.name).collect::<Vec<_>>()
        };
        assert_eq!(names(&a), names(&b));
        drop((a, b));
        (0..2).for_each(|index| assert_clean(&images.path(index)));
    }
}
