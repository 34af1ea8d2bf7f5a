//! Postcopies of real QEMUs whose connections break on the way into a file.

use serde_json::json;
use vmferry_relay::park::ParkError;

use crate::checker::Checker;
use crate::contents::{assert_same_memory, memory_of};
use crate::journeys::{goes_on, load};
use crate::need;
use crate::parking::{Way, park};
use crate::peers::qemu::Version;
use crate::peers::{long, seeded, until};

/// Wherever it breaks, the file is whole in the end.
#[test]
fn a_break_on_the_way_into_a_file_loses_nothing() {
    let mut rng = seeded();
    for round in 0..if long() { 40 } else { 4 } {
        let from = [Version::V10_0, Version::V7_2][round % 2];
        let cuts = (0..rng.usize(1..3))
            .map(|_| rng.u64(1 << 16..2 << 20))
            .collect();
        let way = Way::postcopy(cuts);
        println!("round {round}: {from:?} {way:?}");
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("parked.vm");
        let mut checker = Checker::new();
        let mut source = need!(checker.host(from)).start();
        checker.goes_on(3);
        let (parked, _) = park(&mut source, &file, &way);
        let parked = parked.unwrap_or_else(|error| panic!("{from:?} {way:?}: {error}"));
        assert!(parked.was_postcopy && parked.source_told == Some(true));
        source.migrated();
        let memory = memory_of(&mut source);
        drop(source);
        let mut fresh = load(need!(checker.host(Version::V10_0)), &file);
        assert_same_memory("parked", &memory, &memory_of(&mut fresh));
        goes_on(&checker, &mut fresh);
    }
}

/// Called off in the middle of a postcopy: the guest has not run here. Its source hears that it failed: 10.0 lets it run
/// on, 7.2 cannot.
#[test]
fn a_postcopy_that_is_called_off_is_said_to_have_failed() {
    for from in [Version::V10_0, Version::V7_2] {
        let folder = tempfile::tempdir().unwrap();
        let mut checker = Checker::new();
        let mut source = need!(checker.host(from)).start();
        checker.goes_on(3);
        let way = Way {
            stop: true,
            ..Way::postcopy(Vec::new())
        };
        let (parked, _) = park(&mut source, &folder.path().join("parked.vm"), &way);
        let error = parked.unwrap_err();
        assert!(
            matches!(
                error,
                ParkError::HalfHere {
                    source_told: true,
                    ..
                }
            ),
            "{error}"
        );
        if from == Version::V10_0 {
            source.wait_run_state("running");
            checker.goes_on(3);
        } else {
            until("the source to pause", || {
                let answer = source.qmp.execute("query-migrate", &json!({}));
                (answer["status"] == "postcopy-paused").then_some(())
            });
        }
    }
}
