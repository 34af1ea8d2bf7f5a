//! Streams that break the rules: each is refused with its own error, at the right byte.

use vmferry_stream::{
    Blame, DecodeError, Decoder, Expect, Fault, Footers, Options, SectionId, Step,
};

use crate::drive::{Run, Split, pass_rest, run};
use crate::name;

const HEAD: &[u8] = b"QEVM\0\0\0\x03\x07\0\0\0\x04none";
const HEAD_BYTES: u64 = HEAD.len() as u64;
const RAM: &[u8] = b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04";
const BLOCK: &[u8] = b"\x01\0\0\0\x01\x05block\0\0\0\0\0\0\0\x01";
const BITMAP: &[u8] = b"\x01\0\0\0\x03\x0cdirty-bitmap\0\0\0\0\0\0\0\x01";

fn decode(parts: &[&[u8]]) -> Run {
    run(
        &parts.concat(),
        Options::default(),
        Split::Whole,
        &pass_rest,
    )
}

fn error(parts: &[&[u8]]) -> DecodeError {
    let error = decode(parts).ending.expect_err("stream is refused");
    assert_eq!(error.blame(), Blame::Peer);
    error
}

fn fault(parts: &[&[u8]]) -> Fault {
    error(parts).fault
}

#[test]
fn header() {
    assert_eq!(fault(&[b"QEVX"]), Fault::BadMagic(0x5145_5658));
    assert_eq!(error(&[b"QEVX"]).offset, 0);
    assert_eq!(fault(&[b"QEVM\0\0\0\x02"]), Fault::ObsoleteVersion);
    assert_eq!(fault(&[b"QEVM\0\0\0\x04"]), Fault::UnsupportedVersion(4));
    assert_eq!(
        error(&[b"QEVM\0\0\0\x04"]).to_string(),
        "stream version 4 is not supported (byte 4, version)"
    );
}

#[test]
fn configuration() {
    let with = |configuration, stream: &[u8]| {
        let options = Options {
            configuration,
            ..Options::default()
        };
        run(stream, options, Split::Whole, &pass_rest).ending
    };
    let bare = b"QEVM\0\0\0\x03\0";
    let configured = [HEAD, b"\0"].concat();
    let fault = |ending: Result<_, DecodeError>| ending.expect_err("refused").fault;
    assert_eq!(
        fault(with(Expect::Required, bare)),
        Fault::ConfigurationMissing(0)
    );
    assert!(with(Expect::Required, &configured).is_ok());
    assert!(with(Expect::Absent, bare).is_ok());
    assert_eq!(
        fault(with(Expect::Absent, &configured)),
        Fault::ConfigurationMisplaced
    );
    let twice = [HEAD, &HEAD[8..]].concat();
    assert_eq!(
        fault(with(Expect::Required, &twice)),
        Fault::ConfigurationMisplaced
    );
}

#[test]
fn configuration_subsections() {
    let unknown = b"\x05\x13configuration/other\0\0\0\x01";
    assert_eq!(
        fault(&[HEAD, unknown]),
        Fault::UnknownSubsection(name("configuration/other"))
    );
    let version = b"\x05\x12configuration/uuid\0\0\0\x02";
    assert_eq!(
        fault(&[HEAD, version]),
        Fault::UnsupportedSectionVersion {
            name: name("configuration/uuid"),
            version: 2,
            supported: 1
        }
    );
    let page_bits = b"\x05\x1econfiguration/target-page-bits\0\0\0\x01\0\0\0";
    for (bits, right) in [(9, false), (10, true), (16, true), (17, false)] {
        let run = decode(&[HEAD, page_bits, &[bits], b"\0"]);
        match run.ending {
            Ok(_) => assert!(right, "{bits}"),
            Err(error) => {
                assert!(!right, "{bits}: {error}");
                assert_eq!(error.fault, Fault::UnsupportedPageBits(u32::from(bits)));
            }
        }
    }
}

