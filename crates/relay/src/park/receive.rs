//! The destination's side of a migration whose machine goes into a file.
//!
//! ```text
//!   read ─▶ Parker ─┬─ over ──────────────────────▶ sync, publish ─▶ SHUT 0
//!     ▲             ├─ broken before the package ─▶ SHUT 1: the source keeps its guest
//!     │             └─ broken behind the package ─▶ postcopy-paused
//!     └── bitmaps, RESUME ◀── next connection ◀──────┘
//! ```

use std::time::{Duration, Instant};

use vmferry_channel::{Channel, ChannelError, Reader, Stop, Writer};
use vmferry_migration::{Published, RamStatus, State, Status};
use vmferry_stream::Name;
use vmferry_stream::return_path::ReturnMessage;

use super::{ParkError, ParkEvent, Parked, Parker, Parking};

/// Bytes that are read at once, at most.
const READ_BYTES: usize = 1 << 20;
/// How long an answer may take to leave.
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);
/// How long a source may take to send header and configuration.
const GREETING_PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait for a description, where the source keeps the channel open behind an EOF.
const DESCRIPTION_PATIENCE: Duration = Duration::from_secs(10);
/// How long a source may be silent that has heard of a failure.
const SILENCE_PATIENCE: Duration = Duration::from_secs(30);
/// How long a source may take to close when all is said.
const FAREWELL_PATIENCE: Duration = Duration::from_millis(250);
/// How often it is looked whether to stop.
const TICK: Duration = Duration::from_millis(100);
/// Figures are published whenever this much has come.
const PUBLISH_BYTES: u64 = 4 << 20;

/// Waits for the next connection of a postcopy that was interrupted, and is told why it was; `None` if
/// there will be none.
pub type Reconnect<'a> = dyn FnMut(&ParkError) -> Option<Channel> + 'a;

/// Receive a migration into a file. Ends with the stream, the channel, or `stop`.
///
/// A failure or a stop before the package of a postcopy has come leaves the guest at the source. Behind it
/// the source is told, and what it still sends is thrown away: QEMU 10 lets its guest go on when it has
/// sent everything, and not if the connection breaks before. The stop of the channel breaks that off, too;
/// it must be another [`Stop`] than this one.
///
/// # Errors
/// The machine is not parked. [`ParkError::HalfHere`] if its source is in the middle of a postcopy.
pub fn receive(
    channel: Channel,
    parker: Parker,
    reconnect: &mut Reconnect<'_>,
    stop: &Stop,
    published: &Published,
) -> Result<Parked, ParkError> {
    let mut receiver = Receiver {
        parker,
        answers: Answers::default(),
        buffer: vec![0; READ_BYTES],
        stop,
        published,
        told_bytes: 0,
    };
    published.update(|status| {
        status.state = State::Setup;
        status.begun = Some(Instant::now());
    });
    let (received, reader) = receiver.run(channel, reconnect);
    receiver.publish();
    let Receiver {
        parker,
        mut answers,
        ..
    } = receiver;
    let progress = parker.progress();
    match received.and_then(|()| parker.finish()) {
        Ok(mut parked) => {
            parked.source_told = answers.is_open.then(|| {
                let said = answers.say(&ReturnMessage::Shut(0));
                said && reader.is_none_or(has_heard)
            });
            published.update(|status| {
                status.state = State::Completed;
                status.durable = Some(true);
                status.remaining_bytes = 0;
                status.error = None;
                status.total_time = status.begun.map(|begun| begun.elapsed());
            });
            Ok(parked)
        }
        Err(error) => {
            let source_told = answers.say(&ReturnMessage::Shut(1));
            if let (Some(reader), true, true) = (reader, source_told, progress.is_postcopy) {
                tracing::warn!(%error, "the rest of the postcopy is thrown away");
                throw_away(reader);
            }
            let error = match progress.is_postcopy {
                true => ParkError::HalfHere {
                    source: Box::new(error),
                    missing_pages: progress.missing_pages,
                    source_told,
                },
                false => error,
            };
            published.update(|status| {
                status.state = State::Failed;
                status.error = Some(error.to_string());
                status.total_time = status.begun.map(|begun| begun.elapsed());
            });
            Err(error)
        }
    }
}

