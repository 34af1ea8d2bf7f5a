//! Compares all of an image with its index.

use vmferry_ram::{BlockIndex, PAGE_BYTES};

use crate::Progress;
use crate::error::ImageError;
use crate::image::{Image, build_unnamed};
use crate::index::chunk::Where;
use crate::index::{Index, Unusable};
use crate::page::PAGE;
use crate::storage::{IndexPlace, Storage};

/// Pages that are read at once.
const PAGES: usize = 64;

/// Index the image anew, and compare.
pub(crate) fn indexed(
    storage: &dyn Storage,
    place: &IndexPlace,
    index: &Index,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), ImageError> {
    let wrong = |problem: String| ImageError::WrongIndex {
        image: storage.name(),
        index: place.path(storage).unwrap_or_default(),
        problem,
    };
    let found = build_unnamed(storage, progress)?;
    let blocks = &index.contents.head.blocks;
    if !found.contents.has_the_blocks_of(&index.contents) {
        return Err(wrong("the image has other RAM blocks".into()));
    }
    for (number, block) in blocks.iter().enumerate() {
        let mut page = 0;
        while page < block.pages() {
            let unusable = |why: Unusable| wrong(why.to_string());
            let (expected, count) = index.entries(number, page).map_err(unusable)?;
            let (actual, _) = found.entries(number, page).map_err(unusable)?;
            for step in 0..usize::try_from(count).unwrap_or(0) {
                let (expected, actual) = (expected.get(step), actual.get(step));
                if expected == actual {
                    continue;
                }
                let kept = |index: &Index, entry| kept_sum(index, entry).map_err(unusable);
                if let (Some(one), Some(other)) = (kept(index, expected)?, kept(&found, actual)?)
                    && one == other
                {
                    continue;
                }
                let offset = [expected, actual]
                    .into_iter()
                    .flatten()
                    .find_map(|(place, _)| match place.get() {
                        Some(Where::Plain(payload) | Where::Zlib(payload)) => Some(payload.offset),
                        _ => None,
                    });
                let step = u64::try_from(step).unwrap_or(0);
                return Err(ImageError::DamagedPage {
                    image: storage.name(),
                    block: block.name.clone(),
                    page_offset: page.saturating_add(step).saturating_mul(PAGE_BYTES),
                    offset: offset.unwrap_or(0),
                    problem: "it is not what was indexed".into(),
                });
            }
            page = page.saturating_add(count.max(1));
        }
    }
    if !found.contents.is_same(&index.contents) {
        let problem = "what is in the image besides pages differs";
        return Err(wrong(problem.into()));
    }
    Ok(())
}

/// CRC-32 of a page that is kept in an index. Slots may differ: of two indexes each counts its own.
fn kept_sum(
    index: &Index,
    entry: Option<(crate::index::chunk::Place, u32)>,
) -> Result<Option<u32>, Unusable> {
    match entry.and_then(|(place, _)| place.get()) {
        Some(Where::Kept(slot)) => index.kept_sum(slot).map(Some),
        _ => Ok(None),
    }
}

/// Read every page of a mapped-ram file.
pub(crate) fn mapped(image: &Image, progress: &mut dyn FnMut(Progress)) -> Result<(), ImageError> {
    let blocks = &image.head().blocks;
    let total_bytes = blocks
        .iter()
        .fold(0_u64, |sum, block| sum.saturating_add(block.used_bytes));
    let mut done_bytes = 0_u64;
    let mut pages = vec![0; PAGES * PAGE];
    for (number, block) in blocks.iter().enumerate() {
        let mut page = 0;
        while page < block.pages() {
            let left = usize::try_from(block.pages().saturating_sub(page)).unwrap_or(PAGES);
            let count = left.min(PAGES);
            let into = pages
                .get_mut(..count.saturating_mul(PAGE))
                .unwrap_or_default();
            image.read_pages(BlockIndex(number), page, into)?;
            let count = u64::try_from(count).unwrap_or(1);
            page = page.saturating_add(count);
            done_bytes = done_bytes.saturating_add(count.saturating_mul(PAGE_BYTES));
            progress(Progress {
                done_bytes,
                total_bytes,
            });
        }
    }
    Ok(())
}
