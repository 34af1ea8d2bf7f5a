//! Descriptors that a process is started with: `fd:N` and `-`.
//!
//! Each case starts this program again in a role, with a shell that arranges the descriptors, and
//! talks to it from outside. A role panics on what it does not expect, and then fails the case.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::io::{FdFlags, fcntl_getfd};
use vmferry_channel::{
    Channel, ChannelError, Listener, Reader, Stop, Uri, Writer, open_incoming, open_outgoing,
};

/// A name, what a child process does, and what the test does with it.
type Case = (&'static str, fn(), fn(&'static str));

const CASES: &[Case] = &[
    ("file", file_role, file_case),
    ("socket", socket_role, socket_case),
    ("no-listener", no_listener_role, no_listener_case),
    ("listener", listener_role, listener_case),
    ("systemd", systemd_role, systemd_case),
    ("pipes", pipes_role, pipes_case),
    ("refused", refused_role, refused_case),
    ("stdio", stdio_role, stdio_case),
    ("one-way-out", one_way_out_role, one_way_out_case),
    ("one-way-in", one_way_in_role, one_way_in_case),
    (
        "nothing-inherited",
        nothing_inherited_role,
        nothing_inherited_case,
    ),
];

fn main() {
    let mut arguments = std::env::args().skip(1);
    let first = arguments.next();
    if first.as_deref() == Some("role") {
        let name = arguments.next().expect("a role");
        let (_, role, _) = CASES
            .iter()
            .find(|case| case.0 == name)
            .expect("a known role");
        role();
        return;
    }
    if std::env::args().any(|argument| argument == "--list") {
        CASES.iter().for_each(|(name, ..)| println!("{name}: test"));
        return;
    }
    let wanted = first
        .filter(|argument| !argument.starts_with('-'))
        .unwrap_or_default();
    for (name, _, case) in CASES.iter().filter(|case| case.0.contains(&wanted)) {
        case(name);
        println!("test {name} ... ok");
    }
}

/// Start this program in a role, with the redirections of a shell.
fn start(role: &str, redirections: &str, stdin: Stdio, stdout: Stdio) -> Child {
    Command::new("/bin/sh")
        .arg("-c")
        .arg(format!("exec \"$0\" role {role} {redirections}"))
        .arg(std::env::current_exe().unwrap())
        .stdin(stdin)
        .stdout(stdout)
        .spawn()
        .unwrap()
}

fn ended_well(mut child: Child) {
    assert!(child.wait().unwrap().success());
}

fn stop() -> Stop {
    Stop::new().unwrap()
}

fn uri(text: &str) -> Uri {
    text.parse().unwrap()
}

fn outgoing(text: &str) -> vmferry_channel::Result<Channel> {
    open_outgoing(&uri(text), &stop(), Duration::ZERO)
}

fn to_end(reader: &mut Reader) -> Vec<u8> {
    let mut all = Vec::new();
    let mut buf = [0; 1000];
    loop {
        match reader.read(&mut buf).unwrap() {
            0 => return all,
            got => all.extend_from_slice(&buf[..got]),
        }
    }
}

/// Answer everything that comes, in capitals, and close both directions.
fn shout(mut reader: Reader, mut writer: Writer) {
    let said = to_end(&mut reader);
    writer.write_all(&said.to_ascii_uppercase()).unwrap();
    writer.finish(None).unwrap();
}

fn file_case(role: &'static str) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"content").unwrap();
    let redirections = format!("7< '{}'", file.path().display());
    ended_well(start(role, &redirections, Stdio::null(), Stdio::null()));
}

fn file_role() {
    let Channel::In(mut reader) = open_incoming(&uri("fd:7"), &stop()).unwrap() else {
        panic!("a file is read one way");
    };
    assert_eq!(to_end(&mut reader), b"content");
    let error = open_incoming(&uri("fd:7"), &stop())
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "fd:7: the descriptor was not inherited, or is in use already"
    );
    drop(reader);
    let error = open_incoming(&uri("fd:7"), &stop())
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("take fd:7: Bad file descriptor"),
        "{error}"
    );
}

fn socket_case(role: &'static str) {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let child = start(
        role,
        "7<&0 < /dev/null",
        OwnedFd::from(theirs).into(),
        Stdio::null(),
    );
    ours.write_all(b"hello").unwrap();
    ours.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    ours.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "HELLO");
    ended_well(child);
}