struct Receiver<'a> {
    parker: Parker,
    answers: Answers,
    buffer: Vec<u8>,
    stop: &'a Stop,
    published: &'a Published,
    /// Bytes that had come when figures were published last.
    told_bytes: u64,
}

impl Receiver<'_> {
    /// Read one connection after the other until the stream is over. Returns the one that is there then,
    /// too.
    fn run(
        &mut self,
        channel: Channel,
        reconnect: &mut Reconnect<'_>,
    ) -> (Result<(), ParkError>, Option<Reader>) {
        let mut next = Some(channel);
        while let Some(channel) = next {
            let mut reader = match self.use_channel(channel) {
                Ok(reader) => reader,
                Err(error) => return (Err(error), None),
            };
            let Err(error) = self.read(&mut reader) else {
                return (Ok(()), Some(reader));
            };
            if !self.parker.holds_package() || !error.is_of_connection() {
                return (Err(error), Some(reader));
            }
            // The source shall notice, too.
            self.answers = Answers::default();
            drop(reader);
            next = match self.pause(&error, reconnect) {
                Ok(Some(next)) => Some(next),
                Ok(None) => return (Err(error), None),
                Err(error) => return (Err(error), None),
            };
        }
        (Ok(()), None)
    }

    /// The connection broke: wait for the next.
    fn pause(
        &mut self,
        error: &ParkError,
        reconnect: &mut Reconnect<'_>,
    ) -> Result<Option<Channel>, ParkError> {
        tracing::warn!(%error, "postcopy paused");
        self.parker.interrupted()?;
        self.publish();
        self.published.update(|status| {
            status.state = State::PostcopyPaused;
            status.error = Some(error.to_string());
        });
        loop {
            let next = reconnect(error);
            match &next {
                None => {}
                Some(Channel::TwoWay(..)) => {
                    self.answers.is_open = true;
                    self.published
                        .update(|status| status.state = State::PostcopyRecover);
                }
                Some(_) => {
                    tracing::warn!("the channel is one-way: a postcopy cannot go on over it");
                    continue;
                }
            }
            return Ok(next);
        }
    }

    fn use_channel(&mut self, channel: Channel) -> Result<Reader, ParkError> {
        let peer = channel.peer().to_owned();
        let (reader, writer) = channel.split();
        self.answers.writer = writer;
        self.published
            .update(|status| status.peer.clone_from(&peer));
        reader.ok_or_else(|| {
            let reason = "it cannot be read";
            ChannelError::Unsuitable { peer, reason }.into()
        })
    }

    /// Read a connection until the stream is over.
    fn read(&mut self, reader: &mut Reader) -> Result<(), ParkError> {
        let mut heard_at = Instant::now();
        loop {
            let now = Instant::now();
            match reader.read_until(&mut self.buffer, Some(now + TICK)) {
                Ok(0) => return self.parker.end_of_input().map(drop),
                Ok(length) => {
                    heard_at = now;
                    let pushed = self.parker.push(&self.buffer[..length]);
                    // What came before a failure counts: the source may listen since then.
                    let answered = self.answer();
                    pushed.and(answered)?;
                    if self.parker.is_over() {
                        return Ok(());
                    }
                }
                Err(error @ ChannelError::TimedOut { .. }) => {
                    let silent = heard_at.elapsed();
                    if !self.parker.is_greeted() && silent > GREETING_PATIENCE {
                        return Err(error.into());
                    }
                    // Nothing else says that a stream without a description is over.
                    if silent > DESCRIPTION_PATIENCE && self.parker.ending().is_some() {
                        return Ok(());
                    }
                }
                Err(error) => return Err(error.into()),
            }
            if self.stop.is_triggered() {
                return Err(ChannelError::Stopped.into());
            }
            if self.parker.progress().received_bytes - self.told_bytes >= PUBLISH_BYTES {
                self.publish();
            }
        }
    }

    fn answer(&mut self) -> Result<(), ParkError> {
        for event in self.parker.heard() {
            // There may be many, and each answer may take its time.
            if self.stop.is_triggered() {
                return Err(ChannelError::Stopped.into());
            }
            match event {
                ParkEvent::OpenReturnPath => self.answers.is_open = true,
                ParkEvent::Ping(value) => self.answers.send(&ReturnMessage::Pong(value))?,
                ParkEvent::Advised => {}
                ParkEvent::PackageLoaded => self.publish(),
                ParkEvent::ReceivedBitmap(block) => {
                    let Some(bitmap) = self.parker.received(&block) else {
                        return Err(self.parker.refused(format!(
                            "the source asks what came of RAM block '{block}', which is not here"
                        )));
                    };
                    self.answers.send_bitmap(block, &bitmap)?;
                }
                ParkEvent::Resume => {
                    self.answers.send(&ReturnMessage::ResumeAck(1))?;
                    // Its answer may have been lost with the connection.
                    for ping in self.parker.package_pings() {
                        self.answers.send(&ReturnMessage::Pong(*ping))?;
                    }
                    self.published.update(|status| status.error = None);
                    self.publish();
                }
            }
        }
        Ok(())
    }

    fn publish(&mut self) {
        let progress = self.parker.progress();
        self.told_bytes = progress.received_bytes;
        let is_recovering = self.parker.is_resuming();
        self.published.update(|status| {
            if !is_recovering && self.parker.is_greeted() {
                status.state = match progress.is_postcopy {
                    true => State::PostcopyActive,
                    false => State::Active,
                };
            }
            tell(status, &progress);
        });
    }
}

