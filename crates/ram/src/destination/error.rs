//! Why RAM could not be received.

use vmferry_stream::Name;
use vmferry_stream::xbzrle::XbzrleError;

use crate::block::{LayoutError, OutOfBlock};
use crate::userfault::UserfaultError;

/// A record, or an order of the engine's, that cannot be carried out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RamDestinationError {
    /// Two blocks of the guest have one name.
    #[error("two RAM blocks here are called '{block}'")]
    NamedTwice {
        /// The name.
        block: Name,
    },
    /// The stream lists a block that is not here.
    #[error("RAM block '{block}' is not here")]
    UnknownBlock {
        /// Its name.
        block: Name,
    },
    /// The stream lists a block twice.
    #[error("RAM block '{block}' is listed twice")]
    ListedTwice {
        /// Its name.
        block: Name,
    },
    /// The stream does not list a block that is here: its content would not come.
    #[error("RAM block '{block}' is here, but the source has none of that name")]
    NotListed {
        /// Its name.
        block: Name,
    },
    /// A second list of blocks.
    #[error("a second list of RAM blocks")]
    SecondList,
    /// An entry behind the total length that the list began with.
    #[error("RAM block '{block}' is listed outside of a list")]
    OutsideList {
        /// Its name.
        block: Name,
    },
    /// Pages, or an order, without a list of blocks before.
    #[error("{what} before the list of RAM blocks")]
    NoList {
        /// What came.
        what: &'static str,
    },
    /// The lengths differ, and the block cannot be resized to the source's.
    #[error(
        "RAM block '{block}': size mismatch: {received:#x} bytes at the source, {here:#x} here: {reason}"
    )]
    Size {
        /// Its name.
        block: Name,
        /// Length at the source.
        received: u64,
        /// Length here.
        here: u64,
        /// Why it stays so.
        reason: LayoutError,
    },
    /// The host pages differ, of which a postcopy moves whole ones.
    #[error("RAM block '{block}': host pages of {received:#x} bytes at the source, {here:#x} here")]
    PageSize {
        /// Its name.
        block: Name,
        /// Page size at the source.
        received: u64,
        /// Page size here.
        here: u64,
    },
    /// A shared block stays where it is, but not at the same place of the guest.
    #[error("RAM block '{block}': at guest address {received:#x} at the source, {here:#x} here")]
    GuestAddress {
        /// Its name.
        block: Name,
        /// Address at the source.
        received: u64,
        /// Address here.
        here: u64,
    },
    /// `x-ignore-shared` is on at one side only.
    #[error("x-ignore-shared is {} at the source and {} here", on(*.at_source), on(!*.at_source))]
    IgnoreShared {
        /// Is it on there?
        at_source: bool,
    },
    /// A page cannot be taken.
    #[error("RAM block '{block}', offset {offset:#x}: {fault}")]
    Page {
        /// The block's name.
        block: Name,
        /// Where in the block the page begins.
        offset: u64,
        /// What is wrong.
        fault: PageFault,
    },
    /// Records of a capability that is not supported.
    #[error("a record of {capability}, which is not supported here")]
    Capability {
        /// QEMU's name of it.
        capability: &'static str,
    },
    /// A record of another section.
    #[error("a record that does not belong into a ram section: {0}")]
    Foreign(String),
    /// POSTCOPY_ADVISE, although postcopy was not asked for.
    #[error("postcopy is off here")]
    PostcopyOff,
    /// POSTCOPY_ADVISE, which empties memory, after pages.
    #[error("POSTCOPY_ADVISE after the first pages")]
    LateAdvice,
    /// An order that does not belong here.
    #[error("{what} must not come {when}")]
    WrongPhase {
        /// The command.
        what: &'static str,
        /// How far the postcopy is.
        when: &'static str,
    },
    /// A range that cannot be discarded.
    #[error("RAM block '{block}': cannot discard {length:#x} bytes at {start:#x}: {reason}")]
    Discard {
        /// The block's name.
        block: Name,
        /// Where the range begins.
        start: u64,
        /// Its length.
        length: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// POSTCOPY_LISTEN, and a host page could never be placed: only a part of it will come.
    #[error(
        "RAM block '{block}': of the host page at {offset:#x} only a part was discarded, or the \
         block ends in it"
    )]
    PartOfHostPage {
        /// The block's name.
        block: Name,
        /// Where the host page begins.
        offset: u64,
    },
    /// Nobody sees which pages are waited for any more.
    #[error("the thread for faults of guest memory has ended: {reason}")]
    FaultThread {
        /// Why.
        reason: String,
    },
    /// Userfaultfd, or something about host pages, failed.
    #[error(transparent)]
    Userfault(#[from] UserfaultError),
    /// Payload that no record announced.
    #[error("{bytes} bytes of payload, where {expected} are expected")]
    Payload {
        /// Its length.
        bytes: usize,
        /// What the record before announced.
        expected: usize,
    },
}

