//! Streams of known guests.

use vmferry_inspect::{DescriptionText, DeviceBody, DiskImage, ExtractError, walk};

use crate::{bytes_of, capture, ram};

/// The pages that the captures' guest writes, pass after pass.
const PAGES: std::ops::Range<usize> = 0x10..0x90;

/// What the guest (a firmware of 16 instructions) leaves in a page: how often it wrote it, the pass
/// before, and a mark.
fn passes(memory: &[u8]) -> Vec<u32> {
    let word = |at: usize| u32::from_le_bytes(memory[at..at + 4].try_into().unwrap());
    let passes = PAGES.map(|page| {
        let start = page << 12;
        let pass = word(start + 0x10);
        assert_eq!(word(start + 0x20) + 1, pass, "page {page:#x}");
        assert_eq!(word(start + 0x800), 0xdead_beef, "page {page:#x}");
        let rest = memory[start..start + 4096].iter().enumerate();
        let strange = rest.filter(|(at, byte)| {
            let known = [0x10..0x14, 0x20..0x24, 0x800..0x804];
            **byte != 0 && !known.iter().any(|range| range.contains(at))
        });
        assert_eq!(strange.count(), 0, "page {page:#x}");
        pass
    });
    passes.collect()
}

/// However the pages travelled, the image is the guest's memory at one moment: it stopped in some
/// pass, whose pages are those before some place.
#[test]
fn a_guest_that_writes_all_the_time_is_caught_at_one_moment() {
    let guests = [
        ("running-72", "pc.ram"),
        ("running-100", "pc.ram"),
        ("xbzrle-72", "microvm.ram"),
        ("xbzrle-100", "microvm.ram"),
        ("mapped-ram-100", "microvm.ram"),
        ("bgsnap-72", "microvm.ram"),
        ("bgsnap-100", "microvm.ram"),
        ("postcopy-72.fwd", "pc.ram"),
        ("postcopy-100.fwd", "pc.ram"),
        ("postcopy-100-to-72.fwd", "pc.ram"),
        ("postcopy-hugepages-72.fwd", "m0"),
        ("postcopy-hugepages-100.fwd", "m0"),
        ("return-path-72.fwd", "pc.ram"),
        ("return-path-100.fwd", "pc.ram"),
        ("switchover-ack-100.fwd", "pc.ram"),
    ];
    for (name, block) in guests {
        println!("{name}");
        let (memory, image) = ram(&capture(name), block).unwrap();
        assert_eq!(image.length_bytes, memory.len() as u64);
        assert_eq!(image.absent_bytes, 0);
        assert_eq!(image.data_bytes, 128 << 12);
        let passes = passes(&memory);
        let (first, last) = (passes[0], passes[127]);
        assert!(first > 100 && (first == last || first == last + 1));
        assert!(passes.is_sorted_by(|one, next| one >= next), "{passes:?}");
    }
}

#[test]
fn compressed_firmware_is_the_firmware() {
    let (plain, _) = ram(&capture("pc-72"), "pc.bios").unwrap();
    let (compressed, image) = ram(&capture("compress-72"), "pc.bios").unwrap();
    assert_eq!(plain.len(), 1 << 16);
    assert_eq!(plain[0xfff0], 0xea);
    assert_eq!(plain, compressed);
    assert_eq!(image.absent_bytes, 0);
    for name in ["mapped-ram-100", "q35-100", "no-vmdesc-72", "pc-2.2-72"] {
        let (bytes, _) = ram(&capture(name), "pc.bios").unwrap();
        assert_eq!(plain, bytes, "{name}");
    }
}

#[test]
fn pages_that_are_not_in_the_stream_are_told() {
    for name in ["ignore-shared-72", "ignore-shared-100"] {
        let (memory, image) = ram(&capture(name), "m0").unwrap();
        assert!(image.is_absent(), "{name}");
        assert_eq!(memory, vec![0; 1 << 20]);
    }
    // 7.2 says nothing of its other channels; its zero pages are on the main one.
    let (_, image) = ram(&capture("multifd-72.conn0.fwd"), "pc.bios").unwrap();
    assert!(image.absent_bytes > 0 && image.zero_bytes > 0, "{image:?}");
    let error = ram(&capture("multifd-100.conn0.fwd"), "microvm.ram").unwrap_err();
    assert!(format!("{error:?}").contains("Multifd"), "{error:?}");
}

#[test]
fn a_disk_is_as_long_as_its_last_chunk_or_as_is_said() {
    let stream = capture("blk-72");
    let image = |name: Option<&str>, size| {
        let file = tempfile::tempfile().unwrap();
        let mut disk = DiskImage::new(file, name.map(Into::into), size);
        walk(stream.as_slice(), &mut disk).unwrap();
        disk.finish()
    };
    let (file, report) = image(None, None).unwrap();
    let bytes = bytes_of(&file);
    assert_eq!((bytes.len(), &*report.name), (4 << 20, "dd"));
    assert_eq!((report.absent_bytes, report.length_is_given), (0, false));
    let (file, report) = image(Some("dd"), Some(5 << 20)).unwrap();
    assert_eq!(bytes_of(&file)[..4 << 20], bytes);
    assert_eq!(
        (report.absent_bytes, report.length_is_given),
        (1 << 20, true)
    );
    let other = image(Some("other"), None);
    assert!(matches!(other, Err(ExtractError::NotFound { .. })));
}

#[test]
fn a_device_is_found_by_name_and_instance() {
    let stream = capture("pc-100");
    let device = |name: &str| {
        let mut body = DeviceBody::new(Some(name.into()));
        walk(stream.as_slice(), &mut body).unwrap();
        body.finish()
    };
    let fw_cfg = device("fw_cfg").unwrap();
    // Header, subsections and footer are described in the wire format notes.
    assert_eq!(fw_cfg.section.version, 2);
    assert_eq!(fw_cfg.body.len(), 99 - 20 - 5);
    let start = usize::try_from(fw_cfg.offset).unwrap();
    assert_eq!(stream[start..start + fw_cfg.body.len()], fw_cfg.body);
    assert_eq!(device("fw_cfg/0").unwrap(), fw_cfg);
    assert_eq!(device("i8259/1").unwrap().section.instance.0, 1);
    assert_eq!(device("0000:00:01.1/ide").unwrap().section.instance.0, 0);
    let Err(ExtractError::Ambiguous { choices, .. }) = device("i8259") else {
        panic!("there are two of them");
    };
    assert_eq!(choices, ["i8259/0", "i8259/1"]);
    assert!(matches!(
        device("i8259/2"),
        Err(ExtractError::NotFound { .. })
    ));
}

#[test]
fn the_description_is_given_as_it_stands_there() {
    let stream = capture("pc-72");
    let mut text = DescriptionText::new();
    walk(stream.as_slice(), &mut text).unwrap();
    let text = text.finish().unwrap();
    assert!(stream.ends_with(&text) && text.starts_with(b"{\"page_size\": 4096"));
    let mut none = DescriptionText::new();
    walk(capture("no-vmdesc-72").as_slice(), &mut none).unwrap();
    assert!(matches!(none.finish(), Err(ExtractError::Absent(_))));
}
