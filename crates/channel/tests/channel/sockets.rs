//! Listening and connecting.

use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{OFlags, fcntl_getfl};
use rustix::io::{FdFlags, fcntl_getfd};
use rustix::net::sockopt;
use vmferry_channel::{
    ChannelError, Listener, Socket, Stop, Uri, connect, open_incoming, open_outgoing,
};

use crate::{halves, read_to_end, stop, stop_while_blocked, uri};

const PATIENCE: Duration = Duration::from_secs(30);

fn unix(path: &Path) -> Uri {
    Uri::Unix(path.to_owned())
}

fn port(uri: &Uri) -> u16 {
    match uri {
        Uri::Tcp { port, .. } => *port,
        other => panic!("no TCP address: {other}"),
    }
}

/// Connect to the listener and talk both ways.
fn talk(listener: &Listener, to: &Uri) {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let socket = listener.accept(&stop()).unwrap();
            check(&socket);
            let (mut reader, mut writer) = halves(socket.into_channel(&stop()));
            let question = read_to_end(&mut reader);
            writer.write_all(&question).unwrap();
        });
        let socket = connect(to, &stop(), PATIENCE).unwrap();
        check(&socket);
        let (mut reader, mut writer) = halves(socket.into_channel(&stop()));
        writer.write_all(b"there and back").unwrap();
        writer.shutdown().unwrap();
        assert_eq!(read_to_end(&mut reader), b"there and back");
    });
}

fn check(socket: &Socket) {
    assert!(fcntl_getfd(socket).unwrap().contains(FdFlags::CLOEXEC));
    assert!(!fcntl_getfl(socket).unwrap().contains(OFlags::NONBLOCK));
    if sockopt::socket_domain(socket).unwrap() != rustix::net::AddressFamily::UNIX {
        assert!(sockopt::tcp_nodelay(socket).unwrap());
        assert!(sockopt::socket_keepalive(socket).unwrap());
        assert!(socket.peer().starts_with("tcp:"), "{}", socket.peer());
    }
}

#[test]
fn tcp_reports_the_port_that_the_kernel_chose() {
    let listener = Listener::bind(&uri("tcp:127.0.0.1:0")).unwrap();
    assert_ne!(port(listener.local()), 0);
    assert!(listener.local().to_string().starts_with("tcp:127.0.0.1:"));
    assert!(fcntl_getfd(&listener).unwrap().contains(FdFlags::CLOEXEC));
    talk(&listener, listener.local());
}

#[test]
fn tcp_takes_names_and_tries_all_their_addresses() {
    let listener = Listener::bind(&uri("tcp:127.0.0.1:0")).unwrap();
    // Where localhost is ::1 first, the first address is refused.
    let local = uri(&format!("tcp:localhost:{}", port(listener.local())));
    talk(&listener, &local);
}

#[test]
fn tcp_without_a_host_listens_everywhere() {
    let listener = Listener::bind(&uri("tcp::0")).unwrap();
    let port = port(listener.local());
    talk(&listener, &uri(&format!("tcp:127.0.0.1:{port}")));
    talk(&listener, &uri(&format!("tcp::{port}")));
}

#[test]
fn tcp_speaks_ipv6() {
    if std::net::TcpListener::bind("[::1]:0").is_err() {
        println!("no IPv6 here: nothing to test");
        return;
    }
    let listener = Listener::bind(&uri("tcp:[::1]:0")).unwrap();
    assert!(listener.local().to_string().starts_with("tcp:[::1]:"));
    talk(&listener, listener.local());
}

#[test]
fn tcp_errors_name_the_address() {
    let listener = Listener::bind(&uri("tcp:127.0.0.1:0")).unwrap();
    let address = listener.local().clone();
    let error = Listener::bind(&address).unwrap_err();
    assert!(matches!(error, ChannelError::InUse { .. }), "{error}");
    drop(listener);
    let error = connect(&address, &stop(), PATIENCE)
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with(&format!("connect to {address}: Connection refused")),
        "{error}"
    );
    let error = connect(&uri("tcp:no-such-host.invalid:1"), &stop(), PATIENCE).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("resolve tcp:no-such-host.invalid:1"),
        "{error}"
    );
    let error = Listener::bind(&uri("tcp:192.0.2.1:0"))
        .unwrap_err()
        .to_string();
    assert!(error.starts_with("listen on tcp:192.0.2.1:0"), "{error}");
}

/// A TCP listener that accepts nobody and whose backlog is full: connects to it stay pending.
fn full_listener() -> (OwnedFd, Uri, Vec<OwnedFd>) {
    use rustix::net::{AddressFamily, SocketFlags, SocketType};
    let family = AddressFamily::INET;
    let listener =
        rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
    let any: std::net::SocketAddr = "127.0.0.1:0".parse().unwrap();
    rustix::net::bind(&listener, &any).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let address = rustix::net::getsockname(&listener).unwrap();
    let address = std::net::SocketAddr::try_from(address).unwrap();
    let pending = (0..4)
        .map(|_| {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None).unwrap();
            let _ = rustix::net::connect(&socket, &address);
            socket
        })
        .collect();
    (listener, uri(&format!("tcp:{address}")), pending)
}

