//! What a plain stream says.

use std::collections::BTreeMap;

use vmferry_stream::{Decoder, Ending, Options, RamRecord, Record, Section, SectionKind, Step};

/// Content of a page: its bytes, or its fill.
pub(crate) type Memory = BTreeMap<(String, u64), Vec<u8>>;

/// A plain stream, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Plain {
    pub(crate) memory: Memory,
    /// Everything but pages and the frames of ram's PARTs, up to the first device.
    pub(crate) others: Vec<String>,
    /// From the first device on.
    pub(crate) rest: Vec<u8>,
    pub(crate) ending: Ending,
}

/// Take a stream apart that must be plain and whole.
pub(crate) fn read(bytes: &[u8]) -> Plain {
    let (plain, flushes) = read_main(bytes);
    assert_eq!(flushes, 0, "a plain stream has no flush words");
    plain
}

/// The same for a main connection, and how many flush words it has.
pub(crate) fn read_main(bytes: &[u8]) -> (Plain, usize) {
    let mut flushes = 0;
    let mut decoder = Decoder::new(Options::default());
    let mut window = bytes;
    let (mut memory, mut others, mut rest) = (Memory::new(), Vec::new(), Vec::new());
    let mut last: Option<RamRecord> = None;
    let mut section: Option<Section> = None;
    let mut is_rest = false;
    loop {
        match decoder.step(window).expect("a right stream") {
            Step::NeedMore(_) if window.is_empty() => break,
            Step::NeedMore(bytes) => panic!("cut {bytes} bytes before its end"),
            Step::End => break,
            Step::Record { record, used } => {
                window = &window[used..];
                if let Record::Section(found) = &record {
                    section = Some(found.clone());
                    let is_device = !["ram", "dirty-bitmap"].contains(&found.name.as_str());
                    match found.name.as_str() {
                        "early" => decoder.skip_device(4),
                        "0000:00:03.0/virtio-mem-device-early" => decoder.skip_device(44),
                        _ if is_device => {
                            is_rest = true;
                            decoder.pass_rest();
                        }
                        _ => {}
                    }
                }
                let kind = section.as_ref().map(|section| section.kind);
                let is_ram_part = kind == Some(SectionKind::Part)
                    && section
                        .as_ref()
                        .is_some_and(|section| &*section.name == "ram");
                match &record {
                    Record::Ram(RamRecord::Zero { page, fill }) => {
                        let key = (page.block.to_string(), page.offset_bytes);
                        memory.insert(key, vec![*fill; 4096]);
                    }
                    Record::Ram(RamRecord::MultifdFlush) => flushes += 1,
                    Record::Ram(ram @ RamRecord::Page { .. }) => last = Some(ram.clone()),
                    Record::Section(_)
                    | Record::SectionEnd { .. }
                    | Record::Ram(RamRecord::EndOfSection)
                        if is_ram_part => {}
                    record => others.push(format!("{record:?}")),
                }
            }
            Step::Payload(bytes) => {
                let (payload, after) = window.split_at(bytes as usize);
                window = after;
                match last.take() {
                    Some(RamRecord::Page { page, .. }) => {
                        let key = (page.block.to_string(), page.offset_bytes);
                        memory.insert(key, payload.to_vec());
                    }
                    _ if is_rest => rest.extend(payload),
                    _ => others.push(format!("{payload:?}")),
                }
            }
        }
    }
    let plain = Plain {
        memory,
        others,
        rest,
        ending: decoder.finish().expect("a whole stream"),
    };
    (plain, flushes)
}
