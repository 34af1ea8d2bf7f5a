//! Images that somebody broke on purpose. Each is refused, or read, by an error that names the
//! structure and its place; nothing panics, hangs or takes memory without bound.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use fastrand::Rng;
use vmferry_disk::{BlockDevice, Unmap};
use vmferry_qcow2::header::{BackingFormat, Compression, Header};
use vmferry_qcow2::types::{COMPRESSED, COPIED};
use vmferry_qcow2::{
    CheckReport, CreateOptions, Error, FindingKind, OpenOptions, Qcow2Disk, Repair, Storage, check,
    create,
};

use crate::support::{Bytes, Folder, MemoryFile, mixed_bytes, qemu_img_ok, rounds, seed};

/// An image of 1 MiB in clusters of 64 KiB, with data in its first and its fourth cluster.
fn image() -> MemoryFile {
    let file = MemoryFile::default();
    create(&file, &CreateOptions::new(1 << 20)).unwrap();
    let disk = open(&file).unwrap();
    disk.write_at(&[1; 65536], 0).unwrap();
    disk.write_at(&[2; 65536], 3 << 16).unwrap();
    disk.close().unwrap();
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

/// Where the first L2 table is.
fn l2_table(file: &MemoryFile) -> u64 {
    get64(file, get64(file, 40)) & !COPIED
}

fn refusal(file: &MemoryFile) -> String {
    let error = open(file).expect_err("the image is refused");
    error.to_string()
}

/// What opening says of an image with these bytes changed.
fn refusal_of(changes: &[(u64, &[u8])]) -> String {
    let file = image();
    for (offset, bytes) in changes {
        put(&file, *offset, bytes);
    }
    refusal(&file)
}

fn assert_says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{text:?} does not say {part:?}");
    }
}

#[test]
fn header_fields_out_of_bounds_are_refused_by_name() {
    let be32 = u32::to_be_bytes;
    let be64 = u64::to_be_bytes;
    let cases: &[(u64, &[u8], &[&str])] = &[
        (0, b"QFI\xfa", &["does not start with the qcow2 magic"]),
        (4, &be32(1), &["version (byte 4) is 1"]),
        (4, &be32(4), &["version (byte 4) is 4"]),
        (20, &be32(8), &["cluster bits (byte 20) is 8"]),
        (20, &be32(22), &["cluster bits (byte 20) is 22"]),
        (20, &be32(u32::MAX), &["cluster bits (byte 20)"]),
        (24, &be64((1 << 48) + 1), &["disk size (byte 24)"]),
        (
            24,
            &be64(1 << 40),
            &["L1 entries (byte 36) is 1", "size of the disk"],
        ),
        (32, &be32(1), &["encryption (AES)"]),
        (32, &be32(2), &["encryption (LUKS)"]),
        (36, &be32(1 << 31), &["L1 entries (byte 36) is 2147483648"]),
        (36, &be32(0), &["L1 entries (byte 36) is 0"]),
        (40, &be64(0x1_2345), &["L1 offset (byte 40)"]),
        (40, &be64(0), &["L1 offset (byte 40)"]),
        (40, &be64(1 << 56), &["L1 offset (byte 40)"]),
        (
            40,
            &be64(1 << 40),
            &["L1 table at byte 1099511627776", "past the end"],
        ),
        (48, &be64(513), &["refcount table offset (byte 48)"]),
        (48, &be64(0), &["refcount table offset (byte 48)"]),
        (
            48,
            &be64(1 << 40),
            &["refcount table at byte 1099511627776", "past the end"],
        ),
        (56, &be32(0), &["refcount table clusters (byte 56) is 0"]),
        (
            56,
            &be32(129),
            &["refcount table clusters (byte 56) is 129"],
        ),
        (56, &be32(u32::MAX), &["refcount table clusters"]),
        (
            60,
            &be32(u32::MAX),
            &["number of snapshots (byte 60) is 4294967295"],
        ),
        (60, &be32(1), &["snapshot table offset (byte 64) is 0"]),
        (64, &be64(7), &["snapshot table offset (byte 64) is 7"]),
        (72, &be64(2), &["marked as corrupt"]),
        (72, &be64(4), &["external data file"]),
        (72, &be64(8), &["compression type (byte 104) is 0"]),
        (72, &be64(16), &["extended L2 entries"]),
        (72, &be64(1 << 63), &["incompatible bit 63"]),
        (96, &be32(7), &["refcount order (byte 96) is 7"]),
        (100, &be32(103), &["header length (byte 100) is 103"]),
        (100, &be32(u32::MAX), &["header length (byte 100)"]),
        (104, &[1], &["compression type (byte 104) is 1"]),
        (
            112,
            &[1, 2, 3, 4, 0xff, 0xff, 0xff, 0xff],
            &["header extension at byte 112"],
        ),
        (8, &be64(1 << 40), &["backing name length (byte 16) is 0"]),
        (16, &be32(1024), &[]),
    ];
    for (offset, bytes, says) in cases {
        if says.is_empty() {
            continue;
        }
        println!("{says:?}");
        assert_says(&refusal_of(&[(*offset, bytes)]), says);
    }
    let name = |offset: u64, length: u32| {
        refusal_of(&[(8, &offset.to_be_bytes()), (16, &length.to_be_bytes())])
    };
    assert_says(&name(200, 1024), &["backing name length (byte 16) is 1024"]);
    assert_says(&name(65535, 2), &["backing name offset (byte 8) is 65535"]);
    assert_says(&name(200, 4), &["never guessed"]);
    let names = |bit: u8| {
        let mut table = vec![0x68, 0x03, 0xf8, 0x57, 0, 0, 0, 48, 0, bit];
        table.extend_from_slice(b"quantum disks");
        table.resize(56, 0);
        refusal_of(&[(72, &(1_u64 << 40).to_be_bytes()), (112, &table)])
    };
    assert_says(&names(40), &["\"quantum disks\" (incompatible bit 40)"]);
    assert_says(&names(41), &["unknown feature (incompatible bit 40)"]);
    for length in [0, 3, 50, 103] {
        let short = MemoryFile::new(image().bytes());
        short.set_length(length).unwrap();
        refusal(&short);
    }
}

