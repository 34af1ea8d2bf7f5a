//! Announced guests: a QEMU's frames, and those of the daemon on the wire of a network of the test's own.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, eth, recv, socket_with};
use serde_json::{Value, json};
use vmferry_relay::announce::{MacAddress, rarp_request};

use crate::hosts::{MIB, serve};
use crate::need;
use crate::peers::qemu::{Machine, Version};
use crate::peers::serve::Serve;
use crate::peers::vmferry::{PROGRAM, Vmferry};
use crate::peers::{PATIENCE, disk, required, seeded};

/// Set in the process that has a network of its own.
const INSIDE: &str = "VMFERRY_TEST_NETWORK";
/// A guest behind the interface "wire0", whose own address is [`OWN`].
const GUEST: &str = "52:54:00:12:34:56";
const OWN: &str = "52:54:00:aa:bb:cc";
/// The one behind "wire1".
const OTHER: &str = "52:54:00:12:34:57";

fn frame(mac: &str) -> Vec<u8> {
    let mac: MacAddress = mac.parse().expect("an address");
    rarp_request(mac).to_vec()
}

fn arguments(rounds: u64, more: &Value) -> Value {
    let mut arguments = json!({"initial": 5, "max": 10, "rounds": rounds, "step": 1});
    for (key, value) in more.as_object().expect("an object") {
        arguments[key] = value.clone();
    }
    arguments
}

/// The frames of a QEMU's `announce-self` are ours to the last byte, its parameters and their defaults, too.
fn a_qemu_announces_as_we_do(version: Version) {
    let mut rng = seeded();
    let dir = tempfile::tempdir().expect("a temporary folder");
    let mut machine = need!(Machine::new(version));
    let mut wires = Vec::new();
    for model in ["e1000", "virtio-net-pci"] {
        let path = dir.path().join(model);
        let wire = UnixDatagram::bind(&path).expect("a socket in the temporary folder");
        wire.set_read_timeout(Some(PATIENCE))
            .expect("a read timeout can be set");
        let mac = format!(
            "52:54:00:{:02x}:{:02x}:{:02x}",
            rng.u8(..),
            rng.u8(..),
            rng.u8(..)
        );
        let (net, device) = network(model, &path, &mac);
        machine = machine.args(["-netdev", &net, "-device", &device]);
        wires.push((wire, mac));
    }
    let mut qemu = machine.start();
    let expect = |of: usize, times: usize| {
        let (wire, mac) = &wires[of];
        for _ in 0..times {
            let mut seen = [0; 2048];
            let length = wire.recv(&mut seen).expect("a frame");
            assert_eq!(seen[..length], frame(mac), "of {mac}");
        }
    };
    qemu.qmp.execute("announce-self", &arguments(5, &json!({})));
    expect(0, 5);
    expect(1, 5);
    for nobody in [json!([]), json!(["nobody"])] {
        let none = json!({"interfaces": nobody});
        qemu.qmp.execute("announce-self", &arguments(5, &none));
    }
    let second = json!({"interfaces": ["nobody", "virtio-net-pci"]});
    qemu.qmp.execute("announce-self", &arguments(2, &second));
    expect(1, 2);
    let all = qemu.qmp.execute("query-migrate-parameters", &json!({}));
    let ours = ours(dir.path());
    for parameter in ["initial", "max", "rounds", "step"] {
        let name = format!("announce-{parameter}");
        assert_eq!(all[&name], ours[&name], "{name}");
    }
    qemu.quit();
    for (wire, mac) in wires {
        // It has ended, so what was sent is there.
        wire.set_nonblocking(true)
            .expect("a socket can be non-blocking");
        assert!(wire.recv(&mut [0; 2048]).is_err(), "one more of {mac}");
    }
}

/// The options for a NIC, which is called like its model, whose frames are datagrams to `path`.
fn network(model: &str, path: &Path, mac: &str) -> (String, String) {
    let (path, local) = (path.display(), path.with_extension("qemu"));
    let local = local.display();
    let remote = format!("remote.type=unix,remote.path={path}");
    let net = format!("dgram,id=net-{model},{remote},local.type=unix,local.path={local}");
    // Without the image to boot from, which may not be installed.
    let device = format!("{model},id={model},netdev=net-{model},mac={mac},romfile=");
    (net, device)
}

/// The parameters of a daemon of ours.
fn ours(dir: &Path) -> Value {
    let image = dir.join("disk");
    disk::sparse(&image, MIB, &[], &mut fastrand::Rng::with_seed(0));
    let daemon = serve(dir, "ours", &image);
    let parameters = daemon.qmp().execute("query-migrate-parameters", &json!({}));
    daemon.end();
    parameters
}

#[test]
fn qemu_7_2_announces_as_we_do() {
    a_qemu_announces_as_we_do(Version::V7_2);
}

#[test]
fn qemu_10_0_announces_as_we_do() {
    a_qemu_announces_as_we_do(Version::V10_0);
}

