//! Announcements on the wire: a veth pair in a network of the test's own. Where none can be made
//! (it takes `unshare`, `ip`, and root or user namespaces) the test says so and is left out, unless
//! `VMFERRY_REQUIRE_PEERS=1` says that everything is there.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, eth, recv, socket_with};
use vmferry_relay::announce::{
    Announcement, Announcements, Announcer, Interface, MacAddress, Occasion, Parameters,
    rarp_request,
};

/// How long a frame may take that is due within a second, on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Set in the process that has a network of its own.
const INSIDE: &str = "VMFERRY_TEST_NETWORK";
const GUEST: &str = "52:54:00:12:34:56";
const OWN: &str = "52:54:00:aa:bb:cc";

/// True in a process with a network of its own. Else the test of this name is run in such a one,
/// and there is nothing left to do.
fn in_own_network(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let ways: [&[&str]; 2] = [&["--net"], &["--user", "--map-root-user", "--net"]];
    let works = |way: &&&[&str]| {
        let mut trial = Command::new("unshare");
        trial
            .args(**way)
            .args(["ip", "link", "add", "end0", "type", "veth"]);
        let outcome = trial.stdin(Stdio::null()).output();
        outcome.is_ok_and(|output| output.status.success())
    };
    let Some(way) = ways.iter().find(works) else {
        let required = std::env::var_os("VMFERRY_REQUIRE_PEERS") == Some(OsString::from("1"));
        assert!(
            !required,
            "no network namespace can be made, and VMFERRY_REQUIRE_PEERS is set"
        );
        println!("left out: needs a network namespace (unshare, ip, and root or user namespaces)");
        return false;
    };
    let mut again = Command::new("unshare");
    again.args(*way).arg(std::env::current_exe().unwrap());
    again
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1");
    let output = again.stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{errors}");
    assert!(said.contains("1 passed"), "no such test: {said}");
    false
}

fn ip(arguments: &str) {
    let mut command = Command::new("ip");
    let output = command.args(arguments.split(' ')).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {errors}");
}

/// `guest` and `switch` are the two ends of one cable.
fn plug_in() {
    ip(&format!(
        "link add guest address {OWN} type veth peer name switch"
    ));
    // The end that sends comes last: it is ready when the command is.
    ip("link set switch up");
    ip("link set guest up");
}

/// What arrives anywhere in this network and is a RARP frame.
struct Switch(OwnedFd);

impl Switch {
    fn new() -> Self {
        let socket = socket_with(
            AddressFamily::PACKET,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            Some(eth::RARP),
        );
        Self(socket.unwrap())
    }

    fn next(&self) -> Vec<u8> {
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        let timeout = Timespec::try_from(PATIENCE).unwrap();
        assert_eq!(poll(&mut fds, Some(&timeout)).unwrap(), 1, "no frame");
        let mut frame = vec![0; 2048];
        let (_, length) = recv(&self.0, &mut frame[..], RecvFlags::DONTWAIT).unwrap();
        frame.truncate(length);
        frame
    }
}

fn mac(text: &str) -> MacAddress {
    text.parse().unwrap()
}

#[test]
fn the_other_end_of_the_cable_gets_exactly_five_frames() {
    if !in_own_network("the_other_end_of_the_cable_gets_exactly_five_frames") {
        return;
    }
    plug_in();
    let switch = Switch::new();
    for (given, announced) in [(Some(mac(GUEST)), GUEST), (None, OWN)] {
        let nic = Interface::open("guest", given).unwrap();
        let last: MacAddress = mac("02:00:00:00:00:99");
        let announcements = Announcements::start(vec![
            Box::new(nic),
            Box::new(Renamed(Interface::open("guest", Some(last)).unwrap())),
        ])
        .unwrap();
        let begin = |name: &str, nic: &str, parameters| {
            let announcement = Announcement {
                parameters,
                nics: Some(vec![nic.to_owned()]),
            };
            let occasion = Occasion::Asked(name.to_owned());
            announcements.begin(occasion, announcement).unwrap();
        };
        begin("", "guest", Parameters::default());
        for _ in 0..5 {
            assert_eq!(switch.next(), rarp_request(mac(announced)));
        }
        // A sixth would come between these two.
        begin("end", "last", Parameters::new(600, 600, 2, 0).unwrap());
        for _ in 0..2 {
            assert_eq!(switch.next(), rarp_request(last));
        }
    }
}

/// The interface under the name "last".
#[derive(Debug)]
struct Renamed(Interface);

impl Announcer for Renamed {
    fn name(&self) -> &str {
        "last"
    }

    fn mac(&self) -> MacAddress {
        self.0.mac()
    }

    fn send(&self, frame: &vmferry_relay::announce::Frame) -> std::io::Result<()> {
        self.0.send(frame)
    }
}

#[test]
fn an_interface_may_be_down_or_away_for_a_while() {
    if !in_own_network("an_interface_may_be_down_or_away_for_a_while") {
        return;
    }
    plug_in();
    let switch = Switch::new();
    let nic = Interface::open("guest", Some(mac(GUEST))).unwrap();
    let frame = rarp_request(nic.mac());
    let sends = || {
        nic.send(&frame).unwrap();
        assert_eq!(switch.next(), frame);
    };
    sends();
    ip("link set guest down");
    assert!(nic.send(&frame).is_err());
    ip("link set guest up");
    sends();
    ip("link del guest");
    assert!(nic.send(&frame).is_err());
    plug_in();
    sends();
}

#[test]
fn what_takes_no_frames_is_refused_by_name() {
    if !in_own_network("what_takes_no_frames_is_refused_by_name") {
        return;
    }
    let refused = |interface: &str| Interface::open(interface, None).unwrap_err().to_string();
    assert_eq!(
        refused("none0"),
        "interface \"none0\": no such network interface"
    );
    assert_eq!(
        refused("lo"),
        "interface \"lo\" is not an Ethernet interface"
    );
}
