//! A relay between the two ends that listens, and breaks where it is told to.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;

use vmferry_stream::return_path::{ReturnDecoder, ReturnMessage};
use vmferry_stream::{Decoder, Options, Record, SectionKind, Step};

/// Where the connection breaks, both ways at once.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Cut {
    Never,
    /// After so many bytes of the stream.
    Forth(u64),
    /// So many bytes after the END of the disks: in the PING, the EOF, the description.
    AfterDisks(u64),
    /// After so many bytes of the return path.
    Back(u64),
}

type OnMessage = Box<dyn FnMut(&ReturnMessage) + Send>;

/// Starts a relay; returns the ends for the source and the destination. `on_message` hears every
/// message of the return path before it goes on.
pub(crate) fn relay(
    cut: Cut,
    on_message: impl FnMut(&ReturnMessage) + Send + 'static,
) -> (UnixStream, UnixStream, Vec<JoinHandle<()>>) {
    let (source, here) = UnixStream::pair().expect("a pair");
    let (there, target) = UnixStream::pair().expect("a pair");
    let ends = Arc::new((here, there));
    let (forth, back) = (Arc::clone(&ends), Arc::clone(&ends));
    let forth = std::thread::spawn(move || {
        let mut ear = ForthEar::new(cut);
        pump(&forth, &forth.0, &forth.1, |bytes| ear.hear(bytes));
    });
    let mut ear = BackEar {
        decoder: ReturnDecoder::new(),
        window: Vec::new(),
        on_message: Box::new(on_message),
        left: match cut {
            Cut::Back(bytes) => bytes,
            _ => u64::MAX,
        },
    };
    let back = std::thread::spawn(move || {
        pump(&back, &back.1, &back.0, |bytes| ear.hear(bytes));
    });
    (source, target, vec![forth, back])
}

/// Copies until the end or the cut; `allow` says how many of the bytes may pass.
fn pump(
    ends: &(UnixStream, UnixStream),
    mut from: &UnixStream,
    mut to: &UnixStream,
    mut allow: impl FnMut(&[u8]) -> usize,
) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let length = from.read(&mut buffer).unwrap_or(0);
        if length == 0 {
            let _ = to.shutdown(Shutdown::Write);
            return;
        }
        let allowed = allow(&buffer[..length]);
        let written = to.write_all(&buffer[..allowed]);
        if allowed < length || written.is_err() {
            let _ = ends.0.shutdown(Shutdown::Both);
            let _ = ends.1.shutdown(Shutdown::Both);
            return;
        }
    }
}

struct ForthEar {
    decoder: Decoder,
    window: Vec<u8>,
    skip: usize,
    cut: Cut,
    heard: u64,
    /// Where the disks' END has ended.
    disks_end: Option<u64>,
    in_end: bool,
}

impl ForthEar {
    fn new(cut: Cut) -> Self {
        Self {
            decoder: Decoder::new(Options::default()),
            window: Vec::new(),
            skip: 0,
            cut,
            heard: 0,
            disks_end: None,
            in_end: false,
        }
    }

    fn hear(&mut self, bytes: &[u8]) -> usize {
        if matches!(self.cut, Cut::AfterDisks(_)) {
            self.decode(bytes);
        }
        let limit = match self.cut {
            Cut::Forth(limit) => limit,
            Cut::AfterDisks(after) => self.disks_end.map_or(u64::MAX, |end| end + after),
            Cut::Never | Cut::Back(_) => u64::MAX,
        };
        let left = limit.saturating_sub(self.heard);
        self.heard += bytes.len() as u64;
        usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len())
    }

    fn decode(&mut self, bytes: &[u8]) {
        let skipped = self.skip.min(bytes.len());
        self.skip -= skipped;
        self.window.extend_from_slice(&bytes[skipped..]);
        while self.skip == 0 {
            match self.decoder.step(&self.window).expect("our own stream") {
                Step::Record { record, used } => {
                    self.window.drain(..used);
                    match record {
                        Record::Section(section) => self.in_end = section.kind == SectionKind::End,
                        Record::SectionEnd { .. } if self.in_end => {
                            self.disks_end = Some(self.decoder.offset());
                        }
                        _ => {}
                    }
                }
                Step::Payload(bytes) => {
                    let now = self.window.len().min(bytes as usize);
                    self.window.drain(..now);
                    self.skip = bytes as usize - now;
                }
                Step::NeedMore(_) | Step::End => return,
            }
        }
    }
}

struct BackEar {
    decoder: ReturnDecoder,
    window: Vec<u8>,
    on_message: OnMessage,
    left: u64,
}

impl BackEar {
    fn hear(&mut self, bytes: &[u8]) -> usize {
        self.window.extend_from_slice(bytes);
        while let Step::Record { record, used } = self.decoder.step(&self.window).expect("ours") {
            self.window.drain(..used);
            (self.on_message)(&record);
        }
        let allowed = usize::try_from(self.left)
            .unwrap_or(usize::MAX)
            .min(bytes.len());
        self.left -= allowed as u64;
        allowed
    }
}
