//! Precopy, postcopy, and what keeps a guest at home.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use vmferry_migration::{Parameters, RequestError, State};

use crate::vm::{Pair, Vm, rng, same_memory};

#[test]
fn a_guest_runs_on_after_a_precopy() {
    let rng = &mut rng();
    let (from, to) = (Vm::running(rng), Vm::empty());
    from.goes_on(1000);
    let mut pair = Pair::begin(&from, &to, false, UnixStream::pair().expect("a pair"));
    let status = pair.wait();
    assert_eq!(status.state, State::Completed, "{status:?}");
    pair.received().expect("arrived");
    assert!(!from.is_running() && to.is_running());
    to.goes_on(10_000);
    to.stop();
    assert_eq!((from.runs(), to.runs()), (1, 1));
    same_memory(&from, &to);
}

#[test]
fn a_guest_runs_before_its_memory_is_there() {
    let rng = &mut rng();
    let (from, to) = (Vm::running(rng), Vm::empty());
    from.goes_on(1000);
    let mut pair = Pair::begin(&from, &to, true, UnixStream::pair().expect("a pair"));
    pair.source.start_postcopy().expect("it can");
    let status = pair.wait();
    assert_eq!(status.state, State::Completed, "{status:?}");
    assert!(status.downtime.is_some(), "{status:?}");
    pair.received().expect("arrived");
    assert!(!from.is_running() && to.is_running());
    to.goes_on(10_000);
    to.stop();
    same_memory(&from, &to);
}

/// Nothing but memory is left: no downtime limit is too short for that.
#[test]
fn a_postcopy_begins_when_it_is_asked_for() {
    let rng = &mut rng();
    let (from, to) = (Vm::running(rng), Vm::empty());
    let mut pair = Pair::begin(&from, &to, true, UnixStream::pair().expect("a pair"));
    pair.source.set(Parameters {
        max_bandwidth: Some(4 << 20),
        downtime_limit: Duration::ZERO,
    });
    pair.source.start_postcopy().expect("it can");
    assert_eq!(pair.wait().state, State::Completed);
    pair.received().expect("arrived");
    to.goes_on(10_000);
    to.stop();
    same_memory(&from, &to);
}

#[test]
fn a_cancelled_guest_runs_on_at_home() {
    let rng = &mut rng();
    for postcopy in [false, true] {
        let (from, to) = (Vm::running(rng), Vm::empty());
        let (here, there) = UnixStream::pair().expect("a pair");
        let mut pair = Pair::begin(&from, &to, postcopy, (here, there));
        pair.source.cancel().expect("in time, most likely");
        let status = pair.wait();
        assert_eq!(status.state, State::Cancelled, "{status:?}");
        pair.received().expect_err("nothing came");
        from.goes_on(1000);
        from.stop();
        assert_eq!(to.runs(), 0);
    }
}

#[test]
fn a_precopy_cannot_become_a_postcopy() {
    let rng = &mut rng();
    let (from, to) = (Vm::running(rng), Vm::empty());
    let mut pair = Pair::begin(&from, &to, false, UnixStream::pair().expect("a pair"));
    assert_eq!(pair.source.start_postcopy(), Err(RequestError::NoPostcopy));
    assert_eq!(pair.source.pause(), Err(RequestError::NotInPostcopy));
    assert_eq!(pair.wait().state, State::Completed);
    pair.received().expect("arrived");
    to.stop();
}
