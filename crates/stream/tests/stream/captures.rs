//! Streams of real QEMUs.

use vmferry_stream::{
    BlockChunk, Command, Configuration, DiscardRange, Ending, Name, Options, PageSizes, RamRecord,
    Record, SectionId, SectionKind,
};

use crate::drive::{Run, Split, find_footer, pass_rest, run, run_decoder};
use crate::{capture, captures_folder, name};

/// Every capture of a forward stream that one decoder can read.
pub(crate) fn forward_captures() -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(captures_folder())
        .expect("captures are there")
        .filter_map(|entry| entry.expect("entry").file_name().into_string().ok())
        .filter_map(|name| name.strip_suffix(".xz").map(str::to_owned))
        .filter(|name| !name.ends_with(".rp"))
        .collect();
    names.sort();
    names
}

fn decode(name: &str) -> Run {
    run(
        &capture(name),
        Options::default(),
        Split::Whole,
        &find_footer,
    )
}

fn ram(run: &Run) -> impl Iterator<Item = (&RamRecord, &[u8])> {
    run.records
        .iter()
        .filter_map(|(record, payload)| match record {
            Record::Ram(record) => Some((record, &payload[..])),
            _ => None,
        })
}

fn commands(run: &Run) -> Vec<Command> {
    run.records
        .iter()
        .filter_map(|(record, _)| match record {
            Record::Command(command) => Some(command.clone()),
            _ => None,
        })
        .collect()
}

fn sections(run: &Run) -> Vec<(SectionKind, &str)> {
    run.records
        .iter()
        .filter_map(|(record, _)| match record {
            Record::Section(section) => Some((section.kind, section.name.as_str())),
            _ => None,
        })
        .collect()
}

fn description(run: &Run) -> Option<&[u8]> {
    match run.records.last()? {
        (Record::Description { .. }, text) => Some(text),
        _ => None,
    }
}

#[test]
fn every_capture_decodes_to_its_end() {
    let captures = forward_captures();
    assert!(captures.len() >= 50, "{} captures", captures.len());
    for capture_name in captures {
        let undescribed = capture_name.starts_with("no-vmdesc")
            || capture_name.starts_with("pc-2.2")
            || capture_name.starts_with("preempt")
            || (capture_name.starts_with("postcopy") && !capture_name.contains("advised-only"));
        let ending = if undescribed {
            Ending::WithoutDescription
        } else {
            Ending::WithDescription
        };
        let input = capture(&capture_name);
        for devices in [&pass_rest as crate::drive::Devices<'_>, &find_footer] {
            let run = run(&input, Options::default(), Split::Whole, devices);
            assert_eq!(run.ending, Ok(ending), "{capture_name}");
            assert_eq!(run.length, input.len() as u64, "{capture_name}");
        }
    }
}

#[test]
fn device_sections_are_those_that_the_description_names() {
    let mut compared = 0;
    for capture_name in forward_captures() {
        let run = decode(&capture_name);
        let Some(text) = description(&run) else {
            continue;
        };
        let text = std::str::from_utf8(text).expect("description is text");
        let sections = sections(&run);
        let devices = sections
            .iter()
            .filter(|(kind, _)| *kind == SectionKind::Full);
        if run
            .records
            .iter()
            .any(|(record, _)| matches!(record, Record::SectionEnd { .. }))
            && !capture_name.starts_with("pc-2.3")
        {
            let described = text.matches("\"instance_id\": ").count();
            assert_eq!(devices.count(), described, "{capture_name}");
            compared += 1;
        }
    }
    assert!(compared > 30, "{compared} captures compared");
}

#[test]
fn smallest_stream_of_qemu_10() {
    let run = decode("none-100");
    let id = SectionId(1);
    let head: Vec<&Record> = run.records.iter().map(|(record, _)| record).collect();
    assert_eq!(head[0], &Record::Header { version: 3 });
    assert_eq!(
        head[1],
        &Record::Configuration(Configuration::of_machine(name("none")))
    );
    let Record::Section(start) = head[2] else {
        panic!("{:?}", head[2]);
    };
    assert_eq!(
        (start.kind, start.id, &*start.name, start.version),
        (SectionKind::Start, id, "ram", 4)
    );
    assert_eq!(
        head[3],
        &Record::Ram(RamRecord::BlockList { total_bytes: 0 })
    );
    assert_eq!(head[4], &Record::Ram(RamRecord::EndOfSection));
    assert_eq!(head[5], &Record::SectionEnd { id });
    assert_eq!(head[6], &Record::Command(Command::SwitchoverStart));
    assert_eq!(head[7], &Record::Section(start.with_kind(SectionKind::End)));
    let devices = [(head[10], "timer", 24), (head[12], "globalstate", 104)];
    for ((record, name, bytes), at) in devices.into_iter().zip([10, 12]) {
        let Record::Section(section) = record else {
            panic!("{record:?}");
        };
        assert_eq!((section.kind, &*section.name), (SectionKind::Full, name));
        assert_eq!(run.records[at].1.len(), bytes);
    }
    assert_eq!(head[14], &Record::Eof);
    assert_eq!(head[15], &Record::Description { bytes: 0x337 });
}

