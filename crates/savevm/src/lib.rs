//! Registry, handlers, and the machines that save and load a stream.
//!
//! A [`Registry`] lists what can be saved and loaded, in order: live handlers, whose state changes
//! while it is sent, and devices. [`begin`] starts the machine that saves, [`LoadMachine`] is the one
//! that loads. Neither touches a socket, a file, a clock or a thread: bytes go to a [`Sink`] and come
//! from windows.
//!
//! # Where to begin
//!
//! `examples/machine.rs` is a whole machine: memory that is sent while its guest runs, two devices,
//! a file. What stands still needs less:
//!
//! ```
//! use std::sync::{Arc, Mutex};
//! use vmferry_savevm::{Footers, GuestStopped, LoadMachine, Registration, Registry, save_device_state};
//! use vmferry_vmstate::VmState;
//!
//! #[derive(Clone, Default, VmState)]
//! #[vmstate(name = "clock", version = 1)]
//! struct Clock {
//!     #[vmstate(uint64)]
//!     nanoseconds: u64,
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let clock = Arc::new(Mutex::new(Clock { nanoseconds: 7 }));
//! let mut registry = Registry::new();
//! registry.register(Registration::device("clock", Box::new(clock.clone())))?;
//!
//! let stopped = GuestStopped::assert_drained();
//! let mut stream = Vec::new();
//! save_device_state(true, &stopped, &mut registry, &mut stream)?;
//!
//! clock.lock().unwrap().nanoseconds = 0;
//! LoadMachine::of_device_state(Footers::Present, &stopped).load_slice(&stream, &mut registry)?;
//! assert_eq!(clock.lock().unwrap().nanoseconds, 7);
//! # Ok(()) }
//! ```
//!
//! | to | use |
//! |---|---|
//! | say what a device's state is | `#[derive(VmState)]` of [`vmferry_vmstate`] |
//! | say what changes while it is sent | [`SaveHandler`], [`LoadHandler`] |
//! | list both | [`Registry::register`], [`Registration`] |
//! | save a running machine | [`begin`], [`Iterating`], then [`cleanup`] |
//! | load from memory, from a connection | [`LoadMachine::load_slice`], [`LoadMachine::step`]; then [`load_cleanup`] |
//! | save and load devices alone | [`save_device_state`], [`LoadMachine::of_device_state`] |
//!
//! Rules: `savevm-core.md` of the wire format notes.

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

mod handler;
mod load;
mod machine;
mod postcopy;
mod registry;
mod save;

pub use handler::{
    GuestStopped, HandlerError, LoadHandler, Pending, PostcopyHandler, Progress, SaveHandler, Sink,
    TellDiscard,
};
pub use load::{
    LoadError, LoadMachine, LoadOptions, LoadStep, MAX_DEVICE_BYTES, Notice, Owner, SectionLabel,
    load_cleanup,
};
pub use machine::{Machine, Mismatch};
pub use postcopy::{Incoming, PostcopyState};
pub use registry::{
    Blocked, BlockerId, Entry, LiveLoader, LiveSaver, Priority, RegisterError, Registration,
    Registry,
};
pub use save::{
    Completing, Describe, DirtyTotal, Ended, Iterating, LiveEnded, Opening, Packed, Packing,
    Postcopy, Ready, SaveError, Switching, TotalPending, begin, cleanup, save_device_state,
};
/// From [`vmferry_stream`], what this interface is made of.
pub use vmferry_stream::{
    Blame, Command, Configuration, DecodeError, DiscardRange, Ending, Expect, Footers, InstanceId,
    Name, NameTooLong, Options, PageBits, PageSizes, Record, SectionId,
};
