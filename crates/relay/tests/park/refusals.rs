//! Streams that cannot be parked, and streams that lie.

use crate::contents::{capture, captures, park, read, records};
use vmferry_relay::park::{MEMORY_BYTES_MAX, ParkError, ParkOptions, Parker};
use vmferry_stream::{
    Command, Configuration, DiscardRange, Encoder, InstanceId, Name, PageSizes, RamPage, RamRecord,
    Record, Section, SectionId, SectionKind,
};

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

fn refused(stream: &[u8], words: &[&str]) {
    let error = park(stream).expect_err("refused").to_string();
    for word in words {
        assert!(error.contains(word), "{word}: {error}");
    }
}

#[test]
fn what_cannot_be_parked_is_refused_by_name() {
    for name in captures() {
        let words: &[&str] = match &name {
            name if name.starts_with("blk-") => &["byte ", "'block'", "--disk"],
            name if name.starts_with("mapped-ram-") => &["byte ", "mapped-ram"],
            name if name.contains(".conn0") && name.starts_with("multifd-") => {
                &["byte ", "multifd", "--multifd-channels"]
            }
            name if name.contains("conn") && name.starts_with("multifd-") => {
                &["byte 0", "multifd", "not the first"]
            }
            name if name.starts_with("preempt-") && name.contains(".conn0") => {
                &["pages of memory have not come"]
            }
            _ => continue,
        };
        refused(&capture(&name), words);
    }
}

/// A stream of a machine with one block.
struct Made {
    encoder: Encoder,
    bytes: Vec<u8>,
}

