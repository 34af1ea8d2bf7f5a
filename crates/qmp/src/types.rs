//! The types of the schema, with QEMU's names. What QEMU does not have is prefixed `x-`.

mod address;
mod block;
mod job;
mod machine;
mod migrate;

pub use address::*;
pub use block::*;
pub use job::*;
pub use machine::*;
pub use migrate::*;