#[test]
fn limits_hold_on_their_other_side() {
    let file = image();
    // The largest refcount table: 128 clusters, most of them a hole at the end of the file.
    let end = file.length().unwrap().next_multiple_of(65536);
    let table = get64(&file, get64(&file, 48));
    put(&file, end, &table.to_be_bytes());
    file.set_length(end + (8 << 20)).unwrap();
    put(&file, 48, &end.to_be_bytes());
    put(&file, 56, &128_u32.to_be_bytes());
    let disk = open(&file).unwrap();
    let mut read = [0; 512];
    disk.read_at(&mut read, 0).unwrap();
    assert_eq!(read, [1; 512]);
    drop(disk);
    // The largest L1 table.
    let end = file.length().unwrap();
    put(&file, end, &get64(&file, get64(&file, 40)).to_be_bytes());
    file.set_length(end + (32 << 20)).unwrap();
    put(&file, 36, &(1_u32 << 22).to_be_bytes());
    put(&file, 40, &end.to_be_bytes());
    put(&file, 24, &(1_u64 << 48).to_be_bytes());
    let disk = open(&file).unwrap();
    disk.read_at(&mut read, 3 << 16).unwrap();
    assert_eq!(read, [2; 512]);
    disk.read_at(&mut read, (1 << 48) - 512).unwrap();
    assert_eq!(read, [0; 512]);
}

