//! The return path, as real destinations wrote it and as ours does.

use vmferry_stream::return_path::{ReturnDecoder, ReturnMessage};
use vmferry_stream::{DecodeError, Fault, Step};

use crate::{capture, name, rounds, seeded};

/// Every message, with the payload that followed.
fn decode(
    input: &[u8],
    mut window_bytes: impl FnMut() -> usize,
) -> Result<Vec<(ReturnMessage, Vec<u8>)>, DecodeError> {
    let mut decoder = ReturnDecoder::new();
    let mut messages: Vec<(ReturnMessage, Vec<u8>)> = Vec::new();
    let (mut at, mut wanted) = (0, 0);
    loop {
        let rest = &input[at..];
        let window = &rest[..rest.len().min(window_bytes().max(wanted))];
        match decoder.step(window)? {
            Step::NeedMore(bytes) => {
                assert!(bytes > window.len());
                if window.len() == rest.len() {
                    assert!(rest.is_empty() && decoder.between_messages());
                    return Ok(messages);
                }
                wanted = bytes;
            }
            Step::Record { record, used } => {
                messages.push((record, Vec::new()));
                at += used;
                wanted = 0;
            }
            Step::Payload(bytes) => {
                let payload = &input[at..at + bytes as usize];
                messages.last_mut().expect("a message").1.extend(payload);
                at += bytes as usize;
            }
            Step::End => panic!("a return path has no end"),
        }
        assert_eq!(decoder.offset(), at as u64);
    }
}

#[test]
fn captures() {
    for (capture_name, messages) in [
        ("return-path-72.rp", 2),
        ("return-path-100.rp", 2),
        ("switchover-ack-100.rp", 3),
        ("postcopy-72.rp", 0),
        ("postcopy-100.rp", 0),
        ("postcopy-100-to-72.rp", 0),
        ("preempt-72.conn0.rp", 0),
        ("preempt-100.conn0.rp", 0),
        ("postcopy-hugepages-72.rp", 0),
        ("postcopy-hugepages-100.rp", 0),
        ("postcopy-advised-only-72.rp", 2),
        ("postcopy-advised-only-100.rp", 2),
    ] {
        let input = capture(capture_name);
        let decoded = decode(&input, || usize::MAX).expect(capture_name);
        if messages > 0 {
            assert_eq!(decoded.len(), messages, "{capture_name}");
        }
        assert!(
            decoded
                .iter()
                .any(|(message, _)| *message == ReturnMessage::Pong(1))
        );
        let last = decoded.last().map(|(message, _)| message);
        assert_eq!(last, Some(&ReturnMessage::Shut(0)), "{capture_name}");
        let mut encoded = Vec::new();
        for (message, _) in &decoded {
            message.encode(&mut encoded);
        }
        assert_eq!(encoded, input, "{capture_name}");
    }
    let postcopy = decode(&capture("postcopy-72.rp"), || usize::MAX).expect("decodes");
    assert!(postcopy.contains(&(
        ReturnMessage::RequestPages {
            block: Some(name("pc.bios")),
            start_bytes: 0,
            length_bytes: 4096
        },
        Vec::new()
    )));
}

#[test]
fn recovery_bitmap() {
    let mut input = b"\0\x05\0\x07\x06pc.ram".to_vec();
    input.extend(32u64.to_be_bytes());
    input.extend([0xff; 32]);
    input.extend(0x0123_4567_89ab_cdefu64.to_be_bytes());
    input.extend(b"\0\x06\0\x04\0\0\0\x01");
    let bitmap = ReturnMessage::ReceivedBitmap {
        block: name("pc.ram"),
        bytes: 32,
    };
    assert_eq!(
        decode(&input, || usize::MAX),
        Ok(vec![
            (bitmap, vec![0xff; 32]),
            (ReturnMessage::ReceivedBitmapEnd, vec![]),
            (ReturnMessage::ResumeAck(1), vec![])
        ])
    );
    input[51] ^= 1;
    let error = decode(&input, || usize::MAX).expect_err("end mark is wrong");
    assert!(matches!(error.fault, Fault::Unexpected { .. }));
    assert_eq!(error.offset, 51);
}

#[test]
fn messages_that_do_not_exist() {
    let fault = |bytes: &[u8]| decode(bytes, || usize::MAX).expect_err("refused").fault;
    for number in [0u16, 8, 0xffff] {
        let message = [&number.to_be_bytes()[..], &[0, 4, 0, 0, 0, 0]].concat();
        assert_eq!(
            fault(&message),
            Fault::UnknownReturnMessage { number, length: 4 }
        );
    }
    for (number, length) in [(1, 0), (2, 8), (3, 12), (4, 13), (6, 0), (7, 4)] {
        assert!(
            matches!(fault(&[0, number, 0, length]), Fault::WrongLength { .. }),
            "{number}"
        );
    }
    let mut request = vec![0, 3, 0, 15];
    request.extend([0; 12]);
    request.extend(b"\x03mem");
    assert!(matches!(fault(&request), Fault::WrongLength { .. }));
    assert!(matches!(
        fault(b"\0\x05\0\x05\x03mem"),
        Fault::WrongLength { .. }
    ));
}

#[test]
fn round_trip_in_any_split() {
    let mut rng = seeded();
    for _ in 0..rounds(200) {
        let mut input = Vec::new();
        let mut messages = Vec::new();
        for _ in 0..rng.usize(..12) {
            let block = name(&"b".repeat(rng.usize(..=255)));
            let message = match rng.u8(..7) {
                0 => ReturnMessage::Shut(rng.u32(..)),
                1 => ReturnMessage::Pong(rng.u32(..)),
                2 | 3 => ReturnMessage::RequestPages {
                    block: rng.bool().then_some(block),
                    start_bytes: rng.u64(..),
                    length_bytes: rng.u32(..),
                },
                4 => ReturnMessage::ReceivedBitmap {
                    block,
                    bytes: rng.u32(..100),
                },
                5 => ReturnMessage::ResumeAck(1),
                _ => ReturnMessage::SwitchoverAck,
            };
            message.encode(&mut input);
            let mut payload = Vec::new();
            if let ReturnMessage::ReceivedBitmap { bytes, .. } = &message {
                payload.extend((0..*bytes).map(|_| rng.u8(..)));
                input.extend(&payload);
                messages.push((message, payload));
                ReturnMessage::ReceivedBitmapEnd.encode(&mut input);
                messages.push((ReturnMessage::ReceivedBitmapEnd, Vec::new()));
            } else {
                messages.push((message, payload));
            }
        }
        let decoded = decode(&input, || rng.usize(..40));
        assert_eq!(decoded, Ok(messages));
    }
}
