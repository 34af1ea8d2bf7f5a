//! The other end: a client for our daemon and for real QEMUs.

use std::collections::VecDeque;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use vmferry_channel::{ChannelError, Stop, Uri};

use crate::error::ErrorClass;
use crate::framing::{Frame, Framer};
use crate::json;
use crate::schema::shorten;
use crate::session::{Timestamp, line};
use crate::types::VersionInfo;
use crate::wire::Wire;

/// Longest message of a server, in bytes. The schema of a QEMU is about 300 KiB.
pub const MESSAGE_BYTES_MAX: usize = 8 << 20;
/// Events that are kept for [`Client::wait_event`]; further ones push out the oldest.
pub const EVENTS_MAX: usize = 1024;
/// How long the greeting may take.
pub const GREETING_PATIENCE: Duration = Duration::from_secs(5);
/// How long a reply may take unless [`Client::set_patience`] says otherwise.
pub const REPLY_PATIENCE: Duration = Duration::from_secs(60);

/// Why a client's call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The server refused the command.
    #[error("{command}: {description}")]
    Refused {
        /// The command.
        command: String,
        /// Its class.
        class: ErrorClass,
        /// What it said.
        description: String,
    },
    /// No greeting came.
    #[error(
        "{peer}: no QMP greeting within {} s; if another client holds this socket, give the \
         machine a second -qmp socket",
        GREETING_PATIENCE.as_secs()
    )]
    NoGreeting {
        /// The server.
        peer: String,
    },
    /// The connection was closed before the greeting.
    #[error("{peer}: the connection was closed before the QMP greeting; too many clients?")]
    Unwelcome {
        /// The server.
        peer: String,
    },
    /// The server closed the connection.
    #[error("{peer}: the QMP connection was closed")]
    Closed {
        /// The server.
        peer: String,
    },
    /// What came is not QMP.
    #[error("{peer}: this is not QMP: {reason}")]
    NotQmp {
        /// The server.
        peer: String,
        /// What is wrong.
        reason: String,
    },
    /// The connection failed, was stopped, or took too long.
    #[error(transparent)]
    Channel(#[from] ChannelError),
}

impl ClientError {
    /// The class, if the server refused the command.
    #[must_use]
    pub fn class(&self) -> Option<ErrorClass> {
        match self {
            Self::Refused { class, .. } => Some(*class),
            _ => None,
        }
    }
}

/// An event as it came.
#[derive(Clone, Debug, PartialEq)]
pub struct ServerEvent {
    /// Its name.
    pub name: String,
    /// Its data; an empty object if it has none.
    pub data: Value,
    /// When it happened, by the server's clock.
    pub at: Option<Timestamp>,
}

/// A connection to a QMP server, out of negotiation.
#[derive(Debug)]
pub struct Client {
    wire: Wire,
    framer: Framer,
    /// Bytes that came and were not looked at yet.
    received: VecDeque<u8>,
    events: VecDeque<ServerEvent>,
    version: VersionInfo,
    requests: u64,
    patience: Duration,
    out_of_band: bool,
}

enum Message {
    Event(ServerEvent),
    Other(Map<String, Value>),
}

impl Client {
    /// Connect to `tcp:HOST:PORT` or `unix:PATH`, take the greeting and leave negotiation.
    /// `stop` calls off this and everything later.
    ///
    /// # Errors
    /// The connection failed, or no greeting came within [`GREETING_PATIENCE`].
    pub fn connect(uri: &Uri, stop: &Stop) -> Result<Self, ClientError> {
        let socket = vmferry_channel::connect(uri, stop, GREETING_PATIENCE)?;
        Self::over(socket.into_fd(), uri.to_string(), stop)
    }

