//! Sources that are broken, late, hostile, or strangers. Each ends in an error that says where; none in a wait.

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use vmferry_channel::{Channel, Stop};
use vmferry_multifd::packet::{HANDSHAKE_BYTES, Handshake, Packet, PacketFormat, PacketPages};
use vmferry_multifd::{Compression, JoinOptions, MultifdError, accept};
use vmferry_stream::{PageBits, RamRecord, SectionKind};

use crate::captures::{CAPTURES, capture};
use crate::ends::{PATIENCE, consume, dial, join, listener, read_all, rounds, seeded, stop};
use crate::streams::{Stream, name};

const FORMAT: PacketFormat = PacketFormat {
    page: PageBits::X86,
    compression: Compression::None,
};

fn handshake(channel: u8) -> Vec<u8> {
    let uuid = [0; 16];
    Handshake { uuid, channel }.encode().to_vec()
}

fn packet(sync: bool, pages: Option<PacketPages>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let data = pages.as_ref().map_or(0, |pages| pages.data_bytes);
    let number = 0;
    let packet = Packet {
        number,
        sync,
        pages,
    };
    FORMAT.encode(&packet, &mut bytes);
    bytes.resize(bytes.len() + data as usize, 0x55);
    bytes
}

fn sync() -> Vec<u8> {
    packet(true, None)
}

/// Consecutive pages of a block.
fn pages(block: &str, first: u64, count: u64) -> Vec<u8> {
    let offsets = (first..first + count).map(|page| page << 12);
    packet(
        false,
        Some(PacketPages {
            block: name(block),
            normal: offsets.collect(),
            zero: Vec::new(),
            data_bytes: u32::try_from(count << 12).expect("few"),
        }),
    )
}

/// A main connection that synchronises in each section, up to what a test is about.
struct Main(Stream);

impl Main {
    fn new() -> Self {
        let mut stream = Stream::new("pc-i440fx-7.2", None, true);
        stream.blocks(&[("pc.ram", 1024), ("pc.bios", 16)]);
        Self(stream)
    }

    fn part(mut self) -> Self {
        self.0.begin_ram(SectionKind::Part);
        self.0.end_ram();
        self
    }

    fn end(mut self) -> Vec<u8> {
        self.0.begin_ram(SectionKind::End);
        self.0.end_ram();
        self.0.device(7, "timer", b"body");
        self.0.end();
        self.0.bytes
    }
}

/// What is said about two channels with this content besides a whole main connection with one PART.
fn joined_error(main: Vec<u8>, channels: [&[Vec<u8>]; 2]) -> String {
    let mut rng = seeded();
    let mut connections = vec![main];
    for (number, packets) in (0..).zip(channels) {
        connections.push([&[handshake(number)], packets].concat().concat());
    }
    let options = JoinOptions::new(2, Compression::None);
    let (_, outcome) = join(&connections, &options, &mut rng);
    outcome.expect_err("it is broken").to_string()
}

#[test]
fn wrong_packets_are_told_with_their_place() {
    let good = || vec![sync(), sync(), sync()];
    let cases: Vec<(Vec<Vec<u8>>, &str)> = vec![
        (
            vec![sync(), pages("pc.rom", 0, 1), sync(), sync()],
            "multifd channel 1, packet 1, byte 2752: unknown ram block 'pc.rom'",
        ),
        (
            vec![sync(), sync(), pages("pc.bios", 10, 7), sync()],
            "packet 2, byte 4096: page at 0x10000 of ram block 'pc.bios', which has 0x10000 bytes",
        ),
        (
            vec![pages("pc.ram", 0, 1), sync(), sync(), sync()],
            "packet 0, byte 1408: pages before the first synchronisation",
        ),
        (
            vec![sync(), vec![0; 1344]],
            "packet 1, byte 1408: magic 0x00000000",
        ),
        (
            vec![sync(), sync()[..700].to_vec()],
            "packet 1, byte 1408: read from",
        ),
        (
            vec![sync(), pages("pc.ram", 0, 2)[..5000].to_vec()],
            "packet 1, byte 2752: read from",
        ),
        (
            vec![sync()],
            "packet 1, byte 1408: the source has closed the connection",
        ),
        (vec![], "packet 0, byte 64: the source has closed"),
    ];
    for (packets, said) in cases {
        let error = joined_error(Main::new().part().end(), [&good(), &packets]);
        assert!(
            error.contains(said) && error.contains("channel 1"),
            "{error}"
        );
        assert!(!error.contains('\n'));
    }
}

