//! What the destination says, read by a thread of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
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
    ram: Option<(OutgoingRam, Bitmaps)>,
    events: Heralds,
) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name("migrate-return".to_owned())
        .spawn(move || {
            let mut listening = Listening::new(reader, ram, events);
            let reason = listening.run();
            listening.events.last(Event::ReturnClosed(reason));
        })
}

/// Events that may wait to be heard. A destination answers PINGs, and tells of each RAM block once.
const UNHEARD_MAX: usize = 2 * vmferry_stream::limits::MAX_RAM_BLOCKS as usize;

/// Are bitmaps of received pages awaited on this connection?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bitmaps {
    /// It is the first.
    Refused,
    /// It is a recovery: one of each block.
    Awaited,
}

/// Carries what is heard to the engine, as much as it can be expected to listen to.
pub(crate) struct Heralds {
    events: Sender<Event>,
    unheard: Arc<AtomicUsize>,
}

impl Heralds {
    pub(crate) fn new(events: Sender<Event>, unheard: Arc<AtomicUsize>) -> Self {
        Self { events, unheard }
    }

    fn send(&self, event: Event) -> Result<(), String> {
        if self.unheard.load(Ordering::Acquire) >= UNHEARD_MAX {
            return Err(format!(
                "the destination has sent {UNHEARD_MAX} messages that nobody waits for"
            ));
        }
        self.last(event);
        Ok(())
    }

    fn last(&self, event: Event) {
        self.unheard.fetch_add(1, Ordering::AcqRel);
        // Nobody is there any more, else.
        let _ = self.events.send(event);
    }
}

struct Listening {
    reader: Reader,
    decoder: ReturnDecoder,
    window: Vec<u8>,
    ram: Option<OutgoingRam>,
    events: Heralds,
    /// Blocks whose bitmaps are still to come.
    awaited: Vec<Name>,
    /// The bitmap whose end is awaited.
    bitmap: Option<(Name, Vec<u8>)>,
}

impl Listening {
    fn new(reader: Reader, ram: Option<(OutgoingRam, Bitmaps)>, events: Heralds) -> Self {
        let awaited = match &ram {
            Some((ram, Bitmaps::Awaited)) => ram.blocks(),
            _ => Vec::new(),
        };
        let ram = ram.map(|(ram, _)| ram);
        Self {
            awaited,
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
            ReturnMessage::ReceivedBitmap { block, bytes } if self.ram.is_some() => {
                return self.begin_bitmap(block, bytes);
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
        self.events.send(event)
    }

    fn begin_bitmap(&mut self, block: Name, bytes: u32) -> Result<(), String> {
        let Some(place) = self.awaited.iter().position(|name| *name == block) else {
            return Err(format!(
                "the destination tells what it has of RAM block '{block}', which nobody asked"
            ));
        };
        let expected = self.ram.as_ref().and_then(|ram| ram.bitmap_bytes(&block));
        if expected != Some(u64::from(bytes)) {
            return Err(format!(
                "the destination's bitmap of RAM block '{block}' has {bytes} bytes instead of {}",
                expected.unwrap_or(0)
            ));
        }
        self.awaited.swap_remove(place);
        self.bitmap = Some((block, Vec::new()));
        Ok(())
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn messages_that_nobody_hears_do_not_pile_up() {
        let (sender, inbox) = channel();
        let unheard = Arc::default();
        let heralds = Heralds::new(sender, Arc::clone(&unheard));
        for message in 0..UNHEARD_MAX {
            heralds
                .send(Event::Shut(0))
                .unwrap_or_else(|error| panic!("{message}: {error}"));
        }
        let refused = heralds.send(Event::Shut(0)).expect_err("too many");
        let words = "the destination has sent 8192 messages that nobody waits for";
        assert_eq!(refused, words);
        assert_eq!(inbox.try_iter().count(), UNHEARD_MAX);
        // As the engine does with each.
        unheard.fetch_sub(1, Ordering::AcqRel);
        heralds.send(Event::Shut(0)).expect("one was heard");
        // Why it ends is always told.
        heralds.last(Event::ReturnClosed(refused));
        assert_eq!(inbox.try_iter().count(), 2);
    }
}