    /// Speak over a connected stream socket; `peer` is what messages call the server.
    ///
    /// # Errors
    /// As for [`Client::connect`].
    pub fn over(
        socket: OwnedFd,
        peer: impl Into<String>,
        stop: &Stop,
    ) -> Result<Self, ClientError> {
        let peer = peer.into();
        let mut client = Self {
            wire: Wire::new(socket, peer.clone(), stop.clone()),
            framer: Framer::new(MESSAGE_BYTES_MAX),
            received: VecDeque::new(),
            events: VecDeque::new(),
            version: VersionInfo::default(),
            requests: 0,
            patience: REPLY_PATIENCE,
            out_of_band: false,
        };
        let deadline = Instant::now().checked_add(GREETING_PATIENCE);
        let greeting = match client.message(deadline) {
            Ok(Message::Other(mut message)) => message.remove("QMP"),
            Ok(Message::Event(_)) => None,
            Err(ClientError::Channel(ChannelError::TimedOut { .. })) => {
                return Err(ClientError::NoGreeting { peer });
            }
            Err(ClientError::Closed { .. } | ClientError::Channel(ChannelError::Closed { .. })) => {
                return Err(ClientError::Unwelcome { peer });
            }
            Err(error) => return Err(error),
        };
        let version = greeting
            .as_ref()
            .and_then(|greeting| greeting.get("version"))
            .ok_or_else(|| client.not_qmp("the first message is no greeting"))?;
        client.version = serde_json::from_value(version.clone())
            .map_err(|error| client.not_qmp(format!("version in the greeting: {error}")))?;
        let offered = greeting
            .as_ref()
            .and_then(|it| it.get("capabilities")?.as_array());
        client.out_of_band = offered.is_some_and(|list| list.iter().any(|it| it == "oob"));
        let enable = match client.out_of_band {
            true => json!({"enable": ["oob"]}),
            false => json!({}),
        };
        client.execute("qmp_capabilities", enable)?;
        Ok(client)
    }

    /// The server's version, from its greeting.
    #[must_use]
    pub fn version(&self) -> &VersionInfo {
        &self.version
    }

    /// What messages call the server.
    #[must_use]
    pub fn peer(&self) -> &str {
        self.wire.peer()
    }

