//! The server: listeners in, connections, workers, limits.

use std::collections::HashMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::net::sockopt;
use vmferry_channel::{ChannelError, Listener, Socket, Stop};
use vmferry_disk::Node;

use crate::budget::{Account, Budget};
use crate::connection::{Connection, WINDOW_BYTES};
use crate::job::Context;
use crate::line::Line;
use crate::negotiation::{
    Agreed, Catalog, ExportInfo, Misbehaviour, Negotiation, Progress, Unavailable,
};
use crate::payload::Payloads;
use crate::poll::poll_until;
use crate::window::{Received, Window};
use crate::workers::Workers;

/// The disks that a server offers. Asked anew for every client.
pub trait Exports: Send + Sync {
    /// The names of all exports.
    fn list(&self) -> Vec<String>;

    /// The disk that is exported under exactly this name.
    fn open(&self, name: &str) -> Result<Arc<Node>, Unavailable>;

    /// Words for people.
    fn description(&self, name: &str) -> Option<String>;
}

/// Limits of a server. Bytes count data; every request counts at least 512.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Clients at one time, those in the handshake included.
    pub connections_max: usize,
    /// Time in which a client must have chosen its export.
    pub handshake_timeout: Duration,
    /// Threads that wait for disks. One disk leaves two of them to the others.
    pub workers: usize,
    /// Requests of one connection that are not answered yet.
    pub in_flight_requests_max: u64,
    /// Their data. One request may always be in flight.
    pub in_flight_bytes_max: u64,
    /// The same for all connections together. Over it, every connection may have one small request,
    /// and the server two large ones (above 64 KiB); others wait in their sockets.
    pub in_flight_bytes_max_of_all: u64,
    /// Data of one connection's held requests, that of the answers included. Beyond it the socket
    /// is not read, and reads and flushes behind held writes wait with them; so it is as much as
    /// a guest has under way at most. The last request may exceed it.
    pub held_bytes_max: u64,
    /// The same for all connections together; each may hold one request. What is held is in
    /// flight, too, in the count for all.
    pub held_bytes_max_of_all: u64,
    /// Time in which a write's data must come on by 64 KiB, and, when memory is short, replies be
    /// taken; else the connection ends.
    pub stall_timeout: Duration,
    /// Time for what is in flight when a client or the server says goodbye.
    pub drain_timeout: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            connections_max: 128,
            handshake_timeout: Duration::from_secs(10),
            workers: 8,
            in_flight_requests_max: 1024,
            in_flight_bytes_max: 64 << 20,
            in_flight_bytes_max_of_all: 256 << 20,
            held_bytes_max: 64 << 20,
            held_bytes_max_of_all: 128 << 20,
            stall_timeout: Duration::from_secs(30),
            drain_timeout: Duration::from_secs(5),
        }
    }
}

/// An NBD server for any number of listeners. Dropping it ends its worker threads, after
/// [`Server::serve`] has returned everywhere.
pub struct Server {
    exports: Arc<dyn Exports>,
    settings: Settings,
    workers: Workers,
    payloads: Arc<Payloads>,
    budget: Arc<Budget>,
    held: Account,
    clients: Mutex<HashMap<u64, Client>>,
    next_client: AtomicU64,
}

/// A connection as the server's register has it.
struct Client {
    line: Arc<Line>,
    /// None in the handshake.
    node: Option<Arc<Node>>,
}

