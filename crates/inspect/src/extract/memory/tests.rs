use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};

use vmferry_stream::Configuration;

use super::*;

const PAGE: u64 = 4096;

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

fn page(block: &str, number: u64) -> RamPage {
    RamPage {
        block: name(block),
        offset_bytes: number * PAGE,
    }
}

fn listed(wanted: Blocks, blocks: &[(&str, u64)]) -> Painter {
    let mut painter = Painter(MemoryImage::new(tempfile::tempfile().unwrap(), wanted));
    for (block, pages) in blocks {
        let block = RamRecord::Block {
            name: name(block),
            used_bytes: pages * PAGE,
            page_bytes: None,
            guest_address: None,
            mapped: None,
        };
        painter.ram(block).unwrap();
    }
    painter
}

struct Painter(MemoryImage);

impl Painter {
    fn ram(&mut self, record: RamRecord) -> Result<(), String> {
        let told = self.0.event(Event::Record(0, &Record::Ram(record)));
        told.map_err(|error| error.to_string())
    }

    fn payload(&mut self, bytes: &[u8]) -> Result<(), String> {
        let told = self.0.event(Event::Payload(0, bytes));
        told.map_err(|error| error.to_string())
    }

    fn zero(&mut self, block: &str, number: u64) -> Result<(), String> {
        let page = page(block, number);
        self.ram(RamRecord::Zero { page, fill: 0 })
    }

    fn page(&mut self, block: &str, number: u64, byte: u8) -> Result<(), String> {
        let page = page(block, number);
        self.ram(RamRecord::Page { page, bytes: 4096 })?;
        self.payload(&[byte; 4096])
    }

    fn xbzrle(&mut self, number: u64, encoded: &[u8]) -> Result<(), String> {
        let bytes = u16::try_from(encoded.len()).unwrap();
        let page = page("m", number);
        self.ram(RamRecord::Xbzrle { page, bytes })?;
        self.payload(encoded)
    }

    fn compressed(&mut self, number: u64, plain: &[u8]) -> Result<(), String> {
        let mut zlib = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
        zlib.write_all(plain).unwrap();
        let payload = zlib.finish().unwrap();
        let bytes = u32::try_from(payload.len()).unwrap();
        let page = page("m", number);
        self.ram(RamRecord::Compressed { page, bytes })?;
        self.payload(&payload)
    }

    fn discard(&mut self, start: u64, length: u64) -> Result<(), String> {
        let block = name("m");
        let command = Command::PostcopyRamDiscard { block, ranges: 1 };
        self.0
            .event(Event::Record(0, &Record::Command(command)))
            .unwrap();
        let range = DiscardRange {
            start_bytes: start,
            length_bytes: length,
        };
        let told = self.0.event(Event::Record(0, &Record::DiscardRange(range)));
        told.map_err(|error| error.to_string())
    }

    fn finish(self) -> (Vec<u8>, File, Vec<BlockImage>) {
        let (file, blocks) = self.0.finish().unwrap();
        let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        (bytes, file, blocks)
    }
}

#[test]
fn the_last_of_a_pages_contents_counts() {
    let mut memory = listed(Blocks::Only, &[("m", 6)]);
    memory.page("m", 0, 1).unwrap();
    memory.page("m", 0, 2).unwrap();
    memory.page("m", 1, 3).unwrap();
    memory.zero("m", 1).unwrap();
    memory.zero("m", 2).unwrap();
    memory.page("m", 2, 4).unwrap();
    let filled = RamRecord::Zero {
        page: page("m", 3),
        fill: 5,
    };
    memory.ram(filled).unwrap();
    memory.compressed(4, &[6; 4096]).unwrap();
    let (bytes, _, blocks) = memory.finish();
    let expected = [2, 0, 4, 5, 6, 0].map(|byte| [byte; 4096]).concat();
    assert_eq!(bytes, expected);
    assert_eq!(
        blocks,
        [BlockImage {
            name: name("m"),
            length_bytes: 6 * PAGE,
            file_offset: Some(0),
            data_bytes: 4 * PAGE,
            zero_bytes: PAGE,
            absent_bytes: PAGE,
        }]
    );
}

