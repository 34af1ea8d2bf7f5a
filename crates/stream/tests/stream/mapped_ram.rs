//! Files whose pages have fixed places (capability `mapped-ram`).

use vmferry_stream::limits::{
    MAX_MAPPED_BITMAP_BYTES, MAX_MAPPED_GAP_BYTES, MAX_MAPPED_PIECE_BYTES,
};
use vmferry_stream::{
    Configuration, DecodeError, Decoder, Encoder, Ending, Fault, InstanceId, MappedBlock,
    MappedBound, Name, Options, PageBits, RamRecord, Record, Section, SectionId, SectionKind, Step,
};

use crate::drive::{Run, Split, find_footer, pass_rest, run};
use crate::{capture, name, rounds, seeded};

const HEAD: &[u8] = b"QEVM\0\0\0\x03\x07\0\0\0\x04none\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0amapped-ram";
const START: &[u8] = b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04";
/// Of [`HEAD`], [`START`] and the entry of a block with a name of one byte.
const ENTRY_END: u64 = (HEAD.len() + START.len() + 8 + 2 + 8 + 28) as u64;
const PAGE: u64 = 4096;

/// What a header says.
struct Header {
    used_bytes: u64,
    version: u32,
    page_bytes: u64,
    bitmap_offset: u64,
    pages_offset: u64,
}

impl Header {
    /// One page, right.
    fn new() -> Self {
        Self {
            used_bytes: PAGE,
            version: 1,
            page_bytes: PAGE,
            bitmap_offset: ENTRY_END,
            pages_offset: 1 << 20,
        }
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = (self.used_bytes | 4).to_be_bytes().to_vec();
        bytes.extend(b"\x01m");
        bytes.extend(self.used_bytes.to_be_bytes());
        bytes.extend(self.version.to_be_bytes());
        for field in [self.page_bytes, self.bitmap_offset, self.pages_offset] {
            bytes.extend(field.to_be_bytes());
        }
        bytes
    }

    /// What becomes of a stream that starts at byte `start` of its file and stops after this header.
    fn error(&self, start: u64) -> Option<DecodeError> {
        let stream = [HEAD, START, &self.encode()].concat();
        let options = Options {
            start,
            ..Options::default()
        };
        let error = run(&stream, options, Split::Whole, &pass_rest).ending.err();
        error.filter(|error| !matches!(error.fault, Fault::Truncated(_)))
    }
}

fn fault(parts: &[&[u8]]) -> Fault {
    let run = run(
        &parts.concat(),
        Options::default(),
        Split::Whole,
        &pass_rest,
    );
    run.ending.expect_err("stream is refused").fault
}

/// A block of the list, and what follows it.
struct Listed {
    name: Name,
    used_bytes: u64,
    mapped: MappedBlock,
    bitmap: Vec<u8>,
    pages: Vec<u8>,
}

fn blocks(run: &Run) -> Vec<Listed> {
    let mut blocks: Vec<Listed> = Vec::new();
    for (record, payload) in &run.records {
        match record {
            Record::Ram(RamRecord::Block {
                name,
                used_bytes,
                mapped: Some(mapped),
                ..
            }) => blocks.push(Listed {
                name: name.clone(),
                used_bytes: *used_bytes,
                mapped: *mapped,
                bitmap: Vec::new(),
                pages: Vec::new(),
            }),
            Record::Ram(RamRecord::MappedBitmap { block, bytes }) => {
                let last = blocks.last_mut().expect("a block");
                assert_eq!((&last.name, payload.len()), (block, *bytes as usize));
                last.bitmap.extend(payload);
            }
            Record::Ram(RamRecord::MappedPages {
                block,
                offset_bytes,
                ..
            }) => {
                let last = blocks.last_mut().expect("a block");
                assert_eq!(&last.name, block);
                assert_eq!(last.pages.len() as u64, *offset_bytes);
                last.pages.extend(payload);
            }
            _ => {}
        }
    }
    blocks
}

