//! kill -9 of a daemon that serves a qcow2, under load: what was flushed is there, and the image has lost space at most.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::Value;
use vmferry_channel::Stop;
use vmferry_nbd::client::Operation;
use vmferry_nbd::{Client, ClientSettings, NbdError, NbdUri};

use crate::need;
use crate::peers::nbd::run_tool;
use crate::peers::vmferry::{run, run_well};
use crate::peers::{image, long, seeded};
use crate::serve::CommandLine;

/// Unit of what is written, in bytes. A write of more than one cluster may be there in part: a block is no longer than the
/// smallest cluster.
const BLOCK: usize = 512;
const BLOCKS: usize = 32 << 10;
/// The longest request, in blocks.
const REQUEST_MAX: usize = 256;
/// Requests under way.
const DEPTH: usize = 16;
/// How long a daemon lives before it is killed, at most, in milliseconds.
const LIFE_MS_MAX: u64 = 300;

/// How often each image is killed.
fn kills() -> usize {
    if long() { 25 } else { 5 }
}

#[test]
fn a_killed_daemon_leaves_a_qcow2_with_all_that_was_flushed() {
    killed("cluster_size=65536");
}

#[test]
fn the_same_with_small_clusters() {
    killed("cluster_size=4096");
}

#[test]
fn the_same_with_clusters_that_are_smaller_than_a_request() {
    killed("cluster_size=512,refcount_bits=1");
}

#[test]
fn the_same_with_version_2() {
    killed("compat=0.10,cluster_size=16384");
}

fn killed(options: &str) {
    let mut rng = seeded();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("image.qcow2");
    let name = path.to_str().expect("test paths are UTF-8");
    let size = (BLOCKS * BLOCK).to_string();
    let create = ["create", "-q", "-f", "qcow2", "-o", options, name, &size];
    need!(run_tool("qemu-img", create));
    let line = CommandLine::of_image("host", folder.path(), &path, ",format=qcow2");
    let mut known = Known::new(rng.u64(..));
    for kill in 0..kills() {
        let daemon = line
            .start()
            .unwrap_or_else(|refused| panic!("after {kill} kills: {refused:?}"));
        let guest = Guest::start(&line.export(), known, &mut rng);
        // Whenever it is, it is in the middle of something.
        std::thread::sleep(Duration::from_millis(rng.u64(0..LIFE_MS_MAX)));
        daemon.kill();
        known = guest.join().expect("the guest's disk gave no error");
        assert_no_errors(&path);
        if rng.bool() {
            run_well(["check", "--repair", "leaks", name]);
        }
    }
    println!("{} writes, {} flushes", known.writes, known.flushes);
    assert!(known.writes > 0, "nothing was written");
    let daemon = line.start().expect("a daemon that starts");
    known.check(&mut connect(&line.export()));
    daemon.terminate();
    run_well(["check", "--repair", "leaks", name]);
    need!(image::assert_clean(&path));
}

/// At most leaks, by our own judgement and by `qemu-img`'s.
fn assert_no_errors(path: &Path) {
    let name = path.to_str().expect("test paths are UTF-8");
    let output = run(["check", "--json", name]);
    let said = String::from_utf8_lossy(&output.stdout);
    let report: Value = serde_json::from_str(&said).unwrap_or_else(|error| {
        let errors = String::from_utf8_lossy(&output.stderr);
        panic!("no report ({error}): {said}{errors}")
    });
    for (kind, count) in report["left"].as_object().expect("a count of each kind") {
        assert!(kind == "leak" || count == 0, "{report}");
    }
    if let Some((errors, _)) = image::verdict(path) {
        assert_eq!(
            errors, 0,
            "qemu-img sees errors where vmferry check sees none"
        );
    }
}

fn connect(side: &NbdUri) -> Client {
    let stop = Stop::new().expect("an event can be made");
    Client::connect(side, &ClientSettings::default(), &stop)
        .unwrap_or_else(|error| panic!("the export: {error}"))
}

/// A write; later ones have higher numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Write {
    number: u64,
    zeroes: bool,
}

/// What may be on the disk.
#[derive(Clone, Debug)]
struct Known {
    seed: u64,
    /// For each block the newest write that is durable, and all later ones.
    possible: Vec<Vec<Write>>,
    writes: u64,
    flushes: u64,
}

impl Known {
    /// An empty disk.
    fn new(seed: u64) -> Self {
        let nothing = Write {
            number: 0,
            zeroes: true,
        };
        Self {
            seed,
            possible: vec![vec![nothing]; BLOCKS],
            writes: 0,
            flushes: 0,
        }
    }

    fn fill(&self, block: usize, write: Write, out: &mut [u8]) {
        if write.zeroes {
            out.fill(0);
        } else {
            let key = (block as u64) << 40 ^ write.number;
            fastrand::Rng::with_seed(self.seed ^ key.wrapping_mul(0x9e37_79b9_7f4a_7c15)).fill(out);
        }
    }

