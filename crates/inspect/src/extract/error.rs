//! What can go wrong.

use std::io;

use vmferry_stream::Name;

/// Something could not be extracted. Places inside the stream are the walk's to tell.
#[derive(Debug, thiserror::Error)]
pub enum ExtractError {
    /// A page of a block that was not listed.
    #[error("a page at byte {offset:#x} of RAM block '{block}', which the stream does not list")]
    UnlistedBlock {
        /// The block.
        block: Name,
        /// Where in it.
        offset: u64,
    },
    /// A page, or a range to forget, reaches past the end of its block.
    #[error("byte {offset:#x} of RAM block '{block}' is past its end: it has {length:#x} bytes")]
    OutsideBlock {
        /// The block.
        block: Name,
        /// Where in it.
        offset: u64,
        /// Its length.
        length: u64,
    },
    /// A block is listed twice, or the whole list is there twice.
    #[error("RAM block '{0}' is listed twice")]
    ListedTwice(Name),
    /// A change of a page that never came.
    #[error(
        "an XBZRLE record for the page at byte {offset:#x} of RAM block '{block}', of which no \
         earlier content came"
    )]
    NothingToChange {
        /// The block.
        block: Name,
        /// Where in it.
        offset: u64,
    },
    /// A chunk past the end of its disk.
    #[error("a chunk at byte {offset} of disk '{disk}' is past its end: it has {length} bytes")]
    OutsideDisk {
        /// The disk.
        disk: Name,
        /// Where in it.
        offset: u64,
        /// Its length.
        length: u64,
    },
    /// The encoding of a page is wrong.
    #[error("the page at byte {offset:#x} of RAM block '{block}': {fault}")]
    BadPage {
        /// The block.
        block: Name,
        /// Where in it.
        offset: u64,
        /// What is wrong with it.
        fault: String,
    },
    /// Pages are elsewhere.
    #[error("this is the main channel of a multifd migration: its pages went over other channels")]
    Multifd,
    /// Nothing to extract.
    #[error("there is no {0} in this stream")]
    Absent(&'static str),
    /// What was asked for is not there.
    #[error("there is no {what} '{name}' in this stream")]
    NotFound {
        /// RAM block, disk or device.
        what: &'static str,
        /// Its name.
        name: String,
        /// What there is instead, a line for each.
        choices: Vec<String>,
    },
    /// It is not clear which one is wanted.
    #[error("there is more than one {what} in this stream: say which")]
    Ambiguous {
        /// RAM block, disk or device.
        what: &'static str,
        /// What there is, a line for each.
        choices: Vec<String>,
    },
    /// An image would be longer than a file can be.
    #[error("{what} would be longer than a file can be")]
    TooLong {
        /// RAM block, disk or image.
        what: String,
    },
    /// Something that has to be held is too long.
    #[error("{what} has more than {max} bytes, which is as much as is held")]
    TooMuch {
        /// What it is.
        what: String,
        /// The maximum.
        max: u64,
    },
    /// The file that is written failed.
    #[error("cannot {verb} the output: {source}")]
    Output {
        /// Read, write or extend.
        verb: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl ExtractError {
    pub(crate) fn write(source: io::Error) -> Self {
        let verb = "write";
        Self::Output { verb, source }
    }

    pub(crate) fn read(source: io::Error) -> Self {
        let verb = "read back";
        Self::Output { verb, source }
    }
}
