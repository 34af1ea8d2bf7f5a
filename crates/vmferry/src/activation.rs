//! Descriptors that this process was started with: `fd:N`, and the sockets that systemd opened.
//!
//! systemd's protocol (`sd_listen_fds(3)`): `LISTEN_PID` is this process, `LISTEN_FDS` the number of
//! sockets, from descriptor 3 on, and `LISTEN_FDNAMES` their names with colons between.

use std::io;
use std::os::fd::OwnedFd;

use rustix::process::{PidfdFlags, PidfdGetfdFlags};
use vmferry_channel::{Listener, Uri};

use crate::exit::{Exit, Failure};

/// The first descriptor that systemd passes.
const FIRST: u32 = 3;
/// More sockets than this are no service of ours.
const SOCKETS_MAX: u32 = 1024;

/// Listening sockets by what they are for.
#[derive(Debug, Default)]
pub(crate) struct Activated {
    pub(crate) nbd: Vec<Listener>,
    pub(crate) qmp: Vec<Listener>,
    pub(crate) incoming: Option<Listener>,
}

impl Activated {
    /// The sockets of systemd, if it has passed any to this process.
    pub(crate) fn take() -> Result<Self, Failure> {
        let variable = |name: &str| std::env::var(name).ok();
        let numbers = numbers(
            std::process::id(),
            variable("LISTEN_PID").as_deref(),
            variable("LISTEN_FDS").as_deref(),
            variable("LISTEN_FDNAMES").as_deref(),
        )
        .map_err(|why| Failure::usage(format!("socket activation: {why}")))?;
        let mut activated = Self::default();
        for (number, name) in numbers {
            let uri = i32::try_from(number).map_or(Uri::Fd(i32::MAX), Uri::Fd);
            let listener = Listener::bind(&uri).map_err(|error| {
                Failure::new(
                    Exit::Failed,
                    format!("socket \"{name}\" of systemd: {error}"),
                )
            })?;
            match name.as_str() {
                "qmp" => activated.qmp.push(listener),
                "incoming" if activated.incoming.is_some() => {
                    return Err(Failure::usage(
                        "socket activation: two sockets named incoming",
                    ));
                }
                "incoming" => activated.incoming = Some(listener),
                _ => activated.nbd.push(listener),
            }
        }
        Ok(activated)
    }
}

fn numbers(
    this_process: u32,
    pid: Option<&str>,
    count: Option<&str>,
    names: Option<&str>,
) -> Result<Vec<(u32, String)>, &'static str> {
    let (Some(pid), Some(count)) = (pid, count) else {
        return Ok(Vec::new());
    };
    if pid.parse() != Ok(this_process) {
        return Ok(Vec::new());
    }
    let count: u32 = count.parse().map_err(|_| "LISTEN_FDS is no number")?;
    if count > SOCKETS_MAX {
        return Err("LISTEN_FDS is more than 1024");
    }
    let mut names = names.map(|names| names.split(':'));
    let named = (FIRST..FIRST + count)
        .map(|number| match &mut names {
            None => Some((number, String::from("nbd"))),
            Some(names) => names.next().map(|name| (number, name.to_owned())),
        })
        .collect::<Option<Vec<_>>>();
    let too_many = names.is_some_and(|mut names| names.next().is_some());
    named
        .filter(|_| !too_many || count == 0)
        .ok_or("LISTEN_FDNAMES has not one name for each socket")
}

/// A duplicate of a descriptor that this process was started with.
pub(crate) fn duplicate(number: i32) -> io::Result<OwnedFd> {
    let this = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
    Ok(rustix::process::pidfd_getfd(
        this,
        number,
        PidfdGetfdFlags::empty(),
    )?)
}

/// Does connecting to it go through `accept`?
pub(crate) fn is_listening(number: i32) -> bool {
    duplicate(number)
        .is_ok_and(|fd| rustix::net::sockopt::socket_acceptconn(fd).is_ok_and(|listens| listens))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    fn of(pid: &str, count: &str, names: Option<&str>) -> Result<Vec<(u32, String)>, &'static str> {
        numbers(42, Some(pid), Some(count), names)
    }

    #[test]
    fn sockets_are_numbered_from_three_and_named() {
        assert_eq!(
            of("42", "2", Some("qmp:incoming")),
            Ok(vec![(3, "qmp".into()), (4, "incoming".into())])
        );
        assert_eq!(of("42", "1", None), Ok(vec![(3, "nbd".into())]));
        assert_eq!(of("42", "0", Some("")), Ok(vec![]));
    }

    #[test]
    fn sockets_of_another_process_are_not_ours() {
        assert_eq!(of("41", "2", None), Ok(vec![]));
        assert_eq!(numbers(42, None, None, None), Ok(vec![]));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        assert!(of("42", "two", None).is_err());
        assert!(of("42", "1025", None).is_err());
        assert!(of("42", "1024", None).is_ok());
        assert!(of("42", "2", Some("qmp")).is_err());
        assert!(of("42", "1", Some("qmp:nbd")).is_err());
    }

    #[test]
    fn a_listening_socket_is_told_apart() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(is_listening(listener.as_raw_fd()));
        let connected = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert!(!is_listening(connected.as_raw_fd()));
        assert!(!is_listening(9999));
    }
}