#[test]
fn snapshot_tables_beyond_their_bounds_are_refused() {
    let file = image();
    let table = file.length().unwrap().next_multiple_of(65536);
    put(&file, 64, &table.to_be_bytes());
    put(&file, 60, &1_u32.to_be_bytes());
    assert_says(
        &refusal(&file),
        &["snapshot table entry", "past the end of the file"],
    );
    let entry = |l1_offset: u64, l1_entries: u32, id: u16, name: u16, extra: u32| {
        let mut entry = Vec::new();
        entry.extend_from_slice(&l1_offset.to_be_bytes());
        entry.extend_from_slice(&l1_entries.to_be_bytes());
        entry.extend_from_slice(&id.to_be_bytes());
        entry.extend_from_slice(&name.to_be_bytes());
        entry.extend_from_slice(&[0; 20]);
        entry.extend_from_slice(&extra.to_be_bytes());
        entry
    };
    let says = |entry: &[u8], parts: &[&str]| {
        let file = MemoryFile::new(file.bytes());
        put(&file, table, entry);
        file.set_length(table + 65536).unwrap();
        assert_says(&refusal(&file), parts);
        assert!(check(&file, Repair::None).is_err());
    };
    says(
        &entry(0, 0, 1, 1, 15),
        &["extra data of 15 bytes, less than 16"],
    );
    says(&entry(0, 0, 1, 1, 1025), &["extra data of 1025 bytes"]);
    says(
        &entry(0, 0, 1, 1, u32::MAX),
        &["extra data of 4294967295 bytes"],
    );
    let beyond = ["snapshot table entry at byte", "past the end of the file"];
    says(&entry(0, 0, 65535, 1, 16), &beyond);
    says(&entry(0, 0, 1, 65535, 16), &beyond);
    says(&entry(0, 1 << 23, 1, 1, 16), &["has 8388608 entries"]);
    says(
        &entry(7, 1, 1, 1, 16),
        &["at byte 7, where no cluster starts"],
    );
    says(&entry(1 << 40, 1, 1, 1, 16), &["past the end of the file"]);
    // The same long table for each of many snapshots.
    let many = MemoryFile::new(file.bytes());
    put(&many, 60, &65536_u32.to_be_bytes());
    many.set_length(table + (64 << 20)).unwrap();
    for number in 0..100 {
        put(&many, table + number * 56, &entry(0, 1 << 22, 0, 0, 16));
    }
    assert_says(
        &refusal(&many),
        &["L1 tables of all snapshots", "1107296256"],
    );
}

#[test]
fn entries_that_lead_nowhere_are_named() {
    let read = |file: &MemoryFile| {
        let disk = open(file).unwrap();
        let error = disk.read_at(&mut [0; 512], 3 << 16).unwrap_err();
        let write = disk.write_at(&[0; 512], 3 << 16).unwrap_err();
        assert_eq!(error.source.to_string(), write.source.to_string());
        error.to_string()
    };
    let with_entry = |entry: u64| {
        let file = image();
        put(&file, l2_table(&file) + 3 * 8, &entry.to_be_bytes());
        let report = check(&file, Repair::None).unwrap();
        assert!(report.errors > 0, "{report:?}");
        let at = l2_table(&file) + 3 * 8;
        assert_says(&read(&file), &[&format!("L2 entry at byte {at}")]);
    };
    with_entry(COPIED | (1 << 40));
    with_entry(COPIED | 0x51200);
    with_entry(COMPRESSED | (1 << 40));
    let file = image();
    let l1 = get64(&file, 40);
    put(&file, l1, &(COPIED | (1 << 40)).to_be_bytes());
    assert_says(
        &refusal(&file),
        &[&format!("L1 entry at byte {l1}"), "past the end"],
    );
    put(&file, l1, &(COPIED | 0x200).to_be_bytes());
    assert_says(
        &refusal(&file),
        &[&format!("L1 entry at byte {l1}"), "no cluster starts"],
    );
    let file = image();
    let table = get64(&file, 48);
    put(&file, table + 8, &(1_u64 << 40).to_be_bytes());
    let at = table + 8;
    assert_says(
        &refusal(&file),
        &[&format!("refcount table entry at byte {at}")],
    );
    put(&file, table + 8, &get64(&file, table).to_be_bytes());
    assert_says(&refusal(&file), &["two entries lead to the block"]);
}

#[test]
fn nothing_is_written_over_tables() {
    // Guest data that lies where a table is.
    let tables = |file: &MemoryFile| {
        let refcount_table = get64(file, 48);
        let block = get64(file, refcount_table);
        [0, get64(file, 40), l2_table(file), refcount_table, block]
    };
    for index in 0..5 {
        let file = image();
        let table = tables(&file)[index];
        let entry = COPIED | table | if table == 0 { 1 << 16 } else { 0 };
        put(&file, l2_table(&file) + 3 * 8, &entry.to_be_bytes());
        let report = check(&file, Repair::None).unwrap();
        let overlaps = |report: &CheckReport| {
            let findings = report.findings.iter();
            findings
                .filter(|finding| finding.kind == FindingKind::Overlap)
                .count()
        };
        assert!(overlaps(&report) > 0, "{report:?}");
        let disk = open(&file).unwrap();
        let error = disk.write_at(&[7; 512], 3 << 16).unwrap_err().to_string();
        assert_says(&error, &["lies where a table is"]);
        let error = disk.write_at(&[7; 512], 0).unwrap_err().to_string();
        assert_says(&error, &["marked as corrupt"]);
        disk.read_at(&mut [0; 512], 0).unwrap();
        drop(disk);
        assert_says(&refusal(&file), &["marked as corrupt"]);
    }
    // Refcounts that say that everything is free.
    let file = image();
    let block = get64(&file, get64(&file, 48));
    put(&file, block, &[0; 65536]);
    let disk = open(&file).unwrap();
    let error = disk.write_at(&[7; 512], 1 << 19).unwrap_err().to_string();
    assert_says(&error, &["refcounts say that the file is free"]);
}

