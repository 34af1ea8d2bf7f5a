//! One client's conversation, without its socket.
//!
//! ```text
//!   greeting ─▶ Negotiating ── qmp_capabilities ──▶ Serving ── command ──▶ Step::Execute
//!                   │  anything else: CommandNotFound    │  garbage, wrong arguments:
//!                   └────────────────────────────────────┴─▶ Step::Reply with the error
//! ```

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use crate::commands::{Asked, Command, Event, SessionCommand, introspect, lookup, names};
use crate::error::CommandError;
use crate::framing::{Frame, Framer};
use crate::json;
use crate::schema::shorten;
use crate::types::{QmpCapabilities, VersionInfo};

/// Longest request, in bytes. Our longest argument is a list of disk names; a parsed request takes
/// up to 90 times its length in memory.
pub const REQUEST_BYTES_MAX: usize = 64 << 10;

/// A server's side of one connection. Bytes go in, requests and replies come out.
#[derive(Debug)]
pub struct ServerSession {
    framer: Framer,
    version: VersionInfo,
    negotiated: bool,
}

/// What to do next.
#[derive(Debug, PartialEq)]
pub enum Step {
    /// All bytes were used; read more.
    NeedMore,
    /// Send these bytes to the client.
    Reply(Vec<u8>),
    /// Carry out the request, then send [`encode_return`] or [`encode_error`] with its id.
    Execute(Request),
}

/// A command that passed its checks.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The command with its arguments.
    pub command: Command,
    /// What the client wants back in the reply.
    pub id: Option<Value>,
}

impl ServerSession {
    /// A connection that has just been accepted.
    #[must_use]
    pub fn new(version: VersionInfo) -> Self {
        Self {
            framer: Framer::new(REQUEST_BYTES_MAX),
            version,
            negotiated: false,
        }
    }

    /// The first bytes to send.
    #[must_use]
    pub fn greeting(&self) -> Vec<u8> {
        line(&json!({"QMP": {"version": &self.version, "capabilities": []}}))
    }

    /// The client has left negotiation: it wants events.
    #[must_use]
    pub fn negotiated(&self) -> bool {
        self.negotiated
    }

    /// Take bytes from the front of `input`: how many were used, and what to do. Call again with
    /// the rest until the step is [`Step::NeedMore`].
    pub fn advance(&mut self, input: &[u8]) -> (usize, Step) {
        let (used, frame) = self.framer.advance(input);
        let step = match frame {
            Frame::NeedMore => Step::NeedMore,
            Frame::Broken(broken) => fail(None, &CommandError::generic(broken.to_string())),
            Frame::Text(text) => self.handle_text(&text),
        };
        (used, step)
    }

    fn handle_text(&mut self, text: &[u8]) -> Step {
        let mut message = match json::parse(text) {
            Ok(Value::Object(message)) => message,
            Ok(_) => {
                let error = CommandError::generic("QMP input must be a JSON object");
                return fail(None, &error);
            }
            Err(error) => {
                let error = CommandError::generic(format!("JSON parse error, {error}"));
                return fail(None, &error);
            }
        };
        let id = message.remove("id");
        match self.handle_message(message) {
            Ok(Outcome::Execute(command)) => Step::Execute(Request { command, id }),
            Ok(Outcome::Return(value)) => Step::Reply(encode_return(id.as_ref(), &value)),
            Err(error) => fail(id.as_ref(), &error),
        }
    }

    fn handle_message(&mut self, mut message: Map<String, Value>) -> Result<Outcome, CommandError> {
        let name = message.remove("execute");
        let arguments = message.remove("arguments");
        if let Some(key) = message.keys().next() {
            return Err(CommandError::generic(format!(
                "QMP input member '{}' is unexpected",
                shorten(key)
            )));
        }
        let name = match name {
            Some(Value::String(name)) => name,
            Some(_) => {
                return Err(CommandError::generic(
                    "QMP input member 'execute' must be a string",
                ));
            }
            None => {
                return Err(CommandError::generic("QMP input lacks member 'execute'"));
            }
        };
        let arguments = match arguments {
            Some(Value::Object(arguments)) => arguments,
            None => Map::new(),
            Some(_) => {
                return Err(CommandError::generic(
                    "QMP input member 'arguments' must be an object",
                ));
            }
        };
        if !self.negotiated && name != "qmp_capabilities" {
            return Err(CommandError::command_not_found(
                "Expecting capabilities negotiation with 'qmp_capabilities'",
            ));
        }
        if self.negotiated && name == "qmp_capabilities" {
            return Err(CommandError::command_not_found(
                "Capabilities negotiation is already complete, command ignored",
            ));
        }
        match lookup(&name, arguments)? {
            Asked::Handler(command) => Ok(Outcome::Execute(command)),
            Asked::Session(command) => self.answer(&command).map(Outcome::Return),
        }
    }