/// What is wrong with a page.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PageFault {
    /// No such block.
    #[error("no such block is here")]
    UnknownBlock,
    /// The block is shared, and `x-ignore-shared` leaves it where it is.
    #[error("the block is shared and does not travel (x-ignore-shared)")]
    Ignored,
    /// Not a multiple of the page size.
    #[error("no page begins there")]
    Unaligned,
    /// Behind the block's end.
    #[error("the block ends at {used_bytes:#x}")]
    BehindEnd {
        /// Bytes in use.
        used_bytes: u64,
    },
    /// Guest pages of a size that is not ours.
    #[error("a guest page of {bytes} bytes")]
    PageSize {
        /// Its size.
        bytes: u32,
    },
    /// XBZRLE for a page that never came.
    #[error("a change (XBZRLE) of a page that was not received before")]
    NothingToChange,
    /// XBZRLE that is wrong.
    #[error("XBZRLE: {0}")]
    Xbzrle(#[from] XbzrleError),
    /// A compressed page that is not one page.
    #[error("compressed page: {0}")]
    Compressed(CompressedFault),
    /// After POSTCOPY_LISTEN, of which only ZERO and PAGE records are known.
    #[error("a {what} page in postcopy")]
    NotInPostcopy {
        /// `changed (XBZRLE)`, `compressed`.
        what: &'static str,
    },
    /// After POSTCOPY_LISTEN, a page of other bytes than zeroes.
    #[error("a page filled with {fill:#04x} in postcopy")]
    Fill {
        /// The byte.
        fill: u8,
    },
    /// After POSTCOPY_LISTEN, a page that is here. The guest may have written it since.
    #[error("sent twice in postcopy")]
    SentTwice,
    /// After POSTCOPY_LISTEN, a guest page in the middle of a host page that did not begin.
    #[error(
        "it lies inside a host page of {page_bytes:#x} bytes that did not come from its beginning"
    )]
    InsideHostPage {
        /// Size of the host page.
        page_bytes: u64,
    },
    /// After POSTCOPY_LISTEN, a guest page before the host page was whole that was on its way.
    #[error(
        "the host page before it is not whole, whose next guest page is {expected:#x}{}",
        if *.is_same_block { "" } else { " of another block" }
    )]
    HostPageBroken {
        /// Offset of the guest page that was to come.
        expected: u64,
        /// Does that lie in the same block?
        is_same_block: bool,
    },
    /// Memory is there, although the page never came: somebody has touched it before
    /// POSTCOPY_LISTEN.
    #[error("its memory is in use, although it never came")]
    InUse,
    /// It could not be placed.
    #[error(transparent)]
    Userfault(#[from] UserfaultError),
    /// Guest memory refused, although the place was right: it was resized meanwhile.
    #[error(transparent)]
    OutOfBlock(#[from] OutOfBlock),
}

/// What is wrong with a compressed page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CompressedFault {
    /// The bytes are no zlib stream.
    #[error("the zlib stream is damaged")]
    Damaged,
    /// The zlib stream goes on behind the bytes that were announced.
    #[error("the zlib stream is cut off after {bytes} bytes")]
    Cut {
        /// What was announced.
        bytes: usize,
    },
    /// It unpacks to more than a page.
    #[error("it unpacks to more than a page")]
    Long,
    /// It unpacks to less than a page.
    #[error("it unpacks to {bytes} bytes")]
    Short {
        /// How many.
        bytes: u64,
    },
    /// Bytes behind the zlib stream.
    #[error("{bytes} bytes behind the end of the zlib stream")]
    Trailing {
        /// How many.
        bytes: u64,
    },
    /// More bytes than any page needs.
    #[error("{bytes} bytes, more than zlib makes of any page")]
    TooLong {
        /// How many.
        bytes: u32,
    },
}

/// The stream is over, but not everything has come.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{pages} pages of RAM block '{block}' are missing")]
pub struct MissingPages {
    /// The first block of which pages are missing.
    pub block: Name,
    /// How many of it, in guest pages.
    pub pages: u64,
}

fn on(is_on: bool) -> &'static str {
    if is_on { "on" } else { "off" }
}
