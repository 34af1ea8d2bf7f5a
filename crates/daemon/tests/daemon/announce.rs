//! `announce-self`, and guests that arrive, with NICs whose frames the test sees.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};

use serde_json::{Value, json};
use vmferry_relay::announce::{Announcer, Frame, MacAddress, rarp_request};

use crate::host::{Host, MIB, OVER, PATIENCE, Qmp, Settings, migrate_to, random};

/// A NIC whose frames go to a test.
#[derive(Clone, Debug)]
pub(crate) struct Wire {
    name: &'static str,
    mac: MacAddress,
    sent: Sender<(&'static str, Frame)>,
}

impl Wire {
    pub(crate) fn boxed(self) -> Box<dyn Announcer> {
        Box::new(self)
    }
}

impl Announcer for Wire {
    fn name(&self) -> &str {
        self.name
    }

    fn mac(&self) -> MacAddress {
        self.mac
    }

    fn send(&self, frame: &Frame) -> io::Result<()> {
        // The test may have seen enough.
        let _ = self.sent.send((self.name, *frame));
        Ok(())
    }
}

/// What arrives from the NICs "one" and "two".
struct Network {
    frames: Receiver<(&'static str, Frame)>,
}

impl Network {
    fn new() -> (Self, Vec<Wire>) {
        let (sent, frames) = channel();
        let wire = |name, mac: &str| Wire {
            name,
            mac: mac.parse().unwrap(),
            sent: sent.clone(),
        };
        let wires = vec![
            wire("one", "52:54:00:00:00:01"),
            wire("two", "52:54:00:00:00:02"),
        ];
        (Self { frames }, wires)
    }

    /// The NIC that the next frame comes from, which is the frame that it should be.
    fn next(&self) -> &'static str {
        let (name, frame) = self.frames.recv_timeout(PATIENCE).expect("a frame");
        let mac = match name {
            "one" => "52:54:00:00:00:01",
            _ => "52:54:00:00:00:02",
        };
        assert_eq!(frame, rarp_request(mac.parse().unwrap()));
        name
    }

    /// Nothing more comes once the daemon, which was all that could send, is gone.
    fn silent(&self) {
        let more: Vec<_> = self.frames.iter().map(|(name, _)| name).collect();
        assert!(more.is_empty(), "{more:?}");
    }
}

/// Announce these NICs twice, a moment apart.
fn twice(qmp: &mut Qmp, interfaces: &[&str]) {
    let arguments = json!({
        "initial": 1, "max": 1, "rounds": 2, "step": 0, "interfaces": interfaces,
        "id": "twice",
    });
    assert_eq!(qmp.run("announce-self", arguments), json!({}));
}

fn arguments(rounds: i64, more: &Value) -> Value {
    let mut arguments = json!({"initial": 1, "max": 10, "rounds": rounds, "step": 1});
    for (key, value) in more.as_object().unwrap() {
        arguments[key] = value.clone();
    }
    arguments
}

#[test]
fn announce_self_sends_every_round_of_the_nics_that_are_named() {
    let host = Host::new();
    host.make("root", &[0; 4096]);
    let (network, wires) = Network::new();
    let settings = Settings {
        wires,
        ..Settings::default()
    };
    let daemon = host.start(&["root"], &settings);
    drop(settings);
    let mut qmp = daemon.qmp();
    qmp.run("announce-self", arguments(5, &json!({})));
    for _ in 0..5 {
        assert_eq!((network.next(), network.next()), ("one", "two"));
    }
    twice(&mut qmp, &["two"]);
    assert_eq!((network.next(), network.next()), ("two", "two"));
    for nobody in [json!(["three"]), json!([])] {
        qmp.run(
            "announce-self",
            arguments(5, &json!({"interfaces": nobody})),
        );
    }
    // Far away; the next of the same name takes its place, and one without rounds ends it.
    let far = json!({"initial": 100_000, "max": 100_000});
    for id in [json!({}), json!({"id": "x"})] {
        let mut far = far.clone();
        far.as_object_mut()
            .unwrap()
            .extend(id.as_object().unwrap().clone());
        qmp.run("announce-self", arguments(9, &far));
        assert_eq!((network.next(), network.next()), ("one", "two"));
        qmp.run("announce-self", arguments(0, &id));
    }
    twice(&mut qmp, &["three", "one"]);
    assert_eq!((network.next(), network.next()), ("one", "one"));
    daemon.end().unwrap();
    network.silent();
}

#[test]
fn announcements_without_end_or_number_are_refused() {
    let host = Host::new();
    host.make("root", &[0; 4096]);
    let daemon = host.start(&["root"], &Settings::default());
    let mut qmp = daemon.qmp();
    for (wrong, why) in [
        (
            json!({"rounds": -1}),
            "Parameter 'rounds' expects a value between 0 and 1000",
        ),
        (
            json!({"rounds": 1001}),
            "Parameter 'rounds' expects a value between 0 and 1000",
        ),
        (
            json!({"initial": -1}),
            "Parameter 'initial' expects a value between 0 and 100000",
        ),
        (
            json!({"max": 100_001}),
            "Parameter 'max' expects a value between 0 and 100000",
        ),
        (
            json!({"step": i64::MAX}),
            "Parameter 'step' expects a value between 0 and 10000",
        ),
        (
            json!({"step": 0.5}),
            "Invalid parameter type for 'step', expected: integer",
        ),
        (json!({"wait": 1}), "Parameter 'wait' is unexpected"),
        (
            json!({"interfaces": [1]}),
            "Invalid parameter type for 'interfaces[0]', expected: string",
        ),
    ] {
        let error = qmp.refused("announce-self", arguments(5, &wrong));
        assert!(error.contains(why), "{error}");
    }
    let error = qmp.refused("announce-self", json!({"initial": 1, "max": 1, "step": 1}));
    assert!(error.contains("Parameter 'rounds' is missing"), "{error}");
    // There are no NICs, and that is no error. Only so many may be under way.
    for number in 0..16 {
        let far = json!({"initial": 100_000, "max": 100_000, "id": number.to_string()});
        qmp.run("announce-self", arguments(1000, &far));
    }
    let error = qmp.refused("announce-self", arguments(2, &json!({})));
    assert!(error.contains("16 announcements are under way"), "{error}");
    qmp.run("announce-self", arguments(1000, &json!({"id": "3"})));
}

#[test]
fn a_guest_that_has_arrived_is_announced_and_one_that_has_not_is_not() {
    let (from, to) = (Host::new(), Host::new());
    from.make("root", &random(3, MIB));
    to.make("root", &vec![0; 1 << 20]);
    let (network, wires) = Network::new();
    let source = from.start(&["root"], &Settings::default());
    let settings = Settings {
        incoming: true,
        wires,
        ..Settings::default()
    };
    let destination = to.start(&["root"], &settings);
    drop(settings);
    let uri = destination.incoming.clone().unwrap();
    let parameters = json!({
        "announce-initial": 1, "announce-max": 2, "announce-rounds": 3, "announce-step": 1,
    });
    destination.qmp().run("migrate-set-parameters", parameters);

    // One that is cut off announces nothing.
    drop(std::net::TcpStream::connect(uri.to_string().trim_start_matches("tcp:")).unwrap());
    destination.qmp().wait(|info| info.error_desc.is_some());
    let mut qmp = source.patient_qmp();
    qmp.run("migrate", migrate_to(&uri));
    let info = qmp.wait_status(&OVER);
    assert_eq!(info.error_desc, None);
    for _ in 0..3 {
        assert_eq!((network.next(), network.next()), ("one", "two"));
    }
    destination.end().unwrap();
    network.silent();
}
