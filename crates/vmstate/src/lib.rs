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

mod description;
mod device;
mod layout;
mod saved;

pub use description::{Count, Description, Field};
pub use device::{Decoded, Device, DeviceError};
pub use layout::{
    BodyError, BodyFault, BodyLayout, DescriptionError, DescriptionWriter, DeviceLayout, Dialect,
    FieldLayout, StateLayout, VmDescription,
};
pub use saved::{Content, FieldType, SavedBody, SavedField, SavedState, Shape, Value};