/// A cluster of the disk that lies where a table is loses that place, but the table keeps it.
#[test]
fn tables_are_not_freed_with_guest_data() {
    let header_and_more = COMPRESSED | 127 << 54;
    for index in 0..6 {
        for discarded in [false, true] {
            let file = image();
            let refcount_table = get64(&file, 48);
            let block = get64(&file, refcount_table);
            let l2 = l2_table(&file);
            let place = [0, get64(&file, 40), l2, refcount_table, block, l2][index];
            let entry = match index {
                0 => header_and_more,
                5 => COMPRESSED | place,
                _ => place,
            };
            put(&file, l2 + 3 * 8, &entry.to_be_bytes());
            let disk = open(&file).unwrap();
            let changed = match discarded {
                true => disk.discard(3 << 16, 65536),
                false => disk.write_at(&[7; 65536], 3 << 16),
            };
            changed.unwrap();
            disk.flush().unwrap();
            // What was freed would be used now.
            disk.flush().unwrap();
            disk.write_at(&[8; 8 << 16], 4 << 16).unwrap();
            disk.close().unwrap();
            let disk = open(&file).unwrap();
            let mut read = vec![0; 65536];
            disk.read_at(&mut read, 0).unwrap();
            assert!(read.iter().all(|byte| *byte == 1), "{index}, {discarded}");
            disk.read_at(&mut read, 11 << 16).unwrap();
            assert!(read.iter().all(|byte| *byte == 8), "{index}, {discarded}");
            let report = check(&file, Repair::None).unwrap();
            assert_eq!(report.errors, 0, "{index}, {discarded}: {report:?}");
        }
    }
}

/// What the first cluster reads if it is this compressed data, or the error.
fn read_compressed(data: &[u8], zstd: bool) -> Result<Vec<u8>, String> {
    let file = MemoryFile::default();
    let options = CreateOptions {
        compression: match zstd {
            true => Compression::Zstd,
            false => Compression::Deflate,
        },
        ..CreateOptions::new(1 << 20)
    };
    create(&file, &options).unwrap();
    let disk = open(&file).unwrap();
    disk.write_at(&[1; 65536], 0).unwrap();
    disk.close().unwrap();
    let place = file.length().unwrap();
    put(&file, place, data);
    file.set_length(place + 131_072).unwrap();
    let sectors = (data.len() as u64).div_ceil(512) - 1;
    let entry = COMPRESSED | sectors << 54 | place;
    put(&file, l2_table(&file), &entry.to_be_bytes());
    let disk = open(&file).unwrap();
    let mut read = vec![0; 65536];
    let result = disk.read_at(&mut read, 0);
    let place = format!("compressed cluster at byte {place} ");
    result.map(|()| read).map_err(|error| {
        assert_says(&error.to_string(), &[&place]);
        error.to_string()
    })
}

#[test]
fn compressed_clusters_may_expand_for_ever() {
    let frame = [0x28, 0xb5, 0x2f, 0xfd, 0, 0x38];
    let endless = |start: &[u8], block: &[u8]| {
        let blocks = block.iter().copied().cycle().take(122_880);
        let start = start.iter().copied();
        start.chain(blocks).collect::<Vec<u8>>()
    };
    // Blocks that expand to nothing: stored ones of deflate, raw ones of zstd.
    let nothing = endless(&[], &[0, 0, 0, 0xff, 0xff]);
    let error = read_compressed(&nothing, false).unwrap_err();
    assert_says(&error, &["ends after 0 bytes, a cluster has 65536"]);
    read_compressed(&endless(&frame, &[0, 0, 0]), true).unwrap_err();
    // Blocks that repeat a byte 128 KiB times, 30,720 of them.
    let [low, middle, high, _] = (131_072_u32 << 3 | 2).to_le_bytes();
    let much = endless(&frame, &[low, middle, high, 0x44]);
    assert_eq!(read_compressed(&much, true).unwrap(), [0x44; 65536]);
    // Shorter than a cluster.
    let [low, middle, high, _] = (65_535_u32 << 3 | 3).to_le_bytes();
    let short = [&frame[..], &[low, middle, high, 0x44]].concat();
    read_compressed(&short, true).unwrap_err();
}