    fn answer(&mut self, command: &SessionCommand) -> Result<Value, CommandError> {
        tracing::trace!(command = command.name(), "answered by the session");
        let answer = match command {
            SessionCommand::Capabilities(QmpCapabilities { enable }) => {
                if let Some(capability) = enable.iter().flatten().next() {
                    return Err(CommandError::generic(format!(
                        "Capability {capability} not available"
                    )));
                }
                self.negotiated = true;
                Ok(json!({}))
            }
            SessionCommand::Commands(_) => serde_json::to_value(names()),
            SessionCommand::Version(_) => serde_json::to_value(&self.version),
            SessionCommand::Schema(_) => Ok(introspect()),
        };
        answer.map_err(|error| CommandError::generic(error.to_string()))
    }
}

enum Outcome {
    Return(Value),
    Execute(Command),
}

fn fail(id: Option<&Value>, error: &CommandError) -> Step {
    Step::Reply(encode_error(id, error))
}

/// A successful reply.
#[must_use]
pub fn encode_return(id: Option<&Value>, value: &Value) -> Vec<u8> {
    reply(id, "return", value.clone())
}

/// A failure.
#[must_use]
pub fn encode_error(id: Option<&Value>, error: &CommandError) -> Vec<u8> {
    let error = json!({"class": error.class.name(), "desc": &error.description});
    reply(id, "error", error)
}

/// When something happened, since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timestamp {
    /// Whole seconds.
    pub seconds: u64,
    /// The rest.
    pub microseconds: u32,
}

impl Timestamp {
    /// The time of the host's clock.
    #[must_use]
    pub fn now() -> Self {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Self {
            seconds: since.as_secs(),
            microseconds: since.subsec_micros(),
        }
    }
}

/// An event.
#[must_use]
pub fn encode_event(event: &Event, at: Timestamp) -> Vec<u8> {
    let mut message = json!({
        "timestamp": {"seconds": at.seconds, "microseconds": at.microseconds},
        "event": event.name(),
    });
    // As in QEMU, an event without data has no such member.
    if let (Ok(Value::Object(data)), Some(message)) = (event.data(), message.as_object_mut())
        && !data.is_empty()
    {
        message.insert("data".to_owned(), Value::Object(data));
    }
    line(&message)
}

fn reply(id: Option<&Value>, key: &str, value: Value) -> Vec<u8> {
    let mut message = Map::new();
    message.insert(key.to_owned(), value);
    if let Some(id) = id {
        message.insert("id".to_owned(), id.clone());
    }
    line(&Value::Object(message))
}

