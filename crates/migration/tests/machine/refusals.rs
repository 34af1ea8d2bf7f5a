//! Destinations that cannot run the guest.

use std::os::unix::net::UnixStream;

use vmferry_channel::Direction;
use vmferry_migration::{
    Capabilities, Parameters, Published, RunningSource, SourceJob, State, Target,
};

use crate::vm::{Pair, Vm, channel, rng};

/// What the source can know of it.
const REFUSED: &str = "the destination refused or failed (SHUT 1); its own messages say why";

/// Before the guest runs there, and it is known not to, it goes on at home.
#[test]
fn a_device_that_cannot_be_loaded_keeps_the_guest_at_home() {
    let rng = &mut rng();
    for postcopy in [false, true] {
        let (from, to) = (Vm::running(rng), Vm::empty());
        from.poison();
        let ends = UnixStream::pair().expect("a pair");
        let mut pair = Pair::begin(&from, &to, postcopy, ends);
        if postcopy {
            pair.source.start_postcopy().expect("it can");
        }
        let status = pair.wait();
        assert_eq!(status.state, State::Failed, "{status:?}");
        assert_eq!(status.error.as_deref(), Some(REFUSED));
        let error = pair.received().expect_err("poisoned").to_string();
        assert!(
            error.contains("'vcpu'") && error.ends_with("poisoned"),
            "{error}"
        );
        from.goes_on(1000);
        from.stop();
        assert_eq!((from.runs(), to.runs()), (2, 0));
    }
}

/// A machine with other memory.
#[test]
fn memory_that_does_not_fit_keeps_the_guest_at_home() {
    let rng = &mut rng();
    let (from, to) = (Vm::running(rng), Vm::smaller());
    let ends = UnixStream::pair().expect("a pair");
    let mut pair = Pair::begin(&from, &to, false, ends);
    let status = pair.wait();
    assert_eq!(status.state, State::Failed, "{status:?}");
    assert_eq!(status.error.as_deref(), Some(REFUSED));
    let error = pair.received().expect_err("too small").to_string();
    assert!(error.contains("pc.ram"), "{error}");
    from.goes_on(1000);
    from.stop();
}

/// Only one of the two expects that it may become a postcopy.
#[test]
fn both_must_expect_a_postcopy() {
    let rng = &mut rng();
    let (from, to) = (Vm::running(rng), Vm::empty());
    let ends = UnixStream::pair().expect("a pair");
    let mut pair = Pair::begin_unlike(&from, &to, ends);
    let status = pair.wait();
    assert_eq!(status.state, State::Failed, "{status:?}");
    let error = pair.received().expect_err("refused").to_string();
    assert!(
        error.contains("POSTCOPY_ADVISE") && error.contains("postcopy-ram is off here"),
        "{error}"
    );
    from.goes_on(1000);
    from.stop();
}

/// It would run here and there.
#[test]
fn a_background_snapshot_is_no_migration() {
    let (from, to) = (Vm::running(&mut rng()), Vm::empty());
    let mut machine = from.source(false);
    machine.ram_options.background_snapshot = true;
    let (here, _there) = UnixStream::pair().expect("a pair");
    let (channel, stop) = channel(here, Direction::Outgoing);
    let job = SourceJob {
        disks: Vec::new(),
        target: Target::Channel(channel),
        parameters: Parameters::default(),
        capabilities: Capabilities::default(),
        stop,
    };
    let refused = RunningSource::start_machine(job, machine, Published::default());
    let error = refused.expect_err("refused").to_string();
    assert_eq!(
        error,
        "a background snapshot is no migration: its guest runs on here"
    );
    from.goes_on(1000);
    from.stop();
    assert_eq!(to.runs(), 0);
}
