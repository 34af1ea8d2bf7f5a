//! Where a channel goes: `tcp:HOST:PORT`, `unix:PATH`, `fd:N`, `exec:COMMAND`,
//! `file:PATH[,offset=N]`, `-`.

use std::fmt;
use std::net::Ipv6Addr;
use std::path::PathBuf;
use std::str::FromStr;

/// Longest path that fits in a unix socket address, in bytes: 108 less the final NUL.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// The address of a channel or of a listener. [`fmt::Display`] prints what [`FromStr`] reads.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Uri {
    /// `tcp:HOST:PORT`. An empty host listens on every address and connects to this host; an IPv6
    /// address stands in brackets.
    Tcp {
        /// Name or address, without brackets.
        host: String,
        /// Port; 0 lets the kernel choose when listening.
        port: u16,
    },
    /// `unix:PATH`: a stream socket in the file system.
    Unix(PathBuf),
    /// `fd:N`: a descriptor that this process has inherited.
    Fd(i32),
    /// `exec:COMMAND`: a shell command, its standard input and output.
    Exec(String),
    /// `file:PATH[,offset=N]`.
    File {
        /// The file.
        path: PathBuf,
        /// First byte to read or write.
        offset: u64,
    },
    /// `-`: standard input and output.
    Stdio,
}

impl Uri {
    /// Can a [`crate::Listener`] be bound to it? (`fd:N` may be one: it depends on the descriptor.)
    #[must_use]
    pub fn is_socket_address(&self) -> bool {
        matches!(self, Self::Tcp { .. } | Self::Unix(_))
    }
}

/// A text is no [`Uri`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{text}' is no address: {reason} (expected tcp:HOST:PORT, unix:PATH, fd:N, exec:COMMAND, \
     file:PATH[,offset=N] or -)"
)]
pub struct UriError {
    text: String,
    reason: &'static str,
}

impl UriError {
    /// What is wrong with it.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        self.reason
    }
}

impl FromStr for Uri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        parse(text).map_err(|reason| UriError {
            text: text.escape_debug().to_string(),
            reason,
        })
    }
}

fn parse(text: &str) -> Result<Uri, &'static str> {
    if text == "-" {
        return Ok(Uri::Stdio);
    }
    if text.contains('\0') {
        return Err("it contains a NUL character");
    }
    let (scheme, rest) = text.split_once(':').ok_or("it names no transport")?;
    match scheme {
        "tcp" => parse_tcp(rest),
        "unix" => parse_unix(rest),
        "fd" => parse_fd(rest),
        "exec" if rest.trim().is_empty() => Err("the command is missing"),
        "exec" => Ok(Uri::Exec(rest.to_owned())),
        "file" => parse_file(rest),
        _ => Err("its transport is unknown"),
    }
}

fn parse_tcp(rest: &str) -> Result<Uri, &'static str> {
    let (host, port) = rest.rsplit_once(':').ok_or("the port is missing")?;
    let host = match host.strip_prefix('[') {
        Some(bracketed) => {
            let address = bracketed
                .strip_suffix(']')
                .ok_or("the bracket around the IPv6 address is not closed")?;
            let (bare, zone) = address.split_once('%').unwrap_or((address, "0"));
            if bare.parse::<Ipv6Addr>().is_err() || zone.is_empty() {
                return Err("the brackets hold no IPv6 address");
            }
            address
        }
        None if host.contains(':') => return Err("an IPv6 address needs brackets"),
        None if host.contains(|c: char| c.is_whitespace() || "[]/,".contains(c)) => {
            return Err("the host name is malformed");
        }
        None => host,
    };
    if port.is_empty() {
        return Err("the port is missing");
    }
    let port = digits(port).ok_or("the port is no number from 0 to 65535")?;
    Ok(Uri::Tcp {
        host: host.to_owned(),
        port: u16::try_from(port).map_err(|_| "the port is no number from 0 to 65535")?,
    })
}

fn parse_unix(path: &str) -> Result<Uri, &'static str> {
    if path.is_empty() {
        return Err("the path is missing");
    }
    if path.len() > SOCKET_PATH_BYTES_MAX {
        return Err("the path is longer than a unix socket address allows (107 bytes)");
    }
    Ok(Uri::Unix(PathBuf::from(path)))
}

fn parse_fd(number: &str) -> Result<Uri, &'static str> {
    digits(number)
        .and_then(|number| i32::try_from(number).ok())
        .map(Uri::Fd)
        .ok_or("the descriptor is no number")
}

fn parse_file(rest: &str) -> Result<Uri, &'static str> {
    let (path, offset) = match rest.rsplit_once(OFFSET) {
        Some((path, offset)) => (
            path,
            digits(offset).ok_or("the offset is no number of bytes")?,
        ),
        None => (rest, 0),
    };
    // The kernel counts file positions in a signed number.
    if i64::try_from(offset).is_err() {
        return Err("the offset is no number of bytes");
    }
    if path.is_empty() {
        return Err("the path is missing");
    }
    Ok(Uri::File {
        path: PathBuf::from(path),
        offset,
    })
}