#[test]
fn compressed_clusters_end_where_a_cluster_ends() {
    let mut bomb = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
    bomb.write_all(&vec![0x33; 16 << 20]).unwrap();
    let bomb = bomb.finish().unwrap();
    assert!(bomb.len() < 65536);
    let mut short = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
    short.write_all(&[0x33; 65535]).unwrap();
    let with = read_compressed;
    assert_eq!(with(&bomb, false).unwrap(), [0x33; 65536]);
    let error = with(&short.finish().unwrap(), false).unwrap_err();
    assert_says(
        &error,
        &["compressed cluster at byte", "ends after 65535 bytes"],
    );
    let error = with(&[0xff; 512], false).unwrap_err();
    assert_says(&error, &["compressed cluster at byte"]);
    assert_says(
        &with(&[0; 512], true).unwrap_err(),
        &["does not start with a zstd frame"],
    );
    // A frame that wants a window of 2 GiB, and one whose only segment has 2^60 bytes.
    let window = [0x28, 0xb5, 0x2f, 0xfd, 0, 0xa8, 0, 0];
    assert_says(
        &with(&window, true).unwrap_err(),
        &["window has 2147483648 bytes"],
    );
    let mut segment = vec![0x28, 0xb5, 0x2f, 0xfd, 0xe0];
    segment.extend_from_slice(&(1_u64 << 60).to_le_bytes());
    assert_says(
        &with(&segment, true).unwrap_err(),
        &["window has 1152921504606846976"],
    );
}

/// So many images are made and broken again and again.
const IMAGES: u64 = 6;

/// A small image with all there is: data, compressed clusters, snapshots, a bitmap.
fn rich_image(rng: &mut Rng) -> Bytes {
    let folder = Folder::new();
    let (raw, image) = (folder.path("raw"), folder.path("image"));
    std::fs::write(&raw, mixed_bytes(rng, 100_352)).unwrap();
    let options = format!(
        "cluster_size={},compression_type={}",
        [512, 1024, 4096][rng.usize(..3)],
        ["zlib", "zstd"][rng.usize(..2)],
    );
    qemu_img_ok(&[
        "convert", "-f", "raw", "-O", "qcow2", "-c", "-o", &options, &raw, &image,
    ]);
    qemu_img_ok(&["snapshot", "-c", "one", &image]);
    qemu_img_ok(&["bitmap", "--add", &image, "changes"]);
    let disk = vmferry_qcow2::open(
        &image,
        vmferry_qcow2::ChainOptions {
            read_only: false,
            lock: true,
        },
    )
    .unwrap();
    disk.write_at(&[9; 20_000], 30_000).unwrap();
    disk.close().unwrap();
    Bytes::from_file(Path::new(&image))
}

/// Places worth breaking: the header, and all entries of all tables.
fn break_something(rng: &mut Rng, file: &MemoryFile, header: &Header) {
    let cluster = header.geometry.cluster_bytes();
    let length = file.length().unwrap();
    for _ in 0..rng.usize(1..4) {
        let offset = match rng.u8(..8) {
            0 => rng.u64(..112),
            1 => header.l1_offset + rng.u64(..u64::from(header.l1_entries) * 8),
            2 => header.refcount_table_offset + rng.u64(..64),
            3 => header.snapshots_offset + rng.u64(..80),
            4 => get64(file, header.l1_offset) % (1 << 56) + rng.u64(..cluster),
            5 => get64(file, header.refcount_table_offset) + rng.u64(..cluster),
            _ => rng.u64(..length),
        };
        if offset >= length {
            continue;
        }
        match rng.u8(..4) {
            0 => put(file, offset, &[rng.u8(..)]),
            1 => put(
                file,
                offset & !7,
                &(rng.u64(..length) & !(cluster - 1)).to_be_bytes(),
            ),
            2 => put(file, offset & !7, &rng.u64(..).to_be_bytes()),
            _ => put(
                file,
                offset & !3,
                &[0, 0xff][rng.usize(..2)..][..1].repeat(4),
            ),
        }
    }
    if rng.u8(..8) == 0 {
        file.set_length(rng.u64(..length)).unwrap();
    }
}

