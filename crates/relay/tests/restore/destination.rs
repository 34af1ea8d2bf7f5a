//! The answers of a destination, and nothing else of it.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};

use fastrand::Rng;
use vmferry_stream::return_path::ReturnMessage;
use vmferry_stream::{Command, Decoder, Name, Options, RamRecord, Record, Step};

/// Runs in a thread.
pub(crate) struct Destination(JoinHandle<Arrived>);

/// A RAM block.
struct Block {
    name: Name,
    used_bytes: u64,
    /// Size of the pages under it.
    page_bytes: u64,
}

/// What came.
#[derive(Default)]
pub(crate) struct Arrived {
    pub(crate) stream: Vec<u8>,
    /// Requests for pages that had not come.
    pub(crate) requests: usize,
    /// Pages, in the order in which they came: block and offset.
    pub(crate) pages: Vec<(String, u64)>,
    /// How many of them came before the guest could run.
    pub(crate) early: usize,
}

impl Destination {
    /// Its guest touches pages at random.
    pub(crate) fn begin(socket: UnixStream, rng: Rng) -> Self {
        Self(thread::spawn(move || answer(socket, Some(rng))))
    }

    /// Its guest needs no memory.
    pub(crate) fn begin_silent(socket: UnixStream) -> Self {
        Self(thread::spawn(move || answer(socket, None)))
    }

    pub(crate) fn end(self) -> Arrived {
        self.0.join().expect("no panic")
    }
}

fn answer(mut socket: UnixStream, mut rng: Option<Rng>) -> Arrived {
    let mut arrived = Arrived::default();
    let mut decoder = Decoder::new(Options::default());
    let (mut used, mut blocks) = (0, Vec::new());
    // Each page is asked for once, if at all.
    let mut asked = BTreeSet::new();
    loop {
        match decoder
            .step(&arrived.stream[used..])
            .expect("a right stream")
        {
            Step::NeedMore(bytes) => fill(&mut socket, &mut arrived.stream, used + bytes),
            Step::Payload(bytes) => {
                used += bytes as usize;
                fill(&mut socket, &mut arrived.stream, used);
            }
            Step::End => unreachable!("a postcopy has no description"),
            Step::Record {
                record,
                used: bytes,
            } => {
                used += bytes;
                match record {
                    Record::Command(Command::Ping(value)) => {
                        say(&mut socket, &ReturnMessage::Pong(value));
                    }
                    Record::Command(Command::Packaged { bytes }) => {
                        arrived.early = arrived.pages.len();
                        decoder.step(&[]).expect("its length");
                        used += bytes as usize;
                        fill(&mut socket, &mut arrived.stream, used);
                        let package = &arrived.stream[..used];
                        // The PING behind the devices, and RUN.
                        let ping = &package[package.len() - 14..package.len() - 5];
                        assert!(ping.starts_with(&[8, 0, 2, 0, 4]), "{ping:x?}");
                        if let Some(rng) = &mut rng {
                            (0..20).for_each(|_| ask(&mut socket, &blocks, &mut asked, rng));
                        }
                        let value = u32::from_be_bytes([ping[5], ping[6], ping[7], ping[8]]);
                        say(&mut socket, &ReturnMessage::Pong(value));
                    }
                    Record::Ram(RamRecord::Block {
                        name,
                        used_bytes,
                        page_bytes,
                        ..
                    }) => blocks.push(Block {
                        name,
                        used_bytes,
                        page_bytes: page_bytes.unwrap_or(4096),
                    }),
                    Record::Ram(RamRecord::Page { page, .. } | RamRecord::Zero { page, .. }) => {
                        arrived
                            .pages
                            .push((page.block.to_string(), page.offset_bytes));
                    }
                    Record::Eof => {
                        say(&mut socket, &ReturnMessage::Shut(0));
                        arrived.requests = asked.len();
                        return arrived;
                    }
                    _ => {}
                }
            }
        }
    }
}

/// Ask for a page that was not asked for.
fn ask(
    socket: &mut UnixStream,
    blocks: &[Block],
    asked: &mut BTreeSet<(usize, u64)>,
    rng: &mut Rng,
) {
    let index = rng.usize(..blocks.len());
    let block = &blocks[index];
    let page = rng.u64(..block.used_bytes.div_ceil(block.page_bytes));
    if asked.insert((index, page)) {
        say(
            socket,
            &ReturnMessage::RequestPages {
                block: Some(block.name.clone()),
                start_bytes: page * block.page_bytes,
                length_bytes: u32::try_from(block.page_bytes).expect("small"),
            },
        );
    }
}

/// Read until there are so many bytes.
fn fill(socket: &mut UnixStream, stream: &mut Vec<u8>, wanted: usize) {
    while stream.len() < wanted {
        let start = stream.len();
        stream.resize(start + 65536, 0);
        let length = socket.read(&mut stream[start..]).expect("more");
        assert!(length > 0, "it ends too early");
        stream.truncate(start + length);
    }
}

fn say(socket: &mut UnixStream, message: &ReturnMessage) {
    let mut bytes = Vec::new();
    message.encode(&mut bytes);
    socket.write_all(&bytes).expect("it listens");
}