#[test]
fn files_of_qemu() {
    for capture_name in ["mapped-ram-100", "mapped-ram-multifd-100"] {
        let input = capture(capture_name);
        let run = run(&input, Options::default(), Split::Whole, &find_footer);
        assert_eq!(run.ending, Ok(Ending::WithDescription), "{capture_name}");
        assert_eq!(run.length, input.len() as u64);
        let blocks = blocks(&run);
        let listed: Vec<_> = blocks
            .iter()
            .map(|block| (block.name.as_str(), block.used_bytes))
            .collect();
        assert_eq!(
            listed[..2],
            [("/rom@etc/acpi/tables", 0x1000), ("microvm.ram", 0x10_0000)],
            "{capture_name}"
        );
        for block in &blocks {
            let at = |offset: u64, length: usize| &input[offset as usize..][..length];
            let Listed {
                name,
                mapped,
                bitmap,
                pages,
                ..
            } = block;
            assert_eq!(at(mapped.bitmap_offset, bitmap.len()), bitmap, "{name}");
            assert_eq!(
                bitmap.len() as u64,
                (block.used_bytes / PAGE).div_ceil(64) * 8
            );
            assert_eq!(at(mapped.pages_offset, pages.len()), pages, "{name}");
            assert_eq!(pages.len() as u64, block.used_bytes, "{name}");
            assert_eq!(mapped.page_bytes, PAGE);
            // Pages that are not in the file stand there as holes, unless they were in it before.
            for (page, bytes) in pages.chunks(PAGE as usize).enumerate() {
                let there = bitmap[page / 8] >> (page % 8) & 1 == 1;
                assert!(there || bytes.iter().all(|byte| *byte == 0), "{name}");
            }
        }
        assert_eq!(blocks[0].mapped.bitmap_offset, 0x95);
        assert_eq!(blocks[0].bitmap, [1, 0, 0, 0, 0, 0, 0, 0]);
    }
}

/// The same file behind something else, as `file:PATH,offset=N` writes it.
#[test]
fn offsets_count_from_the_beginning_of_the_file() {
    let before = Header {
        bitmap_offset: ENTRY_END + 0x200,
        ..Header::new()
    };
    assert_eq!(before.error(0x200), None);
    let error = before.error(0).expect("the start was not told");
    assert_eq!(
        error.to_string(),
        format!(
            "bitmap of RAM block 'm' at file offset {:#x}, but its header ends at {ENTRY_END:#x} \
             (does the stream start elsewhere in its file?) (byte {}, mapped-ram bitmap offset)",
            ENTRY_END + 0x200,
            ENTRY_END - 16,
        )
    );
    assert!(Header::new().error(u64::MAX).is_some());
}

#[test]
fn header_fields() {
    assert_eq!(Header::new().error(0), None);
    let unexpected = |header: Header| match header.error(0).expect("refused").fault {
        Fault::Unexpected { found, expected } => (found, expected),
        fault => panic!("{fault}"),
    };
    for version in [0, 2] {
        let header = Header {
            version,
            ..Header::new()
        };
        assert_eq!(unexpected(header), (u64::from(version), 1));
    }
    for page_bytes in [0, 1024, 2 * PAGE] {
        let header = Header {
            page_bytes,
            ..Header::new()
        };
        assert_eq!(unexpected(header), (page_bytes, PAGE));
    }
    for pages_offset in [(1 << 20) - 1024, (1 << 20) + 1] {
        let header = Header {
            pages_offset,
            ..Header::new()
        };
        assert_eq!(
            header.error(0).expect("refused").fault,
            Fault::Unaligned {
                value: pages_offset,
                unit: PAGE
            }
        );
    }
}

#[test]
fn bitmap_and_pages_stand_in_order() {
    let offset_fault = |header: &Header, start| match header.error(start).map(|e| e.fault) {
        Some(Fault::MappedOffset {
            what, found, bound, ..
        }) => Some((what, found, bound)),
        None => None,
        other => panic!("{other:?}"),
    };
    for bitmap_offset in [0, ENTRY_END - 1, ENTRY_END + 1, u64::MAX] {
        let header = Header {
            bitmap_offset,
            ..Header::new()
        };
        assert_eq!(
            offset_fault(&header, 0),
            Some(("bitmap", bitmap_offset, MappedBound::At(ENTRY_END)))
        );
    }
    // The bitmap of one page has 8 bytes; it ends at a page's boundary here.
    let start = 2 * PAGE - ENTRY_END - 8;
    let bitmap_end = 2 * PAGE;
    let pages_at = |pages_offset| {
        let header = Header {
            bitmap_offset: bitmap_end - 8,
            pages_offset,
            ..Header::new()
        };
        offset_fault(&header, start)
    };
    assert_eq!(pages_at(bitmap_end), None, "there may be no gap");
    for pages_offset in [0, PAGE, bitmap_end - 1] {
        assert_eq!(
            pages_at(pages_offset),
            Some(("pages", pages_offset, MappedBound::From(bitmap_end)))
        );
    }
    let highest = bitmap_end + MAX_MAPPED_GAP_BYTES;
    assert_eq!(pages_at(highest), None);
    for pages_offset in [highest + 1, highest + PAGE, u64::MAX] {
        assert_eq!(
            pages_at(pages_offset),
            Some(("pages", pages_offset, MappedBound::UpTo(highest)))
        );
    }
}

