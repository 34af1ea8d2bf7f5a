//! A QMP client for tests: blocking, with a deadline on everything.
//!
//! It knows nothing of ours on purpose: what judges the program must not share its code.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{Value, json};

use super::PATIENCE;

/// A connection past its greeting and `qmp_capabilities`.
pub(crate) struct Qmp {
    stream: BufReader<UnixStream>,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects to a monitor that listens.
    pub(crate) fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket)
            .unwrap_or_else(|error| panic!("connect to {}: {error}", socket.display()));
        Self::negotiate(stream)
    }

    /// Takes the greeting and leaves negotiation mode.
    pub(crate) fn negotiate(stream: UnixStream) -> Self {
        stream
            .set_read_timeout(Some(PATIENCE))
            .expect("a read timeout can be set");
        stream
            .set_write_timeout(Some(PATIENCE))
            .expect("a write timeout can be set");
        let mut qmp = Self {
            stream: BufReader::new(stream),
            events: VecDeque::new(),
        };
        let greeting = qmp.receive();
        assert!(
            greeting["QMP"]["version"].is_object(),
            "no QMP greeting: {greeting}"
        );
        qmp.execute("qmp_capabilities", &json!({}));
        qmp
    }

    /// Runs a command; its `error` object is the `Err`.
    pub(crate) fn try_execute(&mut self, command: &str, arguments: &Value) -> Result<Value, Value> {
        let mut line = json!({"execute": command, "arguments": arguments}).to_string();
        line.push('\n');
        if let Err(error) = self.stream.get_mut().write_all(line.as_bytes()) {
            panic!("the peer does not take {command}: {error}");
        }
        loop {
            let mut message = self.receive();
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if message.get("return").is_some() {
                return Ok(message["return"].take());
            } else if message.get("error").is_some() {
                return Err(message["error"].take());
            } else {
                panic!("neither an answer to {command} nor an event: {message}");
            }
        }
    }

    /// Runs a command that must succeed.
    pub(crate) fn execute(&mut self, command: &str, arguments: &Value) -> Value {
        self.try_execute(command, arguments)
            .unwrap_or_else(|error| panic!("{command} failed: {error}"))
    }

    /// The next event called `name`, be it past or to come; the events before it are dropped.
    pub(crate) fn event(&mut self, name: &str) -> Value {
        loop {
            let event = self.events.pop_front().unwrap_or_else(|| self.receive());
            if event["event"] == name {
                return event;
            }
        }
    }

    fn receive(&mut self) -> Value {
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Ok(0) => panic!("the peer closed its QMP connection"),
            Ok(_) => serde_json::from_str(&line)
                .unwrap_or_else(|error| panic!("not JSON ({error}): {line}")),
            Err(error) => panic!("nothing more from the peer's QMP connection: {error}"),
        }
    }
}
