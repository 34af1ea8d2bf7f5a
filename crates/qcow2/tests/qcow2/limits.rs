//! Each limit of `limits.rs` on both of its sides, in files that are mostly holes.

use std::collections::HashSet;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use vmferry_disk::{BlockDevice, Cached};
use vmferry_qcow2::bitmaps::BitmapDirectory;
use vmferry_qcow2::header::{BITMAPS, BackingFormat, Compression, Header};
use vmferry_qcow2::limits::{
    BACKING_NAME_BYTES_MAX, BITMAP_DIRECTORY_BYTES_MAX, BITMAP_NAME_BYTES_MAX,
    BITMAP_TABLE_BYTES_MAX, BITMAPS_MAX, CHECK_CLUSTERS_MAX, CHECK_TABLES_MAX, EXTENSIONS_MAX,
    FINDINGS_MAX, FREES_MAX, HOST_BYTES_MAX, L1_BYTES_MAX, REFCOUNT_TABLE_BYTES_MAX,
    SNAPSHOT_EXTRA_BYTES_MAX, SNAPSHOT_L1_BYTES_MAX, SNAPSHOT_TABLE_BYTES_MAX, SNAPSHOTS_MAX,
    ZSTD_WINDOW_BYTES_MAX,
};
use vmferry_qcow2::types::{COMPRESSED, COPIED};
use vmferry_qcow2::{
    CreateOptions, Error, FindingKind, OpenOptions, Qcow2Disk, Repair, Storage, check, create,
};

use crate::snapshots::new_snapshot;
use crate::support::MemoryFile;

/// An empty disk of 1 MiB.
fn image(cluster_bits: u32) -> MemoryFile {
    let file = MemoryFile::default();
    let options = CreateOptions {
        cluster_bits,
        ..CreateOptions::new(1 << 20)
    };
    create(&file, &options).unwrap();
    file
}

fn open(file: &MemoryFile) -> Result<Qcow2Disk, Error> {
    Qcow2Disk::open(Arc::new(file.clone()), OpenOptions::default(), None)
}

fn put(file: &MemoryFile, offset: u64, bytes: &[u8]) {
    file.write_at(bytes, offset).unwrap();
}

fn get64(file: &MemoryFile, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    file.read_at(&mut bytes, offset).unwrap();
    u64::from_be_bytes(bytes)
}

fn assert_says<T>(result: Result<T, Error>, parts: &[&str]) {
    let text = result.err().expect("it is refused").to_string();
    for part in parts {
        assert!(text.contains(part), "{text:?} does not say {part:?}");
    }
}

#[test]
fn header_extensions() {
    let file = image(16);
    for number in 0..EXTENSIONS_MAX as u64 {
        put(&file, 112 + number * 8, &[0x11; 4]);
    }
    let header = Header::read(&file).unwrap();
    assert_eq!(header.extensions.len(), EXTENSIONS_MAX);
    open(&file).unwrap();
    let place = 112 + EXTENSIONS_MAX as u64 * 8;
    put(&file, place, &[0x11; 4]);
    let at = format!("header extension at byte {place}");
    assert_says(open(&file), &[&at, "more than 256"]);
}

#[test]
fn offsets_in_the_file() {
    let file = image(16);
    let last = HOST_BYTES_MAX - 65536;
    put(&file, 40, &last.to_be_bytes());
    let at = format!("L1 table at byte {last}");
    assert_says(open(&file), &[&at, "past the end"]);
    put(&file, 40, &HOST_BYTES_MAX.to_be_bytes());
    assert_says(open(&file), &["L1 offset (byte 40) is 72057594037927936"]);
}

#[test]
fn backing_names() {
    let with = |length: usize| {
        let file = MemoryFile::default();
        let options = CreateOptions {
            backing: Some(("n".repeat(length), BackingFormat::Raw)),
            ..CreateOptions::new(1 << 20)
        };
        create(&file, &options).map(|()| file)
    };
    let longest = BACKING_NAME_BYTES_MAX as usize;
    let file = with(longest).unwrap();
    let name = Header::read(&file).unwrap().backing_name.unwrap();
    assert_eq!(name.len(), longest);
    assert_says(with(longest + 1), &["backing name is 1024"]);
    put(&file, 16, &(BACKING_NAME_BYTES_MAX + 1).to_be_bytes());
    assert_says(open(&file), &["backing name length (byte 16) is 1024"]);
}

