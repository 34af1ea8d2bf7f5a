//! Goes through an image and tells an index builder, or an outline, what is there.

use vmferry_inspect::{Event, VisitError, Visitor, walk_skipping};
use vmferry_stream::Record;

use crate::Progress;
use crate::error::ImageError;
use crate::index::IndexBuilder;
use crate::outline::Outline;
use crate::storage::{Reader, Storage};

/// Progress is told after so many bytes.
const TOLD_EVERY_BYTES: u64 = 16 << 20;

/// What is told of an image.
pub(crate) trait Listener {
    fn record(&mut self, offset: u64, bytes: u64, record: &Record) -> Result<(), ImageError>;
    fn payload(&mut self, offset: u64, bytes: &[u8]) -> Result<(), ImageError>;
    fn other(&mut self, event: &Event<'_>) -> Result<(), ImageError>;
}

impl Listener for IndexBuilder {
    fn record(&mut self, offset: u64, bytes: u64, record: &Record) -> Result<(), ImageError> {
        self.record(offset, bytes, record)
    }

    fn payload(&mut self, offset: u64, bytes: &[u8]) -> Result<(), ImageError> {
        self.payload(offset, bytes)
    }

    fn other(&mut self, event: &Event<'_>) -> Result<(), ImageError> {
        match event {
            Event::Container(container) => {
                self.container(container);
                Ok(())
            }
            Event::Device(body) => self.device(body.section, body.offset, body.bytes),
            Event::Description(description) => {
                self.description(description.offset, description.text)
            }
            _ => Ok(()),
        }
    }
}

impl Listener for Outline {
    fn record(&mut self, offset: u64, bytes: u64, record: &Record) -> Result<(), ImageError> {
        self.record(offset, bytes, record)
    }

    fn payload(&mut self, _: u64, _: &[u8]) -> Result<(), ImageError> {
        Ok(())
    }

    fn other(&mut self, event: &Event<'_>) -> Result<(), ImageError> {
        match event {
            Event::Container(container) => self.container(container),
            Event::Device(body) => return self.device(body.section, body.offset, body.bytes),
            Event::Description(description) => {
                self.description(description.offset, description.text);
            }
            _ => {}
        }
        Ok(())
    }
}

/// Tell `listener` of everything in the image.
pub(crate) fn walk<L: Listener>(
    storage: &dyn Storage,
    listener: &mut L,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), ImageError> {
    let start = storage.start();
    let total_bytes = storage.length();
    let mut teller = Teller {
        listener,
        record: None,
        progress,
        next_told: start.saturating_add(TOLD_EVERY_BYTES),
        start,
        total_bytes: total_bytes.saturating_sub(start),
        error: None,
    };
    let walked = walk_skipping(Reader::new(storage), start, &mut teller);
    let finish = match (walked, teller.error.take()) {
        (_, Some(error)) => return Err(error),
        (Err(source), None) => {
            return Err(ImageError::Stream {
                image: storage.name(),
                source,
            });
        }
        (Ok(finish), None) => finish,
    };
    teller.tell(finish.bytes)?;
    (teller.progress)(Progress {
        done_bytes: teller.total_bytes,
        total_bytes: teller.total_bytes,
    });
    Ok(())
}

/// Holds each record until what follows says where its header ends.
struct Teller<'a, L> {
    listener: &'a mut L,
    record: Option<(u64, Record)>,
    progress: &'a mut dyn FnMut(Progress),
    next_told: u64,
    start: u64,
    total_bytes: u64,
    /// What the listener said; the walk knows only that it said no.
    error: Option<ImageError>,
}

impl<L: Listener> Teller<'_, L> {
    /// The header of the record that is held ends here.
    fn tell(&mut self, end: u64) -> Result<(), ImageError> {
        if let Some((offset, record)) = self.record.take() {
            let bytes = end.saturating_sub(offset);
            self.listener.record(offset, bytes, &record)?;
        }
        if end >= self.next_told {
            self.next_told = end.saturating_add(TOLD_EVERY_BYTES);
            (self.progress)(Progress {
                done_bytes: end.saturating_sub(self.start).min(self.total_bytes),
                total_bytes: self.total_bytes,
            });
        }
        Ok(())
    }

    fn hear(&mut self, event: &Event<'_>) -> Result<(), ImageError> {
        match event {
            Event::Record(offset, record) => {
                self.tell(*offset)?;
                self.record = Some((*offset, (*record).clone()));
                Ok(())
            }
            Event::Payload(offset, bytes) => {
                self.tell(*offset)?;
                self.listener.payload(*offset, bytes)
            }
            Event::Device(body) => {
                self.tell(body.offset)?;
                self.listener.other(event)
            }
            Event::Package(offset) | Event::PackageEnd(offset) => self.tell(*offset),
            // It stands further behind.
            Event::Container(_) | Event::Description(_) => self.listener.other(event),
        }
    }
}

impl<L: Listener> Visitor for Teller<'_, L> {
    fn event(&mut self, event: Event<'_>) -> Result<(), VisitError> {
        self.hear(&event).map_err(|error| {
            let said = error.to_string();
            self.error = Some(error);
            said.into()
        })
    }
}
