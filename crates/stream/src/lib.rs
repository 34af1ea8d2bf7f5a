//! The bytes of QEMU's migration stream: a reader and a writer without I/O.
//!
//! A stream is a header, a configuration section, then items until an EOF byte, and usually a JSON
//! description of the device sections:
//!
//! ```text
//! "QEVM" 3 │ 07 configuration │ 01 START │ 08 command │ 02 PART │ … │ 03 END │ 04 FULL │ … │ 00 EOF │ 06 description
//!                                  └ id, name, instance, version, body, footer 7e id
//! ```
//!
//! Sections carry no length. The bodies of `block`, `ram` and `dirty-bitmap` are runs of records
//! that end themselves and are decoded here; the body of any other section is a device's business:
//! whoever knows its length says it ([`Decoder::skip_device`]), whoever does not passes the rest of
//! the stream on unread ([`Decoder::pass_rest`]).
//!
//! Nothing here reads, writes, waits or allocates by a peer's wish. [`Decoder::step`] is given a
//! window of input and answers with a [`Step`]:
//!
//! ```
//! use vmferry_stream::{Decoder, Ending, Options, Step};
//!
//! let stream = b"QEVM\0\0\0\x03\x07\0\0\0\x04none\0\x06\0\0\0\x02{}";
//! let mut decoder = Decoder::new(Options::default());
//! let mut window = &stream[..];
//! loop {
//!     match decoder.step(window)? {
//!         Step::NeedMore(bytes) => unreachable!("a window of {bytes} bytes is wanted"),
//!         Step::Record { record, used } => {
//!             println!("{record:?}");
//!             window = &window[used..];
//!         }
//!         Step::Payload(bytes) => window = &window[bytes as usize..],
//!         Step::End => break,
//!     }
//! }
//! assert_eq!(decoder.finish()?, Ending::WithDescription);
//! # Ok::<(), vmferry_stream::DecodeError>(())
//! ```
//!
//! Headers fit into a window of [`limits::MAX_HEADER_BYTES`]; payload is announced by its length and
//! never copied. Records and payload are the same however the input is split into windows.
//!
//! [`Encoder`] is the way back: it appends the bytes of a [`Record`] to a buffer.

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

mod block;
mod command;
mod configuration;
mod decoder;
mod dirty_bitmap;
mod error;
pub mod limits;
mod mapped_ram;
mod names;
mod ram;
mod reader;
pub mod return_path;
mod section;
mod tail;
mod write;
pub mod xbzrle;

pub use block::{BLOCK_BYTES, BLOCK_SECTORS, BlockChunk, SECTOR_BYTES, Sector};
pub use command::{Command, DiscardRange, PageSizes};
pub use configuration::Configuration;
pub use decoder::{Decoder, Expect, Footers, Options, Record, Step};
pub use dirty_bitmap::{BitmapFlags, BitmapRecord};
pub use error::{Blame, DecodeError, Fault, MappedBound};
pub use mapped_ram::MappedBlock;
pub use names::{InstanceId, Name, NameTooLong, PageBits, SectionId, Shown};
pub use ram::{RamPage, RamRecord};
pub use section::{Content, Section, SectionKind};
pub use tail::{Ending, Tail};
pub use write::Encoder;