#[test]
fn disks_of_migrate_b() {
    let run = decode("blk-72");
    let mut data = Vec::new();
    let mut zero = 0;
    let mut progress = Vec::new();
    for (record, payload) in &run.records {
        match record {
            Record::Block(BlockChunk::Data { sector, device }) => {
                assert_eq!((device.as_str(), payload.len()), ("dd", 1 << 20));
                data.push(sector.number());
            }
            Record::Block(BlockChunk::Zero { .. }) => zero += 1,
            Record::Block(BlockChunk::Progress { percent }) => progress.push(*percent),
            _ => {}
        }
    }
    // QEMU sends blocks in the order in which their reads end.
    data.sort_unstable();
    assert_eq!(data, [0, 2048, 4096, 6144]);
    assert_eq!((zero, progress.last()), (0, Some(&100)));
    let block: Vec<SectionKind> = sections(&run)
        .into_iter()
        .filter_map(|(kind, name)| (name == "block").then_some(kind))
        .collect();
    assert_eq!(block.first(), Some(&SectionKind::Start));
    assert_eq!(block.last(), Some(&SectionKind::End));
}

#[test]
fn ram_blocks_and_pages() {
    let run = decode("pc-72");
    let blocks: Vec<(&str, u64)> = ram(&run)
        .filter_map(|(record, _)| match record {
            RamRecord::Block {
                name,
                used_bytes,
                page_bytes: None,
                guest_address: None,
                mapped: None,
            } => Some((name.as_str(), *used_bytes)),
            _ => None,
        })
        .collect();
    assert_eq!(
        blocks,
        [
            ("/rom@etc/acpi/tables", 0x20000),
            ("pc.ram", 0x100000),
            ("pc.rom", 0x20000),
            ("pc.bios", 0x10000),
            ("/rom@etc/table-loader", 0x1000),
            ("/rom@etc/acpi/rsdp", 0x1000),
        ]
    );
    let mut pages = std::collections::BTreeSet::new();
    for (record, payload) in ram(&run) {
        match record {
            RamRecord::Zero { page, fill: 0 } => {
                pages.insert((page.block.clone(), page.offset_bytes));
            }
            RamRecord::Page { page, bytes: 4096 } => {
                assert_eq!(payload.len(), 4096);
                pages.insert((page.block.clone(), page.offset_bytes));
            }
            RamRecord::BlockList { total_bytes } => assert_eq!(*total_bytes, 0x152000),
            RamRecord::Block { .. } | RamRecord::EndOfSection => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(pages.len(), 0x152, "every page was sent");
}

#[test]
fn xbzrle_records() {
    for (capture_name, records) in [("xbzrle-72", 112), ("xbzrle-100", 104)] {
        let run = decode(capture_name);
        let lengths: Vec<usize> = ram(&run)
            .filter_map(|(record, payload)| {
                matches!(record, RamRecord::Xbzrle { .. }).then_some(payload.len())
            })
            .collect();
        assert_eq!(lengths.len(), records, "{capture_name}");
        assert!(lengths.contains(&8), "{capture_name}: {lengths:?}");
    }
}

#[test]
fn compressed_page() {
    let run = decode("compress-72");
    let found = ram(&run).any(|(record, payload)| match record {
        RamRecord::Compressed { page, bytes: 50 } => {
            page.block == "pc.bios"
                && page.offset_bytes == 0xf000
                && payload.starts_with(b"\x78\x01\xed\xd0\x31\x11")
        }
        _ => false,
    });
    assert!(found);
}

#[test]
fn configuration_subsections() {
    for capture_name in ["ignore-shared-72", "ignore-shared-100"] {
        let run = decode(capture_name);
        let Record::Configuration(configuration) = &run.records[1].0 else {
            panic!("{:?}", run.records[1]);
        };
        assert!(configuration.has_capability("x-ignore-shared"));
        let uuid = u128::from_be_bytes(configuration.uuid.expect("uuid was sent"));
        assert_eq!(uuid, 0x0011_2233_4455_6677_8899_aabb_ccdd_eeff);
        let addresses: Vec<Option<u64>> = ram(&run)
            .filter_map(|(record, _)| match record {
                RamRecord::Block { guest_address, .. } => Some(*guest_address),
                _ => None,
            })
            .collect();
        assert!(!addresses.is_empty() && addresses.iter().all(Option::is_some));
    }
    let run = decode("no-config-72");
    assert!(matches!(run.records[1].0, Record::Section(_)));
}

#[test]
fn old_machines_have_no_footers() {
    for (capture_name, footers) in [("pc-2.2-72", false), ("pc-2.3-72", false), ("pc-72", true)] {
        let input = capture(capture_name);
        let automatic = run(&input, Options::default(), Split::Whole, &pass_rest);
        let told = run(
            &input,
            Options {
                footers: if footers {
                    vmferry_stream::Footers::Present
                } else {
                    vmferry_stream::Footers::Absent
                },
                ..Options::default()
            },
            Split::Whole,
            &pass_rest,
        );
        assert_eq!(automatic, told, "{capture_name}");
        let insisting = run(
            &input,
            Options {
                footers: vmferry_stream::Footers::Present,
                ..Options::default()
            },
            Split::Whole,
            &pass_rest,
        );
        assert_eq!(insisting.ending.is_ok(), footers, "{capture_name}");
    }
}

#[test]
fn postcopy_package_is_a_stream_of_its_own() {
    let input = capture("postcopy-72.fwd");
    let outer = run(&input, Options::default(), Split::Whole, &find_footer);
    let sizes = PageSizes {
        all_bytes: 0x1000,
        target_bytes: 0x1000,
    };
    let outer_commands = commands(&outer);
    assert_eq!(
        outer_commands[..3],
        [
            Command::OpenReturnPath,
            Command::Ping(1),
            Command::PostcopyAdvise(Some(sizes)),
        ]
    );
    let discarded: Vec<(String, DiscardRange)> = outer
        .records
        .windows(2)
        .filter_map(|pair| match [&pair[0].0, &pair[1].0] {
            [
                Record::Command(Command::PostcopyRamDiscard { block, ranges: 1 }),
                Record::DiscardRange(range),
            ] => Some((block.to_string(), *range)),
            _ => None,
        })
        .collect();
    let range = |block: &str, start_bytes, length_bytes| {
        let range = DiscardRange {
            start_bytes,
            length_bytes,
        };
        (block.to_owned(), range)
    };
    assert_eq!(
        discarded,
        [
            range("pc.ram", 0x10000, 0xf0000),
            range("pc.rom", 0, 0x20000),
            range("pc.bios", 0, 0x10000),
            range("/rom@etc/table-loader", 0, 0x1000),
            range("/rom@etc/acpi/rsdp", 0, 0x1000),
        ]
    );

    let package = outer
        .records
        .iter()
        .find_map(|(record, payload)| {
            matches!(record, Record::Command(Command::Packaged { .. })).then_some(payload)
        })
        .expect("a package");
    assert_eq!(package.len(), 12912);
    let decoder = vmferry_stream::Decoder::new(Options {
        footers: vmferry_stream::Footers::Present,
        ..Options::default()
    });
    let inner = run_decoder(decoder.package(), package, Split::Whole, &find_footer);
    assert_eq!(inner.ending, Ok(Ending::WithoutDescription));
    assert_eq!(
        commands(&inner),
        [
            Command::PostcopyListen,
            Command::Ping(3),
            Command::PostcopyRun
        ]
    );
    assert!(sections(&inner).len() > 20);
}

#[test]
fn huge_pages_are_recognised() {
    for capture_name in ["postcopy-hugepages-72.fwd", "postcopy-hugepages-100.fwd"] {
        let run = decode(capture_name);
        let sizes: Vec<(&Name, Option<u64>)> = ram(&run)
            .filter_map(|(record, _)| match record {
                RamRecord::Block {
                    name, page_bytes, ..
                } => Some((name, *page_bytes)),
                _ => None,
            })
            .collect();
        let huge: Vec<_> = sizes.iter().filter(|(_, size)| size.is_some()).collect();
        assert!(sizes.len() > 1, "{capture_name}");
        assert_eq!(huge.len(), 1, "{capture_name}: {sizes:?}");
        assert_eq!(huge[0].1, Some(2 << 20));
    }
}

/// Every package is decoded to its last byte, by a decoder that follows the one outside.
#[test]
fn packages_decode_to_their_end() {
    let mut packages = 0;
    for capture_name in forward_captures() {
        let decoder = vmferry_stream::Decoder::new(Options {
            footers: vmferry_stream::Footers::Present,
            ..Options::default()
        });
        for (record, payload) in decode(&capture_name).records {
            if !matches!(record, Record::Command(Command::Packaged { .. })) {
                continue;
            }
            let inner = run_decoder(decoder.package(), &payload, Split::Whole, &find_footer);
            assert_eq!(
                inner.ending,
                Ok(Ending::WithoutDescription),
                "{capture_name}"
            );
            assert_eq!(inner.length, payload.len() as u64, "{capture_name}");
            assert_eq!(commands(&inner).last(), Some(&Command::PostcopyRun));
            packages += 1;
        }
    }
    assert!(packages >= 7, "{packages} packages");
}

#[test]
fn the_memory_of_a_background_snapshot_has_no_end() {
    for capture_name in ["bgsnap-72", "bgsnap-100"] {
        let run = decode(capture_name);
        let kinds: Vec<SectionKind> = sections(&run)
            .into_iter()
            .filter_map(|(kind, name)| (name == "ram").then_some(kind))
            .collect();
        assert_eq!(kinds.first(), Some(&SectionKind::Start), "{capture_name}");
        assert!(kinds.contains(&SectionKind::Part), "{capture_name}");
        assert!(!kinds.contains(&SectionKind::End), "{capture_name}");
    }
}
