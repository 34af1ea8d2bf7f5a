//! Connections with real QEMUs that break while a guest runs before its memory is there.

use crate::checker::Checker;
use crate::halfway::{Halfway, Way, postcopy};
use crate::layout::Layout;
use crate::need;
use crate::peers::qemu::Version;
use crate::peers::{long, seeded};

/// What a guest's memory takes on the wire, more or less.
const STREAM_BYTES: u64 = 14 << 20;

/// Up to three places, some of them right behind the switch.
fn cuts(rng: &mut fastrand::Rng) -> Vec<u64> {
    let place = |rng: &mut fastrand::Rng| match rng.u8(..4) {
        0 => rng.u64(..20_000),
        _ => rng.u64(..STREAM_BYTES),
    };
    (0..rng.u8(1..4)).map(|_| place(rng)).collect()
}

/// Wherever it breaks, on the way here and on the way on, the guest goes on with every page right.
#[test]
fn a_break_loses_nothing_with_a_qemu_at_the_other_end() {
    need!(postcopy());
    let mut rng = seeded();
    let mut breaks = [0, 0];
    for round in 0..if long() { 100 } else { 4 } {
        let versions = [Version::V10_0, Version::V7_2];
        let [from, to] = [versions[round % 2], versions[round / 2 % 2]];
        let mut checker = Checker::new();
        let layout = Layout::of(need!(checker.host(from)));
        let mut source = need!(checker.host(from)).start();
        checker.goes_on(3);
        let [coming, going] = [cuts(&mut rng), cuts(&mut rng)];
        println!("round {round}: {from:?} {coming:?} {to:?} {going:?}");
        let way = Way {
            probes: 2,
            ..Way::postcopy(coming)
        };
        let (here, came) = Halfway::take(&mut source, &layout, &way);
        drop(source);
        let way = Way::postcopy(going);
        let (mut fresh, went) = need!(here.put_somewhere(|| checker.host(to), &way));
        breaks[0] += came.breaks;
        breaks[1] += went.breaks;
        fresh.qemu.wait_run_state("running");
        checker.goes_on(5);
    }
    let [from, into] = breaks;
    println!("breaks: {from} from QEMU, {into} into QEMU");
    assert!(breaks.iter().all(|count| *count > 0), "{breaks:?}");
}
