//! What goes wrong with an image.

use std::io;
use std::path::PathBuf;

use vmferry_inspect::WalkError;
use vmferry_stream::Name;

/// An image cannot be opened, read or indexed.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file cannot be opened.
    #[error("{image}: {source}")]
    Open {
        /// Its path.
        image: String,
        /// What the host said.
        source: io::Error,
    },
    /// It is no file of a length that is known.
    #[error("{image}: only files and block devices have pages that can be found again")]
    NotAFile {
        /// Its path.
        image: String,
    },
    /// It ends before the stream begins.
    #[error("{image}: it has {bytes} bytes, and the stream is to begin at byte {start}")]
    StartBehindEnd {
        /// Its path.
        image: String,
        /// Its length.
        bytes: u64,
        /// Where the stream is said to begin.
        start: u64,
    },
    /// The snapshot's image cannot be opened, or has no such snapshot.
    #[error("{image}: {source}")]
    Snapshot {
        /// Its path.
        image: String,
        /// What is wrong.
        source: vmferry_qcow2::Error,
    },
    /// The snapshot is one of a disk alone.
    #[error("{image}: snapshot '{snapshot}' has no VM state; only one disk of a machine has it")]
    NoVmState {
        /// Its path.
        image: String,
        /// The snapshot's name.
        snapshot: String,
    },
    /// The image cannot be read.
    #[error("{image}: cannot read byte {offset}: {source}")]
    Read {
        /// Which one.
        image: String,
        /// Where.
        offset: u64,
        /// What the host said.
        source: io::Error,
    },
    /// The stream in it is broken, or ends too early.
    #[error("{image}: {source}")]
    Stream {
        /// Which one.
        image: String,
        /// What is wrong, and where.
        source: WalkError,
    },
    /// The stream in it ends without what ends a stream.
    #[error("{image}: {missing} is missing")]
    Incomplete {
        /// Which one.
        image: String,
        /// What is missing.
        missing: &'static str,
    },
    /// Something is in the stream that a machine cannot be restored from here.
    #[error("{image}: byte {offset}: {what}")]
    Refused {
        /// Which one.
        image: String,
        /// Where.
        offset: u64,
        /// What it is, and what to do.
        what: String,
    },
    /// Its memory is not what it says.
    #[error("{image}: byte {offset}: {problem}")]
    BrokenRam {
        /// Which one.
        image: String,
        /// Where.
        offset: u64,
        /// What is wrong.
        problem: String,
    },
    /// More than is held or indexed.
    #[error("{image}: byte {offset}: {what}, more than {max}")]
    TooMuch {
        /// Which one.
        image: String,
        /// Where.
        offset: u64,
        /// What, and how much of it.
        what: String,
        /// The maximum; see [`crate::limits`].
        max: u64,
    },
    /// A page is not what it was when the image was indexed.
    #[error(
        "{image}: the page at byte {page_offset:#x} of RAM block '{block}' is damaged (byte {offset}): {problem}"
    )]
    DamagedPage {
        /// Which one.
        image: String,
        /// The page's block.
        block: Name,
        /// The page's place in the block.
        page_offset: u64,
        /// The place in the image.
        offset: u64,
        /// What is wrong.
        problem: String,
    },
    /// A section, or the description, is not what it was when the image was indexed.
    #[error("{image}: {section} is damaged (byte {offset}): its checksum differs")]
    DamagedSection {
        /// Which one.
        image: String,
        /// Which section.
        section: String,
        /// Where its body starts.
        offset: u64,
    },
    /// A page that is not in its block was asked for.
    #[error("{image}: pages {first_page} to {end_page} are not in RAM block {block}")]
    NoSuchPage {
        /// Which one.
        image: String,
        /// The block's number.
        block: usize,
        /// The first page.
        first_page: u64,
        /// Behind the last.
        end_page: u64,
    },
    /// Somebody wrote to the image while it was read.
    #[error("{image}: it changes while it is read")]
    Changing {
        /// Which one.
        image: String,
    },
    /// The index is not what the image says.
    #[error("{image}: {index} is not its index: {problem}")]
    WrongIndex {
        /// Which one.
        image: String,
        /// Path of the index.
        index: PathBuf,
        /// What differs.
        problem: String,
    },
    /// The index, or the working set, cannot be written or read back.
    #[error("index {index}: cannot {verb} it: {source}")]
    Index {
        /// Its path.
        index: PathBuf,
        /// Create, write, read …
        verb: &'static str,
        /// What the host said.
        source: io::Error,
    },
}
