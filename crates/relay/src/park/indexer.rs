//! What the index hears.

use vmferry_image::{FileStorage, ImageError, IndexBuilder};
use vmferry_stream::{Record, Section};

use super::memory::Place;

/// Makes the index, if one is wanted.
///
/// An index can be made again at any time, a machine cannot be parked again at any time: where the index
/// cannot be written, there is none. Where it says that nobody could restore the machine, that is an
/// error as long as the source can keep it.
#[derive(Debug)]
pub(super) struct Indexer {
    made: Option<(IndexBuilder, FileStorage)>,
    /// Why there is none although it was wanted.
    failed: Option<ImageError>,
    /// The source cannot keep the machine any more.
    is_late: bool,
}

impl Indexer {
    pub(super) fn new(made: Option<(IndexBuilder, FileStorage)>) -> Self {
        Self {
            made,
            failed: None,
            is_late: false,
        }
    }

    pub(super) fn none() -> Self {
        Self::new(None)
    }

    /// From now on the machine must be parked whatever the index says.
    pub(super) fn be_late(&mut self) {
        self.is_late = true;
    }

    pub(super) fn record(
        &mut self,
        offset: u64,
        bytes: u64,
        record: &Record,
    ) -> Result<(), ImageError> {
        self.tell(|builder| builder.record(offset, bytes, record))
    }

    pub(super) fn device(
        &mut self,
        section: &Section,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), ImageError> {
        self.tell(|builder| builder.device(section, offset, bytes))
    }

    pub(super) fn description(&mut self, offset: u64, text: &[u8]) -> Result<(), ImageError> {
        self.tell(|builder| builder.description(offset, text))
    }

    fn tell(
        &mut self,
        tell: impl FnOnce(&mut IndexBuilder) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        let Some((builder, _)) = &mut self.made else {
            return Ok(());
        };
        let Err(error) = tell(builder) else {
            return Ok(());
        };
        if !self.is_late && !matches!(error, ImageError::Index { .. }) {
            return Err(error);
        }
        self.fail(error);
        Ok(())
    }

    fn fail(&mut self, error: ImageError) {
        tracing::warn!(%error, "the machine is parked without an index");
        self.made = None;
        self.failed = Some(error);
    }

    /// Put it into its place; why there is none, if so.
    pub(super) fn publish(mut self) -> Option<ImageError> {
        if let Some((builder, storage)) = self.made.take()
            && let Err(error) = builder.publish(&storage)
        {
            self.fail(error);
        }
        self.failed
    }
}

/// A page whose payload is on its way.
#[derive(Debug)]
pub(super) struct IncomingPage {
    pub(super) place: Place,
    /// Its record, with the place and length of the header in the file.
    pub(super) record: Option<(Record, u64, u64)>,
    /// What has come, if it came in pieces.
    bytes: Vec<u8>,
}

impl IncomingPage {
    pub(super) fn at(place: Place) -> Self {
        Self {
            place,
            record: None,
            bytes: Vec::new(),
        }
    }

    /// Take a piece of the payload, of which `left` bytes are still to come.
    pub(super) fn take(
        &mut self,
        piece: &[u8],
        left: usize,
        index: &mut Indexer,
    ) -> Result<(), ImageError> {
        if index.made.is_none() {
            return Ok(());
        }
        let is_last = piece.len() == left;
        if !is_last || !self.bytes.is_empty() {
            self.bytes.extend_from_slice(piece);
        }
        if let (true, Some((record, offset, bytes))) = (is_last, &self.record) {
            let payload = match self.bytes.is_empty() {
                true => piece,
                false => &self.bytes,
            };
            index.tell(|builder| {
                builder.record(*offset, *bytes, record)?;
                builder.payload(offset + bytes, payload)
            })?;
        }
        Ok(())
    }
}
