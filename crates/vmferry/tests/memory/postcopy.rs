//! Postcopy from real QEMUs into here and on into other real QEMUs.

use crate::checker::Checker;
use crate::halfway::{Fresh, Halfway, Way, postcopy};
use crate::layout::Layout;
use crate::need;
use crate::peers::qemu::Version;

/// The guest goes on in a fresh QEMU, with every page right. While its memory comes here, others want to see it.
#[test]
fn a_guest_goes_through_here_by_postcopy() {
    use Version::{V7_2, V10_0};
    need!(postcopy());
    let mut requests = 0;
    for (from, to) in [(V10_0, V10_0), (V7_2, V7_2), (V10_0, V7_2), (V7_2, V10_0)] {
        println!("{from:?} to {to:?}");
        let mut checker = Checker::new();
        let layout = Layout::of(need!(checker.host(from)));
        let mut source = need!(checker.host(from)).start();
        checker.goes_on(3);
        let way = Way {
            probes: 3,
            ..Way::postcopy(Vec::new())
        };
        let (here, went) = Halfway::take(&mut source, &layout, &way);
        let ram = went.status.ram.expect("memory came");
        println!("came: {ram:?}");
        assert!(ram.postcopy_requests > 0, "{ram:?}");
        drop(source);

        let mut fresh = Fresh::start(need!(checker.host(to)));
        let went = here.put(&mut fresh, &Way::postcopy(Vec::new()));
        let ram = went.status.ram.expect("memory went");
        println!("went: {ram:?}");
        requests += ram.postcopy_requests;
        fresh.qemu.wait_run_state("running");
        checker.goes_on(5);
    }
    // Where all of it comes before the guest looks for it, nothing is asked for.
    assert!(requests > 0);
}
