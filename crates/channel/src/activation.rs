//! Listening sockets that systemd opened before it started us (`sd_listen_fds(3)`).

use crate::{ChannelError, Listener, Result, inherited};

/// The first descriptor that systemd passes.
const FIRST: i32 = 3;

/// Most sockets that a unit may pass.
const SOCKETS_MAX: i32 = 256;

impl Listener {
    /// The listening sockets that systemd passed to this process, with their names
    /// (`FileDescriptorName=`; `unknown` if there is none). Empty if there are none. To be asked
    /// once, and instead of `sd_notify::listen_fds`: who asks second is refused.
    ///
    /// Fails if a passed descriptor is no listening stream socket.
    pub fn from_systemd() -> Result<Vec<(String, Self)>> {
        let variable = |name| std::env::var(name).ok();
        passed(
            std::process::id(),
            variable("LISTEN_PID").as_deref(),
            variable("LISTEN_FDS").as_deref(),
            variable("LISTEN_FDNAMES").as_deref(),
        )?
        .into_iter()
        .map(|(number, name)| {
            let fd = inherited::take(number, &format!("fd:{number}"))?;
            Ok((name, Self::from_fd(fd)?))
        })
        .collect()
    }
}

/// Numbers and names of the descriptors that the environment announces to process `own_id`.
fn passed(
    own_id: u32,
    process_id: Option<&str>,
    count: Option<&str>,
    names: Option<&str>,
) -> Result<Vec<(i32, String)>> {
    let (Some(process_id), Some(count)) = (process_id, count) else {
        return Ok(Vec::new());
    };
    // The variables may have come down from a parent that they were meant for.
    if process_id.parse() != Ok(own_id) {
        return Ok(Vec::new());
    }
    let Ok(count @ 0..=SOCKETS_MAX) = count.parse::<i32>() else {
        return Err(ChannelError::unsuitable(
            "LISTEN_FDS",
            "it is no number from 0 to 256",
        ));
    };
    let mut names = names.unwrap_or_default().split(':');
    Ok((FIRST..FIRST + count)
        .map(|number| {
            let name = names.next().filter(|name| !name.is_empty());
            (number, name.unwrap_or("unknown").to_owned())
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_is_announced_to_this_process() {
        let named = |number, name: &str| (number, name.to_owned());
        assert_eq!(
            passed(42, Some("42"), Some("3"), Some("nbd:qmp")).unwrap(),
            [named(3, "nbd"), named(4, "qmp"), named(5, "unknown")]
        );
        assert_eq!(
            passed(42, Some("42"), Some("1"), None).unwrap(),
            [named(3, "unknown")]
        );
        for (process_id, count) in [
            (None, None),
            (Some("42"), None),
            (None, Some("1")),
            (Some("41"), Some("1")),
            (Some("x"), Some("1")),
            (Some("42"), Some("0")),
        ] {
            assert_eq!(passed(42, process_id, count, None).unwrap(), []);
        }
    }

    #[test]
    fn the_number_of_sockets_is_limited() {
        let count = |count| passed(42, Some("42"), Some(count), None);
        assert_eq!(count("256").unwrap().len(), 256);
        for wrong in ["257", "-1", "", "2147483647", "x"] {
            let error = count(wrong).unwrap_err().to_string();
            assert_eq!(error, "LISTEN_FDS: it is no number from 0 to 256");
        }
    }
}
