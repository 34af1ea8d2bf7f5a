//! How the memory and the disks of two streams differ.
//!
//! Pages come in any order and more than once, so what a stream makes of memory is painted into a
//! file first, and the files are compared.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;

use super::{Difference, Sides};
use crate::extract::{BlockImage, Blocks, DiskImage, ExtractError, MemoryImage};
use crate::walk::{WalkError, walk};

/// Pages of x86; memory of larger ones is compared in these, too.
const PAGE_BYTES: usize = 4096;
/// Disks are compared in what they travel in.
const CHUNK_BYTES: usize = 1 << 20;
/// Bytes that are compared at once.
const PIECE_BYTES: usize = 1 << 20;

/// The contents of two streams could not be compared.
#[derive(Debug, thiserror::Error)]
pub enum ContentsError {
    /// A stream is broken.
    #[error(transparent)]
    Walk(#[from] WalkError),
    /// Its memory or disk cannot be painted.
    #[error(transparent)]
    Extract(#[from] ExtractError),
    /// A scratch file.
    #[error("scratch file: {0}")]
    Scratch(#[from] io::Error),
}

/// Memory or a disk that was painted into a file.
#[derive(Debug)]
pub struct Painting {
    file: File,
    parts: Vec<Part>,
}

#[derive(Debug)]
struct Part {
    name: String,
    offset: u64,
    length: u64,
    unit: usize,
}

/// Paint a stream's guest memory into `file`, which is empty. A stream without memory is an empty
/// painting.
///
/// # Errors
/// The stream is broken, or the file cannot be written.
pub fn paint_memory(input: impl Read, file: File) -> Result<Painting, ContentsError> {
    let spare = file.try_clone()?;
    let mut image = MemoryImage::new(file, Blocks::All { start_bytes: 0 });
    walk(input, &mut image)?;
    match image.finish() {
        Ok((file, blocks)) => Ok(Painting {
            file,
            parts: blocks.iter().filter_map(part).collect(),
        }),
        Err(ExtractError::Absent(_)) => Ok(Painting {
            file: spare,
            parts: Vec::new(),
        }),
        Err(error) => Err(error.into()),
    }
}

fn part(block: &BlockImage) -> Option<Part> {
    Some(Part {
        name: format!("memory '{}'", block.name),
        offset: block.file_offset?,
        length: block.length_bytes,
        unit: PAGE_BYTES,
    })
}

/// Paint the disk of that name into `file`, which is empty.
///
/// # Errors
/// The stream is broken, has no such disk, or the file cannot be written.
pub fn paint_disk(input: impl Read, name: &str, file: File) -> Result<Painting, ContentsError> {
    let mut image = DiskImage::new(file, Some(name.to_owned()), None);
    walk(input, &mut image)?;
    let (file, disk) = image.finish()?;
    Ok(Painting {
        file,
        parts: vec![Part {
            name: format!("disk '{}'", disk.name),
            offset: 0,
            length: disk.length_bytes,
            unit: CHUNK_BYTES,
        }],
    })
}

/// Compare what is in both, as far as both reach.
///
/// # Errors
/// A file cannot be read.
pub fn compare(first: &Painting, second: &Painting) -> Result<Vec<Difference>, ContentsError> {
    let mut found = Vec::new();
    for part in &first.parts {
        let Some(other) = second.parts.iter().find(|other| other.name == part.name) else {
            continue;
        };
        let differ = units_that_differ(&first.file, part, &second.file, other)?;
        if let Some((units, at)) = differ {
            found.push(Difference {
                part: part.name.clone(),
                device: None,
                field: String::new(),
                sides: Sides::Contents {
                    units,
                    unit_bytes: part.unit,
                    first_at: at,
                },
            });
        }
    }
    Ok(found)
}

/// The next byte that is not in a hole.
fn next_data(file: &File, from: u64) -> io::Result<u64> {
    match rustix::fs::seek(file, SeekFrom::Data(from)) {
        Ok(at) => Ok(at),
        // There are only holes.
        Err(rustix::io::Errno::NXIO) => Ok(u64::MAX),
        Err(error) => Err(error.into()),
    }
}

/// How many pages or chunks differ, and where the first one starts.
fn units_that_differ(
    first: &File,
    part: &Part,
    second: &File,
    other: &Part,
) -> io::Result<Option<(u64, u64)>> {
    let length = part.length.min(other.length);
    let (mut one, mut two) = (vec![0; PIECE_BYTES], vec![0; PIECE_BYTES]);
    let (mut at, mut differ) = (0_u64, None);
    while at < length {
        let hole_ends = next_data(first, part.offset.saturating_add(at))?
            .saturating_sub(part.offset)
            .min(next_data(second, other.offset.saturating_add(at))?.saturating_sub(other.offset));
        let unit = u64::try_from(part.unit).unwrap_or(1);
        at = at.max(hole_ends.saturating_sub(hole_ends.checked_rem(unit).unwrap_or(0)));
        let left = usize::try_from(length.saturating_sub(at)).unwrap_or(usize::MAX);
        let bytes = left.min(PIECE_BYTES);
        let (one, two) = (
            one.get_mut(..bytes).unwrap_or_default(),
            two.get_mut(..bytes).unwrap_or_default(),
        );
        first.read_exact_at(one, part.offset.saturating_add(at))?;
        second.read_exact_at(two, other.offset.saturating_add(at))?;
        if one != two {
            let units = one.chunks(part.unit).zip(two.chunks(part.unit)).enumerate();
            for (k, _) in units.filter(|(_, (one, two))| one != two) {
                let start = k.saturating_mul(part.unit);
                let start = at.saturating_add(u64::try_from(start).unwrap_or(u64::MAX));
                let (count, _) = differ.get_or_insert((0_u64, start));
                *count = count.saturating_add(1);
            }
        }
        at = at.saturating_add(u64::try_from(bytes).unwrap_or(u64::MAX));
    }
    Ok(differ)
}
