//! Into a plain stream.

use std::io::Write;

use vmferry_image::{Image, Progress};
use vmferry_ram::PAGE_BYTES;
use vmferry_stream::{RamPage, RamRecord, Record, SectionKind};

use super::{ConvertError, Writing, page_buffer, pages, room};

/// Write a parked machine as a plain stream, which any QEMU that knows the machine can load. Returns its
/// length.
///
/// # Errors
/// The image cannot be read or is damaged, or the stream cannot be written.
pub fn to_stream(
    image: &Image,
    out: &mut impl Write,
    progress: &mut dyn FnMut(Progress),
) -> Result<u64, ConvertError> {
    let mut writing = Writing::new(image, out, progress);
    writing.begin(image.head().configuration.clone())?;
    writing.block_list()?;
    for block in &image.head().blocks {
        writing.record(&Record::Ram(RamRecord::Block {
            name: block.name.clone(),
            used_bytes: block.used_bytes,
            page_bytes: None,
            guest_address: block.guest_address,
            mapped: None,
        }))?;
    }
    writing.end_of_ram_section()?;
    writing.starts()?;
    writing.ram_section(SectionKind::Part)?;
    all_pages(&mut writing)?;
    writing.end_of_ram_section()?;
    writing.end()?;
    Ok(writing.offset)
}

fn all_pages<W: Write>(writing: &mut Writing<'_, W>) -> Result<(), ConvertError> {
    let mut buffer = page_buffer();
    // Header and content of each page, with some room for names.
    let mut out = Vec::with_capacity(buffer.len() + (16 << 10));
    for (number, block) in writing.head.blocks.iter().enumerate() {
        for run in pages(number, block.pages()) {
            let into = room(&mut buffer, &run);
            let found = writing.image.read_pages(run.block, run.first, into)?;
            out.clear();
            for (at, content) in into.chunks_exact(PAGE_BYTES as usize).enumerate() {
                let bit = 1 << at;
                if found.absent & bit != 0 {
                    continue;
                }
                let page = RamPage {
                    block: block.name.clone(),
                    offset_bytes: (run.first + at as u64) * PAGE_BYTES,
                };
                let is_zero = found.zero & bit != 0;
                let record = match is_zero {
                    true => RamRecord::Zero { page, fill: 0 },
                    false => RamRecord::Page {
                        page,
                        bytes: PAGE_BYTES as u32,
                    },
                };
                writing.encoder.record(&Record::Ram(record), &mut out);
                if !is_zero {
                    out.extend_from_slice(content);
                }
            }
            writing.put(&out)?;
            writing.moved(run.bytes());
        }
    }
    Ok(())
}
