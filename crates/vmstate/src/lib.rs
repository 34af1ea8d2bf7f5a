//! Device state in QEMU's format.
//!
//! A device's body in a stream is its fields in a fixed order, then its subsections; nothing in the
//! stream says which fields there are. So a device has a [`Description`], and state that was saved is
//! a [`SavedState`]: the fields as they stand in the stream, with names and types. It encodes to the
//! bytes of a body, and its JSON description says how to decode them again.

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

mod adapters;
mod description;
mod device;
mod element;
mod layout;
mod loader;
mod saved;
pub mod schema;
mod state;
mod table;
pub mod wire;

pub use adapters::{Apart, ByHand, OldStyle, SaveRestore, Unmigratable};
pub use description::{Count, Description, Field};
pub use device::{BoxError, Decoded, Device, DeviceError};
pub use element::{
    Boxed, Converted, Element, ElementDescription, Elements, Plain, Struct, VStruct,
};
pub use layout::{
    BodyError, BodyFault, BodyLayout, DescriptionError, DescriptionWriter, DeviceLayout, Dialect,
    FieldLayout, StateLayout, VmDescription,
};
pub use loader::Loader;
pub use saved::{Content, FieldType, SavedBody, SavedField, SavedState, Shape, Value};
#[doc(hidden)]
pub use state::is_subsection_of;
pub use state::{View, VmState};
pub use table::{Number, Queue, Sequence, Table, count_of};
pub use vmferry_vmstate_derive::VmState;
