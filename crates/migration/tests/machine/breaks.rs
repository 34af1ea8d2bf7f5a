//! What ends a postcopy for good, and what it must not do to the guest.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;

use vmferry_channel::Direction;
use vmferry_migration::{
    Decision, DestinationFailure, Published, Reconnections, State, Status, Target,
};
use vmferry_ram::{AnonymousRam, GuestRam};
use vmferry_savevm::Registration;
use vmferry_stream::{Command, Decoder, Options, Record, Step};
use vmferry_vmstate::VmState;

use crate::vm::{PATIENCE, Pair, Vm, channel, rng, same_memory};

/// A link that breaks, both ways, right behind the package; not before `is_loaded`.
fn breaking_after_the_package(is_loaded: impl Fn() + Send + 'static) -> (UnixStream, UnixStream) {
    let (source, here) = UnixStream::pair().expect("a pair");
    let (there, target) = UnixStream::pair().expect("a pair");
    let back = (
        here.try_clone().expect("one"),
        there.try_clone().expect("one"),
    );
    thread::spawn(move || std::io::copy(&mut &back.1, &mut &back.0));
    thread::spawn(move || {
        pass_package(&here, &there);
        is_loaded();
        for end in [here, there] {
            let _ = end.shutdown(Shutdown::Both);
        }
    });
    (source, target)
}

fn pass_package(mut from: &UnixStream, mut to: &UnixStream) {
    let mut decoder = Decoder::new(Options::default());
    let (mut window, mut skip) = (Vec::new(), 0);
    let (mut is_package, mut was_package) = (false, false);
    let mut piece = vec![0; 1 << 16];
    while let Ok(length @ 1..) = from.read(&mut piece) {
        window.extend_from_slice(&piece[..length]);
        loop {
            let passed = skip.min(window.len());
            if to.write_all(&window[..passed]).is_err() {
                return;
            }
            window.drain(..passed);
            skip -= passed;
            if skip > 0 {
                break;
            }
            if was_package {
                return;
            }
            match decoder.step(&window).expect("right") {
                Step::Payload(bytes) => (skip, was_package) = (bytes as usize, is_package),
                Step::Record { record, used } => {
                    is_package = matches!(record, Record::Command(Command::Packaged { .. }));
                    to.write_all(&window[..used]).expect("passed");
                    window.drain(..used);
                }
                Step::NeedMore(_) | Step::End => break,
            }
        }
    }
}

fn paused(status: &Status) -> bool {
    status.state == State::PostcopyPaused
}

/// The vCPU waits for ever, rather than to find zeroes.
#[test]
fn a_postcopy_that_is_given_up_does_not_zero_memory() {
    let (from, to) = (Vm::running(&mut rng()), Vm::empty());
    // Counters that are not zero.
    from.goes_on(200 * 600);
    let registers = Arc::clone(&to.registers);
    let ends = breaking_after_the_package(move || {
        let is_loaded = || registers.lock().expect("no panic").steps() > 0;
        while !is_loaded() {
            thread::yield_now();
        }
    });
    let mut pair = Pair::begin(&from, &to, true, ends);
    pair.source.start_postcopy().expect("it can");
    pair.wait_there(paused);
    pair.reconnections.close();
    let failure = pair.received().expect_err("given up");
    assert!(matches!(failure, DestinationFailure::Interrupted { .. }) == (to.runs() == 1));
    drop(failure);
    // All it can still do is a round over pages that are there.
    thread::sleep(std::time::Duration::from_millis(200));
    assert_eq!(to.wrong(), None);
}

/// A device whose load reads guest memory.
#[derive(Clone, Debug, Default, VmState)]
#[vmstate(name = "reader", version = 1, post_load = Self::look)]
struct Reader {
    #[vmstate(uint64)]
    something: u64,
    #[vmstate(skip = "where it looks")]
    ram: Option<Arc<AnonymousRam>>,
}

impl Reader {
    fn look(&mut self, _version: u32) -> Result<(), String> {
        let Some(ram) = &self.ram else { return Ok(()) };
        let block = &ram.blocks()[0];
        let mut page = [0; 4096];
        let last = block.used_bytes() - 4096;
        block
            .read(last, &mut page)
            .map_err(|error| error.to_string())
    }
}

fn reader(ram: Option<&Arc<AnonymousRam>>) -> Registration<'static> {
    let reader = Reader {
        ram: ram.cloned(),
        ..Reader::default()
    };
    Registration::device("reader", Box::new(Arc::new(Mutex::new(reader))))
}

/// Whose page does not come, for nobody brings it any more.
#[test]
fn a_device_that_waits_for_a_page_is_let_go() {
    let (from, to) = (Vm::running(&mut rng()), Vm::empty());
    from.goes_on(1000);
    let (mut here, mut there) = (from.source(true), to.destination(true));
    here.devices.push(reader(None));
    there.devices.push(reader(Some(&to.ram)));
    let ends = breaking_after_the_package(|| {});
    let mut pair = Pair::between(here, there, ends, (None, None));
    pair.source.start_postcopy().expect("it can");
    pair.wait_there(paused);
    pair.reconnections.close();
    assert!(pair.has_ended(), "it hangs");
    pair.received().expect_err("given up");
    assert_eq!(to.runs(), 0);
    // Nothing was said that would tell: a person decides.
    let status = pair.wait_for(paused);
    assert!(status.undecided, "{status:?}");
    pair.source.decide(Decision::Serve).expect("undecided");
    pair.wait();
    from.goes_on(1000);
    from.stop();
}