/// A fixed part and the length of what follows; ids, names and L1 tables have none.
fn entry(l1: (u64, u32), names: (u16, u16), extra: u32) -> Vec<u8> {
    let mut entry = vec![0; 40];
    entry[..8].copy_from_slice(&l1.0.to_be_bytes());
    entry[8..12].copy_from_slice(&l1.1.to_be_bytes());
    entry[12..14].copy_from_slice(&names.0.to_be_bytes());
    entry[14..16].copy_from_slice(&names.1.to_be_bytes());
    entry[36..].copy_from_slice(&extra.to_be_bytes());
    entry
}

/// A table of snapshots behind the image, of these entries; how long it is.
fn put_snapshots(file: &MemoryFile, entries: impl Iterator<Item = Vec<u8>>) -> u64 {
    let table = 1 << 20;
    let (mut at, mut count) = (table, 0_u32);
    for entry in entries {
        put(file, at, &entry);
        let number = |range: std::ops::Range<usize>| {
            let bytes = entry[range].iter();
            bytes.fold(0, |value, byte| value << 8 | u64::from(*byte))
        };
        let length = 40 + number(12..14) + number(14..16) + number(36..40);
        at += length.next_multiple_of(8);
        count += 1;
    }
    put(file, 60, &count.to_be_bytes());
    put(file, 64, &table.to_be_bytes());
    file.set_length(at.next_multiple_of(65536).max(128 << 20))
        .unwrap();
    at - table
}

#[test]
fn number_of_snapshots() {
    let file = image(16);
    let all = (0..SNAPSHOTS_MAX).map(|_| entry((0, 0), (0, 0), 16));
    put_snapshots(&file, all);
    let disk = open(&file).unwrap();
    assert_eq!(disk.snapshots().len(), 65536);
    let made = disk.create_snapshot(&new_snapshot("one more"));
    assert_says(made, &["snapshot table (in entries)", "65537"]);
    drop(disk);
    put(&file, 60, &(SNAPSHOTS_MAX + 1).to_be_bytes());
    assert_says(open(&file), &["number of snapshots (byte 60) is 65537"]);
}

#[test]
fn length_of_the_snapshot_table() {
    let longest = entry((0, 0), (u16::MAX, u16::MAX), SNAPSHOT_EXTRA_BYTES_MAX);
    let longest_bytes = (40 + 1024 + 2 * 65535_u64).next_multiple_of(8);
    let count = SNAPSHOT_TABLE_BYTES_MAX / longest_bytes;
    let rest = SNAPSHOT_TABLE_BYTES_MAX - count * longest_bytes;
    let with_last = |bytes: u64| {
        let file = image(16);
        let names = bytes - 40 - 16;
        let id = names.min(60_000);
        let last = entry((0, 0), (id as u16, (names - id) as u16), 16);
        let all = std::iter::repeat_n(longest.clone(), count as usize);
        let length = put_snapshots(&file, all.chain([last]));
        (file, length)
    };
    let (file, length) = with_last(rest);
    assert_eq!(length, SNAPSHOT_TABLE_BYTES_MAX);
    let disk = open(&file).unwrap();
    assert_eq!(disk.snapshots().len() as u64, count + 1);
    let made = disk.create_snapshot(&new_snapshot("one more"));
    assert_says(made, &["the snapshot table would need", "67108864"]);
    disk.write_at(&[1; 512], 0).unwrap();
    let (file, length) = with_last(rest + 1);
    assert_eq!(length, SNAPSHOT_TABLE_BYTES_MAX + 8);
    assert_says(open(&file), &["the snapshot table would need 67108872"]);
}

#[test]
fn extra_data_of_a_snapshot() {
    let file = image(16);
    let with = |extra| {
        put_snapshots(&file, [entry((0, 0), (1, 1), extra)].into_iter());
        open(&file)
    };
    for extra in [16, SNAPSHOT_EXTRA_BYTES_MAX] {
        assert_eq!(with(extra).unwrap().snapshots().len(), 1);
    }
    let at = "snapshot table entry at byte 1048576";
    let least = "extra data of 15 bytes, less than 16";
    assert_says(with(15), &[at, least]);
    assert_says(with(1025), &[at, "extra data of 1025 bytes"]);
}

#[test]
fn l1_tables_of_snapshots() {
    let file = image(16);
    let longest = (L1_BYTES_MAX / 8) as u32;
    let with = |last| {
        let count = SNAPSHOT_L1_BYTES_MAX / L1_BYTES_MAX - 1;
        let all = std::iter::repeat_n(longest, count as usize).chain(last);
        put_snapshots(
            &file,
            all.map(|entries| entry((1 << 21, entries), (0, 0), 16)),
        );
        open(&file)
    };
    assert_eq!(with(vec![longest]).unwrap().snapshots().len(), 32);
    let whole = "L1 tables of all snapshots would need 1073741832";
    assert_says(with(vec![longest, 1]), &[whole]);
    let text = "its L1 table has 4194305 entries";
    assert_says(with(vec![longest + 1]), &["snapshot table entry at", text]);
}

