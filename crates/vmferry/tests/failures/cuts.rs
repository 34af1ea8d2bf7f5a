//! The connection is cut at a random byte.

use std::collections::BTreeSet;

use crate::link::{Event, Moment};
use crate::log::BLOCK;
use crate::pair::{Outcome, Pair, Side, Target};
use crate::runs::many;

/// Bandwidths, in bytes a second; 0 is any.
const BANDWIDTHS: [u64; 3] = [0, 32 << 20, 128 << 20];

/// Before the PONG of the barrier the source serves on, and a second try succeeds. Later, the source serves, or the
/// destination, or the disk is held until somebody decides. Whatever happens no acknowledged write is lost and nothing
/// is live twice, and all that is so after both daemons were ended and started again.
#[test]
fn a_connection_that_is_cut_anywhere() {
    let ends = many(200, one_cut);
    if std::env::var_os("VMFERRY_RUN").is_some() {
        return;
    }
    let outcomes: BTreeSet<_> = ends.keys().map(|(_, outcome)| *outcome).collect();
    let all = [
        Outcome::SourceServes,
        Outcome::DestinationServes,
        Outcome::UndecidedStayed,
        Outcome::UndecidedMoved,
    ];
    assert_eq!(
        outcomes,
        BTreeSet::from(all),
        "this test has missed something"
    );
}

fn one_cut(rng: &mut fastrand::Rng) -> (&'static str, Outcome) {
    let blocks = rng.usize(512..1024);
    let bytes = (blocks * BLOCK) as u64;
    let moment = Moment::random(bytes * 3 / 2, rng);
    let event = match rng.bool() {
        true => Event::Close,
        false => Event::Reset,
    };
    let bandwidth = BANDWIDTHS[rng.usize(0..BANDWIDTHS.len())];
    let target = [Target::Empty, Target::Full, Target::Made][rng.usize(0..3)];
    let mut pair = Pair::start(blocks, target, rng);
    let link = pair.link(moment, event);
    let by_command = rng.bool();
    let status = match by_command {
        true => pair.migrate_by_command(&link.uri()),
        false => {
            assert!(pair.migrate(&link.uri(), bandwidth));
            None
        }
    };
    pair.wait_for_source();
    let passed = link.end();
    let (outcome, mut side) = pair.settle(rng);
    if !passed.struck {
        assert_eq!(
            outcome,
            Outcome::DestinationServes,
            "{moment:?}, {passed:?}"
        );
    } else if !passed.pong {
        assert_eq!(outcome, Outcome::SourceServes, "{moment:?}, {passed:?}");
    }
    if by_command {
        let expected = match outcome {
            Outcome::DestinationServes => 0,
            Outcome::SourceServes => 1,
            Outcome::UndecidedStayed | Outcome::UndecidedMoved => 3,
        };
        assert_eq!(status, Some(expected), "{moment:?}, {outcome:?}");
    }
    pair.check(side);
    if side == Side::Source && (!passed.pong || rng.bool()) {
        pair.migrate_well();
        side = Side::Destination;
        pair.check(side);
    }
    pair.restart(Side::Source, rng.bool());
    pair.restart(Side::Destination, rng.bool());
    pair.check(side);
    let kind = match passed.struck {
        true => moment.kind(),
        false => "not cut",
    };
    (kind, outcome)
}