#[test]
fn pages_that_come_too_late_are_missing_pages() {
    let (listener, stop) = (listener(), stop());
    let mut sockets: Vec<TcpStream> = (0..2).map(|_| dial(&listener)).collect();
    let mut main = Main::new().part();
    main.0.begin_ram(SectionKind::End);
    main.0.end_ram();
    // The devices are still to come.
    sockets[0].write_all(&main.0.bytes).expect("taken");
    let early = [handshake(0), sync(), sync(), sync()];
    sockets[1].write_all(&early.concat()).expect("taken");
    let options = JoinOptions::new(1, Compression::None);
    let mut joined = accept(&listener, &options, &stop).expect("all come");
    if let Channel::TwoWay(reader, _) = &mut joined.channel {
        let mut all = vec![0; main.0.bytes.len()];
        let until = Some(Instant::now() + PATIENCE);
        reader.read_exact_until(&mut all, until).expect("it comes");
        assert!(all == main.0.bytes);
    }
    sockets[1].write_all(&pages("pc.ram", 0, 1)).expect("taken");
    let (_, outcome) = consume(joined);
    let error = outcome.expect_err("a page is missing").to_string();
    let said = "multifd channel 0, packet 3, byte 5440: pages after the end of the ram section";
    assert_eq!(error, said);
}

#[test]
fn a_main_connection_that_ends_is_told_with_its_place() {
    let whole = Main::new().part().end();
    let good = [sync(), sync(), sync()];
    for cut in [5, 100, whole.len() - 30] {
        let error = joined_error(whole[..cut].to_vec(), [&good, &good]);
        assert!(
            error.contains("main connection: stream truncated")
                && error.contains(&format!("byte {cut}")),
            "{error}"
        );
    }
}

#[test]
fn what_does_not_go_together_with_multifd_is_named() {
    use vmferry_stream::{Command, RamPage};
    let good = [sync(), sync(), sync()];
    let mut postcopy = Main::new();
    postcopy.0.command(Command::PostcopyListen);
    let mut flush = Main::new();
    flush.0.begin_ram(SectionKind::Part);
    flush.0.ram(RamRecord::MultifdFlush);
    let mut twice = Main::new();
    twice.0.begin_ram(SectionKind::Part);
    twice.0.ram(RamRecord::BlockList { total_bytes: 0 });
    let mut early = Stream::new("pc-i440fx-7.2", None, true);
    early.begin_ram(SectionKind::Start);
    early.ram(RamRecord::Zero {
        page: RamPage {
            block: name("pc.ram"),
            offset_bytes: 0,
        },
        fill: 0,
    });
    let mut no_end = Main::new();
    no_end.0.end();
    let mut no_footers = Stream::new("pc-i440fx-7.2", None, false);
    no_footers.blocks(&[("pc.ram", 1)]);
    no_footers.begin_ram(SectionKind::End);
    let mut device = Main::new();
    device.0.device(9, "unknown", &vec![1; 3 << 20]);
    for (main, said) in [
        (postcopy.0.bytes, "a postcopy cannot travel"),
        (flush.0.bytes, "a flush word"),
        (twice.0.bytes, "a second list of ram blocks"),
        (early.bytes, "a page before the end of the list"),
        (no_end.0.bytes, "a ram section without its last part"),
        (no_footers.bytes, "without section footers"),
        (device.0.bytes, "device 'unknown'"),
    ] {
        let error = joined_error(main, [&good, &good]);
        assert!(error.contains(said) && error.contains("byte "), "{error}");
    }
}