/// An image with room for a directory of bitmaps at 1 MiB and a table at 128 MiB.
struct Bitmapped(MemoryFile);

const DIRECTORY: u64 = 1 << 20;
const BITMAP_TABLE: u64 = 128 << 20;

impl Bitmapped {
    fn new(count: u32, directory_bytes: u64) -> Self {
        let file = image(16);
        let mut extension = Vec::new();
        extension.extend(0x2385_2875_u32.to_be_bytes());
        extension.extend(24_u32.to_be_bytes());
        extension.extend(count.to_be_bytes());
        extension.extend([0; 4]);
        extension.extend(directory_bytes.to_be_bytes());
        extension.extend(DIRECTORY.to_be_bytes());
        put(&file, 112, &extension);
        put(&file, 88, &BITMAPS.to_be_bytes());
        file.set_length(256 << 20).unwrap();
        Self(file)
    }

    /// An entry of the directory, and where the next one is.
    fn put(&self, at: u64, name: u16, table_entries: u32) -> u64 {
        let mut entry = Vec::new();
        entry.extend(BITMAP_TABLE.to_be_bytes());
        entry.extend(table_entries.to_be_bytes());
        // It records changes.
        entry.extend(2_u32.to_be_bytes());
        entry.extend([1, 16]);
        entry.extend(name.to_be_bytes());
        entry.extend([0; 4]);
        entry.extend(std::iter::repeat_n(b'n', usize::from(name)));
        put(&self.0, DIRECTORY + at, &entry);
        (at + entry.len() as u64).next_multiple_of(8)
    }

    fn read(&self) -> Result<usize, Error> {
        let header = Header::read(&self.0).unwrap();
        let directory = BitmapDirectory::read(&self.0, &header, 256 << 20)?;
        Ok(directory.unwrap().bitmaps.len())
    }

    /// The extension stays as it is, but means nothing once the disk was written to.
    fn assert_dropped(&self) {
        let disk = open(&self.0).unwrap();
        disk.write_at(&[1; 512], 0).unwrap();
        disk.close().unwrap();
        assert_eq!(Header::read(&self.0).unwrap().autoclear, 0);
    }

    fn assert_kept(&self) {
        let disk = open(&self.0).unwrap();
        disk.write_at(&[1; 512], 0).unwrap();
        disk.close().unwrap();
        assert_eq!(Header::read(&self.0).unwrap().autoclear, BITMAPS);
        assert_eq!(get64(&self.0, DIRECTORY + 8) & 3, 3, "it is in use");
    }
}

#[test]
fn number_of_bitmaps() {
    let with = |count: u32| {
        let image = Bitmapped::new(count, u64::from(count) * 32);
        for number in 0..u64::from(count) {
            image.put(number * 32, 8, 0);
        }
        image
    };
    let most = with(BITMAPS_MAX);
    assert_eq!(most.read().unwrap(), 65535);
    most.assert_kept();
    let extension = "bitmaps extension at byte 120";
    let more = with(BITMAPS_MAX + 1);
    assert_says(more.read(), &[extension, "65536 bitmaps"]);
    more.assert_dropped();
    assert_says(with(0).read(), &[extension, "0 bitmaps"]);
}

#[test]
fn names_of_bitmaps() {
    let with = |name: u16| {
        let image = Bitmapped::new(1, 2048);
        image.put(0, name, 0);
        image
    };
    for name in [1, BITMAP_NAME_BYTES_MAX] {
        assert_eq!(with(name).read().unwrap(), 1);
        with(name).assert_kept();
    }
    let at = "bitmap directory entry at byte 1048576";
    assert_says(with(0).read(), &[at, "a name of 0 bytes"]);
    assert_says(with(1024).read(), &[at, "a name of 1024 bytes"]);
    with(1024).assert_dropped();
    // Its last byte is behind the end.
    let image = Bitmapped::new(1, 32);
    image.put(0, 9, 0);
    assert_says(image.read(), &[at, "reaches past the end of the directory"]);
    image.assert_dropped();
    let image = Bitmapped::new(2, 32);
    image.put(0, 8, 0);
    let at = "bitmap directory entry at byte 1048608";
    assert_says(image.read(), &[at, "a name of 0 bytes"]);
}