/// A decimal number and nothing else: `parse` alone would allow a plus sign.
fn digits(text: &str) -> Option<u64> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) {
        text.parse().ok()
    } else {
        None
    }
}

const OFFSET: &str = ",offset=";

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Fd(number) => write!(f, "fd:{number}"),
            Self::Exec(command) => write!(f, "exec:{command}"),
            Self::File { path, offset } => {
                let path = path.display().to_string();
                write!(f, "file:{path}")?;
                // A path that looks as if it had an offset needs a real one behind it.
                if *offset != 0 || path.contains(OFFSET) {
                    write!(f, "{OFFSET}{offset}")?;
                }
                Ok(())
            }
            Self::Stdio => f.write_str("-"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16) -> Uri {
        Uri::Tcp {
            host: host.into(),
            port,
        }
    }

    fn file(path: &str, offset: u64) -> Uri {
        Uri::File {
            path: path.into(),
            offset,
        }
    }

    #[test]
    fn reads_every_form_and_prints_it_back() {
        for (text, uri) in [
            ("tcp:example.org:4444", tcp("example.org", 4444)),
            ("tcp:127.0.0.1:0", tcp("127.0.0.1", 0)),
            ("tcp::65535", tcp("", 65535)),
            ("tcp:[::1]:80", tcp("::1", 80)),
            ("tcp:[fe80::1%eth0]:80", tcp("fe80::1%eth0", 80)),
            ("unix:/run/a:b.sock", Uri::Unix("/run/a:b.sock".into())),
            ("unix:relative", Uri::Unix("relative".into())),
            ("fd:0", Uri::Fd(0)),
            ("fd:17", Uri::Fd(17)),
            (
                "exec:ssh host vmferry receive -",
                Uri::Exec("ssh host vmferry receive -".into()),
            ),
            ("file:/tmp/x", file("/tmp/x", 0)),
            ("file:/tmp/x,y,offset=4096", file("/tmp/x,y", 4096)),
            ("file:a,offset=1,offset=2", file("a,offset=1", 2)),
            ("-", Uri::Stdio),
        ] {
            assert_eq!(text.parse::<Uri>().as_ref(), Ok(&uri), "{text}");
            assert_eq!(uri.to_string(), text);
        }
    }

    #[test]
    fn prints_values_so_that_they_read_back_equal() {
        for uri in [
            file("a,offset=3", 0),
            file("-", 0),
            file("a", i64::MAX as u64),
        ] {
            assert_eq!(uri.to_string().parse(), Ok(uri));
        }
    }

    #[test]
    fn says_what_is_wrong_and_what_would_be_right() {
        for (text, reason) in [
            ("", "no transport"),
            ("/tmp/x", "no transport"),
            ("--", "no transport"),
            ("udp:a:1", "transport is unknown"),
            ("TCP:a:1", "transport is unknown"),
            ("tcp:", "port is missing"),
            ("tcp:host", "port is missing"),
            ("tcp:host:", "port is missing"),
            ("tcp:host:65536", "from 0 to 65535"),
            ("tcp:host:+1", "from 0 to 65535"),
            ("tcp:host:99999999999999999999", "from 0 to 65535"),
            ("tcp:::1:80", "needs brackets"),
            ("tcp:[::1:80", "not closed"),
            ("tcp:[host]:80", "no IPv6 address"),
            ("tcp:[::1%]:80", "no IPv6 address"),
            ("tcp:a b:80", "malformed"),
            ("tcp:a:80,to=90", "from 0 to 65535"),
            ("unix:", "path is missing"),
            ("fd:", "descriptor"),
            ("fd:-1", "descriptor"),
            ("fd:name", "descriptor"),
            ("fd:2147483648", "descriptor"),
            ("exec:", "command is missing"),
            ("exec: ", "command is missing"),
            ("exec:a\0b", "NUL"),
            ("file:", "path is missing"),
            ("file:,offset=1", "path is missing"),
            ("file:a,offset=", "offset"),
            ("file:a,offset=1k", "offset"),
            ("file:a,offset=9223372036854775808", "offset"),
        ] {
            let error = text.parse::<Uri>().expect_err(text).to_string();
            assert!(error.contains(reason), "{text}: {error}");
            assert!(error.contains("unix:PATH, fd:N"), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn socket_paths_have_a_limit() {
        let longest = format!("unix:{}", "p".repeat(SOCKET_PATH_BYTES_MAX));
        assert!(longest.parse::<Uri>().is_ok());
        assert!(format!("{longest}p").parse::<Uri>().is_err());
    }

    #[test]
    fn any_text_is_either_refused_or_reads_back_equal() {
        let mut rng = crate::test_rng();
        let pieces = [
            "tcp", "unix", "fd", "exec", "file", ":", ":", "-", "[", "]", "::1", "1", "70000", "a",
            ",offset=", "%", " ", "/", ",", "\u{e4}", "\n",
        ];
        for _ in 0..20_000 {
            let text: String = (0..rng.usize(0..8))
                .map(|_| pieces[rng.usize(..pieces.len())])
                .collect();
            if let Ok(uri) = text.parse::<Uri>() {
                assert_eq!(uri.to_string().parse(), Ok(uri), "{text:?}");
            }
        }
    }
}