#[test]
fn length_of_a_bitmap() {
    let max = MAX_MAPPED_BITMAP_BYTES * 8 * PAGE;
    let of = |used_bytes: u64| {
        let bitmap_end = ENTRY_END + (used_bytes / PAGE).div_ceil(64) * 8;
        let header = Header {
            used_bytes,
            pages_offset: bitmap_end.next_multiple_of(1 << 20),
            ..Header::new()
        };
        header.error(0).map(|error| error.fault)
    };
    assert_eq!(of(max), None);
    assert_eq!(
        of(max + PAGE),
        Some(Fault::OverMaximum {
            value: max + PAGE,
            max
        })
    );
}

/// A block that is longer than one announcement comes in pieces.
#[test]
fn long_blocks_come_in_pieces() {
    let piece = u64::from(MAX_MAPPED_PIECE_BYTES);
    let used_bytes = 2 * piece + 3 * PAGE;
    let header = Header {
        used_bytes,
        ..Header::new()
    };
    let stream = [HEAD, START, &header.encode()].concat();
    let mut decoder = Decoder::new(Options::default());
    let mut window = &stream[..];
    let mut pieces = Vec::new();
    while pieces.last() != Some(&(2 * piece, 3 * PAGE as u32)) {
        match decoder.step(window).expect("right") {
            Step::Record { record, used } => {
                window = &window[used..];
                if let Record::Ram(RamRecord::MappedPages {
                    offset_bytes,
                    bytes,
                    ..
                }) = record
                {
                    pieces.push((offset_bytes, bytes));
                }
            }
            Step::Payload(_) => {}
            step => panic!("{step:?}"),
        }
    }
    let whole = MAX_MAPPED_PIECE_BYTES;
    assert_eq!(pieces[..2], [(0, whole), (piece, whole)]);
    assert_eq!(decoder.step(&[]), Ok(Step::Payload(3 * PAGE as u32)));
    assert_eq!(decoder.offset(), header.pages_offset + used_bytes);
    let end = b"\0\0\0\0\0\0\0\x10";
    assert!(matches!(
        decoder.step(end),
        Ok(Step::Record {
            record: Record::Ram(RamRecord::EndOfSection),
            used: 8
        })
    ));
}

#[test]
fn bodies_hold_no_other_records() {
    let end = b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02";
    let part = b"\x02\0\0\0\x02";
    for flags in [0x02u64, 0x08, 0x22, 0x28, 0x40, 0x100, 0x200] {
        let word = (flags | 0x1000).to_be_bytes();
        let refused = Fault::MappedRecord { flags };
        assert_eq!(fault(&[HEAD, START, &word, b"\x01m\0"]), refused);
        assert_eq!(fault(&[HEAD, START, end, part, &word, b"\x01m\0"]), refused);
    }
    let list = b"\0\0\0\0\0\0\0\x04";
    let refused = fault(&[HEAD, START, list, end, part, list]);
    assert_eq!(refused, Fault::MappedRecord { flags: 4 });
    assert_eq!(
        refused.to_string(),
        "ram record with flags 0x4 in a mapped-ram file"
    );
    let whole = [HEAD, START, list, end, part, end, b"\0\x06\0\0\0\x02{}"].concat();
    let run = run(&whole, Options::default(), Split::Whole, &pass_rest);
    assert_eq!(run.ending, Ok(Ending::WithDescription));
}