#[test]
fn page_bits_change_the_ram_words() {
    let subsection = b"\x05\x1econfiguration/target-page-bits\0\0\0\x01\0\0\0\x10";
    // A page at 0x10000; 0x1000 is a flag now, and an unknown one.
    let page = b"\0\0\0\0\0\x01\0\x08\x02m0";
    let run = decode(&[HEAD, subsection, RAM, page, &[7; 0x10000]]);
    assert_eq!(run.records.last().expect("a page").1.len(), 0x10000);
    assert_eq!(
        fault(&[HEAD, subsection, RAM, b"\0\0\0\0\0\0\x10\x08"]),
        Fault::UnknownFlags {
            section: "ram",
            flags: 0x1008
        }
    );
}

#[test]
fn items() {
    assert_eq!(fault(&[HEAD, b"\x09"]), Fault::UnknownSectionType(9));
    assert_eq!(
        fault(&[HEAD, b"\x7e\0\0\0\x01"]),
        Fault::UnknownSectionType(0x7e)
    );
    assert_eq!(
        fault(&[HEAD, b"\x06\0\0\0\x02{}"]),
        Fault::DescriptionBeforeEof
    );
    assert_eq!(fault(&[b"QEVM\0\0\0\x03\x05"]), Fault::SubsectionAtTopLevel);
    let error = error(&[HEAD, b"\x09"]);
    assert_eq!(error.offset, HEAD_BYTES);
    assert_eq!(
        error.to_string(),
        "unknown section type 0x09 (byte 17, section type)"
    );
}

#[test]
fn sections() {
    let end = b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02";
    assert_eq!(
        fault(&[HEAD, b"\x02\0\0\0\x07"]),
        Fault::SectionNeverStarted(SectionId(7))
    );
    assert_eq!(
        fault(&[HEAD, RAM, end, b"\x03\0\0\0\x01"]),
        Fault::SectionNeverStarted(SectionId(1))
    );
    // FULL has said everything: nothing can go on.
    let full = b"\x04\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04";
    for more in [b"\x02\0\0\0\x02", b"\x03\0\0\0\x02"] {
        assert_eq!(
            fault(&[HEAD, full, end, more]),
            Fault::SectionNeverStarted(SectionId(2))
        );
    }
    assert_eq!(
        fault(&[HEAD, RAM, end, RAM]),
        Fault::SectionStartedTwice {
            id: SectionId(2),
            name: name("ram")
        }
    );
    let newer = b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x05";
    assert_eq!(
        fault(&[HEAD, newer]),
        Fault::UnsupportedSectionVersion {
            name: name("ram"),
            version: 5,
            supported: 4
        }
    );
}

#[test]
fn footers() {
    let body = b"\0\0\0\0\0\0\0\x10";
    assert_eq!(
        fault(&[HEAD, RAM, body, b"\x7e\0\0\0\x03"]),
        Fault::FooterWrong {
            section: name("ram"),
            id: SectionId(2),
            found: SectionId(3)
        }
    );
    let part = b"\x02\0\0\0\x02";
    let missing = error(&[HEAD, RAM, body, b"\x7e\0\0\0\x02", part, body, b"\0"]);
    assert_eq!(
        missing.to_string(),
        "footer of section 'ram' (0x2) missing: byte 0x00 instead of 0x7e (byte 60, section footer)"
    );
    // Without footers from the start, one is an unknown item.
    assert_eq!(
        fault(&[HEAD, RAM, body, part, body, b"\x7e\0\0\0\x02"]),
        Fault::UnknownSectionType(0x7e)
    );
}

