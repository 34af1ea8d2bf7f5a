//! A QEMU's machine goes into a file.

use std::fs::File;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;

use serde_json::{Value, json};
use vmferry_channel::{Channel, Direction, Stop};
use vmferry_image::IndexPlace;
use vmferry_migration::{Published, State, Status};
use vmferry_relay::park::{ParkError, ParkOptions, Parked, Parker, receive};

use crate::link::Link;
use crate::peers::qemu::Qemu;
use crate::peers::{PATIENCE, until};

/// Slow enough for a postcopy to begin with most of the memory unsent.
const SLOW: u64 = 4 << 20;
/// No limit.
const FAST: u64 = 1 << 40;

/// How a machine comes.
#[derive(Debug, Clone)]
pub(crate) struct Way {
    pub(crate) postcopy: bool,
    /// After the switch, the connections break, each after so many bytes.
    pub(crate) cuts: Vec<u64>,
    /// After the switch, it is called off.
    pub(crate) stop: bool,
    /// What is asked for would come over a connection of its own.
    pub(crate) preempt: bool,
    /// There are answers.
    pub(crate) two_way: bool,
}

impl Way {
    pub(crate) fn precopy(two_way: bool) -> Self {
        Self {
            postcopy: false,
            cuts: Vec::new(),
            stop: false,
            preempt: false,
            two_way,
        }
    }

    pub(crate) fn postcopy(cuts: Vec<u64>) -> Self {
        Self {
            postcopy: true,
            cuts,
            stop: false,
            preempt: false,
            two_way: true,
        }
    }
}

/// Where a source connects to, over a link that can be cut.
struct Door {
    path: PathBuf,
    listener: UnixListener,
}

impl Door {
    fn in_folder_of(qemu: &Qemu) -> Self {
        let path = qemu.path("door");
        // Of a test before.
        std::fs::remove_file(&path).ok();
        let listener = UnixListener::bind(&path).expect("a socket");
        listener
            .set_nonblocking(true)
            .expect("a listener can be non-blocking");
        Self { path, listener }
    }

    /// The next connection.
    fn next(&self, stop: &Stop) -> (Channel, Link) {
        let source = until("the source to connect", || {
            self.listener.accept().ok().map(|(source, _)| source)
        });
        source.set_nonblocking(false).expect("a socket can block");
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let link = Link::new(source, theirs);
        let channel = Channel::from_fd(ours.into(), Direction::Incoming, "QEMU", stop);
        (channel.expect("a channel"), link)
    }
}

pub(crate) fn capability(qemu: &mut Qemu, name: &str, state: bool) {
    let capabilities = json!({"capabilities": [{"capability": name, "state": state}]});
    qemu.qmp.execute("migrate-set-capabilities", &capabilities);
}

/// Park the machine of a QEMU, whose guest runs or stands still.
pub(crate) fn park(qemu: &mut Qemu, file: &Path, way: &Way) -> (Result<Parked, ParkError>, Status) {
    let door = Door::in_folder_of(qemu);
    // That of the channels, and that of whoever receives.
    let [channels, stop] = [(); 2].map(|()| Stop::new().expect("an event"));
    let published = Published::default();
    capability(qemu, "return-path", way.two_way);
    capability(qemu, "postcopy-ram", way.postcopy);
    if way.preempt {
        capability(qemu, "postcopy-preempt", true);
    }
    let bandwidth = if way.postcopy { SLOW } else { FAST };
    qemu.limits((bandwidth, 300));
    let uri = format!("unix:{}", door.path.display());
    qemu.qmp.execute("migrate", &json!({"uri": uri}));
    let (channel, link) = door.next(&channels);
    let out = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(file)
        .expect("room for a file");
    let index = Some((file.to_owned(), IndexPlace::Beside));
    let parker = Parker::new(out, ParkOptions { index }).expect("room for an index");
    let result = thread::scope(|scope| {
        let mut cuts = way.cuts.iter().skip(1);
        let (watched, calling, channels) = (published.clone(), stop.clone(), channels.clone());
        let (wants, wanted) = mpsc::channel();
        let receiver = scope.spawn(move || {
            let mut reconnect = |error: &ParkError| {
                println!("paused: {error}");
                wants.send(()).expect("somebody who resumes");
                let (channel, link) = door.next(&channels);
                if let Some(cut) = cuts.next() {
                    link.cut_after(*cut);
                }
                Some(channel)
            };
            receive(channel, parker, &mut reconnect, &calling, &watched)
        });
        if way.postcopy {
            switch(qemu, &published, &link, way, &stop);
        }
        // Until nobody can want another connection.
        wanted.iter().for_each(|()| resume(qemu, &uri));
        receiver.join().expect("no panic")
    });
    (result, published.get())
}

/// Into the postcopy, as soon as some memory has come.
fn switch(qemu: &mut Qemu, published: &Published, link: &Link, way: &Way, stop: &Stop) {
    let come = published.wait_until(PATIENCE, |status| status.wire_bytes > 0);
    assert!(come.wire_bytes > 0);
    until("some memory", || (link.carried() > 1 << 20).then_some(()));
    let is_broken = way.stop || !way.cuts.is_empty();
    if is_broken {
        // Something must be left when that comes.
        link.slow_down();
    }
    qemu.qmp.execute("migrate-start-postcopy", &json!({}));
    if is_broken {
        let switched = published.wait_until(PATIENCE, |status| status.state != State::Active);
        assert_eq!(switched.state, State::PostcopyActive);
    }
    if let Some(bytes) = way.cuts.first() {
        link.cut_after(*bytes);
    }
    if way.stop {
        stop.trigger();
        return;
    }
    qemu.limits((FAST, 300));
    let postcopy = json!({"max-postcopy-bandwidth": 0});
    qemu.qmp.execute("migrate-set-parameters", &postcopy);
}

/// Let the source go on over another connection, when it has noticed that the last one broke.
fn resume(qemu: &mut Qemu, uri: &str) {
    until("the source to pause", || {
        let answer: Value = qemu.qmp.execute("query-migrate", &json!({}));
        (answer["status"] == "postcopy-paused").then_some(())
    });
    qemu.qmp
        .execute("migrate", &json!({"uri": uri, "resume": true}));
}