#[test]
fn connecting_has_a_timeout() {
    let (_listener, address, _pending) = full_listener();
    let error = connect(&address, &stop(), Duration::from_millis(50)).unwrap_err();
    assert!(matches!(error, ChannelError::TimedOut { .. }), "{error}");
    assert!(
        error
            .to_string()
            .starts_with(&format!("connect to {address}: no progress within"))
    );

    let folder = tempfile::tempdir().unwrap();
    let (_listener, address) = full_unix_listener(folder.path());
    let error = connect(&address, &stop(), Duration::from_millis(50)).unwrap_err();
    assert!(matches!(error, ChannelError::TimedOut { .. }), "{error}");
}

#[test]
fn a_stop_wakes_a_pending_connect() {
    let (_listener, address, _pending) = full_listener();
    let mine = stop();
    let error = stop_while_blocked(&mine, || connect(&address, &mine, PATIENCE).unwrap_err());
    assert!(error.is_stopped(), "{error}");

    let folder = tempfile::tempdir().unwrap();
    let (_listener, address) = full_unix_listener(folder.path());
    let mine = stop();
    let error = stop_while_blocked(&mine, || connect(&address, &mine, PATIENCE).unwrap_err());
    assert!(error.is_stopped(), "{error}");
}

#[test]
fn a_stop_wakes_accept() {
    let listener = Listener::bind(&uri("tcp:127.0.0.1:0")).unwrap();
    let mine = stop();
    let error = stop_while_blocked(&mine, || listener.accept(&mine).unwrap_err());
    assert!(error.is_stopped(), "{error}");
    talk(&listener, listener.local());
}

#[test]
fn accept_gives_up_at_its_deadline_but_takes_who_waits() {
    let folder = tempfile::tempdir().unwrap();
    let listener = Listener::bind(&unix(&folder.path().join("socket"))).unwrap();
    let past = Some(Instant::now());
    let error = listener.accept_until(&stop(), past).unwrap_err();
    assert!(matches!(error, ChannelError::TimedOut { .. }), "{error}");
    let twin = listener.try_clone().unwrap();
    assert_eq!(twin.local(), listener.local());
    let _client = connect(listener.local(), &stop(), PATIENCE).unwrap();
    twin.accept_until(&stop(), past).unwrap();
    // The file is the first one's.
    drop(twin);
    talk(&listener, listener.local());
}

/// A unix listener that accepts nobody and whose backlog is full.
fn full_unix_listener(folder: &Path) -> (OwnedFd, Uri) {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let path = folder.join("full");
    let address = SocketAddrUnix::new(&path).unwrap();
    let new = || {
        rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
        .unwrap()
    };
    let listener = new();
    rustix::net::bind(&listener, &address).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    // A connection stays in the backlog after its client has gone.
    while rustix::net::connect(new(), &address).is_ok() {}
    (listener, Uri::Unix(path))
}

#[test]
fn unix_sockets_are_private_and_go_with_their_listener() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let listener = Listener::bind(&unix(&path)).unwrap();
    assert_eq!(listener.local(), &unix(&path));
    let mode = std::fs::symlink_metadata(&path)
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o7777, 0o600);
    assert!(fcntl_getfd(&listener).unwrap().contains(FdFlags::CLOEXEC));
    talk(&listener, &unix(&path));
    drop(listener);
    assert!(!path.exists());
    let error = connect(&unix(&path), &stop(), PATIENCE)
        .unwrap_err()
        .to_string();
    assert!(error.contains("No such file"), "{error}");
}

#[test]
fn a_stale_socket_is_replaced_a_live_one_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    // The standard library leaves the file behind.
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let listener = Listener::bind(&unix(&path)).unwrap();
    talk(&listener, &unix(&path));

    let inode = std::fs::symlink_metadata(&path).unwrap().ino();
    let error = Listener::bind(&unix(&path)).unwrap_err();
    assert!(matches!(error, ChannelError::InUse { .. }), "{error}");
    assert!(
        error
            .to_string()
            .ends_with("is in use by a running process")
    );
    assert_eq!(std::fs::symlink_metadata(&path).unwrap().ino(), inode);
    // The probe left a dead connection in the backlog; it must not hurt.
    drop(listener.accept(&stop()).unwrap());
    talk(&listener, &unix(&path));

    let (_full, address) = full_unix_listener(folder.path());
    let error = Listener::bind(&address).unwrap_err();
    assert!(
        matches!(error, ChannelError::InUse { .. }),
        "a busy one is alive: {error}"
    );
}

#[test]
fn only_sockets_are_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("precious");
    std::fs::write(&path, b"data").unwrap();
    let error = Listener::bind(&unix(&path)).unwrap_err().to_string();
    assert!(error.contains("no socket"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"data");
}