/// The natural place to go on is where the pause is heard of.
#[test]
fn the_next_connection_can_be_offered_by_who_hears_of_the_pause() {
    let (from, to) = (Vm::running(&mut rng()), Vm::empty());
    from.goes_on(1000);
    let (here, there) = UnixStream::pair().expect("a pair");
    let (there, _) = channel(there, Direction::Incoming);
    let next = Mutex::new(Some(there));
    let offers: Arc<Mutex<Option<Reconnections>>> = Arc::default();
    let published = {
        let offers = Arc::clone(&offers);
        Published::new(move |status| {
            if paused(status) {
                // Set by then: a postcopy begins when it is asked for.
                let offers = offers.lock().expect("no panic").clone();
                let channel = next.lock().expect("no panic").take();
                offers
                    .expect("set")
                    .offer(channel.expect("one break"))
                    .expect("it waits");
            }
        })
    };
    let ends = breaking_after_the_package(|| {});
    let (source, target) = (from.source(true), to.destination(true));
    let mut pair = Pair::watched(source, target, ends, (None, None), published);
    *offers.lock().expect("no panic") = Some(pair.reconnections.clone());
    pair.source.start_postcopy().expect("it can");
    pair.wait_for(paused);
    let (target, stop) = channel(here, Direction::Outgoing);
    pair.source
        .resume(Target::Channel(target), stop)
        .expect("it is paused");
    assert_eq!(pair.wait().state, State::Completed);
    assert!(pair.has_ended(), "it hangs");
    pair.received().expect("arrived");
    to.stop();
    same_memory(&from, &to);
}

/// An observer of the VMM, for one, may panic in the thread that reads pages.
#[test]
fn a_panic_of_a_thread_ends_it() {
    let (from, to) = (Vm::running(&mut rng()), Vm::empty());
    from.goes_on(1000);
    let published = Published::new(|status| assert!(!paused(status), "on purpose"));
    let ends = breaking_after_the_package(|| {});
    let (source, target) = (from.source(true), to.destination(true));
    let mut pair = Pair::watched(source, target, ends, (None, None), published);
    pair.source.start_postcopy().expect("it can");
    assert!(pair.has_ended(), "it hangs within {PATIENCE:?}");
    pair.received().expect_err("given up");
}

/// More than a window holds.
#[derive(Clone, Debug, Default, VmState)]
#[vmstate(name = "large", version = 1)]
struct Large {
    #[vmstate(uint32)]
    length: u32,
    #[vmstate(buffer, length = length, max = 8_000_000)]
    bytes: Vec<u8>,
}

#[test]
fn the_state_of_a_device_may_be_long() {
    for postcopy in [false, true] {
        let (from, to) = (Vm::running(&mut rng()), Vm::empty());
        let (mut here, mut there) = (from.source(postcopy), to.destination(postcopy));
        let bytes = vec![7; 3 << 20];
        let large = |bytes: Vec<u8>| {
            let length = u32::try_from(bytes.len()).expect("short");
            Arc::new(Mutex::new(Large { length, bytes }))
        };
        let (left, right) = (large(bytes.clone()), large(Vec::new()));
        here.devices
            .push(Registration::device("large", Box::new(left)));
        there
            .devices
            .push(Registration::device("large", Box::new(Arc::clone(&right))));
        let ends = UnixStream::pair().expect("a pair");
        let mut pair = Pair::between(here, there, ends, (None, None));
        if postcopy {
            pair.source.start_postcopy().expect("it can");
        }
        let status = pair.wait();
        assert_eq!(status.state, State::Completed, "{status:?}");
        pair.received().expect("arrived");
        assert!(right.lock().expect("no panic").bytes == bytes);
        to.stop();
    }
}

#[derive(Clone, Debug, Default, VmState)]
#[vmstate(name = "faulty", version = 1, pre_save = Self::fail)]
struct Faulty {
    #[vmstate(uint32)]
    something: u32,
}

impl Faulty {
    fn fail(&mut self) -> Result<(), String> {
        panic!("on purpose")
    }
}

/// Nothing was sent of it: the guest goes on at home.
#[test]
fn a_device_that_panics_keeps_the_guest_at_home() {
    for postcopy in [false, true] {
        let (from, to) = (Vm::running(&mut rng()), Vm::empty());
        let (mut here, there) = (from.source(postcopy), to.destination(postcopy));
        let faulty = Arc::new(Mutex::new(Faulty::default()));
        here.devices
            .push(Registration::device("faulty", Box::new(faulty)));
        let ends = UnixStream::pair().expect("a pair");
        let pair = Pair::between(here, there, ends, (None, None));
        if postcopy {
            pair.source.start_postcopy().expect("it can");
        }
        let status = pair.wait();
        assert_eq!(
            (status.state, status.undecided),
            (State::Failed, false),
            "{status:?}"
        );
        from.goes_on(1000);
        from.stop();
        assert_eq!(to.runs(), 0);
    }
}