impl Server {
    /// A server with its worker threads. Fails if they cannot be started.
    pub fn new(exports: Arc<dyn Exports>, settings: Settings) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            exports,
            workers: Workers::start(settings.workers)?,
            budget: Arc::new(Budget::new(settings.in_flight_bytes_max_of_all)),
            settings,
            payloads: Arc::new(Payloads::new()),
            held: Account::default(),
            clients: Mutex::default(),
            next_client: AtomicU64::new(0),
        }))
    }

    /// Accept clients until the stop event. Returns when all of them have ended: requests in
    /// flight are answered, held ones dropped.
    pub fn serve(self: &Arc<Self>, listener: &Listener, stop: &Stop) -> Result<(), ChannelError> {
        let mut threads: Vec<JoinHandle<()>> = Vec::new();
        let result = loop {
            match listener.accept(stop) {
                Ok(socket) => {
                    threads.retain(|thread| !thread.is_finished());
                    threads.extend(self.welcome(socket, stop));
                }
                Err(error) if error.is_stopped() => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        if result.is_err() {
            // The connections that there are have a right to go on.
            tracing::error!("nbd: the listener failed; its clients are served until the end");
        }
        for thread in threads {
            // It catches panics itself.
            let _ = thread.join();
        }
        result
    }

    /// Number of clients, those in the handshake included.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.clients().len()
    }

    /// Number of clients of this disk.
    #[must_use]
    pub fn connections_of(&self, node: &Arc<Node>) -> usize {
        let clients = self.clients();
        clients.values().filter(|client| client.uses(node)).count()
    }

    /// Cut the connections of all clients of this disk; what they wait for is not answered.
    pub fn disconnect(&self, node: &Arc<Node>) {
        let lines: Vec<Arc<Line>> = self
            .clients()
            .values()
            .filter(|client| client.uses(node))
            .map(|client| Arc::clone(&client.line))
            .collect();
        for line in lines {
            line.sever();
        }
    }

    /// Give a client its thread, or send it away.
    fn welcome(self: &Arc<Self>, socket: Socket, stop: &Stop) -> Option<JoinHandle<()>> {
        let connection = self.enter(socket)?;
        let (server, stop) = (Arc::clone(self), stop.clone());
        let id = connection.id;
        std::thread::Builder::new()
            .name(format!("nbd-client-{id}"))
            .spawn(move || {
                let entered = connection;
                let run = AssertUnwindSafe(|| server.attend(&entered, &stop));
                if catch_unwind(run).is_err() {
                    tracing::error!(client = id, "nbd: a connection's thread panicked");
                }
            })
            .inspect_err(|error| tracing::warn!(client = id, %error, "nbd: no thread for a client"))
            .ok()
    }

    fn enter(self: &Arc<Self>, socket: Socket) -> Option<Entered> {
        let fd = socket.into_fd();
        // Not every socket is TCP.
        let _ = sockopt::set_tcp_nodelay(&fd, true);
        let _ = sockopt::set_socket_keepalive(&fd, true);
        let line = Line::new(fd, Arc::clone(&self.budget))
            .inspect_err(|error| tracing::warn!(%error, "nbd: no event for a client"))
            .ok()?;
        let id = self.next_client.fetch_add(1, Ordering::Relaxed);
        let mut clients = self.clients();
        if clients.len() >= self.settings.connections_max {
            tracing::warn!(
                connections_max = self.settings.connections_max,
                "nbd: too many clients; one was sent away"
            );
            return None;
        }
        let client = Client {
            line: Arc::clone(&line),
            node: None,
        };
        clients.insert(id, client);
        Some(Entered {
            server: Arc::clone(self),
            line,
            id,
        })
    }

    /// A connection's thread.
    fn attend(&self, entered: &Entered, stop: &Stop) {
        let (agreed, window) = match self.negotiate(&entered.line, stop) {
            Ok(agreement) => agreement,
            Err(end) => {
                tracing::debug!(client = entered.id, %end, "nbd: no export chosen");
                return;
            }
        };
        if let Some(client) = self.clients().get_mut(&entered.id) {
            client.node = Some(Arc::clone(&agreed.export));
        }
        let context = Arc::new(Context {
            line: Arc::clone(&entered.line),
            node: agreed.export,
            structured: agreed.structured,
            allocation: agreed.allocation,
            payloads: Arc::clone(&self.payloads),
        });
        let disk = context.node.name().to_owned();
        tracing::debug!(client = entered.id, disk, "nbd: connected");
        let queue = self.workers.queue();
        let connection = Connection::new(context, &self.settings, queue, &self.held, stop, window);
        let end = connection.run();
        tracing::debug!(client = entered.id, disk, %end, "nbd: disconnected");
    }

    fn negotiate(
        &self,
        line: &Line,
        stop: &Stop,
    ) -> Result<(Agreed<Arc<Node>>, Window), HandshakeEnd> {
        let mut window = Window::new(WINDOW_BYTES);
        let mut out = Vec::new();
        let deadline = Instant::now()
            .checked_add(self.settings.handshake_timeout)
            .unwrap_or_else(Instant::now);
        let mut negotiation = Negotiation::new(deadline, &mut out);
        let mut pending = Progress::Advanced;
        while !stop.is_triggered() {
            send_all(line, &mut out, stop, deadline)?;
            match pending {
                Progress::Advanced => {}
                Progress::Ready(agreed) => return Ok((agreed, window)),
                Progress::Goodbye => return Err(HandshakeEnd::Goodbye),
                Progress::NeedMore => match window.receive(line.socket())? {
                    Received::Bytes(_) => {}
                    Received::Nothing => wait(line, PollFlags::IN, stop, deadline)?,
                    Received::End => return Err(HandshakeEnd::Gone),
                },
            }
            let catalog = self.exports.as_ref();
            let (used, progress) =
                negotiation.handle(Instant::now(), window.unread(), &catalog, &mut out)?;
            window.consume(used);
            pending = progress;
        }
        Err(HandshakeEnd::Stopped)
    }

    fn clients(&self) -> MutexGuard<'_, HashMap<u64, Client>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("settings", &self.settings)
            .field("connections", &self.connections())
            .finish_non_exhaustive()
    }
}