fn socket_role() {
    let Channel::TwoWay(reader, writer) = open_incoming(&uri("fd:7"), &stop()).unwrap() else {
        panic!("a socket is two-way");
    };
    shout(reader, writer);
}

fn no_listener_case(role: &'static str) {
    let (_ours, theirs) = UnixStream::pair().unwrap();
    ended_well(start(
        role,
        "7<&0 < /dev/null",
        OwnedFd::from(theirs).into(),
        Stdio::null(),
    ));
}

fn no_listener_role() {
    let error = Listener::bind(&uri("fd:7")).unwrap_err().to_string();
    assert_eq!(error, "fd:7: it is no listening stream socket");
    // The attempt has used it up.
    let error = open_incoming(&uri("fd:7"), &stop()).unwrap_err();
    assert!(matches!(error, ChannelError::Io { .. }), "{error}");
}

fn listener_case(role: &'static str) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let child = start(
        role,
        "3<&0 < /dev/null",
        OwnedFd::from(listener).into(),
        Stdio::null(),
    );
    let mut ours = UnixStream::connect(&path).unwrap();
    ours.write_all(b"hello").unwrap();
    ours.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    ours.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "HELLO");
    ended_well(child);
    assert!(path.exists());
}

fn listener_role() {
    let listener = Listener::bind(&uri("fd:3")).unwrap();
    assert!(matches!(listener.local(), Uri::Unix(path) if path.ends_with("s")));
    let channel = listener.accept(&stop()).unwrap().into_channel(&stop());
    let Channel::TwoWay(reader, writer) = channel else {
        panic!("a socket is two-way");
    };
    shout(reader, writer);
}

fn systemd_case(role: &'static str) {
    let folder = tempfile::tempdir().unwrap();
    let sockets = ["a", "b"].map(|name| UnixListener::bind(folder.path().join(name)).unwrap());
    let [a, b] = sockets.map(OwnedFd::from);
    // The shell keeps its process id through `exec`, as systemd's own helper does.
    let child = Command::new("/bin/sh")
        .arg("-c")
        .arg(format!(
            "export LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=nbd; \
             exec \"$0\" role {role} 3<&0 4<&1 < /dev/null > /dev/null"
        ))
        .arg(std::env::current_exe().unwrap())
        .stdin(a)
        .stdout(b)
        .spawn()
        .unwrap();
    drop(UnixStream::connect(folder.path().join("b")).unwrap());
    ended_well(child);
}

fn systemd_role() {
    let listeners = Listener::from_systemd().unwrap();
    let names: Vec<&str> = listeners.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["nbd", "unknown"]);
    for ((_, listener), file) in listeners.iter().zip(["a", "b"]) {
        assert!(matches!(listener.local(), Uri::Unix(path) if path.ends_with(file)));
    }
    listeners[1].1.accept(&stop()).unwrap();
    assert!(Listener::from_systemd().is_err(), "they are given out once");
}

fn pipes_case(role: &'static str) {
    let mut child = start(role, "8<&0 9>&1", Stdio::piped(), Stdio::piped());
    child.stdin.take().unwrap().write_all(b"hello").unwrap();
    let mut answer = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut answer)
        .unwrap();
    assert_eq!(answer, "HELLO");
    ended_well(child);
}

fn pipes_role() {
    // 0 and 1 are the same pipes as 8 and 9: the ends must not depend on them.
    drop(open_incoming(&uri("fd:0"), &stop()).unwrap());
    drop(outgoing("fd:1").unwrap());
    let (Some(reader), None) = open_incoming(&uri("fd:8"), &stop()).unwrap().split() else {
        panic!("a pipe goes one way");
    };
    let (None, Some(writer)) = outgoing("fd:9").unwrap().split() else {
        panic!("a pipe goes one way");
    };
    shout(reader, writer);
}

fn refused_case(role: &'static str) {
    ended_well(start(role, "7< /", Stdio::null(), Stdio::null()));
}

fn refused_role() {
    let own = std::fs::File::open("/dev/null").unwrap();
    let error = open_incoming(&Uri::Fd(own.as_raw_fd()), &stop())
        .unwrap_err()
        .to_string();
    assert!(
        error.ends_with("was not inherited, or is in use already"),
        "{error}"
    );
    drop(own);
    let error = open_incoming(&uri("fd:999"), &stop())
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("take fd:999: Bad file descriptor"),
        "{error}"
    );
    assert!(open_incoming(&Uri::Fd(-1), &stop()).is_err());
    let error = open_incoming(&uri("fd:7"), &stop())
        .unwrap_err()
        .to_string();
    assert_eq!(error, "fd:7: it is a directory");
}

