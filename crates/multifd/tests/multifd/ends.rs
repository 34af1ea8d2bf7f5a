//! What stands at the other ends: sources that write given bytes, and a reader of the plain stream.

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use vmferry_channel::{Channel, ChannelError, Listener, Reader, Stop, Uri};
use vmferry_multifd::{JoinOptions, Joined, MultifdError, accept};

/// Fails a test that would hang.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A source of test data, whose seed is printed: `VMFERRY_SEED` repeats a run.
pub(crate) fn seeded() -> fastrand::Rng {
    let seed = std::env::var("VMFERRY_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| fastrand::u64(..));
    println!("VMFERRY_SEED={seed}");
    fastrand::Rng::with_seed(seed)
}

/// Longer variants run.
pub(crate) fn rounds(short: usize, long: usize) -> usize {
    match std::env::var_os("VMFERRY_LONG") {
        Some(_) => long,
        None => short,
    }
}

pub(crate) fn stop() -> Stop {
    Stop::new().expect("a descriptor")
}

pub(crate) fn listener() -> Listener {
    Listener::bind(&"tcp:127.0.0.1:0".parse().expect("an address")).expect("a port")
}

pub(crate) fn dial(listener: &Listener) -> TcpStream {
    let Uri::Tcp { port, .. } = listener.local() else {
        panic!("no TCP listener");
    };
    TcpStream::connect(("127.0.0.1", *port)).expect("somebody listens")
}

/// Reads until the stream ends; what was read before an error is kept.
pub(crate) fn read_all(reader: &mut Reader) -> (Vec<u8>, Result<(), ChannelError>) {
    let deadline = Some(Instant::now() + PATIENCE);
    let (mut all, mut piece) = (Vec::new(), vec![0; 100_000]);
    loop {
        match reader.read_until(&mut piece, deadline) {
            Ok(0) => return (all, Ok(())),
            Ok(got) => all.extend(&piece[..got]),
            Err(error @ ChannelError::TimedOut { .. }) => panic!("the stream hangs: {error}"),
            Err(error) => return (all, Err(error)),
        }
    }
}

/// A source whose connections carry these bytes, the first one being the main one if it is right. They are opened in
/// a random order, written in random pieces, and closed.
pub(crate) fn write_all(listener: &Listener, connections: &[Vec<u8>], rng: &mut fastrand::Rng) {
    let mut order: Vec<usize> = (0..connections.len()).collect();
    rng.shuffle(&mut order);
    let mut sockets: Vec<(usize, TcpStream)> =
        order.into_iter().map(|at| (at, dial(listener))).collect();
    std::thread::scope(|scope| {
        for (at, socket) in &mut sockets {
            let mut rng = rng.fork();
            scope.spawn(move || {
                let mut bytes = &connections[*at][..];
                while !bytes.is_empty() {
                    let most = if rng.bool() { 50 } else { 50_000 };
                    let piece = bytes.len().min(rng.usize(1..most));
                    // Whoever joins them may have had enough.
                    if socket.write_all(&bytes[..piece]).is_err() {
                        return;
                    }
                    bytes = &bytes[piece..];
                    if rng.u8(..8) == 0 {
                        std::thread::yield_now();
                    }
                }
                let _ = socket.shutdown(std::net::Shutdown::Write);
            });
        }
    });
}

/// What comes out of connections that carry these bytes.
pub(crate) fn join(
    connections: &[Vec<u8>],
    options: &JoinOptions,
    rng: &mut fastrand::Rng,
) -> (Vec<u8>, Result<(), MultifdError>) {
    let listener = listener();
    let stop = stop();
    std::thread::scope(|scope| {
        scope.spawn(|| write_all(&listener, connections, rng));
        match accept(&listener, options, &stop) {
            Ok(joined) => consume(joined),
            Err(error) => (Vec::new(), Err(error)),
        }
    })
}

/// Reads the plain stream to its end, then asks how it went.
pub(crate) fn consume(joined: Joined) -> (Vec<u8>, Result<(), MultifdError>) {
    let Channel::TwoWay(mut reader, _writer) = joined.channel else {
        panic!("the channel goes both ways");
    };
    let (bytes, outcome) = read_all(&mut reader);
    outcome.expect("the plain stream itself does not break");
    (bytes, joined.joining.finish())
}