    /// From now on it is this write, or a later one.
    fn durable(&mut self, block: usize, number: u64) {
        self.possible[block].retain(|write| write.number >= number);
    }

    /// Reads the whole disk of a daemon that was just started. What a block holds then, it keeps.
    fn check(&mut self, client: &mut Client) {
        let mut found = vec![0; BLOCK * REQUEST_MAX];
        let mut expected = vec![0; BLOCK];
        for first in (0..BLOCKS).step_by(REQUEST_MAX) {
            let read = client.read((first * BLOCK) as u64, &mut found);
            read.unwrap_or_else(|error| panic!("block {first} cannot be read: {error}"));
            for (block, found) in (first..).zip(found.chunks(BLOCK)) {
                let held = self.possible[block].iter().copied().find(|write| {
                    self.fill(block, *write, &mut expected);
                    expected == found
                });
                let possible = &self.possible[block];
                let held =
                    held.unwrap_or_else(|| panic!("block {block} holds none of {possible:?}"));
                self.possible[block] = vec![held];
            }
        }
    }
}

/// What was asked for.
#[derive(Debug)]
enum Asked {
    Write {
        blocks: std::ops::Range<usize>,
        number: u64,
        fua: bool,
    },
    /// The newest write of each block that was answered before.
    Flush(BTreeMap<usize, u64>),
}

/// A guest that writes, makes zero and flushes until its server is gone.
struct Guest {
    client: Client,
    known: Known,
    rng: fastrand::Rng,
    under_way: BTreeMap<u64, Asked>,
    /// Blocks with a write under way: the order of two writes of one block is anybody's guess.
    busy: BTreeSet<usize>,
    /// The newest write of each block that was answered, and is not known to be durable.
    answered: BTreeMap<usize, u64>,
}

impl Guest {
    fn start(side: &NbdUri, mut known: Known, rng: &mut fastrand::Rng) -> JoinHandle<Known> {
        let mut client = connect(side);
        known.check(&mut client);
        let guest = Self {
            client,
            known,
            rng: rng.fork(),
            under_way: BTreeMap::new(),
            busy: BTreeSet::new(),
            answered: BTreeMap::new(),
        };
        std::thread::spawn(move || guest.live())
    }

    fn live(mut self) -> Known {
        loop {
            match self.step() {
                Ok(()) => {}
                Err(NbdError::Closed { .. } | NbdError::Socket { .. }) => return self.known,
                Err(error) => panic!("the disk gave an error: {error}"),
            }
        }
    }

    fn step(&mut self) -> Result<(), NbdError> {
        while self.under_way.len() < DEPTH {
            let (asked, operation) = match self.rng.u32(0..100) {
                0..4 => (Asked::Flush(self.answered.clone()), Operation::Flush),
                _ => self.write(),
            };
            let cookie = self.client.submit(operation)?;
            self.under_way.insert(cookie, asked);
        }
        let Some(completion) = self.client.wait()? else {
            return Ok(());
        };
        if let Err(failure) = completion.result {
            panic!("a request failed: {failure:?}");
        }
        match self.under_way.remove(&completion.cookie) {
            Some(Asked::Write {
                blocks,
                number,
                fua,
            }) => {
                for block in blocks {
                    self.busy.remove(&block);
                    self.answered.insert(block, number);
                    if fua {
                        self.known.durable(block, number);
                    }
                }
            }
            Some(Asked::Flush(answered)) => {
                self.known.flushes += 1;
                for (block, number) in answered {
                    self.known.durable(block, number);
                    if self.answered.get(&block) == Some(&number) {
                        self.answered.remove(&block);
                    }
                }
            }
            None => panic!("an answer to nothing"),
        }
        Ok(())
    }

    fn write(&mut self) -> (Asked, Operation) {
        let blocks = loop {
            let length = self.rng.usize(1..=REQUEST_MAX);
            let first = self.rng.usize(0..=BLOCKS - length);
            let blocks = first..first + length;
            if self.busy.range(blocks.clone()).next().is_none() {
                break blocks;
            }
        };
        self.known.writes += 1;
        let number = self.known.writes;
        let write = Write {
            number,
            zeroes: self.rng.u8(0..4) == 0,
        };
        let offset = (blocks.start * BLOCK) as u64;
        let fua = self.rng.u8(0..32) == 0;
        let mut data = vec![0; blocks.len() * BLOCK];
        for (block, part) in blocks.clone().zip(data.chunks_mut(BLOCK)) {
            self.busy.insert(block);
            self.known.possible[block].push(write);
            self.known.fill(block, write, part);
        }
        let operation = if write.zeroes {
            Operation::WriteZeroes {
                offset,
                length: data.len() as u32,
                no_hole: self.rng.bool(),
                fast_only: false,
                fua,
            }
        } else {
            Operation::Write { offset, data, fua }
        };
        let asked = Asked::Write {
            blocks,
            number,
            fua,
        };
        (asked, operation)
    }
}
