//! Into a mapped-ram file.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

use vmferry_image::{Image, ImageBlock, Progress};
use vmferry_ram::PAGE_BYTES;
use vmferry_stream::{Configuration, MappedBlock, Name, RamRecord, Record};

use super::{ConvertError, Writing, page_buffer, pages, room};

/// Pages start at multiples of this, as QEMU's do: fit for direct I/O.
const ALIGNMENT_BYTES: u64 = 1 << 20;
/// What follows the fields of a block in the list: version, page size, two offsets.
const HEADER_BYTES: u64 = 28;
/// The capability, which the configuration names.
const MAPPED_RAM: &str = "mapped-ram";
const IGNORE_SHARED: &str = "x-ignore-shared";

/// Writes from a place on.
struct At<'a> {
    file: &'a File,
    offset: u64,
}

impl Write for At<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write_at(bytes, self.offset)?;
        self.offset += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Write a parked machine as a mapped-ram file, which QEMU loads from 9.0 on. The file is emptied first;
/// pages of zeroes are holes in it. Pages that the image does not have are zero, for the format has no
/// other word for them. Returns its length; syncing is the caller's.
///
/// # Errors
/// The image cannot be read or is damaged, the file cannot be written, or the machine is of a kind that
/// no such file can hold.
pub fn to_mapped_ram(
    image: &Image,
    out: &File,
    progress: &mut dyn FnMut(Progress),
) -> Result<u64, ConvertError> {
    let configuration = configuration(image)?;
    let emptied = out.set_len(0);
    emptied.map_err(|source| ConvertError::Write { offset: 0, source })?;
    let at = At {
        file: out,
        offset: 0,
    };
    let mut writing = Writing::new(image, at, progress);
    writing.begin(Some(configuration))?;
    writing.block_list()?;
    for (number, block) in image.head().blocks.iter().enumerate() {
        write_block(&mut writing, number, block)?;
    }
    writing.end_of_ram_section()?;
    writing.starts()?;
    writing.end()?;
    Ok(writing.offset)
}

/// That of the image, with the capability.
fn configuration(image: &Image) -> Result<Configuration, ConvertError> {
    let refuse = |what| ConvertError::NotMappable {
        image: image.name(),
        what,
    };
    let head = image.head();
    let Some(mut configuration) = head.configuration.clone() else {
        return Err(refuse(
            "a machine without a configuration section (up to 2.3)",
        ));
    };
    if !head.footers {
        return Err(refuse("a machine without section footers (up to 2.3)"));
    }
    if configuration.has_capability(IGNORE_SHARED) {
        return Err(refuse(
            "memory that stays where it is (x-ignore-shared): it would be loaded as zeroes",
        ));
    }
    let names = configuration.capabilities.get_or_insert_default();
    names.push(Name::new(MAPPED_RAM).unwrap_or_default());
    Ok(configuration)
}

/// A block's entry in the list, its bitmap, and its pages.
fn write_block(
    writing: &mut Writing<'_, At<'_>>,
    number: usize,
    block: &ImageBlock,
) -> Result<(), ConvertError> {
    let entry = |mapped| {
        Record::Ram(RamRecord::Block {
            name: block.name.clone(),
            used_bytes: block.used_bytes,
            page_bytes: None,
            guest_address: block.guest_address,
            mapped,
        })
    };
    let mut plain = Vec::new();
    writing.encoder.record(&entry(None), &mut plain);
    let bitmap_offset = writing.offset + plain.len() as u64 + HEADER_BYTES;
    let mut bitmap = vec![0; bitmap_bytes(block.pages())];
    let bitmap_end = bitmap_offset + bitmap.len() as u64;
    let pages_offset = bitmap_end.next_multiple_of(ALIGNMENT_BYTES);
    writing.record(&entry(Some(MappedBlock {
        page_bytes: PAGE_BYTES,
        bitmap_offset,
        pages_offset,
    })))?;
    write_pages(writing, number, block, pages_offset, &mut bitmap)?;
    writing.put(&bitmap)?;
    writing.offset = pages_offset + block.used_bytes;
    writing.out.offset = writing.offset;
    Ok(())
}

/// One bit for each page, in whole words of 64.
fn bitmap_bytes(pages: u64) -> usize {
    usize::try_from(pages.div_ceil(64) * 8).unwrap_or(usize::MAX)
}

fn write_pages(
    writing: &mut Writing<'_, At<'_>>,
    number: usize,
    block: &ImageBlock,
    pages_offset: u64,
    bitmap: &mut [u8],
) -> Result<(), ConvertError> {
    let mut buffer = page_buffer();
    for run in pages(number, block.pages()) {
        let into = room(&mut buffer, &run);
        let found = writing.image.read_pages(run.block, run.first, into)?;
        let valid = u64::MAX >> (64 - run.count);
        let stored = !(found.zero | found.absent) & valid;
        // A run starts with a word of the bitmap.
        let word = usize::try_from(run.first / 8).unwrap_or(usize::MAX);
        if let Some(bits) = bitmap.get_mut(word..word.saturating_add(8)) {
            bits.copy_from_slice(&stored.to_le_bytes());
        }
        let mut left = stored;
        while left != 0 {
            let start = left.trailing_zeros();
            let count = (left >> start).trailing_ones();
            let range = start as usize * PAGE_BYTES as usize..;
            let length = count as usize * PAGE_BYTES as usize;
            let content = into.get(range).and_then(|rest| rest.get(..length));
            let offset = pages_offset + (run.first + u64::from(start)) * PAGE_BYTES;
            let written = writing
                .out
                .file
                .write_all_at(content.unwrap_or_default(), offset);
            written.map_err(|source| ConvertError::Write { offset, source })?;
            left &= !(u64::MAX >> (64 - count) << start);
        }
        writing.moved(run.bytes());
    }
    Ok(())
}
