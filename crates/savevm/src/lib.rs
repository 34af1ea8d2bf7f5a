//! Registry, handlers, and the machines that save and load a stream.
//!
//! Handlers own sections; the [`Registry`] orders them; [`begin`] starts the machine that saves,
//! [`LoadMachine`] is the one that loads. Neither touches a socket, a file, a clock or a thread:
//! bytes go to a [`Sink`] and come from windows.
//!
//! Rules: `savevm-core.md` of the wire format notes.

#![forbid(unsafe_code)]

mod handler;
mod load;
mod registry;
mod save;

pub use handler::{GuestStopped, HandlerError, LoadHandler, Pending, Progress, SaveHandler, Sink};
pub use load::{LoadError, LoadMachine, LoadOptions, LoadStep, Owner};
pub use registry::{Entry, LoadRegistry, Priority, RegisterError, Registry, SaveRegistry};
pub use save::{
    Completing, DirtyTotal, Ended, Iterating, Opening, Ready, SaveError, TotalPending, begin,
    cleanup,
};
