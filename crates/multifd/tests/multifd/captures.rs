//! Captured migrations of real QEMUs.

use std::io::Read;
use std::path::Path;

use vmferry_multifd::packet::{HANDSHAKE_BYTES, PacketFormat};
use vmferry_multifd::{Compression, JoinOptions};
use vmferry_stream::{Ending, PageBits};

use crate::ends::{join, rounds, seeded};
use crate::plain::{self, Memory};

pub(crate) const CAPTURES: [(&str, Compression); 5] = [
    ("multifd-72", Compression::None),
    ("multifd-zlib-72", Compression::Zlib),
    ("multifd-100", Compression::None),
    ("multifd-zlib-100", Compression::Zlib),
    ("multifd-100-to-72", Compression::None),
];

pub(crate) fn capture(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/captures");
    let connection = |number| {
        let path = folder.join(format!("{name}.conn{number}.fwd.xz"));
        let file = std::fs::File::open(path).expect("the capture is there");
        let mut bytes = Vec::new();
        let mut decoder = xz2::read::XzDecoder::new(file);
        decoder.read_to_end(&mut bytes).expect("it is xz");
        bytes
    };
    (0..3).map(connection).collect()
}

/// The pages of a channel, read without any of the machinery: only the heads of packets and, for zlib, one stream
/// from beginning to end.
fn pages_of_channel(bytes: &[u8], compression: Compression, memory: &mut Memory) {
    let format = PacketFormat {
        page: PageBits::X86,
        compression,
    };
    let mut rest = &bytes[HANDSHAKE_BYTES..];
    let (mut places, mut data) = (Vec::new(), Vec::new());
    while !rest.is_empty() {
        let (head, after) = rest.split_at(format.head_bytes());
        rest = after;
        let packet = format.decode(head).expect("a packet");
        let Some(pages) = packet.pages else { continue };
        let place = |offset: &u64| (pages.block.to_string(), *offset);
        places.extend(pages.normal.iter().map(place));
        for offset in &pages.zero {
            memory.insert(place(offset), vec![0; 4096]);
        }
        let (blob, after) = rest.split_at(pages.data_bytes as usize);
        data.extend(blob);
        rest = after;
    }
    if compression == Compression::Zlib {
        let mut unpacked = vec![0; places.len() * 4096];
        let mut decoder = flate2::read::ZlibDecoder::new(&data[..]);
        decoder.read_exact(&mut unpacked).expect("one zlib stream");
        data = unpacked;
    }
    assert_eq!(data.len(), places.len() * 4096);
    for (place, page) in places.into_iter().zip(data.chunks(4096)) {
        memory.insert(place, page.to_vec());
    }
}

#[test]
fn a_joined_capture_is_a_plain_stream_of_the_same_machine() {
    let mut rng = seeded();
    let mut memories = Vec::new();
    for (name, compression) in CAPTURES {
        let connections = capture(name);
        let (main, flushes) = plain::read_main(&connections[0]);
        assert_eq!(
            flushes > 0,
            name.ends_with("-100"),
            "{name}: two ways to synchronise"
        );
        let mut expected = main.memory;
        for channel in &connections[1..] {
            pages_of_channel(channel, compression, &mut expected);
        }
        for _ in 0..rounds(5, 200) {
            let (bytes, outcome) = join(&connections, &JoinOptions::new(2, compression), &mut rng);
            outcome.unwrap_or_else(|error| panic!("{name}: {error}"));
            let joined = plain::read(&bytes);
            assert!(joined.memory == expected, "{name}: memory differs");
            assert_eq!(joined.others, main.others, "{name}");
            assert!(joined.rest == main.rest, "{name}: devices differ");
            assert_eq!(joined.ending, Ending::WithDescription, "{name}");
        }
        memories.push(expected);
    }
    // The same guest, compressed or not.
    assert!(memories[0] == memories[1] && memories[2] == memories[3]);
    for memory in memories {
        let ram = memory.keys().filter(|(block, _)| block.ends_with(".ram"));
        assert_eq!(ram.count(), 512, "2 MiB");
        let bios = &memory[&("pc.bios".to_owned(), 0xf000)];
        assert!(bios.iter().any(|byte| *byte != 0));
    }
}
