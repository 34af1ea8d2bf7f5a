//! Connections of a source, joined; and their packets on their own.
//!
//! The first byte says how many channels there are, how pages are compressed, and whether handshakes are
//! right. The rest is dealt out: a byte that says to which connection, two bytes of length, and so many
//! bytes. The main connection begins as it must, or nobody would take it for one.

#![no_main]

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use vmferry_channel::{Channel, Listener, Reader, Stop, Uri};
use vmferry_multifd::packet::{Handshake, PACKET_BLOB_BYTES_MAX, PacketFormat};
use vmferry_multifd::{Compression, JoinOptions, accept};
use vmferry_stream::{Decoder, Options, PageBits, RamRecord, Record, Step};

const MAIN: [u8; 8] = *b"QEVM\0\0\0\x03";
const CHANNELS_MAX: u8 = 3;
/// What is written before anybody reads must fit into a socket.
const BYTES_MAX: usize = 100_000;

struct Here {
    listener: Listener,
    path: PathBuf,
    stop: Stop,
}

/// One address for all runs.
fn here() -> &'static Here {
    static HERE: OnceLock<Here> = OnceLock::new();
    HERE.get_or_init(|| {
        let name = format!("vmferry-fuzz-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        Here {
            listener: Listener::bind(&Uri::Unix(path.clone())).expect("a socket"),
            path,
            stop: Stop::new().expect("a descriptor"),
        }
    })
}

/// What comes over each connection.
fn deal(mut rest: &[u8], connections: &mut [Vec<u8>]) {
    while let [to, high, low, after @ ..] = rest {
        let length = usize::from(u16::from_be_bytes([*high, *low])).min(after.len());
        let (bytes, after) = after.split_at(length);
        let to = usize::from(*to) % connections.len();
        connections[to].extend(bytes);
        rest = after;
    }
}

fn connect(bytes: &[u8]) -> UnixStream {
    let mut socket = UnixStream::connect(&here().path).expect("it listens");
    socket.write_all(bytes).expect("there is room");
    socket.shutdown(Shutdown::Write).expect("it is connected");
    socket
}

fn read_all(reader: &mut Reader) -> Vec<u8> {
    let (mut all, mut piece) = (Vec::new(), vec![0; 1 << 16]);
    loop {
        match reader.read(&mut piece) {
            Ok(0) | Err(_) => return all,
            Ok(got) => all.extend(&piece[..got]),
        }
    }
}

/// A plain stream, if it was said to be whole.
fn check(bytes: &[u8]) {
    let mut decoder = Decoder::new(Options::default());
    let mut window = bytes;
    loop {
        match decoder.step(window).expect("a right stream") {
            Step::NeedMore(_) | Step::End => break,
            Step::Payload(bytes) => window = &window[bytes as usize..],
            Step::Record { record, used } => {
                window = &window[used..];
                match record {
                    // Devices in front of the pages are not stepped over here.
                    Record::Section(section) if !is_known(&section.name) => return,
                    Record::Ram(RamRecord::MultifdFlush) => panic!("it is not plain"),
                    _ => {}
                }
            }
        }
    }
    decoder.finish().expect("a whole stream");
}

fn is_known(name: &str) -> bool {
    ["ram", "block", "dirty-bitmap"].contains(&name)
}

/// A head that is taken is bounded, and reads back equal.
fn packets(bytes: &[u8], compression: Compression) {
    for page in [12, 10, 16] {
        let page = PageBits::new(page).expect("a page size");
        let format = PacketFormat { page, compression };
        for head in bytes.chunks_exact(format.head_bytes()) {
            let Ok(packet) = format.decode(head) else {
                continue;
            };
            if let Some(pages) = &packet.pages {
                let count = pages.normal.len() + pages.zero.len();
                assert!(count <= format.pages_max() as usize);
                assert!(pages.data_bytes <= PACKET_BLOB_BYTES_MAX);
            }
            let mut again = Vec::new();
            format.encode(&packet, &mut again);
            assert_eq!(format.decode(&again), Ok(packet));
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((choices, rest)) = input.split_first() else {
        return;
    };
    if rest.len() > BYTES_MAX {
        return;
    }
    let channels = choices % CHANNELS_MAX + 1;
    let compression = match choices >> 2 & 3 {
        0 => Compression::None,
        1 => Compression::Zlib,
        _ => Compression::Zstd,
    };
    packets(rest, compression);
    let mut connections = vec![Vec::new(); usize::from(channels) + 1];
    connections[0].extend(MAIN);
    if choices & 0x80 == 0 {
        for (channel, bytes) in (0..channels).zip(&mut connections[1..]) {
            let uuid = [0; 16];
            bytes.extend(Handshake { uuid, channel }.encode());
        }
    }
    deal(rest, &mut connections);
    let sockets: Vec<UnixStream> = connections.iter().map(|bytes| connect(bytes)).collect();
    let options = JoinOptions {
        patience: Duration::from_millis(20),
        ..JoinOptions::new(channels, compression)
    };
    let Ok(joined) = accept(&here().listener, &options, &here().stop) else {
        // Some may wait to be accepted still.
        drop(sockets);
        let past = Some(std::time::Instant::now());
        while here().listener.accept_until(&here().stop, past).is_ok() {}
        return;
    };
    let Channel::TwoWay(mut reader, writer) = joined.channel else {
        panic!("the channel goes both ways");
    };
    let bytes = read_all(&mut reader);
    drop((reader, writer));
    if joined.joining.finish().is_ok() {
        check(&bytes);
    }
});