/// QEMU keeps the footer of START back while its pages go out, more of them than sockets take.
#[test]
fn pages_need_not_wait_for_a_footer() {
    let (listener, stop) = (listener(), stop());
    let main = Main::new().part().end();
    // The list of blocks without the footer.
    let start_bytes = Main::new().0.bytes.len() - 5;
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| {
            let mut main_socket = dial(&listener);
            let mut channel = dial(&listener);
            main_socket.write_all(&main[..start_bytes]).expect("taken");
            channel.write_all(&handshake(0)).expect("taken");
            channel.write_all(&sync()).expect("taken");
            for round in 0..200 {
                let packet = pages("pc.ram", round % 8 * 128, 128);
                channel.write_all(&packet).expect("taken");
            }
            channel
                .write_all(&[sync(), sync()].concat())
                .expect("taken");
            main_socket.write_all(&main[start_bytes..]).expect("taken");
            drop((main_socket, channel));
        });
        let options = JoinOptions::new(1, Compression::None);
        let joined = accept(&listener, &options, &stop).expect("all come");
        let (bytes, outcome) = consume(joined);
        outcome.expect("it went well");
        assert!(bytes.len() > 200 << 19);
        sending.join().expect("no panic");
    });
}

#[test]
fn a_channel_never_passes_a_synchronisation_alone() {
    let (listener, stop) = (listener(), stop());
    let main = Main::new().part().end();
    let start_bytes = Main::new().0.bytes.len();
    let mut sockets: Vec<TcpStream> = (0..3).map(|_| dial(&listener)).collect();
    let mut write = |at: usize, bytes: &[u8]| sockets[at].write_all(bytes).expect("taken");
    write(0, &main[..start_bytes]);
    for channel in 0..2 {
        write(1 + channel, &handshake(channel as u8));
    }
    // Channel 0 is one step ahead; its page is in the next section.
    write(1, &[sync(), sync(), pages("pc.ram", 7, 1)].concat());
    let options = JoinOptions::new(2, Compression::None);
    let joined = accept(&listener, &options, &stop).expect("all come");
    let Channel::TwoWay(mut reader, _writer) = joined.channel else {
        panic!("the channel goes both ways");
    };
    // Now the other one goes on, with a page of the first section.
    write(2, &[sync(), pages("pc.ram", 5, 1), sync(), sync()].concat());
    write(1, &sync());
    write(0, &main[start_bytes..]);
    drop(sockets);
    let (bytes, _) = read_all(&mut reader);
    joined.joining.finish().expect("it went well");
    let place = |offset: u64| {
        let word = (offset << 12 | 0x008).to_be_bytes();
        let continued = (offset << 12 | 0x028).to_be_bytes();
        let mut windows = bytes.windows(8);
        windows.position(|window| window == word || window == continued)
    };
    assert!(place(5).expect("it is there") < place(7).expect("it is there"));
}

fn impatient(channels: u8) -> JoinOptions {
    JoinOptions {
        patience: Duration::from_millis(300),
        ..JoinOptions::new(channels, Compression::None)
    }
}

