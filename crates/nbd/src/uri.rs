//! `nbd://HOST[:PORT]/EXPORT` and `nbd+unix:///EXPORT?socket=PATH`, as
//! <https://github.com/NetworkBlockDevice/nbd> `doc/uri.md` has them.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use vmferry_channel::Uri;

/// The port of NBD.
pub const PORT: u16 = 10809;

/// Where an export is. [`fmt::Display`] prints what [`FromStr`] reads.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NbdUri {
    /// [`Uri::Tcp`] or [`Uri::Unix`].
    pub address: Uri,
    /// The export; empty for the server's default.
    pub export: String,
}

/// A text is no [`NbdUri`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{text}' is no NBD address: {reason} (expected nbd://HOST[:PORT]/EXPORT or \
     nbd+unix:///EXPORT?socket=PATH)"
)]
pub struct NbdUriError {
    text: String,
    reason: &'static str,
}

impl FromStr for NbdUri {
    type Err = NbdUriError;

    fn from_str(text: &str) -> Result<Self, NbdUriError> {
        parse(text).map_err(|reason| NbdUriError {
            text: text.to_owned(),
            reason,
        })
    }
}

fn parse(text: &str) -> Result<NbdUri, &'static str> {
    let (scheme, rest) = text.split_once("://").ok_or("it has no scheme")?;
    let (rest, query) = match rest.split_once('?') {
        Some((rest, query)) => (rest, Some(query)),
        None => (rest, None),
    };
    let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
    let export = decoded(export)?;
    let address = match scheme {
        "nbd" => {
            if query.is_some_and(|query| !query.is_empty()) {
                return Err("nothing may follow '?'");
            }
            tcp(authority)?
        }
        "nbd+unix" => {
            if !authority.is_empty() {
                return Err("a host makes no sense with a unix socket");
            }
            let mut sockets = query
                .unwrap_or("")
                .split('&')
                .filter_map(|part| part.strip_prefix("socket="));
            match (sockets.next(), sockets.next()) {
                (Some(path), None) if !path.is_empty() => Uri::Unix(PathBuf::from(decoded(path)?)),
                _ => return Err("it needs one 'socket='"),
            }
        }
        "nbds" | "nbds+unix" => return Err("TLS is not supported"),
        _ => return Err("its scheme is unknown"),
    };
    Ok(NbdUri { address, export })
}

fn tcp(authority: &str) -> Result<Uri, &'static str> {
    if authority.contains('@') {
        return Err("user names are not supported");
    }
    let (host, rest) = match authority.strip_prefix('[') {
        Some(bracketed) => bracketed.split_once(']').ok_or("a bracket is not closed")?,
        None => match authority.find(':') {
            Some(at) => authority.split_at(at),
            None => (authority, ""),
        },
    };
    let port = match rest.strip_prefix(':') {
        Some(port) => port.parse().map_err(|_| "its port is no number")?,
        None if rest.is_empty() => PORT,
        None => return Err("its port is no number"),
    };
    Ok(Uri::Tcp {
        host: host.to_owned(),
        port,
    })
}

fn decoded(text: &str) -> Result<String, &'static str> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((byte, tail)) = rest.split_first() {
        rest = tail;
        if *byte != b'%' {
            bytes.push(*byte);
            continue;
        }
        let (digits, tail) = rest.split_at_checked(2).ok_or("a % is cut off")?;
        let digits = std::str::from_utf8(digits).map_err(|_| "a % has no number")?;
        if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err("a % has no number");
        }
        bytes.push(u8::from_str_radix(digits, 16).map_err(|_| "a % has no number")?);
        rest = tail;
    }
    String::from_utf8(bytes).map_err(|_| "it is not UTF-8")
}

/// What stands for itself in a path or a query.
fn encoded(text: &str) -> String {
    use fmt::Write;

    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/:@".contains(&byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a string cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let export = encoded(&self.export);
        match &self.address {
            Uri::Tcp { host, port } if host.contains(':') => {
                write!(f, "nbd://[{host}]:{port}/{export}")
            }
            Uri::Tcp { host, port } => write!(f, "nbd://{host}:{port}/{export}"),
            Uri::Unix(path) => {
                let path = encoded(&path.to_string_lossy());
                write!(f, "nbd+unix:///{export}?socket={path}")
            }
            other => write!(f, "{other}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp_at(host: &str, port: u16, export: &str) -> NbdUri {
        NbdUri {
            address: Uri::Tcp {
                host: host.to_owned(),
                port,
            },
            export: export.to_owned(),
        }
    }

    #[test]
    fn reads_what_other_programs_write() {
        for (text, uri) in [
            ("nbd://localhost", tcp_at("localhost", PORT, "")),
            ("nbd://localhost/", tcp_at("localhost", PORT, "")),
            (
                "nbd://10.0.0.1:99/vm%201/a",
                tcp_at("10.0.0.1", 99, "vm 1/a"),
            ),
            ("nbd://[::1]:1234/x", tcp_at("::1", 1234, "x")),
            ("nbd:///x", tcp_at("", PORT, "x")),
        ] {
            assert_eq!(text.parse(), Ok(uri), "{text}");
        }
        let unix: NbdUri = "nbd+unix:///disk?socket=/tmp/a%26b".parse().unwrap();
        assert_eq!(unix.address, Uri::Unix("/tmp/a&b".into()));
        assert_eq!(unix.export, "disk");
    }

    #[test]
    fn prints_what_it_reads() {
        for text in [
            "nbd://[::1]:1234/x",
            "nbd://host:10809/ein%20Name%3F",
            "nbd+unix:///disk?socket=/tmp/a%26b",
        ] {
            assert_eq!(text.parse::<NbdUri>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn refuses_what_it_cannot_reach() {
        for (text, reason) in [
            ("localhost:10809", "scheme"),
            ("http://localhost/", "scheme is unknown"),
            ("nbds://localhost/", "TLS"),
            ("nbd://host:port/", "port"),
            ("nbd://[::1/", "bracket"),
            ("nbd://host/%4", "cut off"),
            ("nbd://host/%+1", "number"),
            ("nbd://host/%ff", "UTF-8"),
            ("nbd+unix:///x", "socket"),
            ("nbd+unix:///x?socket=a&socket=b", "socket"),
            ("nbd+unix://host/x?socket=a", "host"),
        ] {
            let error = text.parse::<NbdUri>().unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }
}
