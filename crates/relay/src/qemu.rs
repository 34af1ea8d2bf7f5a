//! A QEMU that takes part, by its QMP socket.
//!
//! ```text
//!   Qemu::connect ── change(Settings) ──▶ Before
//!        │                                  │
//!        ├── migrate, cancel                │       its guest leaves
//!        ├── listen, recover, pause         │       a guest comes
//!        ├── run_state, migration           │       how it stands
//!        └── put_back(Before) ◀─────────────┘       as it was
//! ```
//!
//! [`PrivateFolder`] has the sockets over which that QEMU and this process talk. Nothing here waits
//! without a limit, and nothing is started by itself: whoever holds a [`Qemu`] decides.
//!
//! Tried with QEMU 7.2 and 10.0. Names of capabilities and parameters are those of its QMP schema.

mod error;
mod folder;
mod machine;
mod settings;

pub use error::QemuError;
pub use folder::PrivateFolder;
pub use machine::{Qemu, Version};
pub use settings::{Before, Settings};
