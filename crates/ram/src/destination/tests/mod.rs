//! Streams that are made here, and streams of real QEMUs.

mod captures;
mod interrupted;
mod pages;
mod postcopy;

use std::io::Write;
use std::ptr::NonNull;
use std::sync::Arc;

use flate2::Compression;
use flate2::write::ZlibEncoder;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use vmferry_savevm::{
    HandlerError, Incoming, LoadHandler, LoadMachine, LoadOptions, Registration, Registry,
};
use vmferry_stream::{
    DiscardRange, Encoder, InstanceId, Name, RamPage, RamRecord, Record, Section, SectionId,
    SectionKind,
};

use super::*;
use crate::block::{BlockIndex, BlockLayout, LayoutError, RamBlock, Sharing};
use crate::guest::AnonymousRam;
use crate::userfault::check_postcopy;
use crate::{SECTION_NAME, SECTION_VERSION};

/// Blocks of any layout. Host pages of any size are made of ordinary ones: enough for everything but
/// whether they are placed at once.
pub(super) struct TestRam {
    blocks: Vec<RamBlock>,
    /// What was mapped for each.
    mapped: Vec<(NonNull<u8>, usize)>,
}

// SAFETY: `mapped` is only there to be unmapped.
unsafe impl Send for TestRam {}
// SAFETY: as above.
unsafe impl Sync for TestRam {}

impl TestRam {
    pub(super) fn new(layouts: Vec<BlockLayout>) -> Arc<Self> {
        let mut ram = Self {
            blocks: Vec::new(),
            mapped: Vec::new(),
        };
        for layout in layouts {
            let align = layout.page_bytes as usize;
            let bytes = layout.max_bytes as usize + align;
            let (rights, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
            // SAFETY: the host picks a place where nothing is.
            let start = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, rights, flags) };
            let start = NonNull::new(start.unwrap().cast::<u8>()).unwrap();
            ram.mapped.push((start, bytes));
            let first = start.addr().get().next_multiple_of(align) - start.addr().get();
            // SAFETY: mapped just now, long enough to begin at a host page, and until the blocks are
            // gone.
            ram.blocks
                .push(unsafe { RamBlock::new(layout, start.add(first)) }.unwrap());
        }
        Arc::new(ram)
    }

    pub(super) fn content(&self, block: usize) -> Vec<u8> {
        let block = &self.blocks[block];
        let mut content = vec![0; block.used_bytes() as usize];
        block.read(0, &mut content).unwrap();
        content
    }
}

impl TestRam {
    /// Only these pages: others may be missing.
    pub(super) fn content_of(&self, block: usize, pages: std::ops::Range<u64>) -> Vec<u8> {
        let mut content = vec![0; (pages.end - pages.start) as usize * PAGE];
        self.blocks[block]
            .read(pages.start * PAGE_BYTES, &mut content)
            .unwrap();
        content
    }
}

impl Drop for TestRam {
    fn drop(&mut self) {
        self.blocks.clear();
        for (start, bytes) in self.mapped.drain(..) {
            // SAFETY: `new` mapped it, and the blocks in it are gone.
            unsafe { munmap(start.as_ptr().cast(), bytes) }.unwrap();
        }
    }
}

impl GuestRam for TestRam {
    fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    fn resize(&self, block: BlockIndex, used_bytes: u64) -> Result<(), LayoutError> {
        self.blocks[block.0].set_used_bytes(used_bytes)
    }
}

pub(super) fn name(name: &str) -> Name {
    Name::new(name).unwrap()
}

/// A private block of so many pages, which cannot grow.
pub(super) fn layout(idstr: &str, pages: u64) -> BlockLayout {
    BlockLayout {
        idstr: name(idstr),
        used_bytes: pages * PAGE_BYTES,
        max_bytes: pages * PAGE_BYTES,
        page_bytes: PAGE_BYTES,
        guest_address: Some(0x1000),
        sharing: Sharing::Private,
    }
}

/// Two blocks.
pub(super) fn two() -> Arc<TestRam> {
    TestRam::new(vec![layout("pc.ram", 16), layout("pc.bios", 4)])
}

pub(super) fn destination(ram: &Arc<TestRam>) -> RamDestination {
    RamDestination::new(ram.clone(), RamDestinationOptions::default()).unwrap()
}

/// Can a postcopy be received here? Says if not: the test that asks is left out.
pub(super) fn can_postcopy() -> bool {
    match check_postcopy(&*two()) {
        Ok(()) => true,
        Err(error) => {
            println!("left out: {error}");
            false
        }
    }
}

/// Lets everybody go on who waits for a page, when a test fails: it ends then, instead of waiting too.
pub(super) struct GiveUp<'a>(pub(super) &'a IncomingRam);

impl Drop for GiveUp<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.abandon();
        }
    }
}

pub(super) fn with_postcopy(ram: &Arc<TestRam>) -> RamDestination {
    let options = RamDestinationOptions {
        postcopy: true,
        ..RamDestinationOptions::default()
    };
    RamDestination::new(ram.clone(), options).unwrap()
}

