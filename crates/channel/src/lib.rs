//! Migration channels: addresses, listeners, reader and writer halves, stop, rate limit.
//!
//! ```text
//!   Uri ── Listener::bind ── accept ──▶ Socket ─┐
//!    ├──── open_incoming ───────────────────────┼──▶ Channel ── split ──▶ Reader, Writer
//!    └──── open_outgoing ───────────────────────┘
//! ```
//!
//! A thread that reads, writes, accepts or connects waits in `poll` together with its [`Stop`], so
//! that it can always be called off. Descriptors are created close-on-exec. The O_NONBLOCK flag of
//! a descriptor that was handed in is never changed, because it belongs to everybody who shares
//! the open file: sockets are used with MSG_DONTWAIT, pipes with RWF_NOWAIT (or, where the kernel
//! lacks it, one `poll` for each piece that cannot block). Writing to a pipe without a reader is an
//! error only where SIGPIPE is ignored, as it is in every Rust program.

mod activation;
mod ancillary;
mod channel;
mod command;
mod error;
mod inherited;
mod listener;
mod open;
mod packet;
mod rate;
mod reader;
mod stop;
mod unix_path;
mod uri;
mod wait;
mod writer;

pub use ancillary::{DESCRIPTORS_MAX, recv_with_fds, send_with_fds};
pub use channel::{Channel, Counter, Direction};
pub use error::ChannelError;
pub use inherited::{duplicate_inherited, is_inherited_listener};
pub use listener::{Listener, Socket};
pub use open::{connect, open_incoming, open_outgoing};
pub use packet::{INTERFACE_NAME_BYTES_MAX, PacketError, PacketSocket};
pub use rate::{RateLimit, SLICE, SliceBudget};
pub use reader::Reader;
pub use stop::Stop;
pub use uri::{Uri, UriError};
pub use writer::Writer;

/// Result of a channel operation.
pub type Result<T> = std::result::Result<T, ChannelError>;

/// A random generator for tests; its seed is printed and can be given again as `VMFERRY_SEED`.
#[cfg(test)]
fn test_rng() -> fastrand::Rng {
    let seed = std::env::var("VMFERRY_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| fastrand::u64(..));
    println!("VMFERRY_SEED={seed}");
    fastrand::Rng::with_seed(seed)
}
