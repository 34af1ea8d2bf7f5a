//! Device state in QEMU's format.
//!
//! A device's body in a stream is its fields in a fixed order, then its subsections; nothing in the
//! stream says which fields there are. So a device has a [`Description`], and state that was saved is
//! a [`SavedState`]: the fields as they stand in the stream, with names and types. It encodes to the
//! bytes of a body, and its JSON description says how to decode them again.
//!
//! # Describe a device
//!
//! `#[derive(VmState)]` on a plain struct describes it. Every field is sent or says why not; what is
//! missing does not compile, and the compiler says what to write.
//!
//! ```
//! use std::sync::{Arc, Mutex};
//! use vmferry_vmstate::{Device, VmState};
//!
//! #[derive(Clone, Default, VmState)]
//! #[vmstate(name = "watchdog", version = 2, minimum_version = 1, post_load = Self::check)]
//! struct Watchdog {
//!     #[vmstate(bool)]
//!     enabled: bool,
//!     #[vmstate(uint32, since = 2)]
//!     reload: u32,
//!     #[vmstate(timer)]
//!     bark: Option<u64>,
//!     #[vmstate(skip = "wired by the machine")]
//!     irq: u8,
//! }
//!
//! impl Watchdog {
//!     fn check(&mut self, _version: u32) -> Result<(), &'static str> {
//!         if self.bark.is_some() && !self.enabled {
//!             return Err("a disabled watchdog does not bark");
//!         }
//!         Ok(())
//!     }
//! }
//!
//! let mut watchdog = Arc::new(Mutex::new(Watchdog { enabled: true, reload: 9, ..Watchdog::default() }));
//! let mut body = Vec::new();
//! Device::save(&mut watchdog)?.encode(&mut body);
//! assert_eq!(body, b"\x01\0\0\0\x09\xff\xff\xff\xff\xff\xff\xff\xff");
//!
//! // In a stream something follows: here, the footer of the section.
//! body.extend(b"\x7e\0\0\0\x2a");
//! let decoded = watchdog.decode(2, &body)?;
//! assert_eq!(decoded.used, 13);
//! decoded.commit()?;
//!
//! body[0] = 0;
//! body[5..13].fill(0);
//! let refused = watchdog.decode(2, &body).unwrap_err();
//! assert_eq!(
//!     refused.to_string(),
//!     "post_load of 'watchdog': a disabled watchdog does not bark"
//! );
//! assert!(watchdog.lock().unwrap().enabled);
//! # Ok::<(), vmferry_vmstate::DeviceError>(())
//! ```
//!
//! `examples/serial_port.rs` is a longer one to begin with.
//!
//! ## On the struct
//!
//! | attribute | meaning |
//! |---|---|
//! | `name = ".."` | QEMU's `vmsd_name`; a subsection's begins with its owner's, and goes on, mostly with a slash; no name begins with that of a subsection before it |
//! | `version = 3` | what is written, and the highest that is read; any version may be a constant of type `u32`, too |
//! | `minimum_version = 2` | the lowest that is read; without it, only `version` |
//! | `needed = Self::f` | `fn(&Self) -> bool`: is there anything to send? For devices and subsections |
//! | `pre_save`, `post_save`, `pre_load` `= Self::f` | `fn(&mut Self) -> Result<(), E>` |
//! | `post_load = Self::f` | `fn(&mut Self, u32) -> Result<(), E>`, with the version that was sent |
//! | `committed = Self::f` | `fn(&mut Self) -> Result<(), E>`: the state is in place |
//! | `subsections(A, B)` | subsections that are computed: each is a [`View`] of the struct |
//! | `unmigratable` | such a device blocks saving and loading |
//! | `crate = device::state` | where this crate is, if it goes by another name |
//!
//! ## On a field
//!
//! One `#[vmstate(..)]` is one value on the wire, in the order in which they stand. A field can have
//! several, and each begins with a type:
//!
//! | type | on the wire | Rust type |
//! |---|---|---|
//! | `bool`, `int8` … `uint64` | the value, big-endian | `bool`, `i8` … `u64` |
//! | `uint8_equal`, `uint16_equal`, `uint32_equal`, `int32_equal` | as without `equal`; refused unless it is the receiver's own value | `u8`, `u16`, `u32`, `i32` |
//! | `int64_equal` | the same, unsigned in spite of its name | `u64` |
//! | `int32_le` | from 0 to the receiver's own value | `i32` |
//! | `timer` | expiry in nanoseconds, all ones if not armed | `Option<u64>` |
//! | `cpu_double` | high half, low half | `f64`, `u64` |
//! | `buffer` | raw bytes | `[u8; N]`, `Vec<u8>` with `length` |
//! | `bitmap` | words of 64 bits | `[u64; N]`, `Vec<u64>` with `length` in bits |
//! | `struct` | its fields and subsections | [`VmState`], `Box` of it |
//! | `vstruct = 2` | the same, in version 2 of it | [`VmState`] |
//! | `tmp = V` | values computed for the stream | any; `V` is a [`View`] of the struct |
//! | `qtailq`, `qlist` | a list that ends itself, with `max` | `Vec`, `VecDeque`, `LinkedList` of [`VmState`] |
//! | `gtree` | a tree, with `max`; `key = struct` unless keys are `u64` | `BTreeMap` |
//! | `custom = CODEC` | as the [`wire::Codec`] says; with `count`, each element by itself | what it says |
//! | `unused(28)` | so many zero bytes; no field of the struct | |
//! | `subsection` | a subsection, sent if `needed` | [`VmState`] |
//! | `skip = "why"` | nothing | any |
//!
//! QEMU's `fd` is missing: such a value is a descriptor that travels beside the stream, on a local
//! socket, so it is no part of any body. Skip the field, and open the file anew in `committed`.
//!
//! Arrays of these are `[T; N]`, also `[[T; N]; M]`; a `Vec`, a boxed slice and an array behind a type
//! alias say their `count`.
//!
//! | option | meaning |
//! |---|---|
//! | `name = "env.regs"` | QEMU's name, if it is not the field's |
//! | `since = 2` | not in bodies of an older version |
//! | `condition = Self::f` | `fn(&Self, version: u32) -> bool`: present only if it holds; together with `since`, both must |
//! | `count = FIELD`, `max = 64` | as many elements as an earlier field says; `max` may be left out for `[T; N]` |
//! | `length = FIELD`, `max = 64` | the same for bytes of a `buffer` and bits of a `bitmap` |
//! | `count = Self::f`, `length = Self::f` | as many as `fn(&Self)` says, of any integer type |
//! | `count = 16`, `length = PORTS * 2` | always so many: a constant of type `usize`, named in capitals or any other expression |
//! | `nullable` | an array of `Option`s: those that are `None` here must be null there |
//! | `as = u8` | the field is a `u8` on the wire, by `TryInto` in both directions |
//! | `with = MODULE` | by `MODULE::to_wire(&T)` and `MODULE::from_wire(W)`, which return `Result`s |
//! | `at = channels[0].count` | another place in the struct than the field; only arrays `[T; N]` are indexed |
//! | `needed = Self::f` | of a `subsection`: `fn(&Self) -> bool` of its owner decides |
//!
//! # From state to device
//!
//! The registry knows a [`Device`]. There are four kinds:
//!
//! - `Arc<Mutex<T>>`, where `T` is [`VmState`] and `Clone`: the device describes itself;
//! - [`Apart`], where the saved state is a type of its own ([`SaveRestore`]): for devices that hold
//!   files and threads, and for runtime types that shall change without changing the format;
//! - [`ByHand`], where a pair of functions writes and reads the bytes ([`OldStyle`]);
//! - [`Unmigratable`], which refuses.
//!
//! # Whose fault an error is
//!
//! [`DeviceError::blame`] says it: bytes that are wrong are the peer's fault or that of stored data, a
//! hook that fails is this host's. A `pre_load`, `post_load` or [`SaveRestore::restore`] that finds the
//! state itself wrong says [`BadState`]; what [`View::put`] and `from_wire` refuse is wrong anyway.
//!
//! # What runs when
//!
//! | | order | on |
//! |---|---|---|
//! | saving | `needed`, `pre_save`, fields, subsections, `post_save`; the last whenever `pre_save` succeeded | the device |
//! | loading | `pre_load`, fields, subsections, `post_load` | a clone that may be thrown away |
//! | [`Decoded::commit`] | `committed` of structs, of subsections, of the device | the device |
//!
//! The hooks of a struct or subsection run where it stands.
//!
//! Loading takes place on a clone, so that neither a hook that fails nor a broken stream changes the
//! device. It begins again whenever more bytes are needed, so **`pre_load` and `post_load` run any
//! number of times, on clones of which at most one is kept**. They may check the state and change it,
//! but touch nothing that the clone shares with the device or the world: no interrupt line, no timer,
//! no memory map, nothing behind an `Arc`. All that belongs into `committed`, which runs exactly once,
//! on the device, when the section's footer was right and the clone is in place; for each struct and
//! subsection in it, sent or not. If it fails, so does the migration, but the state stays.
//!
//! A subsection that was not sent leaves its fields as they were; a device that is not new when it is
//! loaded sets them in `pre_load`.
//!
//! Skipped fields are part of the clone: they come from the moment when the body was decoded, with
//! what the hooks made of them. What other threads change until the commit stays only if it is behind
//! an `Arc`, or if the device is [`Apart`].
//!
//! The device is locked while it is saved, and while `committed` and [`SaveRestore::restore`] run: a
//! hook that locks it again, or waits for a thread that does, never ends.

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
pub use device::{BadState, BoxError, Decoded, Device, DeviceError, Origin};
pub use element::{
    Boxed, Converted, Element, ElementDescription, Elements, Plain, Struct, VStruct,
};
pub use layout::{
    BodyError, BodyFault, BodyLayout, DescriptionError, DescriptionWriter, DeviceLayout, Dialect,
    FieldLayout, StateLayout, VmDescription,
};
pub use loader::Loader;
pub use saved::{Content, FieldType, Node, Part, SavedBody, SavedField, SavedState, Shape, Value};
pub use state::{View, VmState};
#[doc(hidden)]
pub use state::{begins_with, is_subsection_of};
#[doc(hidden)]
pub use table::{FixedArray, fixed_array};
pub use table::{Number, Queue, Sequence, Table, count_of};
pub use vmferry_vmstate_derive::VmState;
