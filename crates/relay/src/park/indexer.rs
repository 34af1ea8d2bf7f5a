//! What the index hears.

use vmferry_image::{FileStorage, ImageError, IndexBuilder};
use vmferry_stream::{Record, Section};

use super::memory::Place;

/// Makes the index, if one is wanted.
#[derive(Debug)]
pub(super) struct Indexer(pub(super) Option<(IndexBuilder, FileStorage)>);

impl Indexer {
    pub(super) fn record(
        &mut self,
        offset: u64,
        bytes: u64,
        record: &Record,
    ) -> Result<(), ImageError> {
        match &mut self.0 {
            None => Ok(()),
            Some((builder, _)) => builder.record(offset, bytes, record),
        }
    }

    /// A record with its payload.
    fn page(
        &mut self,
        offset: u64,
        bytes: u64,
        record: &Record,
        payload: &[u8],
    ) -> Result<(), ImageError> {
        match &mut self.0 {
            None => Ok(()),
            Some((builder, _)) => {
                builder.record(offset, bytes, record)?;
                builder.payload(offset + bytes, payload)
            }
        }
    }

    pub(super) fn device(
        &mut self,
        section: &Section,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), ImageError> {
        match &mut self.0 {
            None => Ok(()),
            Some((builder, _)) => builder.device(section, offset, bytes),
        }
    }

    pub(super) fn description(&mut self, offset: u64, text: &[u8]) -> Result<(), ImageError> {
        match &mut self.0 {
            None => Ok(()),
            Some((builder, _)) => builder.description(offset, text),
        }
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
        if index.0.is_none() {
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
            index.page(*offset, *bytes, record, payload)?;
        }
        Ok(())
    }
}
