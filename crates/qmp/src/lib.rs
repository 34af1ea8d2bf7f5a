//! QMP, the control protocol of QEMU, for daemons and for their clients.
//!
//! ```text
//!   bytes ──▶ ServerSession ──▶ Step::Execute(Request) ──▶ Handler ──▶ reply ──▶ bytes
//!              framing, negotiation, argument checks,        (yours)
//!              query-version, query-commands, query-qmp-schema
//! ```
//!
//! [`ServerSession`] is one client's conversation without any socket. [`Server`] runs one for
//! each connection and spreads events. [`Client`] is the other end, for our daemon and for real
//! QEMUs. Every command, event and type stands once in a table ([`Command`], [`Event`],
//! [`types`]), from which parsing, checking and `query-qmp-schema` are made.
//!
//! Source: QEMU's public QMP specification and its schema's names; wordings of errors as seen
//! from QEMU 10.0.
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

mod client;
mod commands;
mod error;
mod framing;
mod json;
mod outbox;
mod schema;
mod server;
mod session;
pub mod types;
mod wire;

pub use client::{
    Client, ClientError, EVENTS_MAX, GREETING_PATIENCE, MESSAGE_BYTES_MAX, REPLY_PATIENCE,
    ServerEvent,
};
pub use commands::{Command, Event, check_returned, introspect};
pub use error::{CommandError, ErrorClass};
pub use framing::DEPTH_MAX;
pub use outbox::OUTBOX_BYTES_MAX;
pub use schema::{
    Described, Enumeration, Member, Mismatch, Object, Shape, check_arguments, check_value,
};
pub use server::{Broadcast, CLIENTS_MAX, ClientContext, Handler, KEPT_FDS_MAX, Server};
pub use session::{
    REQUEST_BYTES_MAX, Request, ServerSession, Step, Timestamp, encode_error, encode_event,
    encode_return,
};