fn use_it(rng: &mut Rng, file: &MemoryFile) {
    let _ = check(file, Repair::None);
    let repaired = MemoryFile::new(file.bytes());
    if let Ok(report) = check(&repaired, Repair::All)
        && report.is_clean()
    {
        let again = check(&repaired, Repair::None).unwrap();
        let (first, again_first) = (report.findings.first(), again.findings.first());
        assert!(again.is_clean(), "{first:?} …, then {again_first:?} …");
    }
    let Ok(disk) = open(file) else {
        return;
    };
    let length = disk.disk_bytes().min(1 << 20);
    for _ in 0..20 {
        let offset = rng.u64(..length.max(1));
        let size = rng.u64(1..20_000).min(length - offset.min(length));
        let mut buf = vec![5; size as usize];
        let _ = match rng.u8(..6) {
            0 | 1 => disk.read_at(&mut buf, offset),
            2 | 3 => disk.write_at(&buf, offset),
            4 => disk.write_zeroes(offset, size, Unmap::May, false),
            _ => disk.discard(offset, size),
        };
        if size > 0 {
            let _ = disk.status(offset, size);
        }
    }
    let _ = disk.flush();
    let _ = disk.resize(rng.u64(1..length * 2 + 2));
}

#[test]
fn broken_images_are_never_our_end() {
    let first = seed();
    let images: Vec<Bytes> = (0..IMAGES)
        .map(|number| rich_image(&mut Rng::with_seed(first.wrapping_add(number))))
        .collect();
    for number in 0..rounds(600) {
        let seed = first.wrapping_add(number);
        let result = std::panic::catch_unwind(|| {
            let mut rng = Rng::with_seed(seed);
            let file = MemoryFile::new(images[(number % IMAGES) as usize].clone());
            let header = Header::read(&file).unwrap();
            break_something(&mut rng, &file, &header);
            use_it(&mut rng, &file);
        });
        if let Err(panic) = result {
            println!("image {number}: VMFERRY_SEED={seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn options_that_no_image_can_have_are_refused() {
    let refused = |change: &dyn Fn(&mut CreateOptions)| {
        let mut options = CreateOptions::new(1 << 20);
        change(&mut options);
        let file = MemoryFile::default();
        let error = create(&file, &options).unwrap_err();
        assert_eq!(file.length().unwrap(), 0, "nothing was made");
        error.to_string()
    };
    assert_says(&refused(&|options| options.version = 4), &["version is 4"]);
    assert_says(
        &refused(&|options| options.cluster_bits = 8),
        &["cluster bits is 8"],
    );
    assert_says(
        &refused(&|options| options.cluster_bits = 22),
        &["cluster bits is 22"],
    );
    assert_says(
        &refused(&|options| options.refcount_order = 7),
        &["refcount order is 7"],
    );
    let v2 = |options: &mut CreateOptions| options.version = 2;
    let refused_v2 = |change: &dyn Fn(&mut CreateOptions)| {
        refused(&|options| {
            v2(options);
            change(options);
        })
    };
    assert_says(
        &refused_v2(&|options| options.refcount_order = 3),
        &["refcount order is 3"],
    );
    assert_says(
        &refused_v2(&|options| options.lazy_refcounts = true),
        &["lazy refcounts"],
    );
    let zstd = |options: &mut CreateOptions| options.compression = Compression::Zstd;
    assert_says(&refused_v2(&zstd), &["3 for zstd"]);
    assert_says(
        &refused(&|options| options.disk_bytes = (1 << 48) + 1),
        &["disk size"],
    );
    let small = |options: &mut CreateOptions| {
        options.cluster_bits = 9;
        options.disk_bytes = 1 << 38;
    };
    assert_says(&refused(&small), &["disk size", "clusters this small"]);
    let long_name = |options: &mut CreateOptions| {
        options.backing = Some(("x".repeat(1024), BackingFormat::Raw));
    };
    assert_says(&refused(&long_name), &["backing name is 1024"]);
    let too_long_for_a_cluster = |options: &mut CreateOptions| {
        options.cluster_bits = 9;
        options.backing = Some(("x".repeat(400), BackingFormat::Raw));
    };
    assert_says(&refused(&too_long_for_a_cluster), &["at most a cluster"]);
}
