//! kill -9 of either side, or both, and the same command line again.

use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::control::Control;
use crate::link::{Event, Moment};
use crate::log::BLOCK;
use crate::pair::{Outcome, Pair, Side, Target};
use crate::runs::many;

/// How late somebody dies, in microseconds: writing a record down takes so long.
const LATE_MICROS: u64 = 10_000;

/// When somebody dies.
#[derive(Clone, Copy, Debug)]
enum When {
    /// At a byte of the connection.
    At(Moment),
    /// When the source tells its QMP clients of this.
    Told(&'static str),
}

impl When {
    fn random(bytes: u64, rng: &mut fastrand::Rng) -> Self {
        match rng.u32(0..100) {
            0..75 => Self::At(Moment::random(bytes, rng)),
            _ => Self::Told(["setup", "active", "device", "completed"][rng.usize(0..4)]),
        }
    }

    fn kind(self) -> &'static str {
        match self {
            Self::At(moment) => moment.kind(),
            Self::Told(status) => status,
        }
    }
}

#[test]
fn a_daemon_that_is_killed_anywhere() {
    many(100, one_kill);
}

fn one_kill(rng: &mut fastrand::Rng) -> (&'static str, Vec<Side>, Outcome) {
    let blocks = rng.usize(512..1024);
    let when = When::random((blocks * BLOCK) as u64 * 3 / 2, rng);
    let victims = match rng.u32(0..5) {
        0 | 1 => vec![Side::Source],
        2 | 3 => vec![Side::Destination],
        _ => vec![Side::Source, Side::Destination],
    };
    let target = [Target::Empty, Target::Full, Target::Made][rng.usize(0..3)];
    // What is done with the last bytes takes a while.
    let after = match rng.bool() {
        true => Duration::ZERO,
        false => Duration::from_micros(rng.u64(0..LATE_MICROS)),
    };
    let mut pair = Pair::start(blocks, target, rng);
    let pids: Vec<Pid> = victims
        .iter()
        .map(|side| pair.daemon(*side).pid())
        .collect();
    let (moment, killer) = match when {
        When::At(moment) => (moment, None),
        When::Told(status) => (
            Moment::Never,
            Some(kill_when_told(
                &pair.socket(Side::Source),
                status,
                pids.clone(),
            )),
        ),
    };
    let link = pair.link(moment, Event::Kill(pids, after));
    let begun = pair.migrate(&link.uri(), if rng.bool() { 0 } else { 64 << 20 });
    assert!(
        begun || victims.contains(&Side::Source),
        "the source did not begin"
    );
    pair.wait_for_source_or_death();
    let passed = link.end();
    if let Some(killer) = killer {
        killer.join().expect("a daemon dies of what it tells");
    }
    // Also those whose moment has not come.
    for side in &victims {
        pair.restart(*side, true);
    }
    let (outcome, mut side) = pair.settle(rng);
    let killed_by_byte = matches!(when, When::At(_)) && passed.struck;
    if killed_by_byte && !passed.pong {
        // A source that has not had the PONG has not given its disk away, dead or alive.
        assert_eq!(outcome, Outcome::SourceServes, "{when:?}, {passed:?}");
    }
    pair.check(side);
    if side == Side::Source {
        pair.migrate_well();
        side = Side::Destination;
        pair.check(side);
    }
    pair.restart(Side::Destination, rng.bool());
    pair.restart(Side::Source, rng.bool());
    pair.check(side);
    (when.kind(), victims, outcome)
}

/// A client of the source that kills as soon as it is told of a status, or of the end.
fn kill_when_told(socket: &Path, status: &'static str, pids: Vec<Pid>) -> JoinHandle<()> {
    let mut control = Control::connect(socket).expect("a daemon takes QMP clients");
    std::thread::spawn(move || {
        let told = |message: &serde_json::Value| {
            let now = message["data"]["status"].as_str().unwrap_or_default();
            let over = ["completed", "failed"].contains(&now);
            message["event"] == "MIGRATION" && (now == status || over)
        };
        while !told(&control.message().expect("a daemon tells of its migration")) {}
        for pid in pids {
            kill_process(pid, Signal::KILL).expect("a child that is not waited for yet");
        }
    })
}