    /// How long a reply may take from now on.
    pub fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// Carry out a command and return what it returned. Events that come meanwhile are kept.
    ///
    /// # Errors
    /// [`ClientError::Refused`] if the server refused it; otherwise the connection is of no more
    /// use.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "callers build the arguments in place"
    )]
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, ClientError> {
        self.request("execute", command, &arguments, &[])
    }

    /// The same out of band where the server can do that: it answers although it is busy with another
    /// command, or waits for guest memory. Only for commands whose schema allows it.
    ///
    /// # Errors
    /// As for [`Client::execute`].
    #[expect(
        clippy::needless_pass_by_value,
        reason = "callers build the arguments in place"
    )]
    pub fn execute_out_of_band(
        &mut self,
        command: &str,
        arguments: Value,
    ) -> Result<Value, ClientError> {
        let how = match self.out_of_band {
            true => "exec-oob",
            false => "execute",
        };
        self.request(how, command, &arguments, &[])
    }

    /// `getfd`: give the server a descriptor under a name. Needs a unix socket.
    ///
    /// # Errors
    /// As for [`Client::execute`].
    pub fn getfd(&mut self, name: &str, fd: BorrowedFd<'_>) -> Result<(), ClientError> {
        self.request("execute", "getfd", &json!({"fdname": name}), &[fd])?;
        Ok(())
    }

    /// The next event, which may have come before; `None` when `deadline` passes without one.
    ///
    /// # Errors
    /// The connection failed or was stopped.
    pub fn wait_event(
        &mut self,
        deadline: Option<Instant>,
    ) -> Result<Option<ServerEvent>, ClientError> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        match self.message(deadline) {
            Ok(Message::Event(event)) => Ok(Some(event)),
            Ok(Message::Other(_)) => Err(self.not_qmp("a reply that nobody asked for")),
            Err(ClientError::Channel(ChannelError::TimedOut { .. })) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The events that have been kept so far.
    pub fn take_events(&mut self) -> Vec<ServerEvent> {
        self.events.drain(..).collect()
    }

    fn request(
        &mut self,
        how: &str,
        command: &str,
        arguments: &Value,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Value, ClientError> {
        self.requests = self.requests.wrapping_add(1);
        let id = format!("vmferry-{}", self.requests);
        let mut request = json!({how: command, "id": id});
        if let (Value::Object(arguments), Some(request)) = (arguments, request.as_object_mut())
            && !arguments.is_empty()
        {
            request.insert("arguments".to_owned(), Value::Object(arguments.clone()));
        }
        let deadline = Instant::now().checked_add(self.patience);
        self.wire.send(&line(&request), fds, deadline)?;
        loop {
            let mut message = match self.message(deadline)? {
                Message::Event(event) => {
                    if self.events.len() == EVENTS_MAX {
                        self.events.pop_front();
                    }
                    self.events.push_back(event);
                    continue;
                }
                // Whoever connects while a QEMU is still starting may be greeted twice.
                Message::Other(message) if message.contains_key("QMP") => continue,
                Message::Other(message) => message,
            };
            // A parse error comes without an id; with only one request under way it is ours.
            if message.get("id").is_some_and(|seen| *seen != *id) {
                return Err(self.not_qmp("a reply with an id of nobody"));
            }
            if let Some(value) = message.remove("return") {
                return Ok(value);
            }
            let Some(error) = message.remove("error") else {
                return Err(self.not_qmp("a message that is neither reply nor event"));
            };
            let text = |key: &str| error.get(key).and_then(Value::as_str).unwrap_or_default();
            return Err(ClientError::Refused {
                command: command.to_owned(),
                class: ErrorClass::from_name(text("class")),
                description: text("desc").to_owned(),
            });
        }
    }

    /// The next message of whatever kind.
    fn message(&mut self, deadline: Option<Instant>) -> Result<Message, ClientError> {
        loop {
            let (used, frame) = self.framer.advance(self.received.make_contiguous());
            self.received.drain(..used);
            match frame {
                Frame::NeedMore => self.receive(deadline)?,
                Frame::Broken(broken) => return Err(self.not_qmp(broken.to_string())),
                Frame::Text(text) => return self.parse(&text),
            }
        }
    }

    fn parse(&self, text: &[u8]) -> Result<Message, ClientError> {
        let mut message = match json::parse(text) {
            Ok(Value::Object(message)) => message,
            Ok(_) => return Err(self.not_qmp("a message that is no object")),
            Err(error) => return Err(self.not_qmp(error.to_string())),
        };
        let Some(Value::String(name)) = message.get("event") else {
            return Ok(Message::Other(message));
        };
        let name = name.clone();
        let at = message.get("timestamp").and_then(|at| {
            Some(Timestamp {
                seconds: at.get("seconds")?.as_u64()?,
                microseconds: u32::try_from(at.get("microseconds")?.as_u64()?).ok()?,
            })
        });
        let data = message.remove("data").unwrap_or_else(|| json!({}));
        Ok(Message::Event(ServerEvent { name, data, at }))
    }

    fn receive(&mut self, deadline: Option<Instant>) -> Result<(), ClientError> {
        let mut buf = [0; 16 << 10];
        let mut fds = Vec::new();
        let length = self.wire.receive(&mut buf, &mut fds, deadline)?;
        if length == 0 {
            return Err(ClientError::Closed {
                peer: self.wire.peer().to_owned(),
            });
        }
        self.received.extend(buf.get(..length).unwrap_or_default());
        Ok(())
    }

    fn not_qmp(&self, reason: impl Into<String>) -> ClientError {
        ClientError::NotQmp {
            peer: self.wire.peer().to_owned(),
            reason: shorten(&reason.into()),
        }
    }
}