/// The source closes when it has heard the last word; a connection that breaks may have lost it.
fn has_heard(mut reader: Reader) -> bool {
    let deadline = Instant::now() + FAREWELL_PATIENCE;
    let mut buffer = [0; 64];
    loop {
        match reader.read_until(&mut buffer, Some(deadline)) {
            Ok(0) | Err(ChannelError::TimedOut { .. }) => return true,
            Ok(_) => {}
            Err(_) => return false,
        }
    }
}

/// Read what the source still sends, until it closes, or is silent for long.
fn throw_away(mut reader: Reader) {
    let mut buffer = vec![0; READ_BYTES];
    while let Ok(1..) = reader.read_until(&mut buffer, Some(Instant::now() + SILENCE_PATIENCE)) {}
}

fn tell(status: &mut Status, progress: &Parking) {
    let missing_bytes = progress.missing_pages.saturating_mul(progress.page_bytes);
    status.pass = 1;
    status.wire_bytes = progress.received_bytes;
    status.remaining_bytes = missing_bytes;
    status.ram = Some(RamStatus {
        total_bytes: progress.memory_bytes,
        remaining_bytes: missing_bytes,
        normal_pages: progress.pages,
        zero_pages: progress.zero_pages,
        xbzrle_pages: progress.xbzrle_pages,
        ..RamStatus::default()
    });
}

/// The way back to the source.
#[derive(Default)]
struct Answers {
    writer: Option<Writer>,
    /// The source listens.
    is_open: bool,
}

impl Answers {
    /// Nothing is sent, and that is no error, as long as nobody listens.
    fn send(&mut self, message: &ReturnMessage) -> Result<(), ChannelError> {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        self.write(&bytes)
    }

    /// Which pages of a block are here.
    fn send_bitmap(&mut self, block: Name, bitmap: &[u8]) -> Result<(), ChannelError> {
        let bytes = u32::try_from(bitmap.len()).unwrap_or(u32::MAX);
        let mut message = Vec::new();
        ReturnMessage::ReceivedBitmap { block, bytes }.encode(&mut message);
        message.extend_from_slice(bitmap);
        ReturnMessage::ReceivedBitmapEnd.encode(&mut message);
        self.write(&message)
    }

    /// Send; true if there was somebody to hear it.
    fn say(&mut self, message: &ReturnMessage) -> bool {
        self.is_open && self.writer.is_some() && self.send(message).is_ok()
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), ChannelError> {
        match self.writer.as_mut().filter(|_| self.is_open) {
            None => Ok(()),
            Some(writer) => writer.write_all_until(bytes, Some(Instant::now() + ANSWER_PATIENCE)),
        }
    }
}
