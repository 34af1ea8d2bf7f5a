//! A guest has moved: tell the switches which port leads to it now.
//!
//! Each NIC sends a broadcast with its own address as the sender, some times over, because the
//! first may go out before a port of the new switch forwards anything.
//!
//! ```text
//!   Announcement ── begin ──▶ Agenda ── due(now) ──▶ Announcer::send(frame)
//!   (parameters,              Schedule per            one per NIC, by name
//!    which NICs)              occasion
//! ```
//!
//! [`Schedule`] and [`Agenda`] know neither clock nor socket: whoever drives them says what time it
//! is. [`Announcements`] is a thread that drives an agenda. A VMM makes its NICs [`Announcer`]s;
//! [`Interface`] is one for an interface of this host.
//!
//! Source: "core" wire notes §6; what `announce-self` of QEMU 10.0 does with its arguments was
//! tried.

mod agenda;
mod frame;
mod interface;
mod runner;
mod schedule;

pub use agenda::{ANNOUNCEMENTS_MAX, Agenda, Announcement, Occasion, TooMany};
pub use frame::{FRAME_BYTES, Frame, MacAddress, MacError, rarp_request};
pub use interface::Interface;
pub use runner::{Announcements, Announcer};
pub use schedule::{
    INITIAL_MS_MAX, LONGEST_MS_MAX, OutOfRange, Parameters, ROUNDS_MAX, STEP_MS_MAX, Schedule,
};