/// A message as it goes on the wire.
pub(crate) fn line(message: &Value) -> Vec<u8> {
    let mut line = message.to_string().into_bytes();
    line.extend_from_slice(b"\r\n");
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Empty, VersionTriple};

    fn session() -> ServerSession {
        ServerSession::new(VersionInfo {
            qemu: VersionTriple {
                major: 10,
                minor: 0,
                micro: 0,
            },
            package: "test".to_owned(),
        })
    }

    fn serving() -> ServerSession {
        let mut session = session();
        let steps = steps(&mut session, br#"{"execute":"qmp_capabilities"}"#);
        assert_eq!(steps, [Step::Reply(b"{\"return\":{}}\r\n".to_vec())]);
        assert!(session.negotiated());
        session
    }

    fn steps(session: &mut ServerSession, mut input: &[u8]) -> Vec<Step> {
        let mut steps = Vec::new();
        loop {
            let (used, step) = session.advance(input);
            input = &input[used..];
            if step == Step::NeedMore {
                assert!(input.is_empty());
                return steps;
            }
            steps.push(step);
        }
    }

    fn reply_to(session: &mut ServerSession, input: &str) -> Value {
        let mut steps = steps(session, input.as_bytes());
        assert_eq!(steps.len(), 1, "{input}: {steps:?}");
        let Some(Step::Reply(reply)) = steps.pop() else {
            panic!("{input}: no reply: {steps:?}");
        };
        assert!(reply.ends_with(b"}\r\n"));
        serde_json::from_slice(&reply).unwrap()
    }

    fn error_for(session: &mut ServerSession, input: &str) -> (String, String) {
        let reply = reply_to(session, input);
        let text = |key: &str| reply["error"][key].as_str().unwrap().to_owned();
        (text("class"), text("desc"))
    }

    #[test]
    fn the_greeting_has_what_clients_look_for() {
        let greeting: Value = serde_json::from_slice(&session().greeting()).unwrap();
        assert_eq!(greeting["QMP"]["version"]["qemu"]["major"], 10);
        assert_eq!(greeting["QMP"]["version"]["package"], "test");
        assert_eq!(greeting["QMP"]["capabilities"], json!([]));
    }

    #[test]
    fn before_negotiation_there_is_only_one_command() {
        let mut session = session();
        for input in [
            r#"{"execute":"query-version"}"#,
            r#"{"execute":"no-such-thing"}"#,
        ] {
            let (class, description) = error_for(&mut session, input);
            assert_eq!(class, "CommandNotFound");
            assert_eq!(
                description,
                "Expecting capabilities negotiation with 'qmp_capabilities'"
            );
        }
        let oob = r#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#;
        let (class, description) = error_for(&mut session, oob);
        assert_eq!(class, "GenericError");
        assert_eq!(description, "Capability oob not available");
        assert!(!session.negotiated());
        let nothing = r#"{"execute":"qmp_capabilities","arguments":{"enable":[]}, "id": 1}"#;
        assert_eq!(
            reply_to(&mut session, nothing),
            json!({"return": {}, "id": 1})
        );
        assert_eq!(
            error_for(&mut session, r#"{"execute":"qmp_capabilities"}"#),
            (
                "CommandNotFound".to_owned(),
                "Capabilities negotiation is already complete, command ignored".to_owned()
            )
        );
    }

    #[test]
    fn requests_that_are_none_are_refused_like_qemu_does() {
        let mut session = serving();
        for (input, description) in [
            (r#"{}"#, "QMP input lacks member 'execute'"),
            (r#"{"id":1}"#, "QMP input lacks member 'execute'"),
            (r#"[]"#, "QMP input must be a JSON object"),
            ("5 ", "QMP input must be a JSON object"),
            (
                r#"{"execute":5}"#,
                "QMP input member 'execute' must be a string",
            ),
            (
                r#"{"execute":"quit","arguments":[]}"#,
                "QMP input member 'arguments' must be an object",
            ),
            (
                r#"{"execute":"quit","arguments":null}"#,
                "QMP input member 'arguments' must be an object",
            ),
            (
                r#"{"exec-oob":"quit"}"#,
                "QMP input member 'exec-oob' is unexpected",
            ),
            (
                r#"{"execute":"quit","x":1}"#,
                "QMP input member 'x' is unexpected",
            ),
            (
                r#"{"execute":"quit","arguments":{"x":1}}"#,
                "Parameter 'x' is unexpected",
            ),
            (r#"{"execute":"migrate"}"#, "Parameter 'uri' is missing"),
            (
                r#"{"execute":"migrate","arguments":{"uri":1}}"#,
                "Invalid parameter type for 'uri', expected: string",
            ),
            (
                r#"{"execute":"quit","id":1,"id":2}"#,
                "JSON parse error, duplicate key 'id' at line 1 column 29",
            ),
            (
                r#"{"execute":quit}"#,
                "JSON parse error, expected value at line 1 column 12",
            ),
        ] {
            let (class, seen) = error_for(&mut session, input);
            assert_eq!(
                (class.as_str(), seen.as_str()),
                ("GenericError", description)
            );
        }
        assert_eq!(
            steps(&mut session, br#"{"execute":"quit"}"#).len(),
            1,
            "the session goes on"
        );
    }

    #[test]
    fn ids_come_back_whatever_they_are() {
        let mut session = serving();
        for id in [json!(5), json!("x"), json!({"a": [null]}), Value::Null] {
            let good = json!({"execute": "query-version", "id": id}).to_string();
            assert_eq!(reply_to(&mut session, &good)["id"], id);
            let bad = json!({"execute": "nope", "id": id}).to_string();
            let reply = reply_to(&mut session, &bad);
            assert_eq!(reply["id"], id);
            assert_eq!(reply["error"]["class"], "CommandNotFound");
        }
        let without = reply_to(&mut session, r#"{"execute":"query-version"}"#);
        assert_eq!(without.get("id"), None);
    }

    #[test]
    fn the_longest_request_passes_and_one_byte_more_does_not() {
        let frame = r#"{"execute":"query-version","id":""}"#;
        let mut session = serving();
        for (extra, passes) in [(0, true), (1, false)] {
            let id = "x".repeat(REQUEST_BYTES_MAX - frame.len() + extra);
            let request = format!("{{\"execute\":\"query-version\",\"id\":\"{id}\"}}\n");
            let reply = reply_to(&mut session, &request);
            assert_eq!(reply.get("return").is_some(), passes, "{extra} extra");
        }
    }

    #[test]
    fn events_look_like_qemus() {
        let at = Timestamp {
            seconds: 7,
            microseconds: 9,
        };
        let event = |event| -> Value { serde_json::from_slice(&encode_event(&event, at)).unwrap() };
        assert_eq!(
            event(Event::Stop(Empty {})),
            json!({"event": "STOP", "timestamp": {"seconds": 7, "microseconds": 9}})
        );
        let pass = event(Event::MigrationPass(crate::types::MigrationPassEvent {
            pass: 3,
        }));
        assert_eq!(pass["data"], json!({"pass": 3}));
    }

    /// However the input is split, the same steps come out.
    #[test]
    fn any_split_gives_the_same_steps() {
        let seed = std::env::var("VMFERRY_SEED")
            .ok()
            .and_then(|seed| seed.parse().ok())
            .unwrap_or_else(|| fastrand::u64(..));
        println!("VMFERRY_SEED={seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let pieces: &[&[u8]] = &[
            br#"{"execute":"query-migrate","id":"a\"}b"}"#,
            br#"{'execute':'stop'}"#,
            b"\r\n",
            b"  \t",
            b"garbage\n",
            b"{\"open\": \"\n",
            b"}]\n",
            b"\xff\xfe\n",
            b"{\"execute\":\"quit\"\x00}\n",
            br#"{"execute":"migrate","arguments":{"uri":"unix:/x","x-disks":["a","b"]}}"#,
            br#"{"execute":"qmp_capabilities"}"#,
            b"[[[]]]",
            b"12 ",
            "{\"execute\":\"café\"}".as_bytes(),
        ];
        let rounds = match std::env::var_os("VMFERRY_LONG") {
            Some(_) => 20_000,
            None => 300,
        };
        for _ in 0..rounds {
            let mut input = br#"{"execute":"qmp_capabilities"}"#.to_vec();
            for _ in 0..random.usize(..12) {
                input.extend_from_slice(pieces[random.usize(..pieces.len())]);
                if random.u8(..) < 20 {
                    input.push(random.u8(..));
                }
            }
            let whole = steps(&mut session(), &input);
            let mut split = session();
            let mut pieced = Vec::new();
            let mut rest = &input[..];
            while !rest.is_empty() {
                let (head, tail) = rest.split_at(random.usize(1..=rest.len().min(9)));
                pieced.extend(steps(&mut split, head));
                rest = tail;
            }
            assert_eq!(whole, pieced, "{}", String::from_utf8_lossy(&input));
        }
    }

    /// Bytes of any kind never break a session: after a newline that ends them all, it answers.
    #[test]
    fn a_session_survives_random_bytes() {
        let seed = fastrand::u64(..);
        println!("VMFERRY_SEED={seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let alphabet = b"{}[]\"'\\:, \nx1\x00\xff";
        for _ in 0..500 {
            let mut session = serving();
            let noise: Vec<u8> = (0..random.usize(..200))
                .map(|_| alphabet[random.usize(..alphabet.len())])
                .collect();
            steps(&mut session, &noise);
            // A stray byte breaks off whatever was begun, the newline ends the dropping.
            steps(&mut session, b"\n\x01\n\x01\n");
            let reply = reply_to(&mut session, r#"{"execute":"query-version"}"#);
            assert!(reply.get("return").is_some(), "{noise:?}");
        }
    }
}