/// A live section that nobody knows brings payload, too.
#[test]
fn payload_of_other_sections_is_no_page() {
    let mut painter = listed(Blocks::Only, &[("m", 1)]);
    painter.page("m", 0, 7).unwrap();
    let section = vmferry_stream::Section {
        kind: vmferry_stream::SectionKind::Part,
        id: vmferry_stream::SectionId(9),
        name: name("vfio"),
        instance: vmferry_stream::InstanceId(0),
        version: 1,
    };
    let record = Record::Section(section);
    painter.0.event(Event::Record(0, &record)).unwrap();
    painter.payload(&[1; 5000]).unwrap();
    let (file, _) = painter.0.finish().unwrap();
    let mut bytes = [0; 4096];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [7; 4096]);
}

#[test]
fn changes_build_on_what_came_before_even_if_that_was_zero() {
    let mut memory = listed(Blocks::Only, &[("m", 3)]);
    memory.page("m", 0, 1).unwrap();
    memory.xbzrle(0, &[2, 1, 9, 1, 2, 8, 7]).unwrap();
    memory.xbzrle(0, &[0, 1, 5]).unwrap();
    memory.zero("m", 1).unwrap();
    memory.xbzrle(1, &[0xff, 0x1f, 1, 6]).unwrap();
    memory.xbzrle(1, &[]).unwrap();
    let error = memory.xbzrle(2, &[0, 1, 5]).unwrap_err();
    assert_eq!(
        error,
        "an XBZRLE record for the page at byte 0x2000 of RAM block 'm', of which no earlier content \
         came"
    );
    let (bytes, ..) = memory.finish();
    assert_eq!(bytes[..7], [5, 1, 9, 1, 8, 7, 1]);
    assert_eq!(bytes[4096..8191], [0; 4095]);
    assert_eq!(bytes[8191], 6);
}

#[test]
fn a_page_that_comes_in_pieces_is_a_page_and_half_of_one_is_none() {
    let mut memory = listed(Blocks::Only, &[("m", 3)]);
    for number in 0..2 {
        let page = page("m", number);
        memory.ram(RamRecord::Page { page, bytes: 4096 }).unwrap();
        for piece in [7_u8; 4096].chunks(1000) {
            memory.payload(piece).unwrap();
        }
    }
    let half = page("m", 2);
    memory
        .ram(RamRecord::Page {
            page: half,
            bytes: 4096,
        })
        .unwrap();
    memory.payload(&[9; 2048]).unwrap();
    let (bytes, _, blocks) = memory.finish();
    assert_eq!(bytes, [[7; 8192].as_slice(), &[0; 4096]].concat());
    assert_eq!(blocks[0].absent_bytes, PAGE);
}

#[test]
fn what_postcopy_discards_is_zero_until_it_comes_again() {
    let mut memory = listed(Blocks::Only, &[("m", 4)]);
    for number in 0..4 {
        memory.page("m", number, 1).unwrap();
    }
    memory.discard(PAGE, 2 * PAGE).unwrap();
    memory.discard(0, 0).unwrap();
    memory.page("m", 2, 2).unwrap();
    assert!(memory.xbzrle(1, &[0, 1, 5]).is_err());
    let past = memory.discard(PAGE, u64::MAX).unwrap_err();
    assert_eq!(
        past,
        "byte 0xffffffffffffffff of RAM block 'm' is past its end: it has 0x4000 bytes"
    );
    let (bytes, _, blocks) = memory.finish();
    assert_eq!(bytes, [1, 0, 2, 1].map(|byte| [byte; 4096]).concat());
    assert_eq!(blocks[0].absent_bytes, PAGE);
}

#[test]
fn a_wrong_place_is_refused_with_its_name() {
    let mut memory = listed(Blocks::Only, &[("m", 2)]);
    assert_eq!(
        memory.zero("n", 1).unwrap_err(),
        "a page at byte 0x1000 of RAM block 'n', which the stream does not list"
    );
    assert!(memory.zero("m", 1).is_ok());
    assert_eq!(
        memory.zero("m", 2).unwrap_err(),
        "byte 0x2000 of RAM block 'm' is past its end: it has 0x2000 bytes"
    );
    assert!(memory.zero("m", u64::MAX / PAGE).is_err());
    let again = RamRecord::Block {
        name: name("m"),
        used_bytes: PAGE,
        page_bytes: None,
        guest_address: None,
        mapped: None,
    };
    assert_eq!(
        memory.ram(again).unwrap_err(),
        "RAM block 'm' is listed twice"
    );
    assert!(memory.ram(RamRecord::MultifdFlush).is_err());
}