#[test]
fn a_listener_removes_only_its_own_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let listener = Listener::bind(&unix(&path)).unwrap();
    std::fs::remove_file(&path).unwrap();
    let successor = UnixListener::bind(&path).unwrap();
    drop(listener);
    assert!(path.exists(), "the successor's socket stays");
    drop(successor);
}

#[test]
fn of_many_that_replace_a_stale_socket_one_wins() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    for _ in 0..20 {
        drop(UnixListener::bind(&path).unwrap());
        let outcomes: Vec<_> = std::thread::scope(|scope| {
            let racers: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| Listener::bind(&unix(&path))))
                .collect();
            racers
                .into_iter()
                .map(|racer| racer.join().unwrap())
                .collect()
        });
        let (mut winners, losers): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
        assert_eq!(winners.len(), 1);
        for loser in losers {
            assert!(
                matches!(loser, Err(ChannelError::InUse { .. })),
                "{loser:?}"
            );
        }
        let winner = winners.pop().unwrap().unwrap();
        assert!(connect(&unix(&path), &stop(), PATIENCE).is_ok());
        drop(winner);
        assert!(!path.exists());
    }
}

#[test]
fn a_handed_in_listener_keeps_its_flags_and_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let handed = UnixListener::bind(&path).unwrap();
    let twin = handed.as_fd().try_clone_to_owned().unwrap();
    let before = fcntl_getfl(&twin).unwrap();
    let listener = Listener::from_fd(handed.into()).unwrap();
    assert_eq!(listener.local(), &unix(&path));
    talk(&listener, &unix(&path));
    assert_eq!(fcntl_getfl(&twin).unwrap(), before);
    drop(listener);
    assert!(path.exists(), "it belongs to who has made it");

    let (connected, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let error = Listener::from_fd(connected.into()).unwrap_err().to_string();
    assert!(error.contains("no listening"), "{error}");
}

#[test]
fn channels_open_straight_from_addresses() {
    let folder = tempfile::tempdir().unwrap();
    let address = unix(&folder.path().join("s"));
    std::thread::scope(|scope| {
        let incoming = scope.spawn(|| {
            let (mut reader, _writer) = halves(open_incoming(&address, &stop()).unwrap());
            read_to_end(&mut reader)
        });
        let outgoing = retry(|| open_outgoing(&address, &stop(), PATIENCE));
        halves(outgoing).1.write_all(b"straight").unwrap();
        assert_eq!(incoming.join().unwrap(), b"straight");
    });
    let error = Listener::bind(&uri("exec:cat")).unwrap_err().to_string();
    assert_eq!(error, "exec:cat: nobody can listen there");
    let error = connect(&uri("-"), &stop(), PATIENCE)
        .unwrap_err()
        .to_string();
    assert_eq!(error, "-: nobody can connect there");
}

/// The other thread may not listen yet.
fn retry<T>(attempt: impl Fn() -> vmferry_channel::Result<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        match attempt() {
            Ok(done) => return done,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        std::thread::yield_now();
    }
}

#[test]
fn stopped_before_it_starts_nothing_is_connected() {
    let listener = Listener::bind(&uri("tcp:127.0.0.1:0")).unwrap();
    let stopped = Stop::new().unwrap();
    stopped.trigger();
    assert!(
        connect(listener.local(), &stopped, PATIENCE)
            .unwrap_err()
            .is_stopped()
    );
    assert!(listener.accept(&stopped).unwrap_err().is_stopped());
}

#[test]
fn a_socket_that_can_be_seen_accepts() {
    const ROUNDS: usize = 400;
    let folder = tempfile::tempdir().unwrap();
    let path = |round: usize| folder.path().join(round.to_string());
    let reached = AtomicUsize::new(0);
    let refused = std::thread::scope(|scope| {
        let knocking = scope.spawn(|| {
            let mut refused = 0;
            for round in 0..ROUNDS {
                reached.store(round, Ordering::SeqCst);
                while let Err(error) = UnixStream::connect(path(round)) {
                    refused += usize::from(error.kind() == ErrorKind::ConnectionRefused);
                }
            }
            refused
        });
        // Who knocks is there before each comes, and none goes before the end.
        let listeners: Vec<Listener> = (0..ROUNDS)
            .map(|round| {
                while reached.load(Ordering::SeqCst) < round {
                    std::thread::yield_now();
                }
                Listener::bind(&unix(&path(round))).unwrap()
            })
            .collect();
        let refused = knocking.join().unwrap();
        drop(listeners);
        refused
    });
    assert_eq!(refused, 0);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn the_longest_path_works() {
    const PATH_MAX: usize = 107;
    let folder = tempfile::tempdir().unwrap();
    let length = PATH_MAX - folder.path().as_os_str().len() - 1;
    let path = folder.path().join("s".repeat(length));
    let listener = Listener::bind(&Uri::Unix(path.clone())).unwrap();
    UnixStream::connect(&path).unwrap();
    drop(listener);
    assert!(!path.exists());
}
