//! What is in an image besides its pages.

use vmferry_inspect::LibvirtHeader;
use vmferry_ram::{BlockLayout, PAGE_BYTES, Sharing};
use vmferry_stream::{Configuration, Ending, Name, Section};

/// The capability whose blocks stay where they are.
const IGNORE_SHARED: &str = "x-ignore-shared";

/// What is in an image besides its pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// The configuration, without the capability `mapped-ram`. `None` if the stream has none.
    pub configuration: Option<Configuration>,
    /// Sections end in footers.
    pub footers: bool,
    /// The stream has SWITCHOVER_START.
    pub switchover_start: bool,
    /// RAM blocks, in the order of the stream.
    pub blocks: Vec<ImageBlock>,
    /// Live sections other than `ram`, in the order of their STARTs.
    pub live: Vec<LiveSection>,
    /// Sections of devices, in the order of the stream.
    pub devices: Vec<ImageSection>,
    /// So many of `devices`, the first ones, come among the STARTs, before the first PART: a
    /// destination wants them that early (`virtio-mem`).
    pub early_devices: usize,
    /// How the stream ends.
    pub ending: Ending,
    /// What libvirt wrote before it, if it did.
    pub libvirt: Option<LibvirtHeader>,
}

/// A RAM block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageBlock {
    /// Its name.
    pub name: Name,
    /// Its length.
    pub used_bytes: u64,
    /// Size of the host's pages under it: 4096 unless the stream says otherwise.
    pub page_bytes: u64,
    /// Where the guest sees it, if the stream says it.
    pub guest_address: Option<u64>,
    /// Pages of 4096 bytes that are not in the image.
    pub absent_pages: u64,
}

/// A live section other than `ram`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LiveSection {
    /// START, PARTs and END, in order; empty PARTs of `dirty-bitmap` are left out. The first is
    /// START.
    pub bodies: Vec<ImageSection>,
}

/// A section whose body is in the image; [`Image::section_body`](crate::Image::section_body) reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageSection {
    /// Its header.
    pub section: Section,
    /// Where its body starts in the image.
    pub offset: u64,
    /// Length of its body, at most [`SECTION_BYTES_MAX`](crate::limits::SECTION_BYTES_MAX).
    pub bytes: u64,
    /// CRC-32 of its body.
    pub checksum: u32,
}

/// Bytes of an image with their CRC-32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
    pub(crate) checksum: u32,
}

/// All of it that is not pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Contents {
    pub(crate) head: Head,
    /// The description's text.
    pub(crate) description: Option<Extent>,
}

impl Contents {
    /// The same pages have the same numbers.
    pub(crate) fn has_the_blocks_of(&self, other: &Self) -> bool {
        let blocks = |contents: &Self| -> Vec<_> {
            let blocks = contents.head.blocks.iter();
            blocks
                .map(|block| (block.name.clone(), block.used_bytes))
                .collect()
        };
        blocks(self) == blocks(other)
    }

    /// Both say the same, but for sizes of pages: an image does not always say them, and who wrote it
    /// may have known more.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        let mut this = self.clone();
        for (block, other) in this.head.blocks.iter_mut().zip(&other.head.blocks) {
            block.page_bytes = other.page_bytes;
        }
        this == *other
    }
}

impl Head {
    /// The blocks as a machine's memory.
    pub(crate) fn layouts(&self) -> Vec<BlockLayout> {
        let ignores = self
            .configuration
            .as_ref()
            .is_some_and(|configuration| configuration.has_capability(IGNORE_SHARED));
        self.blocks
            .iter()
            .map(|block| block.layout(ignores))
            .collect()
    }

    /// Pages may be missing because their memory is shared.
    pub(crate) fn ignores_shared(&self) -> bool {
        let configuration = self.configuration.as_ref();
        configuration.is_some_and(|it| it.has_capability(IGNORE_SHARED))
    }
}

impl ImageBlock {
    /// Its pages of 4096 bytes.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.used_bytes.checked_div(PAGE_BYTES).unwrap_or(0)
    }

    /// Lengths are multiples of pages.
    pub(crate) fn is_possible(&self) -> bool {
        self.page_bytes.is_power_of_two()
            && self.page_bytes >= PAGE_BYTES
            && self.used_bytes.is_multiple_of(PAGE_BYTES)
    }

    fn layout(&self, ignores_shared: bool) -> BlockLayout {
        let is_absent = self.pages() > 0 && self.absent_pages == self.pages();
        let max_bytes = self.used_bytes.checked_next_multiple_of(self.page_bytes);
        BlockLayout {
            idstr: self.name.clone(),
            used_bytes: self.used_bytes,
            max_bytes: max_bytes.unwrap_or(self.used_bytes),
            page_bytes: self.page_bytes,
            guest_address: self.guest_address,
            sharing: match ignores_shared && is_absent {
                true => Sharing::Shared,
                false => Sharing::Private,
            },
        }
    }
}
