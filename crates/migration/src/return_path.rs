//! What the destination says, read by a thread of its own.

use std::sync::mpsc::Sender;
use std::thread::JoinHandle;
use std::time::Instant;

use vmferry_channel::Reader;
use vmferry_ram::OutgoingRam;
use vmferry_stream::return_path::{ReturnDecoder, ReturnMessage};
use vmferry_stream::{Name, Step};

use crate::source::Event;

/// Start the thread. It ends with the channel, or when the reader's stop is triggered. Requests for
/// pages go to `ram` at once.
pub(crate) fn listen(
    reader: Reader,
    ram: Option<OutgoingRam>,
    events: Sender<Event>,
) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name("migrate-return".to_owned())
        .spawn(move || {
            let reason = Listening::new(reader, ram, events.clone()).run();
            let _ = events.send(Event::ReturnClosed(reason));
        })
}

struct Listening {
    reader: Reader,
    decoder: ReturnDecoder,
    window: Vec<u8>,
    ram: Option<OutgoingRam>,
    events: Sender<Event>,
    /// The bitmap whose end is awaited.
    bitmap: Option<(Name, Vec<u8>)>,
}

impl Listening {
    fn new(reader: Reader, ram: Option<OutgoingRam>, events: Sender<Event>) -> Self {
        Self {
            reader,
            decoder: ReturnDecoder::new(),
            window: Vec::new(),
            ram,
            events,
            bitmap: None,
        }
    }

    /// Read until the end; why it came.
    fn run(&mut self) -> String {
        loop {
            let read = match self.decoder.step(&self.window) {
                Ok(Step::Record { record, used }) => {
                    self.window.drain(..used);
                    self.message(record)
                }
                Ok(Step::Payload(bytes)) => self.payload(bytes),
                Ok(Step::NeedMore(_)) => self.fill(),
                Ok(Step::End) => Err("the destination has closed its side".to_owned()),
                Err(error) => Err(format!("the return path is broken: {error}")),
            };
            if let Err(reason) = read {
                return reason;
            }
        }
    }

    fn fill(&mut self) -> Result<(), String> {
        let mut piece = [0; 4096];
        match self.reader.read(&mut piece) {
            Ok(0) => Err("the destination has closed its side".to_owned()),
            Ok(length) => {
                self.window.extend_from_slice(&piece[..length]);
                Ok(())
            }
            Err(error) => Err(error.to_string()),
        }
    }

    /// A bitmap, in pieces as it comes.
    fn payload(&mut self, bytes: u32) -> Result<(), String> {
        let Some((_, bitmap)) = &mut self.bitmap else {
            return Err("the destination sent payload".to_owned());
        };
        let length = usize::try_from(bytes).unwrap_or(usize::MAX);
        while bitmap.len() < length {
            let missing = length - bitmap.len();
            if self.window.is_empty() {
                let mut piece = [0; 4096];
                let room = missing.min(piece.len());
                match self.reader.read(&mut piece[..room]) {
                    Ok(0) => return Err("the destination has closed its side".to_owned()),
                    Ok(read) => bitmap.extend_from_slice(&piece[..read]),
                    Err(error) => return Err(error.to_string()),
                }
            } else {
                let here = missing.min(self.window.len());
                bitmap.extend(self.window.drain(..here));
            }
        }
        Ok(())
    }

    fn message(&mut self, message: ReturnMessage) -> Result<(), String> {
        let event = match message {
            ReturnMessage::Pong(value) => Event::Pong {
                value,
                at: Instant::now(),
            },
            ReturnMessage::Shut(status) => Event::Shut(status),
            ReturnMessage::SwitchoverAck => return Ok(()),
            ReturnMessage::RequestPages {
                block,
                start_bytes,
                length_bytes,
            } => return self.request(block.as_ref(), start_bytes, length_bytes),
            ReturnMessage::ReceivedBitmap { block, .. } if self.ram.is_some() => {
                self.bitmap = Some((block, Vec::new()));
                return Ok(());
            }
            ReturnMessage::ReceivedBitmapEnd if self.bitmap.is_some() => {
                let Some((block, bitmap)) = self.bitmap.take() else {
                    return Ok(());
                };
                Event::Received { block, bitmap }
            }
            ReturnMessage::ResumeAck(value) if self.ram.is_some() => Event::ResumeAck(value),
            other => {
                return Err(format!(
                    "the destination sent {other:?}, which only RAM needs"
                ));
            }
        };
        self.events.send(event).map_err(|_| String::new())
    }

    fn request(&self, block: Option<&Name>, start: u64, bytes: u32) -> Result<(), String> {
        let Some(ram) = &self.ram else {
            return Err("the destination asks for pages, but no memory is sent".to_owned());
        };
        ram.request(block, start, u64::from(bytes))
            .map_err(|error| format!("the destination asks for pages: {error}"))?;
        self.events.send(Event::Wake).map_err(|_| String::new())
    }
}
