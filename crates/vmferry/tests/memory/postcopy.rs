//! Postcopy from real QEMUs into here and on into other real QEMUs.

use crate::checker::Checker;
use crate::contents::{assert_same_memory, memory_of};
use crate::halfway::{Fresh, Halfway, Way, postcopy};
use crate::layout::Layout;
use crate::need;
use crate::peers::qemu::Version;

/// The guest goes on in a fresh QEMU, with every page right. While its memory comes here, others want to see it; what
/// the guest had written since it was sent comes again.
#[test]
fn a_guest_goes_through_here_by_postcopy() {
    use Version::{V7_2, V10_0};
    need!(postcopy());
    let mut requests = 0;
    for (machine, from, to, passes) in [
        ("pc-i440fx-7.2", V10_0, V10_0, 0),
        ("pc-i440fx-7.2", V7_2, V7_2, 3),
        ("pc-i440fx-7.2", V10_0, V7_2, 3),
        ("pc-q35-7.2", V7_2, V10_0, 0),
        ("pc-q35-10.0", V10_0, V10_0, 3),
    ] {
        println!("{machine}: {from:?} to {to:?}");
        let mut checker = Checker::on(machine);
        let layout = Layout::of(need!(checker.host(from)));
        let mut source = need!(checker.host(from)).start();
        checker.goes_on(3);
        let way = Way {
            probes: 3,
            passes,
            ..Way::postcopy(Vec::new())
        };
        let (here, went) = Halfway::take(&mut source, &layout, &way);
        println!("came: {:?}", went.status.ram);
        assert_same_memory("received", &memory_of(&mut source), &here.bytes("pc.ram"));
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
