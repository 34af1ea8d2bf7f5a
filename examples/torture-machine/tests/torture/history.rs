//! What happens to one guest.
//!
//! There are two sides, each with its own images. The guest's process is at one of them; for a
//! migration another process is started at the other side, and whoever does not have the guest
//! afterwards ends.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use vmferry_ram::Userfault;

use crate::host::{Host, PATIENCE};
use crate::link::{Cut, Link};

/// How often what happened, and how it ended.
pub(crate) type Ends = BTreeMap<(Move, End), u64>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Move {
    /// A migration; connections may break.
    Precopy,
    Postcopy,
    /// One that the operator calls off.
    Cancel,
    /// kill -9 on the way.
    KillSource,
    KillDestination,
    /// The machine is saved on its disks, or brought back to what was saved.
    Snapshot,
    /// Its devices are saved and loaded, without memory.
    Devices,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum End {
    /// The guest is where it was.
    Stayed,
    Moved,
    /// It has moved, although its postcopy broke on the way.
    Recovered,
    /// A kill -9 took it along. Another one begins.
    Lost,
}

/// Guest steps that follow each move.
const STEPS: u64 = 1500;
/// Limits in bytes per second; 0 is none. Each is above what the fastest guest dirties: a slower
/// precopy need not end.
const BANDWIDTHS: [u64; 3] = [0, 50 << 20, 100 << 20];
/// A command comes so late after the beginning of a migration, at most.
const DELAY_MICROS: u64 = 80_000;

pub(crate) struct History {
    rng: fastrand::Rng,
    folder: TempDir,
    memory_bytes: u64,
    cpus: u32,
    /// Format and length of each disk.
    disks: Vec<(&'static str, u64)>,
    here: Host,
    side: usize,
    /// May memory follow a guest that runs?
    has_postcopy: bool,
    /// Snapshots on the images of each side, and what the machine was then.
    saved: [Vec<(String, Value)>; 2],
    /// Names are used once.
    names: u64,
    ends: Ends,
}

/// A migration that was started.
struct Migration {
    there: Host,
    /// The guest does not run there before it is told to, so that both sides can be compared.
    waits: bool,
    end: End,
}

impl History {
    pub(crate) fn new(seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let folder = tempfile::Builder::new()
            .prefix("torture-")
            .tempdir()
            .expect("a folder");
        let formats = ["raw", "qcow2", "qcow2"];
        let count = rng.usize(0..3);
        let disks: Vec<_> = (0..count)
            .map(|_| (formats[rng.usize(0..formats.len())], rng.u64(1..5) << 20))
            .collect();
        let (memory_bytes, cpus) = (rng.u64(4..24) << 20, rng.u32(1..4));
        let arguments = arguments(
            &folder,
            memory_bytes,
            cpus,
            &disks,
            0,
            &[format!("--seed={seed}")],
        );
        Self {
            here: Host::start(folder.path(), "0".into(), &arguments),
            rng,
            folder,
            memory_bytes,
            cpus,
            disks,
            side: 0,
            has_postcopy: Userfault::open_missing().is_ok(),
            saved: Default::default(),
            names: 1,
            ends: Ends::new(),
        }
    }

    pub(crate) fn run(mut self, moves: u64) -> Ends {
        for _ in 0..moves {
            let kind = self.choose();
            println!("  {kind:?} ...");
            let end = match kind {
                Move::Snapshot => self.snapshot(),
                Move::Devices => self.devices(),
                _ => self.migrate(kind),
            };
            println!("  {kind:?}: {end:?}");
            *self.ends.entry((kind, end)).or_default() += 1;
            self.here.go_on(STEPS);
        }
        self.ends
    }

    fn choose(&mut self) -> Move {
        let can_snapshot =
            !self.disks.is_empty() && self.disks.iter().all(|(format, _)| *format == "qcow2");
        match self.rng.u32(0..100) {
            0..25 => Move::Precopy,
            25..60 if self.has_postcopy => Move::Postcopy,
            25..60 => Move::Precopy,
            60..70 => Move::Cancel,
            70..77 => Move::KillSource,
            77..85 => Move::KillDestination,
            85..95 if can_snapshot => Move::Snapshot,
            _ => Move::Devices,
        }
    }

    /// About so many make a migration.
    fn bytes(&self) -> u64 {
        self.memory_bytes + self.disks.iter().map(|(_, bytes)| bytes).sum::<u64>()
    }

    fn path(&mut self, what: &str) -> PathBuf {
        self.names += 1;
        self.folder.path().join(format!("{}.{what}", self.names))
    }

    fn start(&mut self, side: usize, more: &[String]) -> Host {
        let arguments = arguments(
            &self.folder,
            self.memory_bytes,
            self.cpus,
            &self.disks,
            side,
            more,
        );
        self.names += 1;
        Host::start(self.folder.path(), self.names.to_string(), &arguments)
    }

    fn cut(&mut self, bytes: u64) -> Cut {
        match self.rng.u32(0..10) {
            0..3 => Cut::Never,
            3..8 => Cut::Forth(self.rng.u64(..bytes)),
            _ => Cut::Back(self.rng.u64(..100)),
        }
    }

    fn delay(&mut self) {
        thread::sleep(Duration::from_micros(self.rng.u64(..DELAY_MICROS)));
    }

    fn migrate(&mut self, kind: Move) -> End {
        let may = self.has_postcopy && kind != Move::Precopy && self.rng.bool();
        let postcopy = kind == Move::Postcopy || may;
        let waits = self.rng.bool();
        let (mut there, target) = self.expect(postcopy, waits);
        // What breaks is chosen before, or when the guest is between both sides.
        let early = kind == Move::Precopy || self.rng.u32(0..4) == 0;
        let cut = match kind {
            Move::Precopy | Move::Postcopy if early => {
                let bytes = self.bytes();
                self.cut(bytes)
            }
            _ => Cut::Never,
        };
        let link = Link::new(self.path("link"), &target, cut);
        self.here.must("migrate", json!({"uri": link.uri()}));
        if self.rng.bool() {
            self.delay();
        }
        if postcopy && (kind == Move::Postcopy || self.rng.bool()) {
            // It may be over, or have failed.
            let _ = self.here.ask("migrate-start-postcopy", json!({}));
            if kind == Move::Postcopy && !early {
                let left = self.wait_for_switch();
                match self.rng.u32(0..4) {
                    // The operator breaks it off, if it is not over.
                    0 => drop(self.here.ask("migrate-pause", json!({}))),
                    1 => drop(there.ask("migrate-pause", json!({}))),
                    _ => {
                        let cut = self.cut(left);
                        link.cut(cut);
                    }
                }
            } else {
                self.delay();
            }
        }
        let migration = Migration {
            there,
            waits,
            end: End::Moved,
        };
        match kind {
            // Too late is no error of ours.
            Move::Cancel => drop(self.here.ask("migrate_cancel", json!({}))),
            Move::KillSource => return self.kill_source(migration),
            Move::KillDestination => return self.kill_destination(migration),
            _ => {}
        }
        self.settle(migration)
    }

    /// Start a machine at the other side that waits for the guest, and where.
    fn expect(&mut self, postcopy: bool, waits: bool) -> (Host, PathBuf) {
        let mut more = vec!["--incoming=defer".to_owned(), "--tables=128K".to_owned()];
        more.extend(waits.then(|| "--paused".to_owned()));
        let mut there = self.start(1 - self.side, &more);
        let capabilities = [
            ("postcopy-ram", postcopy),
            ("xbzrle", self.rng.bool()),
            ("auto-converge", self.rng.bool()),
        ];
        self.here.set_capabilities(&capabilities);
        there.set_capabilities(&capabilities);
        let bandwidth = BANDWIDTHS[self.rng.usize(0..BANDWIDTHS.len())];
        self.here.must(
            "migrate-set-parameters",
            json!({"max-bandwidth": bandwidth}),
        );
        let target = self.path("in");
        there.must(
            "migrate-incoming",
            json!({"uri": format!("unix:{}", target.display())}),
        );
        (there, target)
    }

    /// Until the guest is to run at the other side, or all is over; returns bytes that are left.
    fn wait_for_switch(&mut self) -> u64 {
        let is_there = ["postcopy-active", "completed", "failed"];
        let state = self.here.wait("query-migrate", |state| {
            state["x-undecided"] == true || is_there.iter().any(|there| state["status"] == *there)
        });
        state["ram"]["remaining"]
            .as_u64()
            .unwrap_or_default()
            .max(1)
    }

    /// See where the guest is, and go on if something broke.
    fn settle(&mut self, mut migration: Migration) -> End {
        let begun = Instant::now();
        loop {
            assert!(
                begun.elapsed() < PATIENCE,
                "it does not end: {}",
                self.here.log()
            );
            let state = self.wait_for_source();
            let undecided = state["x-undecided"] == true;
            match state["status"].as_str().unwrap_or_default() {
                "completed" => return self.moved(migration),
                "failed" | "cancelled" => return self.stayed(migration),
                _ => {}
            }
            let there = &mut migration.there;
            let decision =
                match &*there.wait_for_migration(&["completed", "failed", "postcopy-paused"]) {
                    // The last word was lost.
                    "completed" if !undecided => return self.moved(migration),
                    "completed" => "give-up",
                    "failed" => "serve",
                    _ => {
                        migration.end = End::Recovered;
                        self.reconnect(&mut migration.there);
                        continue;
                    }
                };
            // Refused if a connection that was offered before has changed everything meanwhile.
            let _ = self.here.ask("x-resolve", json!({"decision": decision}));
        }
    }

    /// Until it waits for a person, or is over.
    fn wait_for_source(&mut self) -> Value {
        let waits = ["completed", "failed", "cancelled", "postcopy-paused"];
        self.here.wait("query-migrate", |state| {
            state["x-undecided"] == true || waits.iter().any(|waits| state["status"] == *waits)
        })
    }

    fn reconnect(&mut self, there: &mut Host) {
        let target = self.path("in");
        let cut = self.cut(self.memory_bytes);
        let link = Link::new(self.path("link"), &target, cut);
        there.must(
            "migrate-recover",
            json!({"uri": format!("unix:{}", target.display())}),
        );
        // Refused if the connection that was offered before is still being tried.
        let again = json!({"uri": link.uri(), "resume": true});
        let _ = self.here.ask("migrate", again);
    }

    fn stayed(&mut self, mut migration: Migration) -> End {
        assert!(!migration.there.is_running(), "two guests");
        self.here
            .wait("query-status", |status| status["running"] == true);
        End::Stayed
    }

    fn moved(&mut self, migration: Migration) -> End {
        let Migration {
            mut there,
            waits,
            end,
        } = migration;
        there.wait_for_migration(&["completed"]);
        assert!(!self.here.is_running(), "two guests");
        match waits {
            true => {
                assert_eq!(
                    self.here.digests(),
                    there.digests(),
                    "both sides after the switch"
                );
                there.must("cont", json!({}));
            }
            false => drop(there.wait("query-status", |status| status["running"] == true)),
        }
        self.here = there;
        self.side = 1 - self.side;
        end
    }

    fn kill_source(&mut self, mut migration: Migration) -> End {
        self.here.kill();
        let over = ["none", "completed", "failed", "postcopy-paused"];
        match &*migration.there.wait_for_migration(&over) {
            "completed" => {
                let there = &mut migration.there;
                if migration.waits {
                    there.must("cont", json!({}));
                }
                there.wait("query-status", |status| status["running"] == true);
                self.here = migration.there;
                self.side = 1 - self.side;
                End::Moved
            }
            _ => {
                drop(migration);
                self.begin_anew()
            }
        }
    }

    fn kill_destination(&mut self, mut migration: Migration) -> End {
        migration.there.kill();
        let state = self.wait_for_source();
        drop(migration);
        match state["status"].as_str().unwrap_or_default() {
            "failed" | "cancelled" => {}
            // It may have run there, but there is no more.
            _ if state["x-undecided"] == true => {
                self.here.must("x-resolve", json!({"decision": "serve"}));
            }
            _ => return self.begin_anew(),
        }
        self.here
            .wait("query-status", |status| status["running"] == true);
        End::Stayed
    }

    /// The guest is gone: another one, on empty disks.
    fn begin_anew(&mut self) -> End {
        self.here.kill();
        for side in 0..2 {
            for number in 0..self.disks.len() {
                let image = image(&self.folder, side, number);
                // A side that never had a guest has none.
                let _ = std::fs::remove_file(image);
            }
        }
        self.saved = Default::default();
        let seed = format!("--seed={}", self.rng.u64(..));
        self.here = self.start(self.side, &[seed]);
        End::Lost
    }

    fn snapshot(&mut self) -> End {
        let was_running = self.rng.bool();
        let saved = self.saved[self.side].len();
        if saved == 0 || self.rng.bool() {
            self.here.must("stop", json!({}));
            let before = self.here.digests();
            let tag = format!("snapshot {}", self.names);
            self.names += 1;
            self.here.job("snapshot-save", &tag).expect("saved");
            assert_eq!(self.here.digests(), before, "after a snapshot");
            self.saved[self.side].push((tag, before));
            self.here.must("cont", json!({}));
            return End::Stayed;
        }
        let number = self.rng.usize(0..saved);
        let (tag, then) = self.saved[self.side][number].clone();
        if self.rng.u32(0..4) == 0 {
            self.here.job("snapshot-delete", &tag).expect("deleted");
            self.saved[self.side].remove(number);
            self.here
                .job("snapshot-load", &tag)
                .expect_err("it was deleted");
        } else if was_running {
            self.here.job("snapshot-load", &tag).expect("loaded");
        } else {
            self.here.must("stop", json!({}));
            self.here.job("snapshot-load", &tag).expect("loaded");
            assert_eq!(self.here.digests(), then, "after loading a snapshot");
        }
        self.here.must("cont", json!({}));
        End::Stayed
    }

    fn devices(&mut self) -> End {
        let path = self.path("devices");
        let file = json!({"filename": path});
        self.here.must("stop", json!({}));
        let before = self.here.digests();
        self.here.must("xen-save-devices-state", file.clone());
        self.here.must("xen-load-devices-state", file);
        assert_eq!(
            self.here.digests(),
            before,
            "after its devices were saved and loaded"
        );
        self.here.must("cont", json!({}));
        End::Stayed
    }
}

fn arguments(
    folder: &TempDir,
    memory_bytes: u64,
    cpus: u32,
    disks: &[(&str, u64)],
    side: usize,
    more: &[String],
) -> Vec<String> {
    let mut arguments = vec![format!("--memory={memory_bytes}"), format!("--cpus={cpus}")];
    for (number, (format, bytes)) in disks.iter().enumerate() {
        let image = image(folder, side, number);
        arguments.push(format!(
            "--disk=disk{number}={},format={format},size={bytes}",
            image.display()
        ));
    }
    arguments.extend_from_slice(more);
    arguments
}

fn image(folder: &TempDir, side: usize, number: usize) -> PathBuf {
    folder.path().join(format!("side{side}-disk{number}.img"))
}
