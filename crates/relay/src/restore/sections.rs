//! Sections whose bodies go on as they came.

use std::collections::VecDeque;
use std::time::Duration;

use vmferry_image::{Image, ImageError, LiveSection};
use vmferry_savevm::{
    GuestStopped, HandlerError, Pending, PostcopyHandler, Progress, Registration, SaveHandler, Sink,
};
use vmferry_stream::{Section, SectionKind};
use vmferry_vmstate::{Decoded, Description, Device, DeviceError, SavedBody};

/// A device whose state is nothing but bytes.
pub(super) struct RawDevice {
    section: Section,
    description: Description,
    body: Vec<u8>,
}

impl RawDevice {
    pub(super) fn new(section: &Section, body: Vec<u8>) -> Self {
        Self {
            section: section.clone(),
            description: Description {
                name: section.name.to_string().into(),
                version: section.version,
                minimum_version: section.version,
                unmigratable: false,
                fields: Vec::new(),
                subsections: Vec::new(),
            },
            body,
        }
    }

    pub(super) fn registration(self) -> Registration<'static> {
        let (name, instance) = (self.section.name.clone(), self.section.instance);
        Registration::device(&name, Box::new(self))
            .instance(instance)
            .may_repeat()
    }

    pub(super) fn early_registration(self) -> Registration<'static> {
        let (name, instance) = (self.section.name.clone(), self.section.instance);
        Registration::early_device(&name, Box::new(self)).instance(instance)
    }
}

impl Device for RawDevice {
    fn description(&self) -> Option<&Description> {
        Some(&self.description)
    }

    fn is_needed(&self) -> bool {
        true
    }

    fn save(&mut self) -> Result<SavedBody, DeviceError> {
        Ok(SavedBody::OldStyle(self.body.clone()))
    }

    fn decode(&self, _version: u32, _window: &[u8]) -> Result<Decoded, DeviceError> {
        Err(DeviceError::Unsaveable {
            field: self.section.name.to_string(),
            fault: "a parked machine is not loaded here".to_owned(),
        })
    }
}

/// The only live section besides disks and memory that is known: dirty bitmaps of QEMU's own disks.
pub(super) const DIRTY_BITMAP: &str = "dirty-bitmap";

/// A body of [`DIRTY_BITMAP`] that says nothing: its end mark.
const NOTHING: &[u8] = &[0x01];

/// Dirty bitmaps: what was sent while the machine was parked.
pub(super) struct RawLive {
    section: Section,
    /// That of START, until it is sent.
    start: Option<Vec<u8>>,
    parts: VecDeque<Vec<u8>>,
    end: Option<Vec<u8>>,
}

impl RawLive {
    /// `None` if it never began.
    pub(super) fn read(image: &Image, live: &LiveSection) -> Result<Option<Self>, ImageError> {
        let Some(first) = live.bodies.first() else {
            return Ok(None);
        };
        let mut this = Self {
            section: first.section.clone(),
            start: None,
            parts: VecDeque::new(),
            end: None,
        };
        for body in &live.bodies {
            let bytes = image.section_body(body)?;
            match body.section.kind {
                SectionKind::Start => this.start = Some(bytes),
                SectionKind::End => this.end = Some(bytes),
                SectionKind::Part | SectionKind::Full => this.parts.push_back(bytes),
            }
        }
        Ok(Some(this))
    }

    pub(super) fn registration(self) -> Registration<'static> {
        let (name, instance) = (self.section.name.clone(), self.section.instance);
        let version = self.section.version;
        Registration::saving(&name, version, Box::new(self)).instance(instance)
    }

    fn left(&self) -> u64 {
        let bodies = self.parts.iter().chain(&self.end);
        bodies.map(|body| body.len() as u64).sum()
    }
}

impl SaveHandler for RawLive {
    /// Not after the last body: one that never ended does not end here either.
    fn is_active(&self) -> bool {
        self.start.is_some() || !self.parts.is_empty() || self.end.is_some()
    }

    fn setup(&mut self, sink: &mut dyn Sink) -> Result<(), HandlerError> {
        match self.start.take() {
            Some(body) => sink.put(&[&body]),
            None => Err("it has no START".into()),
        }
    }

    fn iterate(&mut self, sink: &mut dyn Sink) -> Result<Progress, HandlerError> {
        match self.parts.pop_front() {
            Some(body) => sink.put(&[&body])?,
            None => sink.put(&[NOTHING])?,
        }
        Ok(match self.parts.is_empty() {
            true => Progress::Finished,
            false => Progress::Unfinished,
        })
    }

    fn pending(&mut self) -> Pending {
        let bytes = self.left();
        match self.parts.is_empty() {
            false => Pending::Bulk { bytes },
            true => Pending::Dirty {
                bytes,
                later_bytes: 0,
                read_time: Duration::ZERO,
            },
        }
    }

    fn complete(
        &mut self,
        _stopped: &GuestStopped,
        sink: &mut dyn Sink,
    ) -> Result<(), HandlerError> {
        match self.end.take() {
            Some(body) => sink.put(&[&body]),
            None => Ok(()),
        }
    }

    fn postcopy(&mut self) -> Option<&mut dyn PostcopyHandler> {
        None
    }

    fn cleanup(&mut self) {}
}