/// True in a process with a network of its own. Else the test of this name is run in such a one, if one can be made, and
/// there is nothing left to do.
fn in_own_network(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let ways: [&[&str]; 2] = [&["--net"], &["--user", "--map-root-user", "--net"]];
    let works = |way: &&&[&str]| {
        let mut trial = Command::new("unshare");
        trial.args(**way);
        trial.args(["ip", "link", "add", "end0", "type", "veth"]);
        let outcome = trial.stdin(Stdio::null()).output();
        outcome.is_ok_and(|output| output.status.success())
    };
    let Some(way) = ways.iter().find(works) else {
        assert!(
            !required(),
            "no network namespace can be made, and VMFERRY_REQUIRE_PEERS is set"
        );
        println!("left out: needs a network namespace (unshare, ip, and root or user namespaces)");
        return false;
    };
    let mut again = Command::new("unshare");
    let program = std::env::current_exe().expect("the path of this program");
    again.args(*way).arg(program);
    again
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1");
    let output = again
        .stdin(Stdio::null())
        .output()
        .expect("unshare can be run");
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{errors}");
    assert!(said.contains("1 passed"), "no such test: {said}");
    false
}

fn ip(arguments: &str) {
    let mut command = Command::new("ip");
    let output = command.args(arguments.split(' ')).output();
    let output = output.expect("ip can be run");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {errors}");
}

/// What arrives anywhere in this network and is a RARP frame: "wire0" and "wire1" lead to it.
struct Switch(OwnedFd);

impl Switch {
    fn new() -> Self {
        ip("link set lo up");
        for wire in ["wire0", "wire1"] {
            ip(&format!(
                "link add {wire} address {OWN} type veth peer name {wire}-end"
            ));
            // The end that sends comes last: it is ready when the command is.
            ip(&format!("link set {wire}-end up"));
            ip(&format!("link set {wire} up"));
        }
        let socket = socket_with(
            AddressFamily::PACKET,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            Some(eth::RARP),
        );
        Self(socket.expect("a packet socket"))
    }

    fn next(&self) -> Vec<u8> {
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        let timeout = Timespec::try_from(PATIENCE).expect("a short time");
        let ready = poll(&mut fds, Some(&timeout)).expect("a socket can be waited for");
        assert_eq!(ready, 1, "no frame");
        let mut frame = vec![0; 2048];
        let (_, length) = recv(&self.0, &mut frame[..], RecvFlags::DONTWAIT).expect("a frame");
        frame.truncate(length);
        frame
    }

    /// Rounds with a frame of each of these.
    fn rounds(&self, macs: &[&str], rounds: usize) {
        let mut expected: Vec<_> = macs.iter().map(|mac| frame(mac)).collect();
        expected.sort();
        for _ in 0..rounds {
            let mut round: Vec<_> = macs.iter().map(|_| self.next()).collect();
            round.sort();
            assert_eq!(round, expected);
        }
    }
}

#[test]
fn a_guest_is_announced_when_it_has_arrived_and_when_somebody_asks() {
    let name = "announce::a_guest_is_announced_when_it_has_arrived_and_when_somebody_asks";
    if !in_own_network(name) {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let [from, to] = ["from", "to"].map(|name| dir.path().join(name));
    disk::random(&from, 4 * MIB, &mut seeded());
    let switch = Switch::new();
    let source = serve(dir.path(), "source", &from);
    let made = format!("disk0={},create=on,size={}", to.display(), 4 * MIB);
    let guest = format!("wire0,mac={GUEST}");
    let other = format!("wire1,mac={OTHER}");
    let mut options = vec!["--disk", &made, "--incoming", "tcp:127.0.0.1:0"];
    options.extend(["--announce", &guest, "--announce", "wire0"]);
    options.extend(["--announce", &other]);
    let destination = Serve::start(dir.path(), "destination", options);
    let mut qmp = destination.qmp();
    // One that comes by itself after an announcement is over would come between these two.
    let last = json!({"interfaces": ["wire1"], "initial": 600, "max": 600, "id": "last"});

    source.migrate(&destination.incoming(), []).succeeds();
    switch.rounds(&[GUEST, OWN, OTHER], 5);
    qmp.execute("announce-self", &arguments(2, &last));
    switch.rounds(&[OTHER], 2);

    let wire0 = json!({"interfaces": ["wire0", "wire2"]});
    qmp.execute("announce-self", &arguments(7, &wire0));
    switch.rounds(&[GUEST, OWN], 7);
    qmp.execute("announce-self", &arguments(2, &last));
    switch.rounds(&[OTHER], 2);
    destination.end();
    source.end();
    disk::assert_same(&from, &to);
}

#[test]
fn an_interface_that_cannot_be_used_is_refused_before_anything_is_made() {
    let name = "announce::an_interface_that_cannot_be_used_is_refused_before_anything_is_made";
    if !in_own_network(name) {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let image = dir.path().join("image");
    let made = format!("disk0={},create=on,size={MIB}", image.display());
    let door = format!("unix:{}", dir.path().join("nbd").display());
    let base = ["serve", "--disk", &made, "--nbd", &door, "--announce"];
    for (interface, why) in [
        ("none0", "\"none0\": no such network interface"),
        ("lo", "\"lo\" is not an Ethernet interface"),
    ] {
        let line = Vmferry::start(base.into_iter().chain([interface])).fails(4);
        assert!(line.contains("--announce") && line.contains(why), "{line}");
    }
    // In a user namespace of its own it has no privilege over this network.
    let mut powerless = Command::new("unshare");
    powerless.arg("--user").arg(PROGRAM).args(base).arg("lo");
    let output = powerless.output().expect("unshare can be run");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("not permitted"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    let left = std::fs::read_dir(dir.path()).expect("a folder").count();
    assert_eq!(left, 0, "something was made");
}