/// Words of the refusal, and what is refused.
type Spoilt = (&'static str, fn(&mut Made));

const RAM: SectionId = SectionId(2);

impl Made {
    fn new() -> Self {
        let mut made = Self {
            encoder: Encoder::new(true),
            bytes: Vec::new(),
        };
        made.put(&Record::Header { version: 3 });
        made.put(&Record::Configuration(Configuration::of_machine(name(
            "pc",
        ))));
        made
    }

    fn put(&mut self, record: &Record) -> &mut Self {
        self.encoder.record(record, &mut self.bytes);
        self
    }

    fn section(&mut self, kind: SectionKind) -> &mut Self {
        self.put(&Record::Section(Section {
            kind,
            id: RAM,
            name: name("ram"),
            instance: InstanceId(0),
            version: 4,
        }))
    }

    fn end(&mut self) -> &mut Self {
        self.put(&Record::Ram(RamRecord::EndOfSection));
        self.put(&Record::SectionEnd { id: RAM })
    }

    fn command(&mut self, command: Command) -> &mut Self {
        self.put(&Record::Command(command))
    }

    fn advise(&mut self) -> &mut Self {
        self.command(Command::PostcopyAdvise(Some(PageSizes {
            all_bytes: 4096,
            target_bytes: 4096,
        })))
    }

    fn start(&mut self, blocks: &[(&str, u64)]) -> &mut Self {
        self.section(SectionKind::Start);
        let total_bytes = blocks.iter().map(|(_, bytes)| bytes).sum();
        self.put(&Record::Ram(RamRecord::BlockList { total_bytes }));
        for (block, used_bytes) in blocks {
            self.put(&Record::Ram(RamRecord::Block {
                name: name(block),
                used_bytes: *used_bytes,
                page_bytes: None,
                guest_address: None,
                mapped: None,
            }));
        }
        self.end()
    }

    fn page(&mut self, block: &str, offset_bytes: u64) -> &mut Self {
        let page = RamPage {
            block: name(block),
            offset_bytes,
        };
        self.put(&Record::Ram(RamRecord::Page { page, bytes: 4096 }));
        self.bytes.extend([0x5a; 4096]);
        self
    }

    fn discard(&mut self, block: &str, start_bytes: u64, length_bytes: u64) -> &mut Self {
        let block = name(block);
        self.command(Command::PostcopyRamDiscard { block, ranges: 1 });
        self.put(&Record::DiscardRange(DiscardRange {
            start_bytes,
            length_bytes,
        }))
    }

    fn package(&mut self, build: impl FnOnce(&mut Made)) -> &mut Self {
        let mut inner = Made {
            encoder: Encoder::new(true),
            bytes: Vec::new(),
        };
        build(&mut inner);
        let bytes = u32::try_from(inner.bytes.len()).unwrap();
        self.command(Command::Packaged { bytes });
        self.bytes.extend(inner.bytes);
        self
    }

    fn device(&mut self, device: &str, body: &[u8]) -> &mut Self {
        let id = SectionId(7);
        self.put(&Record::Section(Section {
            kind: SectionKind::Full,
            id,
            name: name(device),
            instance: InstanceId(0),
            version: 1,
        }));
        self.bytes.extend(body);
        self.put(&Record::SectionEnd { id })
    }
}

/// Up to the package of a postcopy of three pages, of which one is discarded.
fn postcopy() -> Made {
    let mut made = Made::new();
    made.advise().start(&[("a", 0x3000)]);
    made.section(SectionKind::Part);
    made.page("a", 0).page("a", 0x1000).page("a", 0x2000).end();
    made.discard("a", 0x1000, 0x1000);
    made
}

fn package(made: &mut Made) {
    made.command(Command::PostcopyListen)
        .device("timer", &[1; 24])
        .command(Command::Ping(3))
        .device("empty", &[])
        .command(Command::PostcopyRun);
}

#[test]
fn a_made_postcopy_is_parked() {
    let mut made = postcopy();
    made.package(package).section(SectionKind::Part);
    made.page("a", 0x1000).end();
    made.section(SectionKind::End).end().put(&Record::Eof);
    let bytes = park(&made.bytes).unwrap();
    let (contents, commands, _) = read(&bytes).unwrap();
    assert_eq!(commands, Vec::<String>::new());
    let names: Vec<_> = contents
        .devices
        .iter()
        .map(|(it, _)| it.name.to_string())
        .collect();
    assert_eq!(names, ["timer", "empty"]);
    assert_eq!(contents.devices[0].1, [1; 24]);
    assert_eq!(contents.memory["a"], (vec![0x5a; 0x3000], 0));
    // The page that is missing is missed.
    let mut made = postcopy();
    made.package(package).section(SectionKind::End).end();
    made.put(&Record::Eof);
    refused(&made.bytes, &["1 pages"]);
}

#[test]
fn a_postcopy_out_of_order_is_refused() {
    let checks: [Spoilt; 11] = [
        ("second POSTCOPY_ADVISE", |made| {
            made.advise();
        }),
        ("POSTCOPY_LISTEN", |made| {
            made.command(Command::PostcopyListen);
        }),
        ("POSTCOPY_RUN", |made| {
            made.command(Command::PostcopyRun);
        }),
        ("COLO", |made| {
            made.command(Command::EnableColo);
        }),
        ("PACKAGED", |made| {
            made.package(package).package(package);
        }),
        ("POSTCOPY_RAM_DISCARD", |made| {
            made.package(package).discard("a", 0, 0x1000);
        }),
        ("'late'", |made| {
            made.package(package).device("late", &[]);
        }),
        ("LISTEN and RUN", |made| {
            made.package(|made| {
                made.device("timer", &[1; 24]);
            });
        }),
        ("'ram'", |made| {
            made.package(|made| {
                made.command(Command::PostcopyListen)
                    .section(SectionKind::Start);
            });
        }),
        ("PACKAGED", |made| {
            made.package(|made| {
                made.command(Command::PostcopyListen).package(package);
            });
        }),
        ("what changed in it", |made| {
            made.package(package).section(SectionKind::Part);
            let page = RamPage {
                block: name("a"),
                offset_bytes: 0x1000,
            };
            made.put(&Record::Ram(RamRecord::Xbzrle { page, bytes: 0 }));
        }),
    ];
    for (words, spoil) in checks {
        let mut made = postcopy();
        spoil(&mut made);
        refused(&made.bytes, &["byte ", words]);
    }
}

#[test]
fn memory_that_is_not_there_is_refused() {
    let checks: [Spoilt; 6] = [
        ("'b' is not in the list", |made| {
            made.section(SectionKind::Part).page("b", 0);
        }),
        ("0x3000 are not inside RAM block 'a'", |made| {
            made.section(SectionKind::Part).page("a", 0x3000);
        }),
        ("are not inside RAM block 'a'", |made| {
            made.discard("a", 0x1000, u64::MAX - 0xfff);
        }),
        ("not whole pages", |made| {
            made.discard("a", 0x1000, 0x800);
        }),
        ("'b' is not in the list", |made| {
            made.discard("b", 0x1000, 0x1000);
        }),
        ("a second 'ram' section", |made| {
            made.put(&Record::Section(Section {
                kind: SectionKind::Start,
                id: SectionId(9),
                name: name("ram"),
                instance: InstanceId(0),
                version: 4,
            }));
        }),
    ];
    for (words, spoil) in checks {
        let mut made = postcopy();
        spoil(&mut made);
        refused(&made.bytes, &["byte ", words]);
    }
    let mut made = Made::new();
    made.start(&[("a", 0x1000), ("a", 0x1000)]);
    refused(&made.bytes, &["'a' is listed twice"]);
    let mut made = Made::new();
    made.advise()
        .start(&[("a", MEMORY_BYTES_MAX), ("b", 0x1000)]);
    refused(&made.bytes, &["byte ", "4096 GiB"]);
}

#[test]
fn sections_that_nobody_knows_are_refused() {
    let mut made = Made::new();
    made.put(&Record::Section(Section {
        kind: SectionKind::Start,
        id: SectionId(3),
        name: name("0000:00:05.0/vfio"),
        instance: InstanceId(0),
        version: 1,
    }));
    refused(&made.bytes, &["byte ", "0000:00:05.0/vfio"]);
}

#[test]
fn commands_among_the_devices_are_refused() {
    let stream = capture("pc-100");
    let records = records(&stream);
    let is_full = |record: &Record| matches!(record, Record::Section(section) if section.kind == SectionKind::Full);
    let (at, ..) = records
        .iter()
        .rfind(|(_, record, _)| is_full(record))
        .unwrap();
    let mut ping = Vec::new();
    Encoder::new(true).record(&Record::Command(Command::Ping(1)), &mut ping);
    let spoilt = [&stream[..*at], &ping, &stream[*at..]].concat();
    refused(&spoilt, &["PING"]);
}

/// The package is held: announcing one must not take memory, and its length has a limit.
#[test]
fn length_of_a_package() {
    let held = u32::try_from(vmferry_inspect::limits::HELD_BYTES_MAX).unwrap();
    for (bytes, is_refused) in [(held, false), (held + 1, true)] {
        let mut made = postcopy();
        made.command(Command::Packaged { bytes });
        let file = tempfile::tempfile().unwrap();
        let mut parker = Parker::new(file, ParkOptions::default()).unwrap();
        let pushed = parker.push(&made.bytes);
        assert_eq!(matches!(pushed, Err(ParkError::Refused { .. })), is_refused);
    }
}

/// What is behind the memory is held to be understood.
#[test]
fn length_of_the_devices() {
    let held = vmferry_inspect::limits::HELD_BYTES_MAX;
    let mut made = Made::new();
    made.start(&[("a", 0x1000)]);
    made.section(SectionKind::End).page("a", 0).end();
    let start = made.bytes.len();
    made.device("large", &[0x55; 100]);
    let end_bytes = made.bytes.len() - start - 100 + 1;
    for (length, is_refused) in [(held - end_bytes, false), (held + 1, true)] {
        let mut made = Made::new();
        made.start(&[("a", 0x1000)]);
        made.section(SectionKind::End).page("a", 0).end();
        made.device("large", &vec![0x55; length]).put(&Record::Eof);
        let parked = park(&made.bytes);
        assert_eq!(parked.is_err(), is_refused, "{length}: {:?}", parked.err());
    }
    // The same for a device before the memory, of which the header counts.
    let header_bytes = end_bytes - 1 - 5;
    for (length, is_refused) in [
        (held - header_bytes, false),
        (held - header_bytes + 1, true),
    ] {
        let mut made = Made::new();
        made.device("large", &vec![0x55; length]);
        made.start(&[("a", 0x1000)]);
        made.section(SectionKind::End).page("a", 0).end();
        made.put(&Record::Eof);
        let result = park_slowly(&made.bytes);
        assert_eq!(result.is_err(), is_refused, "{length}: {:?}", result.err());
    }
}

fn park_slowly(stream: &[u8]) -> Result<Vec<u8>, ParkError> {
    crate::contents::park_in_pieces(stream, || 1 << 20).map(|(bytes, _)| bytes)
}
