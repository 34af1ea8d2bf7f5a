//! Reading and writing over sockets and pipes.

use std::io::IoSlice;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use vmferry_channel::{Channel, ChannelError, Direction, RateLimit, Reader, Writer};

use crate::{halves, pipe, read_to_end, reader_of, rng, stop, stop_while_blocked, writer_of};

/// Send random data in random pieces both sides disagree about.
fn transfer(mut reader: Reader, mut writer: Writer) {
    let mut rng = rng();
    let mut data = vec![0; 3_000_000 + rng.usize(0..1000)];
    rng.fill(&mut data);
    let (written, read) = (writer.counter().clone(), reader.counter().clone());
    let mut pieces = rng.fork();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut rest = &data[..];
            while !rest.is_empty() {
                let slices: Vec<IoSlice<'_>> = (0..pieces.usize(1..50))
                    .map(|_| {
                        let length = pieces.usize(0..20_000).min(rest.len());
                        let (piece, more) = rest.split_at(length);
                        rest = more;
                        IoSlice::new(piece)
                    })
                    .collect();
                writer.write_vectored_all(&slices).unwrap();
            }
            writer.shutdown().unwrap();
            let error = writer.write_all(b"x").unwrap_err();
            assert!(matches!(error, ChannelError::Closed { .. }), "{error}");
        });
        let mut seen = Vec::new();
        let mut buf = vec![0; 100_000];
        loop {
            let length = if rng.bool() {
                rng.usize(1..200)
            } else {
                rng.usize(1..buf.len())
            };
            match reader.read(&mut buf[..length]).unwrap() {
                0 => break,
                got => seen.extend_from_slice(&buf[..got]),
            }
        }
        assert!(seen == data, "what arrives is what was sent");
    });
    assert_eq!(written.bytes(), data.len() as u64);
    assert_eq!(read.bytes(), data.len() as u64);
}

#[test]
fn everything_arrives_over_a_socket() {
    let (a, b) = Channel::pair(&stop(), &stop()).unwrap();
    let ((reader, _keep), (_keep_too, writer)) = (halves(a), halves(b));
    transfer(reader, writer);
}

#[test]
fn everything_arrives_over_a_pipe() {
    let (reader, writer) = pipe(&stop(), &stop());
    transfer(reader, writer);
}

#[test]
fn a_half_closed_socket_still_answers() {
    let (a, b) = Channel::pair(&stop(), &stop()).unwrap();
    let ((mut a_reader, mut a_writer), (mut b_reader, mut b_writer)) = (halves(a), halves(b));
    a_writer.write_all(b"question").unwrap();
    a_writer.shutdown().unwrap();
    a_writer.shutdown().unwrap();
    assert_eq!(read_to_end(&mut b_reader), b"question");
    b_writer.write_all(b"answer").unwrap();
    b_writer.finish(None).unwrap();
    assert_eq!(read_to_end(&mut a_reader), b"answer");
}

#[test]
fn a_stop_wakes_a_blocked_reader() {
    let mine = stop();
    let (mut pipe_reader, _writer) = pipe(&mine, &stop());
    let error = stop_while_blocked(&mine, || pipe_reader.read(&mut [0; 8]).unwrap_err());
    assert!(error.is_stopped(), "{error}");

    let mine = stop();
    let (a, _b) = Channel::pair(&mine, &stop()).unwrap();
    let (mut reader, _writer) = halves(a);
    let error = stop_while_blocked(&mine, || reader.read_exact(&mut [0; 8]).unwrap_err());
    assert!(error.is_stopped(), "{error}");
    assert!(reader.stop().is_triggered());
}

#[test]
fn a_stop_wakes_a_blocked_writer() {
    let mine = stop();
    let (_reader, mut pipe_writer) = pipe(&stop(), &mine);
    let error = stop_while_blocked(&mine, || pipe_writer.write_all(&[1; 1 << 24]).unwrap_err());
    assert!(error.is_stopped(), "{error}");

    let mine = stop();
    let (a, _b) = Channel::pair(&mine, &stop()).unwrap();
    let (_reader, mut writer) = halves(a);
    let error = stop_while_blocked(&mine, || writer.write_all(&[1; 1 << 24]).unwrap_err());
    assert!(error.is_stopped(), "{error}");
    assert!(writer.stop().is_triggered());
}

#[test]
fn a_stopped_half_does_nothing_even_if_it_could() {
    let (reading, writing) = (stop(), stop());
    let (mut reader, mut writer) = pipe(&reading, &writing);
    writer.write_all(b"here").unwrap();
    reading.trigger();
    writing.trigger();
    assert!(reader.read(&mut [0; 4]).unwrap_err().is_stopped());
    assert!(writer.write_all(b"more").unwrap_err().is_stopped());
    assert_eq!(writer.counter().bytes(), 4);
}

#[test]
fn deadlines_end_reads_and_writes_but_not_what_needs_no_waiting() {
    let past = Some(Instant::now());
    let (mut reader, mut writer) = pipe(&stop(), &stop());
    writer.write_all_until(b"abc", past).unwrap();
    let mut buf = [0; 3];
    assert_eq!(reader.read_until(&mut buf[..2], past).unwrap(), 2);
    let error = reader.read_exact_until(&mut buf, past).unwrap_err();
    assert!(matches!(error, ChannelError::TimedOut { .. }), "{error}");
    assert!(
        error
            .to_string()
            .starts_with("read from test input: no progress")
    );
    let error = writer.write_all_until(&[0; 1 << 24], past).unwrap_err();
    assert!(matches!(error, ChannelError::TimedOut { .. }), "{error}");

    let soon = Some(Instant::now() + Duration::from_millis(20));
    let (a, _b) = Channel::pair(&stop(), &stop()).unwrap();
    let error = halves(a).0.read_until(&mut buf, soon).unwrap_err();
    assert!(matches!(error, ChannelError::TimedOut { .. }), "{error}");
}

