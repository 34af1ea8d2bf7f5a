//! Images of all shapes, and what an input breaks in them.
//!
//! ```text
//! input   image 1 │ options 1 │ number of patches 1 │ patches │ operations
//! patch   place 1 │ index 2 │ how 1 │ value 8
//! ```
//!
//! A place is one of the structures of the unbroken image, so that few bytes of input reach each
//! entry of each table. The image 0xff is the input itself, behind two more bytes: how long it is.

use std::io::Read;
use std::sync::LazyLock;

use vmferry_qcow2::Storage;

use crate::file::{FILE_BYTES_MAX, MemoryFile};

macro_rules! images {
    ($($name:literal),* $(,)?) => {
        const PACKED: &[&[u8]] = &[
            $(include_bytes!(concat!("../../images/", $name, ".qcow2.xz"))),*
        ];
    };
}

// Inputs choose them by number: new ones go to the end.
images!(
    "snapshots-512",
    "deflate-4k",
    "zstd-1k",
    "backed-4k",
    "zeroes-512",
    "bitmaps-512",
    "v2-1k",
    "refcounts-1-bit",
    "refcounts-64-bits",
    "vm-state-512",
    "dirty-512",
    "clusters-64k",
);

/// Patches of one input.
const PATCHES_MAX: u8 = 16;
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

struct Image {
    bytes: Vec<u8>,
    cluster_bytes: u64,
    /// Structures: offset and length.
    places: Vec<(u64, u64)>,
}

static IMAGES: LazyLock<Vec<Image>> = LazyLock::new(|| {
    let unpacked = PACKED.iter().map(|packed| {
        let mut bytes = Vec::new();
        let mut decoder = xz2::read::XzDecoder::new(*packed);
        decoder.read_to_end(&mut bytes).expect("it is whole");
        Image::new(bytes)
    });
    unpacked.collect()
});

/// The bytes of the input that were not used yet; zeroes behind its end.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn take(&mut self, length: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn number(&mut self, bytes: usize) -> u64 {
        let taken = self.take(bytes).iter();
        taken.fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    pub fn u8(&mut self) -> u8 {
        self.number(1) as u8
    }

    pub fn u16(&mut self) -> u64 {
        self.number(2)
    }

    pub fn u64(&mut self) -> u64 {
        self.number(8)
    }
}

/// An image as the input wants it.
pub struct Wanted {
    pub file: MemoryFile,
    /// Nothing is broken.
    pub is_good: bool,
    pub options: u8,
}

pub fn wanted(input: &mut Input<'_>) -> Wanted {
    let number = input.u8();
    let options = input.u8();
    if number == 0xff {
        let length = input.u16() as usize;
        let file = MemoryFile::new(input.take(length));
        return Wanted {
            file,
            is_good: false,
            options,
        };
    }
    let image = &IMAGES[usize::from(number) % IMAGES.len()];
    let file = MemoryFile::new(&image.bytes);
    let patches = input.u8().min(PATCHES_MAX);
    for _ in 0..patches {
        image.patch(&file, input);
    }
    Wanted {
        file,
        is_good: patches == 0,
        options,
    }
}

impl Image {
    fn new(bytes: Vec<u8>) -> Self {
        let mut image = Self {
            cluster_bytes: 0,
            places: vec![(0, 256)],
            bytes,
        };
        image.cluster_bytes = 1 << image.be32(20);
        let cluster = image.cluster_bytes;
        // Active tables, refcounts, snapshots with their tables, bitmaps.
        image.add_l1(image.be64(40), u64::from(image.be32(36)));
        let table = image.be64(48);
        image.places.push((table, cluster.min(64)));
        for block in image.entries(table, cluster / 8) {
            image.places.push((block, cluster.min(1024)));
        }
        let mut at = image.be64(64);
        for _ in 0..image.be32(60) {
            let names = image.be16(at + 12) + image.be16(at + 14);
            let length = 40 + u64::from(image.be32(at + 36)) + names;
            image.places.push((at, length));
            image.add_l1(image.be64(at), u64::from(image.be32(at + 8)));
            at += length.next_multiple_of(8);
        }
        let extension = image
            .extensions()
            .into_iter()
            .find(|(kind, ..)| *kind == 0x2385_2875);
        if let Some((_, offset, length)) = extension {
            image.places.push((offset, length));
            let (directory, bytes) = (image.be64(offset + 16), image.be64(offset + 8));
            image.places.push((directory, bytes));
            let table = image.be64(directory);
            image.places.push((table, 64));
        }
        image
    }

    fn add_l1(&mut self, offset: u64, entries: u64) {
        self.places.push((offset, entries * 8));
        for table in self.entries(offset, entries) {
            self.places.push((table, self.cluster_bytes));
        }
    }

    fn entries(&self, offset: u64, count: u64) -> Vec<u64> {
        let entries = (0..count).map(|index| self.be64(offset + index * 8) & OFFSET_MASK);
        entries.filter(|entry| *entry != 0).collect()
    }

    /// Kind, offset and length of the data.
    fn extensions(&self) -> Vec<(u32, u64, u64)> {
        let mut at = if self.be32(4) == 2 {
            72
        } else {
            u64::from(self.be32(100))
        };
        let mut found = Vec::new();
        while self.be32(at) != 0 {
            let length = u64::from(self.be32(at + 4));
            found.push((self.be32(at), at + 8, length));
            at += 8 + length.next_multiple_of(8);
        }
        found
    }

    fn number(&self, at: u64, bytes: usize) -> u64 {
        let at = at as usize;
        let field = &self.bytes[at..at + bytes];
        field
            .iter()
            .fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    fn be16(&self, at: u64) -> u64 {
        self.number(at, 2)
    }

    fn be32(&self, at: u64) -> u32 {
        self.number(at, 4) as u32
    }

    fn be64(&self, at: u64) -> u64 {
        self.number(at, 8)
    }

    fn patch(&self, file: &MemoryFile, input: &mut Input<'_>) {
        let place = usize::from(input.u8()) % (self.places.len() + 1);
        let index = input.u16();
        let how = input.u8();
        let value = input.u64();
        let length = self.bytes.len() as u64;
        let (start, bytes) = self.places.get(place).copied().unwrap_or((0, length));
        let at = start + index % bytes.max(8);
        let (entry_at, field_at) = (at & !7, at & !3);
        let old = |at: u64| if at + 8 <= length { self.be64(at) } else { 0 };
        let put = |bytes: &[u8], at| file.write_at(bytes, at).expect("images are short");
        let clusters = length / self.cluster_bytes;
        match how % 8 {
            0 => put(&[value as u8], at),
            1 => put(&(value as u32).to_be_bytes(), field_at),
            2 => put(&value.to_be_bytes(), entry_at),
            // Other bits.
            3 => put(&(old(entry_at) ^ value).to_be_bytes(), entry_at),
            // One of the clusters, with some of the flags.
            4 | 5 => {
                let flags = value & (0xff << 56 | 0x1ff);
                let cluster = (value >> 16) % (clusters + 2) * self.cluster_bytes;
                put(&(flags | cluster).to_be_bytes(), entry_at);
            }
            // What another entry says.
            6 => {
                let other = start + value % bytes.max(8);
                put(&old(other & !7).to_be_bytes(), entry_at);
            }
            // The file has another length: near its own, or much more.
            _ => {
                let wanted = match value % 4 {
                    0 => (value >> 8) % FILE_BYTES_MAX,
                    _ => (value >> 8) % (2 * length),
                };
                file.set_length(wanted).expect("it is not too long");
            }
        }
    }
}