#[test]
fn lengths_of_the_bitmap_directory_and_of_tables() {
    let with = |directory_bytes, table_entries| {
        let image = Bitmapped::new(1, directory_bytes);
        image.put(0, 1, table_entries);
        image
    };
    let longest = (BITMAP_TABLE_BYTES_MAX / 8) as u32;
    let most = with(BITMAP_DIRECTORY_BYTES_MAX, longest);
    assert_eq!(most.read().unwrap(), 1);
    most.assert_kept();
    let too_long = with(BITMAP_DIRECTORY_BYTES_MAX + 1, 1);
    let extension = "bitmaps extension at byte 120";
    assert_says(too_long.read(), &[extension, "67108865"]);
    too_long.assert_dropped();
    let too_many = with(32, longest + 1);
    let entry = "bitmap directory entry at byte 1048576";
    assert_says(too_many.read(), &[entry, "8388616"]);
    too_many.assert_dropped();
}

#[test]
fn window_of_a_zstd_frame() {
    // Exponent and mantissa of the window; then one block that repeats a byte 65,536 times.
    let read = |window: u8| {
        let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, window];
        frame.extend(&(65536_u32 << 3 | 3).to_le_bytes()[..3]);
        frame.push(0x5a);
        let file = MemoryFile::default();
        let options = CreateOptions {
            compression: Compression::Zstd,
            ..CreateOptions::new(1 << 20)
        };
        create(&file, &options).unwrap();
        let disk = open(&file).unwrap();
        disk.write_at(&[1; 65536], 0).unwrap();
        disk.close().unwrap();
        let place = file.length().unwrap();
        put(&file, place, &frame);
        file.set_length(place + 65536).unwrap();
        let l2 = get64(&file, get64(&file, 40)) & !COPIED;
        put(&file, l2, &(COMPRESSED | place).to_be_bytes());
        let mut bytes = vec![0; 65536];
        let result = open(&file).unwrap().read_at(&mut bytes, 0);
        result
            .map(|()| bytes)
            .map_err(|error| (place, error.to_string()))
    };
    assert_eq!(1 << 23, ZSTD_WINDOW_BYTES_MAX);
    assert_eq!(read(13 << 3).unwrap(), [0x5a; 65536]);
    let (place, error) = read(13 << 3 | 1).unwrap_err();
    let at = format!("compressed cluster at byte {place}");
    assert!(error.contains(&at) && error.contains("9437184"), "{error}");
}

#[test]
fn runs_that_wait_to_become_free() {
    let cluster = 512;
    let runs = FREES_MAX as u64 + 1;
    let disk_bytes = 2 * cluster * (runs + 1);
    let file = MemoryFile::default();
    let options = CreateOptions {
        cluster_bits: 9,
        ..CreateOptions::new(disk_bytes)
    };
    create(&file, &options).unwrap();
    let disk = open(&file).unwrap();
    disk.write_at(&vec![1; disk_bytes as usize], 0).unwrap();
    disk.flush().unwrap();
    let before = file.syncs();
    // Every second cluster: no two runs are one.
    for number in 0..runs {
        disk.discard(number * 2 * cluster, cluster).unwrap();
    }
    assert_eq!(file.syncs(), before, "nothing was flushed yet");
    disk.discard(runs * 2 * cluster, cluster).unwrap();
    assert!(file.syncs() > before, "that was one too many");
    disk.close().unwrap();
    assert!(check(&file, Repair::None).unwrap().is_clean());
}

#[test]
fn clusters_of_a_checked_file() {
    let file = image(9);
    file.set_length(CHECK_CLUSTERS_MAX * 512).unwrap();
    let report = check(&file, Repair::None).unwrap();
    assert!(report.is_clean(), "{report:?}");
    file.set_length(CHECK_CLUSTERS_MAX * 512 + 1).unwrap();
    let clusters = "the image (in clusters) would need 134217729";
    assert_says(check(&file, Repair::None), &[clusters]);
}