#[test]
fn an_early_end_says_how_much_was_missing() {
    let (mut reader, mut writer) = pipe(&stop(), &stop());
    writer.write_all(b"abc").unwrap();
    drop(writer);
    let error = reader.read_exact(&mut [0; 8]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "read from test input: the stream ended after 3 of 8 bytes"
    );
    assert_eq!(
        reader.read(&mut [0; 8]).unwrap(),
        0,
        "the end stays the end"
    );
}

#[test]
fn writing_to_nobody_is_an_error_not_a_signal() {
    let (a, b) = Channel::pair(&stop(), &stop()).unwrap();
    drop(b);
    let error = halves(a).1.write_all(b"x").unwrap_err();
    assert!(matches!(error, ChannelError::Closed { .. }), "{error}");

    let (reader, mut writer) = pipe(&stop(), &stop());
    drop(reader);
    let error = writer.write_all(b"x").unwrap_err();
    assert_eq!(
        error.to_string(),
        "write to test output: the other side has closed the channel"
    );
}

#[test]
fn flags_of_descriptors_that_were_handed_in_stay_as_they_are() {
    for nonblocking in [false, true] {
        let (input, output) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
        // Duplicates share the flags and outlive the halves.
        let watched = [
            input.try_clone().unwrap(),
            output.try_clone().unwrap(),
            a.as_fd().try_clone_to_owned().unwrap(),
            b.as_fd().try_clone_to_owned().unwrap(),
        ];
        if nonblocking {
            for fd in &watched {
                fcntl_setfl(fd, fcntl_getfl(fd).unwrap() | OFlags::NONBLOCK).unwrap();
            }
        }
        let before = watched.each_ref().map(|fd| fcntl_getfl(fd).unwrap());
        for (input, output) in [(input, output), (a.into(), b.into())] {
            let mut reader = reader_of(input, &stop());
            let mut writer = writer_of(output, &stop());
            let past = Some(Instant::now());
            assert!(
                reader.read_until(&mut [0; 1], past).is_err(),
                "waits for data"
            );
            writer.write_all(b"x").unwrap();
            assert_eq!(reader.read(&mut [0; 1]).unwrap(), 1);
        }
        assert_eq!(
            watched.each_ref().map(|fd| fcntl_getfl(fd).unwrap()),
            before
        );
    }
}

#[test]
fn descriptors_that_are_no_channels_are_refused() {
    let refused = |fd, direction| {
        Channel::from_fd(fd, direction, "it", &stop())
            .unwrap_err()
            .to_string()
    };
    let (input, output) = rustix::pipe::pipe().unwrap();
    assert_eq!(
        refused(input, Direction::Outgoing),
        "it: it cannot be written"
    );
    assert_eq!(
        refused(output, Direction::Incoming),
        "it: it cannot be read"
    );
    let folder = std::fs::File::open("/").unwrap();
    assert_eq!(
        refused(folder.into(), Direction::Incoming),
        "it: it is a directory"
    );
    let (datagram, _other) = UnixDatagram::pair().unwrap();
    assert_eq!(
        refused(datagram.into(), Direction::Incoming),
        "it: it is no stream socket"
    );
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    assert!(refused(listener.into(), Direction::Incoming).contains("listening"));
}

#[test]
fn a_device_is_a_channel_too() {
    let zero = std::fs::File::open("/dev/zero").unwrap();
    let mut buf = [1; 100];
    reader_of(zero.into(), &stop())
        .read_exact(&mut buf)
        .unwrap();
    assert_eq!(buf, [0; 100]);
    let null = std::fs::File::create("/dev/null").unwrap();
    let mut writer = writer_of(null.into(), &stop());
    writer.write_all(&[1; 1 << 20]).unwrap();
    writer.sync().unwrap();
    assert_eq!(writer.counter().bytes(), 1 << 20);
}

#[test]
fn a_rate_limit_holds_a_writer_back_until_it_is_lifted() {
    let (mut reader, mut writer) = pipe(&stop(), &stop());
    let limit = RateLimit::new(10);
    writer.set_rate_limit(limit.clone());
    let past = Some(Instant::now());
    let error = writer.write_all_until(&[7; 1000], past).unwrap_err();
    assert!(matches!(error, ChannelError::TimedOut { .. }), "{error}");
    assert_eq!(writer.counter().bytes(), 1, "one byte for each slice");
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| writer.write_all(&[7; 1 << 20]));
        limit.set(0);
        let mut all = vec![0; (1 << 20) + 1];
        reader.read_exact(&mut all).unwrap();
        worker.join().unwrap().unwrap();
    });
}

#[test]
fn a_stop_wakes_a_writer_that_waits_for_its_next_slice() {
    let mine = stop();
    let (_reader, mut writer) = pipe(&stop(), &mine);
    writer.set_rate_limit(RateLimit::new(1));
    let error = stop_while_blocked(&mine, || writer.write_all(&[1; 1000]).unwrap_err());
    assert!(error.is_stopped(), "{error}");
}