/// A file of random blocks, gaps and places.
fn random_file(rng: &mut fastrand::Rng, start: u64) -> (Vec<u8>, Vec<(Record, Vec<u8>)>) {
    let page = PageBits::new(rng.u32(10..=16)).expect("in range");
    let page_bytes = u64::from(page.bytes());
    let mut capabilities = vec![name("mapped-ram")];
    let addresses = rng.bool();
    if addresses {
        capabilities.push(name("x-ignore-shared"));
    }
    let mut encoder = Encoder::new(true);
    let (mut bytes, mut records) = (Vec::new(), Vec::new());
    let mut put = |record: Record, bytes: &mut Vec<u8>| {
        let payload: Vec<u8> = (0..record.payload_bytes()).map(|at| at as u8).collect();
        encoder.record(&record, bytes);
        bytes.extend(&payload);
        records.push((record, payload));
    };
    put(Record::Header { version: 3 }, &mut bytes);
    let configuration = Configuration {
        page_bits: Some(page),
        capabilities: Some(capabilities),
        ..Configuration::of_machine(name("m"))
    };
    put(Record::Configuration(configuration), &mut bytes);
    let section = Section {
        kind: SectionKind::Start,
        id: SectionId(7),
        name: name("ram"),
        instance: InstanceId(0),
        version: 4,
    };
    put(Record::Section(section.clone()), &mut bytes);
    let lengths: Vec<u64> = (0..rng.usize(1..5))
        .map(|_| rng.u64(1..90) * page_bytes)
        .collect();
    let total_bytes = lengths.iter().sum();
    put(
        Record::Ram(RamRecord::BlockList { total_bytes }),
        &mut bytes,
    );
    for (index, used_bytes) in lengths.into_iter().enumerate() {
        let block = name(&format!("block{index}"));
        let mut entry = 1 + block.len() as u64 + 8 + 28;
        if addresses {
            entry += 8;
        }
        let bitmap_offset = start + bytes.len() as u64 + entry;
        let bitmap_bytes = (used_bytes / page_bytes).div_ceil(64) * 8;
        let align = page_bytes << rng.u32(..=4);
        let pages_offset = (bitmap_offset + bitmap_bytes).next_multiple_of(align);
        let mapped = Some(MappedBlock {
            page_bytes,
            bitmap_offset,
            pages_offset,
        });
        let mut ram = |record, bytes: &mut Vec<u8>| put(Record::Ram(record), bytes);
        ram(
            RamRecord::Block {
                name: block.clone(),
                used_bytes,
                page_bytes: None,
                guest_address: addresses.then_some(used_bytes),
                mapped,
            },
            &mut bytes,
        );
        ram(
            RamRecord::MappedBitmap {
                block: block.clone(),
                bytes: bitmap_bytes as u32,
            },
            &mut bytes,
        );
        let gap = pages_offset - (bitmap_offset + bitmap_bytes);
        if gap > 0 {
            ram(RamRecord::MappedGap { bytes: gap as u32 }, &mut bytes);
        }
        ram(
            RamRecord::MappedPages {
                block,
                offset_bytes: 0,
                bytes: used_bytes as u32,
            },
            &mut bytes,
        );
    }
    for kind in [SectionKind::Part, SectionKind::End] {
        put(Record::Ram(RamRecord::EndOfSection), &mut bytes);
        put(Record::SectionEnd { id: section.id }, &mut bytes);
        put(Record::Section(section.with_kind(kind)), &mut bytes);
    }
    put(Record::Ram(RamRecord::EndOfSection), &mut bytes);
    put(Record::SectionEnd { id: section.id }, &mut bytes);
    put(Record::Eof, &mut bytes);
    (bytes, records)
}

#[test]
fn random_files_come_back() {
    let mut rng = seeded();
    for round in 0..rounds(20) {
        let start = rng.u64(..100_000);
        let (bytes, records) = random_file(&mut rng, start);
        let options = Options {
            start,
            ..Options::default()
        };
        let whole = run(&bytes, options, Split::Whole, &pass_rest);
        assert_eq!(whole.ending, Ok(Ending::WithoutDescription), "{round}");
        assert!(whole.records == records, "round {round}");
        let cut = run(&bytes, options, Split::Random(&mut rng), &pass_rest);
        assert!(whole == cut, "round {round}");
        let end = rng.usize(..bytes.len());
        let error = run(&bytes[..end], options, Split::Whole, &pass_rest).ending;
        let error = error.expect_err("truncated");
        assert!(matches!(error.fault, Fault::Truncated(_)), "{error}");
        assert_eq!(error.offset, end as u64);
    }
}