#[test]
fn missing_connections_are_missed_after_a_time() {
    let listener = listener();
    let mut main = dial(&listener);
    main.write_all(b"QEVM").expect("taken");
    let mut channel = dial(&listener);
    channel.write_all(&handshake(1)).expect("taken");
    let error = accept(&listener, &impatient(2), &stop()).expect_err("one is missing");
    assert!(
        matches!(
            error,
            MultifdError::Missing {
                there: 2,
                expected: 3,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn strangers_do_no_harm() {
    let (listener, stop) = (listener(), stop());
    // Some say nothing, some go away, some talk of something else, one is slow.
    let silent: Vec<TcpStream> = (0..40).map(|_| dial(&listener)).collect();
    for text in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"Q", &handshake(0)[..40]] {
        dial(&listener).write_all(text).expect("taken");
    }
    let mut sockets: Vec<TcpStream> = (0..2).map(|_| dial(&listener)).collect();
    std::thread::scope(|scope| {
        let accepting = scope.spawn(|| {
            let joined = accept(&listener, &impatient(1), &stop).expect("all come");
            consume(joined)
        });
        let bytes = [handshake(0), sync(), sync(), sync()].concat();
        let main = Main::new().part().end();
        for (socket, bytes) in sockets.iter_mut().zip([bytes, main]) {
            let (first, rest) = bytes.split_at(3);
            socket.write_all(first).expect("taken");
            std::thread::yield_now();
            socket.write_all(rest).expect("taken");
        }
        drop(sockets);
        let (_, outcome) = accepting.join().expect("no panic");
        outcome.expect("it went well");
    });
    drop(silent);
}

#[test]
fn wrong_sets_of_connections_are_refused() {
    let odd = Handshake {
        uuid: *b"someone else's  ",
        channel: 1,
    };
    let main = b"QEVM".to_vec();
    let old = [&handshake(0)[..7], &[9], &handshake(0)[8..]].concat();
    for (connections, said) in [
        (vec![main.clone(), main.clone()], "a second main connection"),
        (vec![handshake(0), handshake(0)], "multifd channel 0 twice"),
        (
            vec![handshake(2)],
            "a multifd channel 2, although 2 channels",
        ),
        (
            vec![handshake(0), odd.encode().to_vec()],
            "channel 1 says UUID 736f6d65-6f6e-6520-656c-736527732020, not 00000000-0000",
        ),
        (vec![old], "version 9 instead of 1"),
    ] {
        let listener = listener();
        let sockets: Vec<TcpStream> = connections
            .iter()
            .map(|bytes| {
                let mut socket = dial(&listener);
                socket.write_all(bytes).expect("taken");
                socket
            })
            .collect();
        let options = JoinOptions::new(2, Compression::None);
        let error = accept(&listener, &options, &stop()).expect_err("it is wrong");
        assert!(error.to_string().contains(said), "{error}");
        drop(sockets);
    }
    let none = JoinOptions::new(0, Compression::None);
    let error = accept(&listener(), &none, &stop()).expect_err("nothing to do");
    assert!(matches!(error, MultifdError::NoChannels));
}

#[test]
fn the_guest_is_the_one_that_was_asked_for() {
    let mut rng = seeded();
    let channel = [handshake(0), sync(), sync(), sync()].concat();
    let connections = [Main::new().part().end(), channel.clone()];
    let wanted = JoinOptions {
        uuid: Some([1; 16]),
        ..JoinOptions::new(1, Compression::None)
    };
    let (_, outcome) = join(&connections, &wanted, &mut rng);
    assert!(
        matches!(outcome, Err(MultifdError::Uuid { .. })),
        "{outcome:?}"
    );
    // The stream says another one than the channels.
    let mut stream = Stream::new("pc-i440fx-7.2", Some([2; 16]), true);
    stream.blocks(&[("pc.ram", 1)]);
    let any = JoinOptions::new(1, Compression::None);
    let (_, outcome) = join(&[stream.bytes, channel], &any, &mut rng);
    assert!(
        matches!(outcome, Err(MultifdError::Uuid { .. })),
        "{outcome:?}"
    );
}

/// Its pages would be missing.
#[test]
fn a_channel_too_many_is_noticed() {
    let mut rng = seeded();
    let channel = |number| [handshake(number), sync(), sync(), sync()].concat();
    let (listener, stop) = (listener(), stop());
    let connections = [Main::new().part().end(), channel(0)];
    std::thread::scope(|scope| {
        let accepting = scope.spawn(|| {
            let options = JoinOptions::new(1, Compression::None);
            accept(&listener, &options, &stop).map(consume)
        });
        let mut sockets: Vec<TcpStream> = (0..2).map(|_| dial(&listener)).collect();
        let mut surplus = dial(&listener);
        surplus.write_all(&channel(1)).expect("taken");
        for (socket, bytes) in sockets.iter_mut().zip(&connections) {
            let cut = rng.usize(..100);
            socket.write_all(&bytes[..cut]).expect("taken");
            // Nobody may be left who reads the rest.
            let _ = socket.write_all(&bytes[cut..]);
        }
        let outcome = accepting.join().expect("no panic");
        let error = match outcome {
            Ok((_, outcome)) => outcome.expect_err("pages are missing"),
            Err(error) => error,
        };
        assert!(
            matches!(
                error,
                MultifdError::SurplusChannel {
                    channel: 1,
                    channels: 1
                }
            ),
            "{error}"
        );
    });
}

/// Wherever it waits.
#[test]
fn a_stop_ends_it() {
    for place in 0..4 {
        let (listener, stop) = (listener(), Stop::new().expect("a descriptor"));
        let main = Main::new().part().end();
        let mut sockets: Vec<TcpStream> = (0..2).map(|_| dial(&listener)).collect();
        if place > 0 {
            sockets[0].write_all(&main[..40]).expect("taken");
            sockets[1].write_all(&handshake(0)).expect("taken");
        }
        if place > 1 {
            sockets[0].write_all(&main[40..]).expect("taken");
        }
        if place > 2 {
            // Nobody reads them.
            let much: Vec<u8> = (0..8)
                .flat_map(|at| pages("pc.ram", at * 128, 128))
                .collect();
            sockets[1].write_all(&sync()).expect("taken");
            sockets[1].set_nonblocking(true).expect("it can be");
            let _ = sockets[1].write(&much);
        }
        std::thread::scope(|scope| {
            let working = scope.spawn(|| {
                let options = JoinOptions::new(1, Compression::None);
                let joined = accept(&listener, &options, &stop)?;
                let Channel::TwoWay(mut reader, _writer) = joined.channel else {
                    panic!("the channel goes both ways");
                };
                let mut some = [0; 20];
                let _ = reader.read_exact(&mut some);
                let _ = reader.stop().wait(PATIENCE);
                joined.joining.finish()
            });
            // Let it come to where it waits, as far as it happens to.
            for _ in 0..1000 {
                std::thread::yield_now();
            }
            stop.trigger();
            let outcome = working.join().expect("no panic");
            assert!(
                matches!(outcome, Ok(()) | Err(MultifdError::Stopped)),
                "place {place}: {outcome:?}"
            );
        });
    }
}

/// Dropped with the channel still in use, and full of pages that nobody reads.
#[test]
fn dropping_it_ends_its_threads() {
    let (listener, stop) = (listener(), stop());
    let main = Main::new().part().end();
    let mut sockets: Vec<TcpStream> = (0..2).map(|_| dial(&listener)).collect();
    sockets[0].write_all(&main).expect("taken");
    sockets[1].write_all(&handshake(0)).expect("taken");
    sockets[1].write_all(&sync()).expect("taken");
    sockets[1].set_nonblocking(true).expect("it can be");
    for at in 0..8 {
        let _ = sockets[1].write(&pages("pc.ram", at * 128, 128));
    }
    let options = JoinOptions::new(1, Compression::None);
    let joined = accept(&listener, &options, &stop).expect("all come");
    let mut channel = joined.channel;
    if let Channel::TwoWay(reader, _) = &mut channel {
        reader.read_exact(&mut [0; 100]).expect("it comes");
    }
    let before = Instant::now();
    drop(joined.joining);
    assert!(before.elapsed() < PATIENCE);
    drop(channel);
}

#[test]
fn a_stream_without_memory_ends_while_channels_synchronise() {
    let mut rng = seeded();
    let mut main = Stream::new("none", None, true);
    main.end();
    let expected = main.bytes.clone();
    let channel = [handshake(0), sync(), pages("pc.ram", 0, 1)].concat();
    let options = JoinOptions::new(1, Compression::None);
    let (bytes, _) = join(&[main.bytes, channel], &options, &mut rng);
    assert!(bytes == expected);
}

/// Captured connections with bytes changed, cut or exchanged.
#[test]
fn damaged_captures_end_in_an_error_or_in_a_stream() {
    let mut rng = seeded();
    for _ in 0..rounds(150, 5_000) {
        let (name, compression) = *rng.choice(&CAPTURES).expect("some");
        let mut connections = capture(name);
        for _ in 0..rng.usize(1..4) {
            let connection = rng.usize(..3);
            let bytes = &mut connections[connection];
            // What is not sent to the right place is waited for.
            let first = if connection == 0 { 8 } else { HANDSHAKE_BYTES };
            if bytes.len() <= first {
                continue;
            }
            let place = match rng.bool() {
                true => rng.usize(first..bytes.len()),
                false => rng.usize(first..bytes.len().min(first + 1500)),
            };
            match rng.u8(..4) {
                0 => bytes.truncate(place),
                1 => bytes.insert(place, rng.u8(..)),
                _ => bytes[place] ^= 1 << rng.u8(..8),
            }
        }
        let options = JoinOptions {
            patience: Duration::from_secs(2),
            ..JoinOptions::new(2, compression)
        };
        let (_, outcome) = join(&connections, &options, &mut rng);
        if let Err(error) = outcome {
            let text = error.to_string();
            assert!(!text.is_empty() && !text.contains('\n'), "{text}");
        }
    }
}