#[test]
fn flags() {
    for word in [0u64, 0x03, 0x05, 0x06, 0x08, 0x0a, 0x0b, 0x10, 0x11, 0x100] {
        assert_eq!(
            fault(&[HEAD, BLOCK, &word.to_be_bytes()]),
            Fault::UnknownFlags {
                section: "block",
                flags: word
            }
        );
    }
    for word in [0u64, 0x001, 0x020, 0x048, 0x080, 0x0a0, 0x006, 0x400, 0x800] {
        assert_eq!(
            fault(&[HEAD, RAM, &word.to_be_bytes()]),
            Fault::UnknownFlags {
                section: "ram",
                flags: word
            }
        );
    }
    for flags in [0u8, 0x02, 0x04, 0x09, 0x11, 0x30, 0x70, 0x80, 0x90] {
        assert_eq!(
            fault(&[HEAD, BITMAP, &[flags]]),
            Fault::UnknownFlags {
                section: "dirty-bitmap",
                flags: u64::from(flags)
            }
        );
    }
    let shown = error(&[HEAD, BLOCK, b"\0\0\0\0\0\0\x01\x10"]).to_string();
    assert_eq!(
        shown,
        "unknown flags 0x110 in section 'block' (byte 36, block record)"
    );
}

#[test]
fn names() {
    for length in [0usize, 255] {
        let device = "d".repeat(length);
        let chunk = [&[0, 0, 0, 0, 0, 0, 0, 9, length as u8], device.as_bytes()].concat();
        let run = decode(&[HEAD, BLOCK, &chunk]);
        assert_eq!(
            run.records.last().expect("a chunk").0,
            vmferry_stream::Record::Block(vmferry_stream::BlockChunk::Zero {
                sector: vmferry_stream::Sector::at_byte(0).expect("sector 0"),
                device: name(&device)
            })
        );
    }
    let error = error(&[HEAD, BLOCK, b"\0\0\0\0\0\0\0\x09\x03d\xff0"]);
    assert_eq!(error.fault, Fault::NotUtf8(b"d\xff0".to_vec()));
    assert_eq!(
        error.to_string(),
        "name of 3 bytes is not UTF-8: 'd…' (byte 45, device name)"
    );
}

#[test]
fn names_of_the_record_before() {
    assert_eq!(
        fault(&[HEAD, RAM, b"\0\0\0\0\0\0\0\x28"]),
        Fault::NoPreviousName
    );
    assert_eq!(fault(&[HEAD, BITMAP, b"\x24\x01b"]), Fault::NoPreviousName);
    assert_eq!(fault(&[HEAD, BITMAP, b"\x28\x01n"]), Fault::NoPreviousName);
    // The list of blocks names no page's block.
    let list = b"\0\0\0\0\0\0\x10\x04\x01m\0\0\0\0\0\0\x10\0";
    assert_eq!(
        fault(&[HEAD, RAM, list, b"\0\0\0\0\0\0\0\x28"]),
        Fault::NoPreviousName
    );
}

#[test]
fn ram_values() {
    let xbzrle = b"\0\0\0\0\0\0\0\x40\x01m";
    assert_eq!(
        fault(&[HEAD, RAM, xbzrle, b"\x02\0\x08"]),
        Fault::Unexpected {
            found: 2,
            expected: 1
        }
    );
    let overrun = b"\0\0\0\0\0\0\x10\x04\x01m\0\0\0\0\0\0\x20\0";
    assert_eq!(
        fault(&[HEAD, RAM, overrun]),
        Fault::BlockListOverrun {
            name: name("m"),
            bytes: 0x2000,
            left: 0x1000
        }
    );
    let unaligned = b"\0\0\0\0\0\0\x10\x04\x01m\0\0\0\0\0\0\x08\0";
    assert_eq!(
        fault(&[HEAD, RAM, unaligned]),
        Fault::Unaligned {
            value: 0x800,
            unit: 0x1000
        }
    );
}

/// The last block of a disk of odd length may end with the disk and start anywhere.
#[test]
fn blocks_may_start_at_any_sector() {
    let run = decode(&[HEAD, BLOCK, b"\0\0\0\0\0\0\x02\x01\x01d"]);
    assert_eq!(
        run.records.last().expect("a chunk").0,
        vmferry_stream::Record::Block(vmferry_stream::BlockChunk::Data {
            sector: vmferry_stream::Sector::at_byte(512).expect("sector 1"),
            device: name("d")
        })
    );
}