#[test]
fn a_wrong_encoding_is_refused_with_its_page() {
    let mut memory = listed(Blocks::Only, &[("m", 2)]);
    memory.zero("m", 0).unwrap();
    let cases: [&[u8]; 4] = [
        &[0xff, 0x1f, 2, 1, 1],
        &[0, 0],
        &[0, 1, 1, 0, 1, 1],
        &[0, 5, 1],
    ];
    for encoded in cases {
        let error = memory.xbzrle(0, encoded).unwrap_err();
        assert!(
            error.starts_with("the page at byte 0x0 of RAM block 'm': "),
            "{encoded:?}: {error}"
        );
    }
    for plain in [0, 4095, 4097, 1 << 20] {
        let error = memory.compressed(1, &vec![1; plain]).unwrap_err();
        assert!(
            error.starts_with("the page at byte 0x1000 of RAM block 'm': its zlib stream"),
            "{plain}: {error}"
        );
    }
    let (bytes, ..) = memory.finish();
    assert_eq!(bytes, [0; 8192]);
}

#[test]
fn one_block_of_several_has_to_be_named() {
    let blocks = [("a", 1), ("b", 2)];
    let mut memory = listed(Blocks::Only, &blocks);
    assert_eq!(
        memory.ram(RamRecord::EndOfSection).unwrap_err(),
        "there is more than one RAM block in this stream: say which"
    );
    let mut memory = listed(Blocks::Named("c".into()), &blocks);
    assert_eq!(
        memory.ram(RamRecord::EndOfSection).unwrap_err(),
        "there is no RAM block 'c' in this stream"
    );
    let choices = memory.0.finish().map(|_| ());
    assert!(
        matches!(&choices, Err(ExtractError::NotFound { choices, .. })
            if choices == &["b (8192 bytes)", "a (4096 bytes)"]),
        "{choices:?}"
    );
    let mut memory = listed(Blocks::Named("b".into()), &blocks);
    memory.ram(RamRecord::EndOfSection).unwrap();
    memory.page("a", 0, 1).unwrap();
    memory.page("b", 1, 2).unwrap();
    let (bytes, _, images) = memory.finish();
    assert_eq!(bytes, [[0; 4096], [2; 4096]].concat());
    assert_eq!(images[0].file_offset, None);
    assert!(listed(Blocks::Only, &[]).0.finish().is_err());
}

#[test]
fn all_blocks_fit_into_one_file() {
    let start_bytes = 1 << 16;
    let mut memory = listed(
        Blocks::All { start_bytes },
        &[("a", 17), ("b", 1), ("c", 1)],
    );
    memory.page("a", 16, 1).unwrap();
    memory.page("b", 0, 2).unwrap();
    let (bytes, _, images) = memory.finish();
    let starts: Vec<_> = images
        .iter()
        .filter_map(|image| image.file_offset)
        .collect();
    assert_eq!(starts, [1 << 16, 3 << 16, 4 << 16]);
    assert_eq!(bytes.len(), (4 << 16) + 4096);
    assert_eq!(bytes[(2 << 16)..(2 << 16) + 4096], [1; 4096]);
    assert_eq!(bytes[3 << 16..(3 << 16) + 4096], [2; 4096]);
    assert!(images[2].is_absent() && !images[1].is_absent());
}

#[test]
fn zeroes_stay_holes() {
    let mut memory = listed(Blocks::Only, &[("m", 1 << 20)]);
    for number in (0..1 << 20).step_by(1 << 10) {
        memory.zero("m", number).unwrap();
    }
    memory.page("m", 1 << 19, 1).unwrap();
    let (file, images) = memory.0.finish().unwrap();
    let metadata = file.metadata().unwrap();
    assert_eq!(metadata.len(), 4 << 30);
    assert!(metadata.blocks() * 512 < 1 << 20, "{}", metadata.blocks());
    assert_eq!(images[0].zero_bytes, 1023 * PAGE);
}

