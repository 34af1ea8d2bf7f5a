//! kill -9 of a daemon that takes and deletes snapshots of disks in use: no write is lost, no snapshot is wrong, and the
//! images have lost space at most.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde_json::{Value, json};
use vmferry_channel::Stop;
use vmferry_disk::BlockDevice;
use vmferry_nbd::{Client, ClientSettings, NbdError, NbdUri};
use vmferry_qcow2::{ChainOptions, CreateOptions, FileStorage};

use crate::control::Control;
use crate::need;
use crate::peers::guest::Guest;
use crate::peers::nbd::{run_tool, try_tool};
use crate::peers::patterns;
use crate::peers::vmferry::{run, run_well};
use crate::peers::{image, long, seeded, until};
use crate::serve::{CommandLine, DISK};

const MIB: u64 = 1 << 20;
/// Snapshots that are kept; the oldest goes first.
const KEPT: usize = 2;

fn utf8(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// As long as nobody flushed what followed: leaks, and COPIED flags that disagree with a refcount that is high enough.
fn assert_consistent(path: &Path) {
    let output = run(["check", "--json", utf8(path)]);
    let said = String::from_utf8_lossy(&output.stdout);
    let report: Value = serde_json::from_str(&said).unwrap_or_else(|error| {
        let errors = String::from_utf8_lossy(&output.stderr);
        panic!("no report ({error}): {said}{errors}")
    });
    for (kind, count) in report["left"].as_object().expect("a count of each kind") {
        let harmless = ["leak", "copied-flag"].contains(&kind.as_str());
        assert!(harmless || count == 0, "{report}");
    }
    // It takes flags for errors, too.
    if let Some(Err(said)) = try_tool("qemu-img", ["check", "-f", "qcow2", utf8(path)]) {
        let mut errors = said.lines().filter(|line| line.contains("ERROR"));
        assert!(errors.all(|line| line.contains("OFLAG_COPIED")), "{said}");
    }
}

/// Names of the snapshots that all images have, and of those that only some have.
fn listed(images: &[PathBuf]) -> [BTreeSet<String>; 2] {
    let list = ["snapshot", "list", "--json"].into_iter();
    let said = run_well(list.chain(images.iter().map(|path| utf8(path))));
    let listing: Value = serde_json::from_str(&said).expect("JSON");
    let names = |snapshots: &Value| -> Vec<String> {
        let snapshots = snapshots.as_array().expect("a list of snapshots").iter();
        let names = snapshots.map(|one| one["name"].as_str().expect("a name").to_owned());
        names.collect()
    };
    let partial = listing["partial"]
        .as_array()
        .expect("a list of disks")
        .iter();
    let partial = partial.flat_map(|disk| names(&disk["snapshots"]));
    [
        names(&listing["whole"]).into_iter().collect(),
        partial.collect(),
    ]
}

/// What is known of the snapshots.
#[derive(Debug, Default)]
struct Known {
    /// They were taken, and not deleted.
    there: BTreeSet<String>,
    /// They were being taken, or deleted.
    perhaps: BTreeSet<String>,
    number: u64,
    taken: u64,
    deleted: u64,
}

impl Known {
    /// Compares with the images of a daemon that is dead; deletes what was half done.
    fn check(&mut self, images: &[PathBuf]) {
        let [whole, partial] = listed(images);
        assert!(self.there.is_subset(&whole), "{self:?}: {whole:?}");
        for name in whole.difference(&self.there).chain(&partial) {
            assert!(self.perhaps.contains(name), "{name} of {self:?}");
            let delete = ["snapshot", "delete", name.as_str()].into_iter();
            run_well(delete.chain(images.iter().map(|path| utf8(path))));
        }
        self.perhaps.clear();
    }
}

/// Takes and deletes snapshots until its daemon is gone.
struct Snapshotter {
    control: Control,
    disks: &'static [&'static str],
    pause: Duration,
    known: Known,
    /// Commands so far.
    begun: Arc<AtomicU64>,
}

