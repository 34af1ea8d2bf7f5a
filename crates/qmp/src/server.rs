//! Serves QMP on listening sockets: several clients at once, events to all of them.
//!
//! ```text
//!   listener thread ── accept ──▶ client thread: receive ▶ ServerSession ▶ Handler ▶ reply ─┐
//!                                                                                          ▼
//!   Broadcast::publish(event) ─────────────────────────────────────────────────────────▶ Outbox
//!                                                        sender thread: next ▶ send ◀──────┘
//! ```
//!
//! A client that does not read keeps nobody waiting but itself: once its outbox is full, an event
//! ends its connection.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use std::{fmt, io, thread};

use serde_json::Value;
use vmferry_channel::{ChannelError, Listener, Socket, Stop};

use crate::commands::{Command, Event};
use crate::error::CommandError;
use crate::outbox::Outbox;
use crate::session::{
    Request, ServerSession, Step, Timestamp, encode_error, encode_event, encode_return,
};
use crate::types::VersionInfo;
use crate::wire::Wire;

/// Clients that may be connected at the same time. A further one is closed before its greeting.
pub const CLIENTS_MAX: usize = 16;
/// Descriptors that a client may keep under names.
pub const KEPT_FDS_MAX: usize = 64;
/// A client that has closed its side must take its last replies within this time.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Carries out commands. Called from the thread of the client, so a slow command keeps only its
/// own client waiting; a panic becomes an error reply.
pub trait Handler: Send + Sync {
    /// Carry out `command` for `client`. What is returned must be what the command's row in the
    /// table promises ([`crate::check_returned`]).
    fn execute(&self, client: &ClientContext, command: Command) -> Result<Value, CommandError>;
}

/// What a handler may know of the client whose command it carries out.
#[derive(Debug)]
pub struct ClientContext {
    id: u64,
    peer: String,
    fds: Mutex<Fds>,
}

#[derive(Debug, Default)]
struct Fds {
    /// Those that came with the newest bytes that brought any.
    arrived: Vec<OwnedFd>,
    kept: HashMap<String, OwnedFd>,
}

impl ClientContext {
    fn new(id: u64, peer: String) -> Self {
        Self {
            id,
            peer,
            fds: Mutex::default(),
        }
    }

    /// Tells clients apart while the server lives.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// What messages call the client.
    #[must_use]
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// `getfd`: keep the descriptor that came with the command. One that had the name is closed.
    ///
    /// # Errors
    /// None came; the name begins with a digit; [`KEPT_FDS_MAX`] are kept already.
    pub fn getfd(&self, name: &str) -> Result<(), CommandError> {
        let mut fds = lock(&self.fds);
        if fds.arrived.is_empty() {
            return Err(CommandError::generic(
                "No file descriptor supplied via SCM_RIGHTS",
            ));
        }
        let fd = fds.arrived.remove(0);
        if name.starts_with(|first: char| first.is_ascii_digit()) {
            return Err(CommandError::generic(
                "Parameter 'fdname' expects a name not starting with a digit",
            ));
        }
        if fds.kept.len() >= KEPT_FDS_MAX && !fds.kept.contains_key(name) {
            return Err(CommandError::generic(format!(
                "{KEPT_FDS_MAX} file descriptors are kept already"
            )));
        }
        fds.kept.insert(name.to_owned(), fd);
        Ok(())
    }

    /// The descriptor kept under `name`, which is then free; `closefd` drops it.
    ///
    /// # Errors
    /// None is kept under that name.
    pub fn take_fd(&self, name: &str) -> Result<OwnedFd, CommandError> {
        lock(&self.fds).kept.remove(name).ok_or_else(|| {
            CommandError::generic(format!("File descriptor named '{name}' not found"))
        })
    }

    /// Descriptors came with bytes: older ones that nobody took are closed.
    fn arrive(&self, arrived: Vec<OwnedFd>) {
        if !arrived.is_empty() {
            lock(&self.fds).arrived = arrived;
        }
    }
}

/// Sends events to every client that has left negotiation. Clones are the same broadcast.
#[derive(Clone, Default)]
pub struct Broadcast {
    clients: Arc<Mutex<Vec<Subscriber>>>,
}

struct Subscriber {
    id: u64,
    outbox: Arc<Outbox>,
    stop: Stop,
}

impl fmt::Debug for Broadcast {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Broadcast")
            .field("clients", &lock(&self.clients).len())
            .finish()
    }
}

