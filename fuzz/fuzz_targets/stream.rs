//! The decoder of a whole stream, in windows of any size.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmferry_stream::limits::MAX_HEADER_BYTES;
use vmferry_stream::{
    Content, DecodeError, Decoder, Encoder, Ending, Expect, Footers, Options, RamRecord, Record,
    Section, Step,
};

/// Records, each with its payload, and how it ended.
#[derive(Debug, PartialEq)]
struct Run {
    records: Vec<(Record, Vec<u8>)>,
    ending: Result<Ending, DecodeError>,
    footers: Option<bool>,
}

/// What the first byte of the input chooses.
#[derive(Clone, Copy)]
struct Choices {
    options: Options,
    pass_rest: bool,
    package: bool,
}

impl Choices {
    fn new(byte: u8) -> Self {
        Self {
            options: Options {
                configuration: match byte & 3 {
                    1 => Expect::Required,
                    2 => Expect::Absent,
                    _ => Expect::Optional,
                },
                footers: match byte >> 2 & 3 {
                    1 => Footers::Present,
                    2 => Footers::Absent,
                    _ => Footers::Auto,
                },
                start: if byte & 0x80 == 0 { 0 } else { 1 << 20 },
                ..Options::default()
            },
            pass_rest: byte & 0x10 != 0,
            package: byte & 0x20 != 0,
        }
    }

    fn decoder(self) -> Decoder {
        let decoder = Decoder::new(self.options);
        if self.package {
            decoder.package()
        } else {
            decoder
        }
    }
}

/// The length of a device's body: up to its footer, or half of what is left.
fn body_bytes(section: &Section, rest: &[u8]) -> u64 {
    let mut footer = vec![0x7e];
    footer.extend(section.id.0.to_be_bytes());
    let found = rest.windows(footer.len()).position(|bytes| bytes == footer);
    found.unwrap_or(rest.len() / 2) as u64
}

fn run(input: &[u8], choices: Choices, mut window_bytes: impl FnMut() -> usize) -> Run {
    let mut decoder = choices.decoder();
    let mut records: Vec<(Record, Vec<u8>)> = Vec::new();
    let (mut at, mut wanted) = (0, 0);
    let ending = loop {
        let rest = &input[at..];
        let window = &rest[..rest.len().min(window_bytes().max(wanted))];
        match decoder.step(window) {
            Err(error) => {
                assert_eq!(decoder.step(window), Err(error.clone()), "an error repeats");
                break Err(error);
            }
            Ok(Step::NeedMore(bytes)) => {
                assert!(bytes > window.len() && bytes <= MAX_HEADER_BYTES);
                if window.len() == rest.len() {
                    break decoder.finish();
                }
                wanted = bytes;
            }
            Ok(Step::Record { record, used }) => {
                (at, wanted) = (at + used, 0);
                assert!(used <= window.len());
                records.push((record, Vec::new()));
                if let Some((Record::Section(section), _)) = records.last()
                    && section.content() == Content::Device
                {
                    if choices.pass_rest {
                        decoder.pass_rest();
                    } else {
                        decoder.skip_device(body_bytes(section, &input[at..]));
                    }
                }
            }
            Ok(Step::Payload(bytes)) => {
                assert!(bytes > 0);
                let payload = &rest[..rest.len().min(bytes as usize)];
                let record = records.last_mut().expect("payload belongs to a record");
                record.1.extend(payload);
                (at, wanted) = (at + payload.len(), 0);
                if payload.len() < bytes as usize {
                    break decoder.finish_at(at as u64);
                }
            }
            Ok(Step::End) => break decoder.finish(),
        }
    };
    Run {
        records,
        ending,
        footers: decoder.footers(),
    }
}

/// Encode what was decoded, decode it again. The last record may lack payload if the stream is broken.
fn check_encoder(input: &[u8], whole: &Run, choices: Choices) {
    let footers = whole.footers.unwrap_or(true);
    let before = match whole.ending {
        Ok(_) => &whole.records[..],
        Err(_) => whole.records.split_last().map_or(&[][..], |(_, rest)| rest),
    };
    let mut encoder = Encoder::new(footers);
    let mut bytes = Vec::new();
    for (record, payload) in before {
        encoder.record(record, &mut bytes);
        bytes.extend(payload);
    }
    // Offsets of a mapped-ram file are wrong once something before them was written shorter.
    let is_mapped = |(record, _): &(Record, _)| {
        matches!(
            record,
            Record::Ram(RamRecord::Block {
                mapped: Some(_),
                ..
            })
        )
    };
    if before.iter().any(is_mapped) && !input.starts_with(&bytes) {
        return;
    }
    // Some records end where the next item begins.
    bytes.extend([0; 8]);
    let mut choices = choices;
    choices.options.footers = if footers {
        Footers::Present
    } else {
        Footers::Absent
    };
    let again = run(&bytes, choices, || usize::MAX);
    let pairs = before.iter().zip(&again.records);
    let same = pairs.take_while(|(a, b)| a == b).count();
    // Only a device's body of guessed length may be cut elsewhere.
    let device = before.iter().any(|(record, _)| {
        matches!(record, Record::Section(section) if section.content() == Content::Device)
    });
    assert!(
        device || same == before.len(),
        "{:?} became {:?}",
        before.get(same),
        again.records.get(same)
    );
}

fuzz_target!(|data: &[u8]| {
    let Some((&first, input)) = data.split_first() else {
        return;
    };
    let choices = Choices::new(first);
    let whole = run(input, choices, || usize::MAX);
    let mut rng = fastrand::Rng::with_seed(data.len() as u64 * 31 + u64::from(first));
    let cut = run(input, choices, || {
        rng.usize(..if first & 0x40 == 0 { 12 } else { 3000 })
    });
    assert_eq!(whole, cut);
    check_encoder(input, &whole, choices);
});
