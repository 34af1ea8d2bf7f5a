//! QMP to a daemon that may die at any time.

use std::io::{BufRead, BufReader, Error, ErrorKind, Result, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{Value, json};

use crate::peers::PATIENCE;

/// A connection past its greeting. A dead daemon is an error, not a panic.
pub(crate) struct Control(BufReader<UnixStream>);

impl Control {
    pub(crate) fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut control = Self(BufReader::new(stream));
        control.message()?;
        control.execute("qmp_capabilities", &json!({}))?;
        Ok(control)
    }

    /// Runs a command; its `error` object is an error like any other.
    pub(crate) fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let line = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.0.get_mut().write_all(line.as_bytes())?;
        loop {
            let mut message = self.message()?;
            if message.get("return").is_some() {
                return Ok(message["return"].take());
            }
            if message.get("error").is_some() {
                return Err(Error::other(format!("{command}: {}", message["error"])));
            }
        }
    }

    /// The next message, whatever it is.
    pub(crate) fn message(&mut self) -> Result<Value> {
        let mut line = String::new();
        match self.0.read_line(&mut line)? {
            0 => Err(ErrorKind::UnexpectedEof.into()),
            _ => serde_json::from_str(&line).map_err(Error::other),
        }
    }
}
