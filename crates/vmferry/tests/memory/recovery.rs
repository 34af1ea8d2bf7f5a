//! Connections with real QEMUs that break while a guest runs before its memory is there.

use serde_json::json;
use vmferry_migration::State;

use crate::checker::{Checker, UNUSED};
use crate::contents::{assert_same_memory, memory_of};
use crate::halfway::{Halfway, Way, postcopy};
use crate::layout::Layout;
use crate::need;
use crate::peers::qemu::Version;
use crate::peers::{long, seeded};

/// Up to three breaks after the switch, some of them right behind it, and up to two before the next connection has
/// brought anything: what both sides say to one another then has about a hundred bytes. What is written all the time has
/// more than three times `written` bytes.
fn broken(written: u64, rng: &mut fastrand::Rng) -> Way {
    let passes = rng.u64(..3);
    // All of it together is less than what is sent after the switch.
    let most = if passes == 0 { 4 << 20 } else { written };
    let place = |rng: &mut fastrand::Rng| match rng.u8(..4) {
        0 => rng.u64(..20_000),
        _ => rng.u64(..most),
    };
    let cuts = (0..rng.u8(1..4)).map(|_| place(rng)).collect();
    let cuts_again = (0..rng.u8(..3)).map(|_| rng.u64(1..150)).collect();
    Way {
        cuts_again,
        passes,
        ..Way::postcopy(cuts)
    }
}

/// Wherever it breaks, on the way here and on the way on, the guest goes on with every page right.
#[test]
fn a_break_loses_nothing_with_a_qemu_at_the_other_end() {
    need!(postcopy());
    let mut rng = seeded();
    let (mut breaks, mut given_up) = ([0, 0], 0);
    let rounds = if long() { 100 } else { 4 };
    for round in 0..rounds {
        let versions = [Version::V10_0, Version::V7_2];
        let [from, to] = [versions[round % 2], versions[round / 2 % 2]];
        let mut checker = Checker::new();
        let layout = Layout::of(need!(checker.host(from)));
        let mut source = need!(checker.host(from)).start();
        checker.goes_on(3);
        let mut coming = Way {
            probes: 2,
            ..broken(300 << 10, &mut rng)
        };
        if from == Version::V7_2 {
            // A source of that version waits for ever for what the destination has, when the connection breaks first.
            coming.cuts_again.clear();
        }
        let mut going = broken(2 << 20, &mut rng);
        if to == Version::V7_2 {
            // A destination of that version reads where nothing is, and is no more.
            going.cuts_again.clear();
        }
        println!("round {round}: {from:?} {coming:?} {to:?} {going:?}");
        let (here, came) = Halfway::take(&mut source, &layout, &coming);
        breaks[0] += came.breaks;
        if came.status.state != State::Completed {
            given_up += 1;
            continue;
        }
        assert_same_memory("received", &memory_of(&mut source), &here.bytes("pc.ram"));
        drop(source);
        if going.passes > 0 {
            here.write_to(UNUSED);
        }
        let (mut fresh, went) = need!(here.put_somewhere(|| checker.host(to), &going));
        breaks[1] += went.breaks;
        fresh.qemu.wait_run_state("running");
        checker.goes_on(5);
        fresh.qemu.qmp.execute("stop", &json!({}));
        let place = UNUSED.start as usize..UNUSED.end as usize;
        let there = memory_of(&mut fresh.qemu);
        assert!(
            there[place.clone()] == here.bytes("pc.ram")[place],
            "what was written here differs"
        );
    }
    let [from, into] = breaks;
    println!("breaks: {from} from QEMU, {into} into QEMU; {given_up} given up by QEMU");
    assert!(given_up < rounds / 2);
    assert!(breaks.iter().all(|count| *count > 0), "{breaks:?}");
}
