//! The sockets that systemd opened, by their names.

use vmferry_channel::Listener;

use crate::exit::{Exit, Failure};

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
        let passed = Listener::from_systemd()
            .map_err(|error| Failure::new(Exit::Failed, format!("socket activation: {error}")))?;
        Self::by_name(passed)
    }

    fn by_name(passed: Vec<(String, Listener)>) -> Result<Self, Failure> {
        let mut activated = Self::default();
        for (name, listener) in passed {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn by_name(names: &[&str]) -> Result<Activated, Failure> {
        let listener = || Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        let passed = names.iter().map(|name| ((*name).to_owned(), listener()));
        Activated::by_name(passed.collect())
    }

    #[test]
    fn sockets_are_used_as_they_are_named() {
        let activated = by_name(&["qmp", "unknown", "incoming", "nbd"]).unwrap();
        assert_eq!((activated.nbd.len(), activated.qmp.len()), (2, 1));
        assert!(activated.incoming.is_some());
        let failure = by_name(&["incoming", "incoming"]).unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
    }
}
