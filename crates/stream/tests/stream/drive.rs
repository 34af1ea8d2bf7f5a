//! Drives a decoder over a whole input, in windows of any size.

use vmferry_stream::{DecodeError, Decoder, Ending, Footers, Options, Record, Section, Step};

/// What came out: records in order, each with the payload that followed it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) records: Vec<(Record, Vec<u8>)>,
    pub(crate) ending: Result<Ending, DecodeError>,
    /// Bytes of input that belong to the stream.
    pub(crate) length: u64,
}

/// How the input is cut into windows.
pub(crate) enum Split<'a> {
    Whole,
    Random(&'a mut fastrand::Rng),
}

/// What to do with the body of a device: skip its length, or pass the rest.
pub(crate) type Devices<'a> = &'a dyn Fn(&Section, &[u8]) -> Option<u64>;

pub(crate) fn pass_rest(_: &Section, _: &[u8]) -> Option<u64> {
    None
}

/// The length of a device's body, found by looking for its footer and an item after it.
pub(crate) fn find_footer(section: &Section, rest: &[u8]) -> Option<u64> {
    let mut footer = vec![0x7e];
    footer.extend(section.id.0.to_be_bytes());
    let found = rest
        .windows(6)
        .position(|bytes| bytes[..5] == footer && matches!(bytes[5], 0 | 1 | 2 | 3 | 4 | 8));
    Some(found? as u64)
}

pub(crate) fn run(input: &[u8], options: Options, split: Split<'_>, devices: Devices<'_>) -> Run {
    run_decoder(Decoder::new(options), input, split, devices)
}

pub(crate) fn run_decoder(
    mut decoder: Decoder,
    input: &[u8],
    mut split: Split<'_>,
    devices: Devices<'_>,
) -> Run {
    let mut records: Vec<(Record, Vec<u8>)> = Vec::new();
    let mut at = 0;
    let mut wanted = 0;
    let ending = loop {
        let rest = &input[at..];
        let window = match &mut split {
            Split::Whole => rest,
            Split::Random(rng) => {
                let spare = if rng.bool() {
                    rng.usize(..20)
                } else {
                    rng.usize(..5000)
                };
                &rest[..rest.len().min(wanted.max(1) + spare)]
            }
        };
        match decoder.step(window) {
            Err(error) => break Err(error),
            Ok(Step::NeedMore(bytes)) => {
                assert!(bytes > window.len() && bytes <= vmferry_stream::limits::MAX_HEADER_BYTES);
                if window.len() == rest.len() {
                    break decoder.finish();
                }
                wanted = bytes;
            }
            Ok(Step::Record { record, used }) => {
                at += used;
                wanted = 0;
                assert_eq!(decoder.offset(), at as u64);
                let section = match &record {
                    Record::Section(section) => Some(section.clone()),
                    _ => None,
                };
                records.push((record, Vec::new()));
                if let Some(section) = section
                    && section.content() == vmferry_stream::Content::Device
                {
                    match devices(&section, &input[at..]) {
                        Some(bytes) => decoder.skip_device(bytes),
                        None => decoder.pass_rest(),
                    }
                }
            }
            Ok(Step::Payload(bytes)) => {
                let bytes = bytes as usize;
                let available = bytes.min(input.len() - at);
                let payload = &mut records.last_mut().expect("a record before its payload").1;
                payload.extend(&input[at..at + available]);
                at += available;
                wanted = 0;
                if available < bytes {
                    break decoder.finish_at(at as u64);
                }
            }
            Ok(Step::End) => break decoder.finish(),
        }
    };
    Run {
        records,
        ending,
        length: at as u64,
    }
}

/// Options for streams of machine types up to 2.3.
pub(crate) fn without_footers() -> Options {
    Options {
        footers: Footers::Absent,
        ..Options::default()
    }
}