impl Broadcast {
    /// Send an event to all. Never waits; a client without room for it loses its connection.
    pub fn publish(&self, event: &Event) {
        let message = encode_event(event, Timestamp::now());
        for client in &*lock(&self.clients) {
            if !client.outbox.event(&message) {
                tracing::warn!(client = client.id, "does not read its events: disconnected");
                client.stop.trigger();
            }
        }
    }
}

/// A running server. Dropping it ends all connections at once, and waits for handlers that are at
/// work: it must not be dropped by one.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    listeners: Vec<JoinHandle<()>>,
}

struct Shared {
    version: VersionInfo,
    handler: Arc<dyn Handler>,
    broadcast: Broadcast,
    stop: Stop,
    next_id: AtomicU64,
    connected: Mutex<usize>,
    left: Condvar,
    clients: Mutex<Vec<JoinHandle<()>>>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("version", &self.version)
            .field("broadcast", &self.broadcast)
            .finish_non_exhaustive()
    }
}

impl Server {
    /// Serve on all `listeners`; what is published through `broadcast` goes to the clients.
    ///
    /// # Errors
    /// The host has no thread or descriptor left.
    pub fn start(
        listeners: Vec<Listener>,
        version: VersionInfo,
        handler: Arc<dyn Handler>,
        broadcast: Broadcast,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            version,
            handler,
            broadcast,
            stop: Stop::new()?,
            next_id: AtomicU64::new(0),
            connected: Mutex::new(0),
            left: Condvar::new(),
            clients: Mutex::default(),
        });
        let mut server = Self {
            shared: Arc::clone(&shared),
            listeners: Vec::new(),
        };
        for listener in listeners {
            let shared = Arc::clone(&shared);
            let thread = thread::Builder::new()
                .name("qmp-listener".to_owned())
                .spawn(move || shared.accept_all(&listener))?;
            server.listeners.push(thread);
        }
        Ok(server)
    }

    /// End orderly: take no more clients and requests, let every client read what waits for it
    /// and then `farewell`, for at most `patience`. Not to be called from a handler, which would
    /// wait for itself.
    pub fn shutdown(self, farewell: &Event, patience: Duration) {
        self.shared.stop.trigger();
        let farewell = encode_event(farewell, Timestamp::now());
        for client in &*lock(&self.shared.broadcast.clients) {
            client.outbox.finish(Some(&farewell));
        }
        self.shared.wait_until_left(patience);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stop.trigger();
        for listener in self.listeners.drain(..) {
            let _ = listener.join();
        }
        for client in &*lock(&self.shared.broadcast.clients) {
            client.outbox.close();
            client.stop.trigger();
        }
        // Nobody uses the handler any more when this is over.
        let clients = std::mem::take(&mut *lock(&self.shared.clients));
        for client in clients {
            let _ = client.join();
        }
    }
}

impl Shared {
    fn accept_all(self: &Arc<Self>, listener: &Listener) {
        loop {
            match listener.accept(&self.stop) {
                Ok(socket) => self.admit(socket),
                Err(ChannelError::Stopped) => return,
                Err(error) => {
                    tracing::error!(%error, "QMP listener failed");
                    return;
                }
            }
        }
    }

    fn admit(self: &Arc<Self>, socket: Socket) {
        let peer = socket.peer().to_owned();
        {
            let mut connected = lock(&self.connected);
            if *connected >= CLIENTS_MAX {
                tracing::warn!(%peer, "more than {CLIENTS_MAX} QMP clients: turned away");
                return;
            }
            *connected = connected.saturating_add(1);
        }
        let place = Place(Arc::clone(self));
        let started = thread::Builder::new()
            .name("qmp-client".to_owned())
            .spawn(move || {
                if let Err(error) = place.0.serve(socket) {
                    tracing::debug!(%peer, %error, "QMP client lost");
                }
            });
        match started {
            Ok(client) => {
                let mut clients = lock(&self.clients);
                clients.retain(|client| !client.is_finished());
                clients.push(client);
            }
            Err(error) => tracing::warn!(%error, "no thread for a QMP client"),
        }
    }

