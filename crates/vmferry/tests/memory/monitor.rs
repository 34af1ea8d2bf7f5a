//! A second monitor of a QEMU, which answers while its main loop waits for a page of guest memory.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{Value, json};

use crate::peers::{PATIENCE, until};

/// A connection that takes commands out of band.
pub(crate) struct Monitor(BufReader<UnixStream>);

impl Monitor {
    pub(crate) fn connect(socket: &Path) -> Self {
        let stream = until("the second monitor", || UnixStream::connect(socket).ok());
        stream
            .set_read_timeout(Some(PATIENCE))
            .expect("a read timeout can be set");
        let mut monitor = Self(BufReader::new(stream));
        let greeting = monitor.receive().expect("a greeting");
        assert!(greeting["QMP"].is_object(), "no greeting: {greeting}");
        let enable = json!({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}});
        let enabled = monitor.ask(&enable).expect("an answer");
        assert!(enabled, "no commands out of band");
        monitor
    }

    /// Listens for the next connection of a postcopy that is paused, as soon as it is; false if QEMU has ended.
    pub(crate) fn recover(&mut self, uri: &str) -> bool {
        let command = json!({"exec-oob": "migrate-recover", "id": 1, "arguments": {"uri": uri}});
        until("the destination to be paused", || {
            match self.ask(&command) {
                Ok(done) => done.then_some(true),
                Err(error) if is_end(error.kind()) => Some(false),
                Err(error) => panic!("the second monitor: {error}"),
            }
        })
    }

    /// True if it could be done.
    fn ask(&mut self, command: &Value) -> io::Result<bool> {
        let mut line = command.to_string();
        line.push('\n');
        self.0.get_mut().write_all(line.as_bytes())?;
        loop {
            let message = self.receive()?;
            if message.get("event").is_none() {
                return Ok(message.get("return").is_some());
            }
        }
    }

    fn receive(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        match self.0.read_line(&mut line)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(serde_json::from_str(&line)?),
        }
    }
}

fn is_end(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(kind, BrokenPipe | ConnectionReset | UnexpectedEof)
}