#[test]
fn tables_of_a_check() {
    // One L1 table of empty L2 tables, and many snapshots that share it.
    const TABLES: u64 = 1 << 12;
    let file = image(9);
    let (l1, l2) = (64 << 20, 65 << 20);
    for index in 0..TABLES {
        put(&file, l1 + index * 8, &(l2 + index * 512).to_be_bytes());
    }
    let snapshots = CHECK_TABLES_MAX / TABLES;
    let all = |last| {
        let all = std::iter::repeat_n(TABLES as u32, snapshots as usize);
        let all = all.chain(last);
        all.map(move |entries| entry((l1, entries), (0, 0), 16))
    };
    put_snapshots(&file, all(None));
    let report = check(&file, Repair::None).unwrap();
    assert!(report.count(FindingKind::Overlap) > 0);
    put_snapshots(&file, all(Some(1)));
    let tables = "L2 tables (number, over all snapshots) would need 4194305";
    assert_says(check(&file, Repair::None), &[tables]);
}

#[test]
fn findings_of_a_check() {
    // One block counts 4,096 clusters, with a byte for each.
    let file = MemoryFile::default();
    let options = CreateOptions {
        cluster_bits: 12,
        refcount_order: 3,
        ..CreateOptions::new(1 << 20)
    };
    create(&file, &options).unwrap();
    let end = file.length().unwrap() / 4096;
    let block = get64(&file, get64(&file, 48));
    let leak = |more: u64| {
        put(&file, block + end, &vec![1; more as usize]);
        file.set_length((end + more) * 4096).unwrap();
        let report = check(&file, Repair::None).unwrap();
        (report.findings.len() as u64, report.leaks)
    };
    assert_eq!(leak(FINDINGS_MAX), (FINDINGS_MAX, FINDINGS_MAX));
    assert_eq!(leak(FINDINGS_MAX + 1), (FINDINGS_MAX, FINDINGS_MAX + 1));
}

/// A file in which a range reads as numbers of 64 bits, each of them 1, where nothing was written.
struct Ones {
    file: MemoryFile,
    range: Range<u64>,
    written: Mutex<HashSet<u64>>,
}

impl Storage for Ones {
    fn length(&self) -> io::Result<u64> {
        self.file.length()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_at(buf, offset)?;
        let written = self.written.lock().unwrap();
        for (at, number) in (offset..).step_by(8).zip(buf.chunks_mut(8)) {
            if self.range.contains(&at) && !written.contains(&(at / 512)) {
                number.copy_from_slice(&1_u64.to_be_bytes());
            }
        }
        Ok(())
    }

    fn read_cached_at(&self, _buf: &mut [u8], _offset: u64) -> io::Result<Cached> {
        Ok(Cached::Unsupported)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        if self.range.contains(&offset) {
            let sectors = offset / 512..(offset + buf.len() as u64) / 512;
            self.written.lock().unwrap().extend(sectors);
        }
        self.file.write_at(buf, offset)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.file.set_length(length)
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        self.file.punch_hole(offset, length)
    }

    fn start_writeback(&self, _offset: u64, _length: u64) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.file.flush()
    }
}

/// An image whose refcount table is so long, and counts nothing but clusters that are in use.
fn full_image(table_bytes: u64) -> Ones {
    let file = MemoryFile::default();
    let options = CreateOptions {
        cluster_bits: 9,
        refcount_order: 6,
        ..CreateOptions::new(1 << 20)
    };
    create(&file, &options).unwrap();
    let blocks = table_bytes / 8;
    let (table, first) = (1 << 20, 16 << 20);
    let entries = (0..blocks).map(|block| first + block * 512);
    let entries: Vec<u8> = entries.flat_map(u64::to_be_bytes).collect();
    put(&file, table, &entries);
    put(&file, 48, &table.to_be_bytes());
    put(&file, 56, &((table_bytes / 512) as u32).to_be_bytes());
    file.set_length(blocks * 64 * 512).unwrap();
    let range = first..first + blocks * 512;
    Ones {
        file,
        range,
        written: Mutex::default(),
    }
}

#[test]
fn a_refcount_table_grows_to_its_limit_and_no_further() {
    let open = |image| {
        let storage: Arc<dyn Storage> = Arc::new(image);
        Qcow2Disk::open(storage, OpenOptions::default(), None).unwrap()
    };
    let disk = open(full_image(REFCOUNT_TABLE_BYTES_MAX * 3 / 4));
    disk.write_at(&[1; 512], 0).unwrap();
    let clusters = u64::from(disk.header().refcount_table_clusters);
    assert_eq!(clusters * 512, REFCOUNT_TABLE_BYTES_MAX);
    disk.close().unwrap();
    let disk = open(full_image(REFCOUNT_TABLE_BYTES_MAX));
    let error = disk.write_at(&[1; 512], 0).unwrap_err();
    assert_eq!(error.source.kind(), io::ErrorKind::StorageFull);
    let text = error.to_string();
    assert!(text.contains("the refcount table would need"), "{text}");
}