    /// Serve one client from greeting to end.
    fn serve(&self, socket: Socket) -> Result<(), ServeError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let context = ClientContext::new(id, socket.peer().to_owned());
        let stop = Stop::new()?;
        let peer = context.peer.clone();
        let wire = Arc::new(Wire::new(socket.into_fd(), peer, stop.clone()));
        let outbox = Arc::new(Outbox::default());
        let subscription = Subscription::new(self, id, &outbox, &stop);
        let sender = {
            let (wire, outbox) = (Arc::clone(&wire), Arc::clone(&outbox));
            thread::Builder::new()
                .name("qmp-sender".to_owned())
                .spawn(move || send_all(&wire, &outbox))?
        };
        tracing::debug!(client = id, peer = wire.peer(), "QMP client connected");
        let outcome = self.converse(&wire, &outbox, &context);
        match outcome {
            Ok(()) => {
                outbox.finish(None);
                outbox.wait_closed(LAST_WORDS);
            }
            Err(_) => outbox.close(),
        }
        stop.trigger();
        let _ = sender.join();
        drop(subscription);
        tracing::debug!(client = id, "QMP client gone");
        outcome
    }

    /// Read requests and answer them until the client has no more.
    fn converse(
        &self,
        wire: &Wire,
        outbox: &Outbox,
        context: &ClientContext,
    ) -> Result<(), ServeError> {
        let mut session = ServerSession::new(self.version.clone());
        outbox.reply(session.greeting(), false);
        let mut buf = [0; 4096];
        loop {
            let mut fds = Vec::new();
            let length = wire.receive(&mut buf, &mut fds, None)?;
            if length == 0 {
                return Ok(());
            }
            context.arrive(fds);
            let mut input = buf.get(..length).unwrap_or_default();
            loop {
                let (used, step) = session.advance(input);
                input = input.get(used..).unwrap_or_default();
                let reply = match step {
                    Step::NeedMore => break,
                    _ if !outbox.begin() => return Ok(()),
                    Step::Reply(reply) => reply,
                    Step::Execute(request) => self.execute(context, request),
                };
                outbox.reply(reply, session.negotiated());
            }
        }
    }

    fn execute(&self, context: &ClientContext, request: Request) -> Vec<u8> {
        let Request { command, id } = request;
        let name = command.name();
        tracing::debug!(client = context.id, command = name, "QMP command");
        // The handler is shared between threads, so it guards its state against panics anyway.
        let outcome = catch_unwind(AssertUnwindSafe(|| self.handler.execute(context, command)))
            .unwrap_or_else(|_| {
                tracing::error!(command = name, "QMP command panicked");
                Err(CommandError::generic(format!(
                    "{name} failed because of an error in this program"
                )))
            });
        match outcome {
            Ok(value) => encode_return(id.as_ref(), &value),
            Err(error) => encode_error(id.as_ref(), &error),
        }
    }

    fn wait_until_left(&self, patience: Duration) {
        let connected = lock(&self.connected);
        let _ = self
            .left
            .wait_timeout_while(connected, patience, |connected| *connected > 0)
            .unwrap_or_else(PoisonError::into_inner);
    }
}

/// One of the places for clients; freed when dropped.
struct Place(Arc<Shared>);

impl Drop for Place {
    fn drop(&mut self) {
        let mut connected = lock(&self.0.connected);
        *connected = connected.saturating_sub(1);
        drop(connected);
        self.0.left.notify_all();
    }
}

/// A client's entry in the broadcast.
struct Subscription<'a> {
    shared: &'a Shared,
    id: u64,
}

impl<'a> Subscription<'a> {
    fn new(shared: &'a Shared, id: u64, outbox: &Arc<Outbox>, stop: &Stop) -> Self {
        let mut clients = lock(&shared.broadcast.clients);
        clients.push(Subscriber {
            id,
            outbox: Arc::clone(outbox),
            stop: stop.clone(),
        });
        // Shutting down has gone through the list already, or will under this lock.
        if shared.stop.is_triggered() {
            outbox.finish(None);
        }
        Self { shared, id }
    }
}

impl Drop for Subscription<'_> {
    fn drop(&mut self) {
        lock(&self.shared.broadcast.clients).retain(|client| client.id != self.id);
    }
}

/// The sender thread: everything in the outbox, in order. Its end is the connection's end.
fn send_all(wire: &Wire, outbox: &Outbox) {
    while let Some(message) = outbox.next() {
        if wire.send(&message, &[], None).is_err() {
            break;
        }
        outbox.sent(message.len());
    }
    outbox.close();
    wire.stop().trigger();
}

/// Why a client was lost.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("no descriptor or thread for the client: {0}")]
    Resources(#[from] io::Error),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