pub(super) fn range(start_bytes: u64, length_bytes: u64) -> DiscardRange {
    DiscardRange {
        start_bytes,
        length_bytes,
    }
}

/// An entry of the list of blocks.
pub(super) fn listed(block: &str, pages: u64) -> RamRecord {
    RamRecord::Block {
        name: name(block),
        used_bytes: pages * PAGE_BYTES,
        page_bytes: None,
        guest_address: None,
        mapped: None,
    }
}

pub(super) fn page(block: &str, offset: u64) -> RamPage {
    RamPage {
        block: name(block),
        offset_bytes: offset,
    }
}

/// The list of [`two`].
pub(super) fn list() -> Vec<(RamRecord, Vec<u8>)> {
    list_of(vec![listed("pc.ram", 16), listed("pc.bios", 4)])
}

pub(super) fn list_of(blocks: Vec<RamRecord>) -> Vec<(RamRecord, Vec<u8>)> {
    let total_bytes = blocks
        .iter()
        .map(|block| match block {
            RamRecord::Block { used_bytes, .. } => *used_bytes,
            _ => 0,
        })
        .sum();
    let mut list = vec![(RamRecord::BlockList { total_bytes }, Vec::new())];
    list.extend(blocks.into_iter().map(|block| (block, Vec::new())));
    list
}

pub(super) fn plain(block: &str, offset: u64, bytes: &[u8]) -> (RamRecord, Vec<u8>) {
    let record = RamRecord::Page {
        page: page(block, offset),
        bytes: bytes.len() as u32,
    };
    (record, bytes.to_vec())
}

pub(super) fn zero(block: &str, offset: u64, fill: u8) -> (RamRecord, Vec<u8>) {
    let page = page(block, offset);
    (RamRecord::Zero { page, fill }, Vec::new())
}

pub(super) fn xbzrle(block: &str, offset: u64, encoded: &[u8]) -> (RamRecord, Vec<u8>) {
    let record = RamRecord::Xbzrle {
        page: page(block, offset),
        bytes: encoded.len() as u16,
    };
    (record, encoded.to_vec())
}

pub(super) fn compressed(block: &str, offset: u64, packed: &[u8]) -> (RamRecord, Vec<u8>) {
    let record = RamRecord::Compressed {
        page: page(block, offset),
        bytes: packed.len() as u32,
    };
    (record, packed.to_vec())
}

pub(super) fn zlib(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Give records to a handler, as a machine does.
pub(super) fn feed(
    handler: &mut dyn LoadHandler,
    records: &[(RamRecord, Vec<u8>)],
) -> Result<(), HandlerError> {
    for (record, payload) in records {
        handler.record(&Record::Ram(record.clone()))?;
        if !payload.is_empty() {
            handler.payload(payload.len())?.copy_from_slice(payload);
            handler.payload_filled()?;
        }
    }
    Ok(())
}

/// What a handler that has got the list of [`two`] says to more, as text.
pub(super) fn refusal(ram: &Arc<TestRam>, records: &[(RamRecord, Vec<u8>)]) -> String {
    let mut handler = destination(ram);
    feed(&mut handler, &list()).unwrap();
    feed(&mut handler, records).unwrap_err().to_string()
}

/// A whole stream: each part is a section of records, the first START and the last END.
pub(super) fn stream(parts: &[Vec<(RamRecord, Vec<u8>)>]) -> Vec<u8> {
    let mut encoder = Encoder::new(true);
    let mut out = Vec::new();
    encoder.record(&Record::Header { version: 3 }, &mut out);
    for (index, part) in parts.iter().enumerate() {
        let kind = match index {
            0 => SectionKind::Start,
            _ if index + 1 == parts.len() => SectionKind::End,
            _ => SectionKind::Part,
        };
        let section = Section {
            kind,
            id: SectionId(2),
            name: name(SECTION_NAME),
            instance: InstanceId(0),
            version: SECTION_VERSION,
        };
        encoder.record(&Record::Section(section), &mut out);
        for (record, payload) in part {
            encoder.record(&Record::Ram(record.clone()), &mut out);
            out.extend(payload);
        }
        encoder.record(&Record::Ram(RamRecord::EndOfSection), &mut out);
        encoder.record(&Record::SectionEnd { id: SectionId(2) }, &mut out);
    }
    encoder.record(&Record::Eof, &mut out);
    out
}

pub(super) fn load(stream: &[u8], handler: RamDestination) -> Result<(), String> {
    load_as(stream, handler, Incoming::Refused("no postcopy"))
}

pub(super) fn load_as(
    stream: &[u8],
    handler: RamDestination,
    postcopy: Incoming,
) -> Result<(), String> {
    let options = LoadOptions {
        postcopy,
        ..LoadOptions::default()
    };
    let mut registry = Registry::new();
    let versions = SECTION_VERSION..=SECTION_VERSION;
    let registration = Registration::loading(SECTION_NAME, versions, Box::new(handler));
    registry.register(registration).unwrap();
    let loaded = LoadMachine::new(options).load_slice(stream, &mut registry);
    vmferry_savevm::load_cleanup(&mut registry);
    loaded.map(drop).map_err(|error| error.to_string())
}