fn stdio_case(role: &'static str) {
    let mut child = start(role, "", Stdio::piped(), Stdio::piped());
    let mut input = child.stdin.take().unwrap();
    let mut output = child.stdout.take().unwrap();
    input.write_all(b"hello").unwrap();
    let mut answer = [0; 5];
    output.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HELLO");
    // The stream ends with the half, not with the process, which still waits for us here.
    let mut rest = String::new();
    output.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "", "stray prints stay out of the stream");
    drop(input);
    ended_well(child);
}

fn stdio_role() {
    let Channel::TwoWay(mut reader, mut writer) = open_incoming(&uri("-"), &stop()).unwrap() else {
        panic!("pipes both ways are two-way");
    };
    let mut said = [0; 5];
    reader.read_exact(&mut said).unwrap();
    println!("a stray print");
    writer.write_all(&said.to_ascii_uppercase()).unwrap();
    writer.finish(None).unwrap();
    assert_eq!(to_end(&mut reader), b"");
}

fn one_way_out_case(role: &'static str) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let redirections = format!("> '{}'", file.path().display());
    ended_well(start(role, &redirections, Stdio::null(), Stdio::null()));
    let mut content = String::new();
    file.read_to_string(&mut content).unwrap();
    assert_eq!(content, "out");
}

fn one_way_out_role() {
    let Channel::Out(mut writer) = outgoing("-").unwrap() else {
        panic!("nothing comes back from a null device");
    };
    writer.write_all(b"out").unwrap();
    writer.sync().unwrap();
}

fn one_way_in_case(role: &'static str) {
    let mut child = start(role, "", Stdio::piped(), Stdio::null());
    child.stdin.take().unwrap().write_all(b"in").unwrap();
    ended_well(child);
}

fn one_way_in_role() {
    let Channel::In(mut reader) = open_incoming(&uri("-"), &stop()).unwrap() else {
        panic!("nothing goes back into a null device");
    };
    assert_eq!(to_end(&mut reader), b"in");
}

fn nothing_inherited_case(role: &'static str) {
    ended_well(start(role, "7< /dev/zero", Stdio::piped(), Stdio::piped()));
}

/// Open one of everything; nothing of it may survive an `exec`.
fn nothing_inherited_role() {
    // What else the test runner leaves open is not ours to close.
    let before: Vec<i32> = surviving()
        .into_iter()
        .filter(|number| *number != 7)
        .collect();
    let folder = tempfile::tempdir().unwrap();
    let stop = stop();
    let unix = Listener::bind(&Uri::Unix(folder.path().join("s"))).unwrap();
    let tcp = Listener::bind(&uri("tcp:127.0.0.1:0")).unwrap();
    let connected = vmferry_channel::connect(tcp.local(), &stop, Duration::from_secs(30)).unwrap();
    let accepted = tcp.accept(&stop).unwrap();
    let file = Uri::File {
        path: folder.path().join("f"),
        offset: 0,
    };
    let channels = [
        open_outgoing(&file, &stop, Duration::ZERO).unwrap(),
        open_incoming(&file, &stop).unwrap(),
        open_incoming(&uri("exec:cat"), &stop).unwrap(),
        open_incoming(&uri("fd:7"), &stop).unwrap(),
        open_incoming(&uri("fd:0"), &stop).unwrap(),
        open_incoming(&uri("-"), &stop).unwrap(),
        Channel::pair(&stop, &stop).unwrap().0,
    ];
    assert_eq!(surviving(), before);
    drop((unix, connected, accepted, channels));
}

/// The descriptors of this process that a program it starts would get.
fn surviving() -> Vec<i32> {
    let mut numbers: Vec<i32> = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .map(|entry| {
            entry
                .unwrap()
                .file_name()
                .to_str()
                .unwrap()
                .parse()
                .unwrap()
        })
        .filter(|number| {
            // SAFETY: only the flags are read, and a descriptor that is gone answers EBADF.
            let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(*number) };
            fcntl_getfd(fd).is_ok_and(|flags| !flags.contains(FdFlags::CLOEXEC))
        })
        .collect();
    numbers.sort_unstable();
    numbers
}