impl Client {
    fn uses(&self, node: &Arc<Node>) -> bool {
        self.node
            .as_ref()
            .is_some_and(|used| Arc::ptr_eq(used, node))
    }
}

/// A client's place in the register; dropping it ends the connection and frees the place.
struct Entered {
    server: Arc<Server>,
    line: Arc<Line>,
    id: u64,
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.line.sever();
        let mut clients = self.server.clients();
        clients.remove(&self.id);
        if clients.is_empty() {
            self.server.payloads.shrink();
        }
    }
}

/// Why a handshake led to nothing.
#[derive(Debug, thiserror::Error)]
enum HandshakeEnd {
    #[error("the client said goodbye")]
    Goodbye,
    #[error("the client went away")]
    Gone,
    #[error("the connection was closed by us")]
    Severed,
    #[error("the server stops")]
    Stopped,
    #[error("the socket failed: {0}")]
    Socket(#[from] rustix::io::Errno),
    #[error(transparent)]
    Misbehaviour(#[from] Misbehaviour),
}

/// Send handshake replies; the client has to take them in time.
fn send_all(
    line: &Line,
    out: &mut Vec<u8>,
    stop: &Stop,
    deadline: Instant,
) -> Result<(), HandshakeEnd> {
    let mut rest = out.as_slice();
    while !rest.is_empty() {
        match line.send_some(rest) {
            Ok(sent) => rest = rest.get(sent..).unwrap_or(&[]),
            Err(rustix::io::Errno::AGAIN) => wait(line, PollFlags::OUT, stop, deadline)?,
            Err(error) => return Err(error.into()),
        }
    }
    out.clear();
    Ok(())
}

fn wait(
    line: &Line,
    events: PollFlags,
    stop: &Stop,
    deadline: Instant,
) -> Result<(), HandshakeEnd> {
    let mut fds = [
        PollFd::from_borrowed_fd(line.socket(), events),
        PollFd::from_borrowed_fd(line.wake_event(), PollFlags::IN),
        PollFd::new(stop, PollFlags::IN),
    ];
    poll_until(&mut fds, Some(deadline))?;
    if stop.is_triggered() {
        return Err(HandshakeEnd::Stopped);
    }
    if line.is_severed() {
        return Err(HandshakeEnd::Severed);
    }
    if Instant::now() >= deadline {
        return Err(Misbehaviour::TimedOut.into());
    }
    Ok(())
}

impl Catalog for &dyn Exports {
    type Export = Arc<Node>;

    fn list(&self) -> Vec<String> {
        Exports::list(*self)
    }

    fn open(&self, name: &str) -> Result<(Arc<Node>, ExportInfo), Unavailable> {
        let node = Exports::open(*self, name)?;
        if node.held().is_none() {
            return Err(Unavailable::Departed);
        }
        let limits = node.limits();
        let info = ExportInfo {
            length: limits.length,
            read_only: limits.read_only,
            preferred_bytes: limits.preferred_bytes,
        };
        Ok((node, info))
    }

    fn description(&self, name: &str) -> Option<String> {
        Exports::description(*self, name)
    }
}
