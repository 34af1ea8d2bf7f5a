//! Plain streams that are split and joined again.

use std::sync::Mutex;

use vmferry_channel::{Channel, Writer};
use vmferry_multifd::{
    Compression, Flush, JoinOptions, MultifdError, Split, SplitOptions, accept, connect,
};

use crate::ends::{PATIENCE, consume, listener, rounds, seeded, stop};
use crate::streams::random;
use crate::{captures, plain};

const COMPRESSIONS: [Compression; 3] = [Compression::None, Compression::Zlib, Compression::Zstd];

/// Write in random pieces.
fn write(writer: &mut Writer, mut bytes: &[u8], rng: &mut fastrand::Rng) {
    while !bytes.is_empty() {
        let most = if rng.u8(..4) == 0 { 100 } else { 200_000 };
        let (piece, rest) = bytes.split_at(bytes.len().min(rng.usize(1..most)));
        // Whoever reads it may have had enough; that is told by `finish`.
        if writer.write_all(piece).is_err() {
            return;
        }
        bytes = rest;
    }
}

/// Send a stream with these options to a destination with those.
pub(crate) fn travel(
    bytes: &[u8],
    from: SplitOptions,
    to: &JoinOptions,
    rng: &mut fastrand::Rng,
) -> (Vec<u8>, Result<(), MultifdError>, Result<(), MultifdError>) {
    let (listener, stop) = (listener(), stop());
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| {
            let split = connect(listener.local(), from, &stop, PATIENCE)?;
            let Split { channel, splitting } = split;
            let (Some(_reader), Some(mut writer)) = channel.split() else {
                panic!("the channel goes both ways");
            };
            write(&mut writer, bytes, rng);
            drop(writer);
            splitting.finish()
        });
        let (seen, received) = match accept(&listener, to, &stop) {
            Ok(joined) => consume(joined),
            Err(error) => (Vec::new(), Err(error)),
        };
        (seen, sending.join().expect("no panic"), received)
    })
}

#[test]
fn what_is_split_is_joined_to_the_same_machine() {
    let mut rng = seeded();
    for round in 0..rounds(60, 3000) {
        let bytes = random(&mut rng);
        let channels = *rng.choice(&[1, 2, 3, 7]).expect("some");
        let compression = *rng.choice(&COMPRESSIONS).expect("some");
        let mut from = SplitOptions::new(channels, compression);
        let flushes = [None, Some(Flush::EachSection), Some(Flush::EachRound)];
        from.flush = *rng.choice(&flushes).expect("some");
        let to = JoinOptions::new(channels, compression);
        let what = format!("round {round}: {from:?}");
        let (seen, sent, received) = travel(&bytes, from, &to, &mut rng);
        assert!(
            sent.is_ok() && received.is_ok(),
            "{what}: {sent:?}, {received:?}"
        );
        let (expected, joined) = (plain::read(&bytes), plain::read(&seen));
        assert!(joined.memory == expected.memory, "{what}: memory differs");
        assert_eq!(joined.others, expected.others, "{what}");
        assert!(joined.rest == expected.rest, "{what}: devices differ");
    }
}

#[test]
fn captures_travel_on() {
    let mut rng = seeded();
    for (name, compression) in captures::CAPTURES {
        let connections = captures::capture(name);
        let options = JoinOptions::new(2, compression);
        let (bytes, _) = crate::ends::join(&connections, &options, &mut rng);
        for compression in COMPRESSIONS {
            let from = SplitOptions::new(4, compression);
            let to = JoinOptions::new(4, compression);
            let (seen, sent, received) = travel(&bytes, from, &to, &mut rng);
            assert!(sent.is_ok() && received.is_ok(), "{sent:?} {received:?}");
            assert!(plain::read(&seen) == plain::read(&bytes), "{name}");
        }
    }
}

