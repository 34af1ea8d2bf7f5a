//! The control socket: QMP, as little of it as this machine needs.
//!
//! One line is one message. A client is greeted, says `qmp_capabilities`, and then sends commands with
//! QEMU's names and gets answers; events go to all clients.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::gate::lock;
use crate::vm::Vm;

/// Longest command in bytes.
const COMMAND_BYTES_MAX: u64 = 64 << 10;
/// A client that does not read for so long is given up.
const PATIENCE: Duration = Duration::from_secs(5);

/// Those who hear of events. Clones are the same.
#[derive(Clone, Default)]
pub(crate) struct Events(Arc<Mutex<Vec<Arc<Mutex<UnixStream>>>>>);

impl Events {
    pub(crate) fn publish(&self, event: &str, data: &Value) {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let timestamp = json!({"seconds": now.as_secs(), "microseconds": now.subsec_micros()});
        let message = json!({"event": event, "data": data, "timestamp": timestamp});
        lock(&self.0).retain(|client| say(client, &message).is_ok());
    }
}

fn say(client: &Mutex<UnixStream>, message: &Value) -> std::io::Result<()> {
    lock(client).write_all(format!("{message}\r\n").as_bytes())
}

/// Serve clients, for as long as the program lives.
pub(crate) fn serve(listener: UnixListener, vm: Arc<Vm>) -> std::io::Result<()> {
    let accept = move || {
        for client in listener.incoming().flatten() {
            let vm = Arc::clone(&vm);
            let thread = thread::Builder::new().name("qmp-client".into());
            // Without a thread the client is gone, and sees that.
            let _ = thread.spawn(move || {
                if let Err(error) = converse(client, &vm) {
                    tracing::debug!(%error, "QMP client lost");
                }
            });
        }
    };
    thread::Builder::new().name("qmp".into()).spawn(accept)?;
    Ok(())
}

fn converse(stream: UnixStream, vm: &Arc<Vm>) -> Result<()> {
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut lines = BufReader::new(stream.try_clone()?);
    let client = Arc::new(Mutex::new(stream));
    let qemu = json!({"major": 10, "minor": 0, "micro": 0});
    let version = json!({"qemu": qemu, "package": "torture-machine"});
    say(
        &client,
        &json!({"QMP": {"version": version, "capabilities": []}}),
    )?;
    let mut negotiating = true;
    let mut line = String::new();
    while (&mut lines).take(COMMAND_BYTES_MAX).read_line(&mut line)? != 0 {
        if !line.ends_with('\n') {
            bail!("a command has no end within {COMMAND_BYTES_MAX} bytes");
        }
        let request: Value = serde_json::from_str(&line).context("this is no JSON")?;
        line.clear();
        let command = request["execute"].as_str().unwrap_or_default();
        let answer = match (command, negotiating) {
            ("qmp_capabilities", true) => {
                negotiating = false;
                lock(&vm.events.0).push(Arc::clone(&client));
                Ok(json!({}))
            }
            (_, true) => Err(anyhow::anyhow!(
                "expecting capabilities negotiation with 'qmp_capabilities'"
            )),
            (_, false) => vm.execute(command, &request["arguments"]),
        };
        let mut answer = match answer {
            Ok(value) => json!({"return": value}),
            Err(error) => {
                json!({"error": {"class": "GenericError", "desc": format!("{error:#}")}})
            }
        };
        if let Some(id) = request.get("id") {
            answer["id"] = id.clone();
        }
        say(&client, &answer)?;
    }
    Ok(())
}
