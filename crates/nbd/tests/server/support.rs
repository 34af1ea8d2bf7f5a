//! A server in this process, and clients that misbehave.

use std::io::{Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmferry_channel::{Listener, Stop, Uri};
use vmferry_disk::simulated::MemoryDisk;
use vmferry_disk::{Hold, Node};
use vmferry_nbd::protocol::{Command, OptionCode, Request, SIMPLE_REPLY_BYTES, handshake};
use vmferry_nbd::{Client, ClientSettings, Exports, NbdUri, Server, Settings, Unavailable};

/// A hang fails its test after this long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Disks(pub(crate) Vec<Arc<Node>>);

impl Exports for Disks {
    fn list(&self) -> Vec<String> {
        self.0.iter().map(|node| node.name().to_owned()).collect()
    }

    fn open(&self, name: &str) -> Result<Arc<Node>, Unavailable> {
        let found = self.0.iter().find(|node| node.name() == name);
        found.cloned().ok_or(Unavailable::Unknown)
    }

    fn description(&self, name: &str) -> Option<String> {
        Some(format!("the disk {name}"))
    }
}

/// A running server; it stops when dropped.
pub(crate) struct Running {
    pub(crate) server: Arc<Server>,
    pub(crate) address: Uri,
    pub(crate) stop: Stop,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    pub(crate) fn new(nodes: Vec<Arc<Node>>, settings: Settings) -> Self {
        let address = Uri::Tcp {
            host: "127.0.0.1".to_owned(),
            port: 0,
        };
        Self::at(&address, nodes, settings)
    }

    pub(crate) fn at(address: &Uri, nodes: Vec<Arc<Node>>, settings: Settings) -> Self {
        let listener = Listener::bind(address).unwrap();
        let address = listener.local().clone();
        let server = Server::new(Arc::new(Disks(nodes)), settings).unwrap();
        let stop = Stop::new().unwrap();
        let thread = std::thread::spawn({
            let (server, stop) = (Arc::clone(&server), stop.clone());
            move || server.serve(&listener, &stop).unwrap()
        });
        Self {
            server,
            address,
            stop,
            thread: Some(thread),
        }
    }

    pub(crate) fn uri(&self, export: &str) -> NbdUri {
        NbdUri {
            address: self.address.clone(),
            export: export.to_owned(),
        }
    }

    pub(crate) fn client(&self) -> Client {
        self.client_with(true)
    }

    pub(crate) fn client_with(&self, structured: bool) -> Client {
        let settings = ClientSettings {
            connect_timeout: PATIENCE,
            silence_timeout: Some(PATIENCE),
            structured,
        };
        Client::connect(&self.uri("disk"), &settings, &Stop::new().unwrap()).unwrap()
    }

    /// A connection without any handshake.
    pub(crate) fn raw(&self) -> Raw {
        let Uri::Tcp { host, port } = &self.address else {
            panic!("not TCP: {}", self.address);
        };
        let address = (host.as_str(), *port).to_socket_addrs().unwrap().next();
        let stream = TcpStream::connect(address.unwrap()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Raw { stream }
    }

    /// Wait until the server has exactly so many clients.
    pub(crate) fn await_connections(&self, count: usize) {
        eventually(|| self.server.connections() == count);
    }

    /// Stop it and wait for its end.
    pub(crate) fn finish(&mut self) {
        self.stop.trigger();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.trigger();
        if let Some(thread) = self.thread.take() {
            let result = thread.join();
            if !std::thread::panicking() {
                result.unwrap();
            }
        }
    }
}

/// A server for one disk named `disk`.
pub(crate) fn serve(disk: &MemoryDisk) -> (Running, Arc<Node>) {
    serve_with(disk, Settings::default())
}

pub(crate) fn serve_with(disk: &MemoryDisk, settings: Settings) -> (Running, Arc<Node>) {
    let node = Node::new("disk", Box::new(disk.clone()), Hold::Nothing);
    (Running::new(vec![Arc::clone(&node)], settings), node)
}

/// Look again and again; a condition that never comes fails the test.
pub(crate) fn eventually(condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "it never happened");
        std::thread::yield_now();
    }
}

/// A hand-made client.
pub(crate) struct Raw {
    pub(crate) stream: TcpStream,
}

impl Raw {
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub(crate) fn receive(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Nothing comes for a while. Only a wrong server that is slow can be taken for a right one.
    pub(crate) fn is_silent(&mut self) -> bool {
        let patience = Some(Duration::from_millis(300));
        self.stream.set_read_timeout(patience).unwrap();
        let result = self.stream.peek(&mut [0]);
        self.stream.set_read_timeout(Some(PATIENCE)).unwrap();
        result.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
    }

    /// Everything until the server closes; a reset counts as closing.
    pub(crate) fn receive_to_end(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut piece = [0; 4096];
        loop {
            match self.stream.read(&mut piece) {
                Ok(0) => return bytes,
                Ok(count) => bytes.extend(&piece[..count]),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return bytes,
                Err(error) => panic!("the server neither answers nor closes: {error}"),
            }
        }
    }

    /// The oldest handshake: simple replies follow.
    pub(crate) fn enter(&mut self, export: &str) {
        self.receive(18);
        let flags = u32::from(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        self.send(&flags.to_be_bytes());
        self.send(&option(OptionCode::EXPORT_NAME, export.as_bytes()));
        self.receive(10);
    }

    pub(crate) fn request(&mut self, request: Request) {
        self.send(&request.encode());
    }

    /// Error and cookie of a simple reply.
    pub(crate) fn simple_reply(&mut self) -> (u32, u64) {
        let bytes = self.receive(SIMPLE_REPLY_BYTES);
        assert_eq!(bytes[..4], [0x67, 0x44, 0x66, 0x98]);
        (
            u32::from_be_bytes(bytes[4..8].try_into().unwrap()),
            u64::from_be_bytes(bytes[8..].try_into().unwrap()),
        )
    }
}

pub(crate) fn option(code: OptionCode, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(code.0.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
    bytes.extend(data);
    bytes
}

pub(crate) fn request(command: Command, cookie: u64, offset: u64, length: u32) -> Request {
    Request {
        flags: 0,
        command,
        cookie,
        offset,
        length,
    }
}

/// Random numbers from `VMFERRY_SEED` or from anywhere; the seed is printed.
pub(crate) fn random() -> fastrand::Rng {
    let seed = std::env::var("VMFERRY_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| fastrand::u64(..));
    println!("VMFERRY_SEED={seed}");
    fastrand::Rng::with_seed(seed)
}

pub(crate) fn random_bytes(random: &mut fastrand::Rng, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    random.fill(&mut bytes);
    bytes
}
