//! Registry, handlers, and the machines that save and load a stream.
//!
//! A [`Registry`] lists what can be saved and loaded, in order: live handlers, whose state changes
//! while it is sent, and devices. [`begin`] starts the machine that saves, [`LoadMachine`] is the one
//! that loads. Neither touches a socket, a file, a clock or a thread: bytes go to a [`Sink`] and come
//! from windows.
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
    Completing, Describe, DirtyTotal, Ended, Interrupted, Iterating, LiveEnded, Opening, Packing,
    Postcopy, Ready, SaveError, Switching, TotalPending, begin, cleanup, save_device_state,
};
/// From [`vmferry_stream`], what this interface is made of.
pub use vmferry_stream::{
    Blame, Command, Configuration, DecodeError, DiscardRange, Ending, Expect, Footers, InstanceId,
    Name, NameTooLong, Options, PageBits, PageSizes, Record, SectionId,
};