impl Snapshotter {
    fn start(
        line: &CommandLine,
        disks: &'static [&'static str],
        pause: Duration,
        known: Known,
    ) -> (JoinHandle<Known>, Arc<AtomicU64>) {
        let control = Control::connect(&line.qmp_socket()).expect("a daemon takes QMP clients");
        let begun = Arc::default();
        let snapshotter = Self {
            control,
            disks,
            pause,
            known,
            begun: Arc::clone(&begun),
        };
        (thread::spawn(move || snapshotter.live()), begun)
    }

    fn live(mut self) -> Known {
        loop {
            match self.step() {
                Ok(()) => {}
                // What a daemon says is told as another kind.
                Err(error) if error.kind() != io::ErrorKind::Other => return self.known,
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn step(&mut self) -> io::Result<()> {
        if self.known.there.len() > KEPT
            && let Some(oldest) = self.known.there.pop_first()
        {
            self.known.perhaps.insert(oldest.clone());
            self.job("snapshot-delete", &oldest)?;
            self.known.perhaps.remove(&oldest);
            self.known.deleted += 1;
        }
        self.known.number += 1;
        let name = format!("s{:08}", self.known.number);
        self.known.perhaps.insert(name.clone());
        self.job("snapshot-save", &name)?;
        self.known.perhaps.remove(&name);
        self.known.there.insert(name);
        self.known.taken += 1;
        thread::sleep(self.pause);
        Ok(())
    }

    fn job(&mut self, command: &str, tag: &str) -> io::Result<()> {
        let mut arguments = json!({"job-id": "job", "tag": tag, "devices": self.disks});
        if command == "snapshot-save" {
            arguments["vmstate"] = self.disks[0].into();
        }
        self.begun.fetch_add(1, Ordering::SeqCst);
        self.control.execute(command, &arguments)?;
        // Events that came before the answer were dropped with it: it is asked for.
        let error = loop {
            let jobs = self.control.execute("query-jobs", &json!({}))?;
            if jobs[0]["status"] == "concluded" {
                break jobs[0]["error"].clone();
            }
            thread::sleep(Duration::from_millis(1));
        };
        self.control.execute("job-dismiss", &json!({"id": "job"}))?;
        assert_eq!(error, Value::Null, "{command} {tag}");
        Ok(())
    }
}

fn connect(line: &CommandLine, disk: &str) -> Client {
    let stop = Stop::new().expect("an event can be made");
    let side = NbdUri {
        export: disk.to_owned(),
        ..line.export()
    };
    Client::connect(&side, &ClientSettings::default(), &stop)
        .unwrap_or_else(|error| panic!("the export: {error}"))
}

/// Writes a counter to one disk after the other, each acknowledged before the next, until the daemon is gone. All disks
/// have the same number when it returns: each may have lost others of those that were not flushed.
fn count_on(line: &CommandLine, disks: &[&str], mut number: u64) -> JoinHandle<u64> {
    let mut disks: Vec<Client> = disks.iter().map(|disk| connect(line, disk)).collect();
    for disk in &mut disks {
        let first = disk.write(8192, &number.to_be_bytes(), true);
        first.expect("the disk takes a write");
    }
    thread::spawn(move || {
        loop {
            number += 1;
            for disk in &mut disks {
                let place = 2 * MIB + number * 65536 % (4 * MIB);
                let written = disk
                    .write(8192, &number.to_be_bytes(), false)
                    .and_then(|()| disk.write(place, &[7; 4096], number.is_multiple_of(64)));
                match written {
                    Ok(()) => {}
                    Err(NbdError::Closed { .. } | NbdError::Socket { .. }) => return number,
                    Err(error) => panic!("the disk gave an error: {error}"),
                }
            }
        }
    })
}

/// The counter in each image, as a snapshot has it.
fn counters(images: &[PathBuf], snapshot: &str) -> Vec<u64> {
    let counter = |path: &PathBuf| {
        let copy = path.with_extension("copy");
        std::fs::copy(path, &copy).expect("an image can be copied");
        let options = ChainOptions {
            read_only: false,
            lock: true,
        };
        let disk = vmferry_qcow2::open(&copy, options).expect("the copy is nobody else's");
        disk.apply_snapshot(snapshot).expect("the image has it");
        let mut number = [0; 8];
        disk.read_at(&mut number, 8192).expect("it can be read");
        u64::from_be_bytes(number)
    };
    images.iter().map(counter).collect()
}

#[test]
fn a_daemon_that_is_killed_while_it_takes_snapshots_of_three_disks() {
    const DISKS: [&str; 3] = [DISK, "disk1", "disk2"];
    let mut rng = seeded();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let images = DISKS.map(|name| folder.path().join(format!("{name}.qcow2")));
    for path in &images {
        let storage = FileStorage::create(path, true).expect("a new file");
        vmferry_qcow2::create(&storage, &CreateOptions::new(8 * MIB)).expect("a new image");
    }
    let flag = |index: usize| format!("{}={},format=qcow2", DISKS[index], images[index].display());
    let line = CommandLine::of_image("host", folder.path(), &images[0], ",format=qcow2").args([
        "--disk",
        &flag(1),
        "--disk",
        &flag(2),
    ]);
    let (mut known, mut number, mut whole) = (Known::default(), 0, 0);
    for kill in 0..if long() { 100 } else { 8 } {
        let daemon = line
            .start()
            .unwrap_or_else(|refused| panic!("after {kill} kills: {refused:?}"));
        let writer = count_on(&line, &DISKS, number);
        let (snapshotter, _) = Snapshotter::start(&line, &DISKS, Duration::ZERO, known);
        thread::sleep(Duration::from_millis(rng.u64(0..500)));
        daemon.kill();
        number = writer.join().expect("the disks gave no error");
        known = snapshotter.join().expect("the daemon refused nothing");
        images.iter().for_each(|path| assert_consistent(path));
        known.check(&images);
        for name in &known.there {
            let counters = counters(&images, name);
            let fit = counters.is_sorted_by(|a, b| a >= b) && counters[0] - counters[2] <= 1;
            assert!(fit, "snapshot {name} after {kill} kills: {counters:?}");
            whole += 1;
        }
    }
    println!("{number} rounds of writes, {whole} looks at {known:?}");
    assert!(known.taken > 0 && whole > 0, "{known:?}");
    let daemon = line.start().expect("a daemon that starts");
    let control = format!("unix:{}", line.qmp_socket().display());
    for name in &known.there {
        run_well(["snapshot", "delete", name, "--qmp", &control]);
    }
    daemon.terminate();
    for path in &images {
        assert_consistent(path);
        run_well(["check", "--repair", "all", utf8(path)]);
        need!(image::assert_clean(path));
    }
}

/// Snapshots every second, deleted again every second; a guest that never sees a wrong byte; and a daemon that is killed
/// again and again, half the times just when it works on a snapshot.
#[test]
fn a_guest_sees_no_wrong_byte_while_snapshots_come_and_go_and_the_daemon_dies() {
    let mut rng = seeded();
    let rounds = if long() { 100 } else { 5 };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("image.qcow2");
    need!(run_tool(
        "qemu-img",
        ["create", "-q", "-f", "qcow2", utf8(&path), "32M"]
    ));
    let line = CommandLine::of_image("host", folder.path(), &path, ",format=qcow2");
    let mut guest = Guest::new();
    // What is acknowledged and not flushed would die with the daemon, and the guest not be told.
    let machine = need!(guest.host_of_patterns(&line.nbd_socket(), DISK, true));
    let mut daemon = line.start().expect("a daemon that starts");
    let mut qemu = machine.start();
    guest.wait_more_ticks(5);
    let (mut known, mut patterns) = (Known::default(), 0);
    for round in 0..rounds {
        let second = Duration::from_secs(1);
        let (snapshotter, begun) = Snapshotter::start(&line, &[DISK], second, known);
        guest.wait_more_ticks(5);
        thread::sleep(Duration::from_millis(rng.u64(0..2000)));
        if rng.bool() {
            let before = begun.load(Ordering::SeqCst);
            until("work on a snapshot", || {
                (begun.load(Ordering::SeqCst) > before).then_some(())
            });
            thread::sleep(Duration::from_micros(rng.u64(0..20_000)));
        }
        daemon.kill();
        known = snapshotter.join().expect("the daemon refused nothing");
        // The guest does not wait for checks.
        let copy = folder.path().join("copy.qcow2");
        std::fs::copy(&path, &copy).expect("an image can be copied");
        known.check(std::slice::from_ref(&path));
        if rng.u8(0..4) == 0 {
            // Flags stay as they are, and so may the verdict.
            run(["check", "--repair", "leaks", utf8(&path)]);
            assert_consistent(&path);
        }
        daemon = line
            .start()
            .unwrap_or_else(|refused| panic!("after {round} kills: {refused:?}"));
        assert_consistent(&copy);
        if let Some(newest) = known.there.last() {
            let raw = folder.path().join("raw");
            let select = format!("snapshot.name={newest}");
            let convert = ["convert", "-l", &select, "-f", "qcow2", "-O", "raw"];
            let files = [utf8(&copy), utf8(&raw)];
            need!(run_tool("qemu-img", convert.into_iter().chain(files)));
            patterns += patterns::assert_patterns(&raw);
        }
    }
    let ticks = guest.wait_more_ticks(20);
    assert_eq!(qemu.run_state(), "running");
    qemu.qmp.execute("stop", &json!({}));
    qemu.quit();
    println!("{rounds} kills, {ticks} ticks, {patterns} patterns in snapshots, {known:?}");
    assert!(known.taken > 0 && patterns > 0, "{known:?}");
    let control = format!("unix:{}", line.qmp_socket().display());
    for name in &known.there {
        run_well(["snapshot", "delete", name, "--qmp", &control]);
    }
    daemon.terminate();
    assert_consistent(&path);
    run_well(["check", "--repair", "all", utf8(&path)]);
    need!(image::assert_clean(&path));
}
