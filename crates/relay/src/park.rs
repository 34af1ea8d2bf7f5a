//! Keeps a machine that comes in a file.
//!
//! A *parked* machine is a complete precopy stream, which a QEMU can load (`-incoming "exec:cat FILE"`)
//! and from which [`crate::restore`] sends pages in any order. [`Parker`] makes it of whatever a source
//! sends:
//!
//! ```text
//! precopy   header, START, PARTs, END, devices, EOF, description ──▶ the same, without commands
//!
//! postcopy  header, START, PARTs ─────────────────────────────────▶ header, START, PARTs
//!           discards ── remembered: missing from then on
//!           package: LISTEN, devices, PING, RUN ── held ───────────────────┐
//!           PARTs with what is missing, END ──────────────────────▶ PARTs, END
//!           EOF ──────────────────────────────────────────────────▶ devices, EOF, empty description
//! ```
//!
//! [`receive`] is the destination's side of such a migration: it answers the source and says SHUT 0 when
//! file and index are on stable storage, not before. The guest does not run here, so what goes wrong
//! before that leaves it where it was, as far as the source can take it back.

mod error;
mod indexer;
mod memory;
mod output;
mod package;
mod parker;
mod receive;
mod tail;

pub use error::{MemoryFault, ParkError};
pub use memory::MEMORY_BYTES_MAX;
pub use parker::{ParkEvent, ParkOptions, Parked, Parker, Parking};
pub use receive::{Reconnect, receive};