#[test]
fn commands() {
    for number in [0u16, 12, 0xffff] {
        let command = [&[8][..], &number.to_be_bytes(), &[0, 3]].concat();
        assert_eq!(
            fault(&[HEAD, &command]),
            Fault::UnknownCommand { number, length: 3 }
        );
    }
    let fixed: [(u8, u8, &str); 9] = [
        (1, 1, "OPEN_RETURN_PATH"),
        (2, 3, "PING"),
        (3, 8, "POSTCOPY_ADVISE"),
        (4, 1, "POSTCOPY_LISTEN"),
        (5, 1, "POSTCOPY_RUN"),
        (7, 8, "PACKAGED"),
        (8, 1, "ENABLE_COLO"),
        (9, 1, "POSTCOPY_RESUME"),
        (11, 1, "SWITCHOVER_START"),
    ];
    for (number, length, name) in fixed {
        let command = [8, 0, number, 0, length];
        let error = error(&[HEAD, &command]);
        assert!(
            error
                .to_string()
                .starts_with(&format!("{name} has length {length} instead of ")),
            "{error}"
        );
    }
    // RECV_BITMAP with a name that does not fill its length.
    let error = error(&[HEAD, b"\x08\0\x0a\0\x03\x01m"]);
    assert!(matches!(error.fault, Fault::WrongLength { length: 3, .. }));
}

#[test]
fn discards() {
    let discard = |length: u8, rest: &[u8]| {
        let head = [8, 0, 6, 0, length];
        decode(&[HEAD, &head, rest])
            .ending
            .map_err(|error| error.fault)
    };
    let range = [0u8; 16];
    let right = [b"\0\x01m\0", &range[..]].concat();
    assert!(matches!(discard(20, &right), Err(Fault::Truncated(_))));
    for length in [4, 19, 21, 35] {
        assert!(
            matches!(
                discard(length, &right),
                Err(Fault::WrongLength {
                    name: "POSTCOPY_RAM_DISCARD",
                    ..
                })
            ),
            "{length}"
        );
    }
    let unexpected = |found| Err(Fault::Unexpected { found, expected: 0 });
    assert_eq!(discard(20, b"\x01\x01m\0"), unexpected(1));
    assert_eq!(discard(20, b"\0\x01m\x02"), unexpected(2));
}

#[test]
fn a_device_body_of_unknown_length_is_the_callers_mistake() {
    let mut decoder = Decoder::new(Options {
        footers: Footers::Present,
        ..Options::default()
    });
    let stream = [HEAD, b"\x04\0\0\0\x09\x05timer\0\0\0\0\0\0\0\x02rest"].concat();
    let mut window = &stream[..];
    let error = loop {
        match decoder.step(window) {
            Ok(Step::Record { used, .. }) => window = &window[used..],
            Ok(other) => panic!("{other:?}"),
            Err(error) => break error,
        }
    };
    assert_eq!(error.blame(), Blame::Caller);
    assert_eq!(
        error.fault,
        Fault::DeviceBody {
            section: name("timer"),
            id: SectionId(9)
        }
    );
    // Neither an error nor a misplaced hint moves the decoder.
    assert_eq!(decoder.step(window), Err(error));
    decoder.skip_device(4);
    decoder.skip_device(400);
    assert_eq!(decoder.step(window), Ok(Step::Payload(4)));
    assert_eq!(decoder.step(&[]), Ok(Step::NeedMore(1)));
}

#[test]
fn bytes_after_the_end_do_not_belong_to_the_stream() {
    let run = decode(&[HEAD, b"\0\x06\0\0\0\x02{}", b"more"]);
    assert!(run.ending.is_ok());
    assert_eq!(run.length, HEAD_BYTES + 8);
    let run = decode(&[HEAD, b"\0\0\0\0"]);
    assert!(run.ending.is_ok());
    assert_eq!(run.length, HEAD_BYTES + 1);
}
