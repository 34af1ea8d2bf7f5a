//! The decoder of a return path, in windows of any size.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmferry_stream::limits::MAX_HEADER_BYTES;
use vmferry_stream::return_path::{ReturnDecoder, ReturnMessage};
use vmferry_stream::{DecodeError, Step};

type Messages = Vec<(ReturnMessage, Vec<u8>)>;

/// Messages, each with its payload; the error; whether the input ended inside a message.
fn run(
    input: &[u8],
    mut window_bytes: impl FnMut() -> usize,
) -> (Messages, Result<bool, DecodeError>) {
    let mut decoder = ReturnDecoder::new();
    let mut messages = Messages::new();
    let (mut at, mut wanted) = (0, 0);
    loop {
        let rest = &input[at..];
        let window = &rest[..rest.len().min(window_bytes().max(wanted))];
        match decoder.step(window) {
            Err(error) => return (messages, Err(error)),
            Ok(Step::NeedMore(bytes)) => {
                assert!(bytes > window.len() && bytes <= MAX_HEADER_BYTES);
                if window.len() == rest.len() {
                    let whole = rest.is_empty() && decoder.between_messages();
                    return (messages, Ok(whole));
                }
                wanted = bytes;
            }
            Ok(Step::Record { record, used }) => {
                messages.push((record, Vec::new()));
                (at, wanted) = (at + used, 0);
            }
            Ok(Step::Payload(bytes)) => {
                let payload = &rest[..rest.len().min(bytes as usize)];
                let message = messages.last_mut().expect("payload belongs to a message");
                message.1.extend(payload);
                at += payload.len();
                if payload.len() < bytes as usize {
                    return (messages, Ok(false));
                }
            }
            Ok(Step::End) => panic!("a return path has no end"),
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let whole = run(input, || usize::MAX);
    let mut rng = fastrand::Rng::with_seed(input.len() as u64);
    assert_eq!(whole, run(input, || rng.usize(..12)));
    if whole.1 == Ok(true) {
        let mut bytes = Vec::new();
        for (message, payload) in &whole.0 {
            message.encode(&mut bytes);
            bytes.extend(payload);
        }
        assert_eq!(bytes, input, "a return path has one encoding");
    }
});
