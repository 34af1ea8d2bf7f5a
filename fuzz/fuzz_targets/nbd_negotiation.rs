//! The NBD server's handshake, in windows of any size.
//!
//! The first byte of the input seeds the splits, the rest is what the client sends.

#![no_main]

use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use vmferry_nbd::Unavailable;
use vmferry_nbd::negotiation::{Catalog, ExportInfo, Misbehaviour, Negotiation, Progress};
use vmferry_nbd::protocol::{OPTION_BYTES, OPTION_BYTES_MAX};

struct Two;

impl Catalog for Two {
    type Export = String;

    fn list(&self) -> Vec<String> {
        vec!["disk".to_owned(), "ro".to_owned()]
    }

    fn open(&self, name: &str) -> Result<(String, ExportInfo), Unavailable> {
        match name {
            "disk" | "ro" => Ok((
                name.to_owned(),
                ExportInfo {
                    length: 1 << 30,
                    read_only: name == "ro",
                    preferred_bytes: 4096,
                },
            )),
            "moved" => Err(Unavailable::Departed),
            _ => Err(Unavailable::Unknown),
        }
    }

    fn description(&self, name: &str) -> Option<String> {
        (name == "disk").then(|| "a disk".to_owned())
    }
}

type End = Result<Progress<String>, Misbehaviour>;

/// Everything that the server says, how it ends, and how much of the input that took.
fn run(input: &[u8], mut piece_bytes: impl FnMut() -> usize) -> (Vec<u8>, End, usize) {
    let now = Instant::now();
    let mut out = Vec::new();
    let mut negotiation = Negotiation::new(now + Duration::from_secs(1), &mut out);
    let (mut start, mut end) = (0, 0);
    loop {
        let said = out.len();
        let window = &input[start..end];
        match negotiation.handle(now, window, &Two, &mut out) {
            Ok((0, Progress::NeedMore)) => {
                assert!(window.len() < OPTION_BYTES + OPTION_BYTES_MAX as usize);
                assert_eq!(out.len(), said, "it speaks before it has understood");
                if end == input.len() {
                    return (out, Ok(Progress::NeedMore), start);
                }
                end = input.len().min(end + piece_bytes());
            }
            Ok((used, Progress::Advanced)) => {
                assert!(used > 0 && used <= window.len());
                assert!(out.len() - said <= 64 << 10, "one option, one short answer");
                start += used;
            }
            Ok((used, end)) => return (out, Ok(end), start + used),
            Err(misbehaviour) => return (out, Err(misbehaviour), start),
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((seed, input)) = data.split_first() else {
        return;
    };
    let mut random = fastrand::Rng::with_seed(u64::from(*seed));
    let whole = run(input, || usize::MAX / 2);
    let split = run(input, || random.usize(1..50));
    assert_eq!(whole, split);
});
