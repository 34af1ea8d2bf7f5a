//! The NBD protocol, a server for disks that migrate, and a small client.
//!
//! - [`protocol`]: numbers and records; [`negotiation`]: the server's handshake without I/O.
//! - [`Server`]: exports [`vmferry_disk::Node`]s over any number of listeners. Requests that a node
//!   holds wait in their connection, never in a worker; the connection's other requests go on.
//!   A disk that was given up closes its connections without a reply.
//! - [`Client`]: one connection, synchronous or with many requests under way.
//! - [`errno`]: the one place where disk errors become NBD's numbers.

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

pub mod client;
pub mod errno;
pub mod negotiation;
pub mod protocol;

mod admission;
mod budget;
mod client_handshake;
mod client_replies;
mod connection;
mod held;
mod job;
mod lanes;
mod line;
mod pace;
mod payload;
mod poll;
mod reply;
mod server;
mod stall;
mod uri;
mod window;
mod workers;

pub use client::{Client, ClientSettings, NbdError};
pub use negotiation::Unavailable;
pub use server::{Exports, Server, Settings};
pub use uri::{NbdUri, NbdUriError, PORT};
