//! Migration streams over several connections (QEMU's `multifd`): joined into one plain stream, and
//! split again.
//!
//! ```text
//!              ┌─ main ──────▶ Decoder ─┐
//!   listener ──┼─ channel 0 ─▶ packets ─┼─▶ one plain stream ─▶ Joined::channel     (accept)
//!              └─ channel 1 ─▶ packets ─┘
//!
//!                                           ┌─▶ main
//!   Split::channel ─▶ one plain stream ─────┼─▶ channel 0                            (connect)
//!                                           └─▶ channel 1
//! ```
//!
//! Whoever reads or writes the plain stream need not know: it is an ordinary
//! [`Channel`](vmferry_channel::Channel). The return path goes straight to the main connection.
//!
//! Nothing about it is negotiated: the number of channels and the compression must be the same on both
//! sides. How often channels are synchronised follows from the machine type; see [`Flush`].
//!
//! Source of the format: wire format notes, `multifd-mapped-ram.md` §1.

#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::cast_possible_truncation,
        clippy::unwrap_used,
        clippy::arithmetic_side_effects
    )
)]

mod compression;
mod error;
mod flush;
mod gather;
mod join;
pub mod packet;
mod sockets;
mod split;
mod window;
mod zstd;

pub use compression::{Compression, CompressionError};
pub use error::{MultifdError, Place, Unsupported, Uuid};
pub use flush::Flush;
pub use join::{JoinOptions, Joined, Joining, accept};
pub use split::{Split, SplitOptions, Splitting, connect};

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