#[test]
fn zeroes_that_came_as_data_are_holes_unless_data_was_there() {
    let mut memory = listed(Blocks::Only, &[("m", 1 << 10)]);
    for number in 0..1 << 10 {
        memory.page("m", number, 0).unwrap();
    }
    memory.page("m", 7, 1).unwrap();
    memory.page("m", 7, 0).unwrap();
    memory.page("m", 8, 1).unwrap();
    let (bytes, file, images) = memory.finish();
    assert_eq!(bytes.iter().filter(|byte| **byte != 0).count(), 4096);
    assert!(file.metadata().unwrap().blocks() * 512 <= 1 << 18);
    assert_eq!((images[0].data_bytes, images[0].absent_bytes), (PAGE, 0));
}

#[test]
fn an_image_longer_than_a_file_is_refused() {
    let mut memory = listed(Blocks::All { start_bytes: 0 }, &[("a", 1)]);
    let long = RamRecord::Block {
        name: name("b"),
        used_bytes: u64::MAX - 4095,
        page_bytes: None,
        guest_address: None,
        mapped: None,
    };
    assert_eq!(
        memory.ram(long).unwrap_err(),
        "the image of RAM block 'b' would be longer than a file can be"
    );
}

#[test]
fn pages_have_the_size_that_the_configuration_says() {
    let mut memory = listed(Blocks::Only, &[("m", 8)]);
    let configuration = Configuration {
        page_bits: PageBits::new(14),
        ..Configuration::default()
    };
    let record = Record::Configuration(configuration);
    memory.0.event(Event::Record(0, &record)).unwrap();
    memory.zero("m", 4).unwrap();
    assert!(memory.zero("m", 5).is_err());
    assert_eq!(memory.finish().2[0].zero_bytes, 4 * PAGE);
}

#[test]
fn a_mapped_page_counts_only_if_its_bit_is_set() {
    let mut memory = listed(Blocks::Named("m".into()), &[("n", 1), ("m", 70), ("o", 1)]);
    let bitmap = |block: &str, bytes| RamRecord::MappedBitmap {
        block: name(block),
        bytes,
    };
    let pages = |block: &str, first: u64, pages: u32| RamRecord::MappedPages {
        block: name(block),
        offset_bytes: first * PAGE,
        bytes: pages * 4096,
    };
    memory.ram(bitmap("n", 8)).unwrap();
    memory.payload(&[0xff; 8]).unwrap();
    memory.ram(pages("n", 0, 1)).unwrap();
    memory.payload(&[9; 4096]).unwrap();
    memory.ram(bitmap("m", 16)).unwrap();
    for piece in [&[2][..], &[0, 0, 0, 0, 0, 0, 0x80, 1], &[0; 7]] {
        memory.payload(piece).unwrap();
    }
    memory.ram(RamRecord::MappedGap { bytes: 3 }).unwrap();
    memory.payload(&[8; 3]).unwrap();
    for (first, count) in [(0, 66), (66, 4)] {
        memory.ram(pages("m", first, count)).unwrap();
        let bytes = vec![7; usize::try_from(count).unwrap() * 4096];
        for piece in bytes.chunks(10_000) {
            memory.payload(piece).unwrap();
        }
    }
    let (bytes, _, images) = memory.finish();
    assert_eq!(bytes.len(), 70 * 4096);
    for (number, page) in bytes.chunks(4096).enumerate() {
        let byte = if [1, 63, 64].contains(&number) { 7 } else { 0 };
        assert_eq!(page, [byte; 4096], "{number}");
    }
    assert_eq!(
        (images[1].data_bytes, images[1].absent_bytes),
        (3 * PAGE, 0)
    );
}

#[test]
fn a_mapped_bitmap_has_a_bound() {
    let mut memory = listed(Blocks::Only, &[("m", 8)]);
    for (bytes, fits) in [(MAX_BITMAP_BYTES, true), (MAX_BITMAP_BYTES + 1, false)] {
        let block = name("m");
        let told = memory.ram(RamRecord::MappedBitmap { block, bytes });
        assert_eq!(told.is_ok(), fits, "{bytes}");
    }
}