#[test]
fn the_return_path_goes_straight_back() {
    let mut rng = seeded();
    let bytes = random(&mut rng);
    let (listener, stop) = (listener(), stop());
    let to = JoinOptions::new(3, Compression::None);
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| {
            let options = SplitOptions::new(3, Compression::None);
            let split = connect(listener.local(), options, &stop, PATIENCE).expect("connected");
            let (Some(mut reader), Some(mut writer)) = split.channel.split() else {
                panic!("the channel goes both ways");
            };
            write(&mut writer, &bytes, &mut rng);
            // Before the end of the stream, whose writer stays open.
            let mut answer = [0; 8];
            let until = Some(std::time::Instant::now() + PATIENCE);
            reader
                .read_exact_until(&mut answer, until)
                .expect("an answer");
            assert_eq!(&answer, b"00010004");
            split.splitting.finish()
        });
        let joined = accept(&listener, &to, &stop).expect("all come");
        let Channel::TwoWay(mut reader, mut writer) = joined.channel else {
            panic!("the channel goes both ways");
        };
        let until = Some(std::time::Instant::now() + PATIENCE);
        let mut seen = vec![0; 1];
        while !seen.ends_with(crate::streams::DESCRIPTION) {
            let mut piece = [0; 5000];
            let got = reader.read_until(&mut piece, until).expect("more comes");
            seen.extend(&piece[..got]);
        }
        writer.write_all(b"00010004").expect("it is read");
        drop((reader, writer));
        joined.joining.finish().expect("it went well");
        sending.join().expect("no panic").expect("it went well");
    });
}

/// Whoever gives up knows why; that nothing else was wrong is all that is said.
#[test]
fn either_end_may_give_up() {
    let mut rng = seeded();
    for _ in 0..rounds(20, 1000) {
        let bytes = random(&mut rng);
        let cut = rng.usize(..bytes.len());
        let (listener, stop) = (listener(), stop());
        let seen = Mutex::new(0);
        std::thread::scope(|scope| {
            let sending = scope.spawn(|| {
                let options = SplitOptions::new(2, Compression::None);
                let mut split = connect(listener.local(), options, &stop, PATIENCE)?;
                if let Channel::TwoWay(_, writer) = &mut split.channel {
                    // It breaks at some time, or is taken whole.
                    let _ = writer.write_all(&bytes);
                }
                split.finish()
            });
            let to = JoinOptions::new(2, Compression::None);
            if let Ok(mut joined) = accept(&listener, &to, &stop) {
                if let Channel::TwoWay(reader, _) = &mut joined.channel {
                    let mut piece = vec![0; cut];
                    *seen.lock().expect("not poisoned") = cut;
                    let _ = reader.read_exact(&mut piece);
                }
                let outcome = joined.finish();
                assert!(outcome.is_ok(), "{outcome:?}");
            }
            // Whatever it says, it ends.
            let _ = sending.join().expect("no panic");
        });
        assert!(seen.into_inner().is_ok());
        let options = SplitOptions::new(2, Compression::Zlib);
        let to = JoinOptions::new(2, Compression::Zlib);
        let (_, sent, received) = travel(&bytes[..cut], options, &to, &mut rng);
        assert!(received.is_err(), "cut at {cut} of {}", bytes.len());
        assert!(sent.is_ok(), "{sent:?} {received:?}");
    }
}

/// Whoever gives up does not wait for a destination that takes nothing.
#[test]
fn a_destination_that_takes_nothing_is_given_up() {
    let mut rng = seeded();
    let (listener, stop) = (listener(), stop());
    let patience = std::time::Duration::from_secs(1);
    let options = SplitOptions::new(2, Compression::None);
    let split = connect(listener.local(), options, &stop, patience).expect("it listens");
    let main = listener.accept(&stop).expect("it connects");
    let mut stream = crate::streams::Stream::new("microvm", None, true);
    stream.blocks(&[("pc.ram", 10_000)]);
    stream.begin_ram(vmferry_stream::SectionKind::Part);
    let mut content = vec![0; 4096];
    for page in 0..10_000 {
        rng.fill(&mut content);
        stream.page("pc.ram", page, &content);
    }
    let Channel::TwoWay(_reader, mut writer) = split.channel else {
        panic!("the channel goes both ways");
    };
    let until = Some(std::time::Instant::now() + patience);
    let error = writer.write_all_until(&stream.bytes, until);
    error.expect_err("there is not so much room");
    drop(writer);
    let outcome = split.splitting.finish();
    assert!(
        matches!(outcome, Err(MultifdError::Stalled { .. })),
        "{outcome:?}"
    );
    drop(main);
}
