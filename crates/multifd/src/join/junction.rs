//! Where the connections of a migration meet: one plain stream, and who may write it when.
//!
//! ```text
//!   Setup ─▶ Items ◀──────────────▶ Elsewhere      a section that is not ram, too long to be held
//!              ▲ │ pages of a channel, or PART
//!              │ ▼
//!             Pages ── END ─▶ Over
//! ```
//!
//! Channels write pages in [`Stage::Items`] (they open a PART of their own) and in [`Stage::Pages`];
//! everywhere else they wait. So the main thread writes whatever is not a page in one piece, and a
//! channel never waits for bytes of the main connection while it has pages to give: the source may be
//! unable to send these bytes before.
//!
//! All of it is behind one lock, which is held while the plain stream is written. That write ends when
//! the consumer reads, when it is gone, with the stop event, or when [`Junction::give_up`] shuts the
//! sockets down, which needs no lock.

use std::collections::BTreeMap;
use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use rustix::net::Shutdown;
use vmferry_channel::Writer;
use vmferry_stream::{Encoder, Name, PageBits, RamPage, RamRecord, Record, Section, SectionKind};

use crate::error::{MultifdError, Place};

/// What may be written to the plain stream now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// The list of blocks is not through.
    Setup,
    /// Between two items.
    Items,
    /// In the body of a PART or END of ram.
    Pages,
    /// In the body of another section.
    Elsewhere,
    /// Behind the END of ram.
    Over,
}

/// Pages of one packet.
pub(crate) struct Pages<'a> {
    pub(crate) block: &'a Name,
    pub(crate) normal: &'a [u64],
    pub(crate) zero: &'a [u64],
    /// The normal ones, one after the other.
    pub(crate) bytes: &'a [u8],
    pub(crate) page_bytes: u32,
}

/// Used lengths of blocks.
pub(crate) type Blocks = BTreeMap<Name, u64>;

pub(crate) struct State {
    stage: Stage,
    /// Whether the open section is one of ours.
    is_ours: bool,
    writer: Option<Writer>,
    /// The section of ram, and how pages are written.
    ram: Option<(Section, Encoder)>,
    pub(crate) page: Option<PageBits>,
    pub(crate) blocks: Blocks,
    /// SYNCs of each channel.
    syncs: Vec<u64>,
    /// Where channels have ended.
    ended: Vec<Option<Place>>,
    /// SYNCs that the main thread has passed.
    passed: u64,
    /// END of ram has begun.
    is_ending: bool,
    failure: Option<MultifdError>,
}

pub(crate) struct Junction {
    state: Mutex<State>,
    changed: Condvar,
    /// Our end of the plain stream, the main connection, the channels.
    sockets: Vec<OwnedFd>,
    given_up: AtomicBool,
}

/// What a wait says when somebody else has failed: why is known already.
const FAILED: MultifdError = MultifdError::Abandoned;

impl Junction {
    pub(crate) fn new(writer: Writer, sockets: Vec<OwnedFd>, channels: usize) -> Self {
        Self {
            state: Mutex::new(State {
                stage: Stage::Setup,
                is_ours: false,
                writer: Some(writer),
                ram: None,
                page: None,
                blocks: Blocks::new(),
                syncs: vec![0; channels],
                ended: vec![None; channels],
                passed: 0,
                is_ending: false,
                failure: None,
            }),
            changed: Condvar::new(),
            sockets,
            given_up: AtomicBool::new(false),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Look at the state, or change it. Fails if somebody has failed.
    pub(crate) fn with<T>(
        &self,
        act: impl FnOnce(&mut State) -> Result<T, MultifdError>,
    ) -> Result<T, MultifdError> {
        let mut state = self.lock();
        if state.failure.is_some() {
            return Err(FAILED);
        }
        let outcome = act(&mut state);
        drop(state);
        self.changed.notify_all();
        outcome
    }

    /// Wait until `ready` has an answer. Fails if somebody has failed.
    fn wait<T>(
        &self,
        mut ready: impl FnMut(&mut State) -> Option<Result<T, MultifdError>>,
    ) -> Result<T, MultifdError> {
        let mut state = self.lock();
        let outcome = loop {
            if state.failure.is_some() {
                return Err(FAILED);
            }
            if let Some(outcome) = ready(&mut state) {
                break outcome;
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        };
        drop(state);
        self.changed.notify_all();
        outcome
    }

    /// Nothing more comes of it: everybody stops, and the consumer sees the end of the stream. The first
    /// reason counts.
    pub(crate) fn fail(&self, error: MultifdError) {
        let mut state = self.lock();
        if state.failure.is_none() {
            state.failure = Some(if self.given_up.load(Ordering::SeqCst) {
                MultifdError::Abandoned
            } else {
                tracing::debug!(%error, "multifd failed");
                error
            });
        }
        state.writer = None;
        drop(state);
        self.changed.notify_all();
        self.shut_down(Shutdown::Both);
    }

    /// The main connection is through: so is the plain stream. Channels wait for nothing any more, even
    /// if there was no section of ram.
    pub(crate) fn end(&self) {
        let mut state = self.lock();
        state.writer = None;
        state.stage = Stage::Over;
        drop(state);
        self.changed.notify_all();
        // Our second handle keeps it open.
        if let Some(plain) = self.sockets.first() {
            let _ = rustix::net::shutdown(plain, Shutdown::Write);
        }
    }

    /// Whoever reads the plain stream wants no more of it. Takes no lock: one may be held by a thread
    /// that waits for the consumer.
    pub(crate) fn give_up(&self) {
        self.given_up.store(true, Ordering::SeqCst);
        if let Some(plain) = self.sockets.first() {
            let _ = rustix::net::shutdown(plain, Shutdown::Both);
        }
        // The return path may still be under way: the main connection is only read no more.
        self.shut_down(Shutdown::Read);
    }

    pub(crate) fn is_given_up(&self) -> bool {
        self.given_up.load(Ordering::SeqCst)
    }

    fn shut_down(&self, how: Shutdown) {
        for socket in &self.sockets {
            // Fails if the other side was faster.
            let _ = rustix::net::shutdown(socket, how);
        }
    }

    /// What went wrong, once no thread is left. That nobody wanted the rest is nothing wrong here.
    pub(crate) fn outcome(&self) -> Result<(), MultifdError> {
        match self.lock().failure.take() {
            Some(error) if !error.is_given_up() => Err(error),
            _ => Ok(()),
        }
    }

    /// For channels: the size of pages, when the main thread knows it.
    pub(crate) fn page_bits(&self) -> Result<PageBits, MultifdError> {
        self.wait(|state| match (state.page, state.stage) {
            (None, Stage::Over) => Some(Err(FAILED)),
            (page, _) => page.map(Ok),
        })
    }

    /// For channels: put pages into the plain stream as soon as that is possible. False if it never
    /// will be.
    pub(crate) fn deliver(&self, pages: &Pages<'_>) -> Result<bool, MultifdError> {
        self.wait(|state| match state.stage {
            Stage::Setup | Stage::Elsewhere => None,
            Stage::Over => Some(Ok(false)),
            Stage::Items | Stage::Pages => Some(state.write_pages(pages).map(|()| true)),
        })
    }

    /// For channels: a SYNC came; wait until the main thread and all other channels have come as far, or
    /// until that no longer matters.
    pub(crate) fn synchronise(&self, channel: u8) -> Result<(), MultifdError> {
        let mut reached = 0;
        self.with(|state| {
            if let Some(syncs) = state.syncs.get_mut(usize::from(channel)) {
                *syncs = syncs.saturating_add(1);
                reached = *syncs;
            }
            Ok(())
        })?;
        self.wait(|state| {
            let is_passed = state.passed >= reached || state.stage == Stage::Over;
            is_passed.then_some(Ok(()))
        })
    }

    /// For channels: the connection has ended. Whether it may at this place.
    pub(crate) fn may_end(&self, at: Place) -> Result<bool, MultifdError> {
        self.with(|state| {
            if let Some(ended) = state.ended.get_mut(usize::from(at.channel)) {
                *ended = Some(at);
            }
            Ok(state.is_ending)
        })
    }

    /// For channels: whether what they bring matters no more.
    pub(crate) fn is_over(&self) -> bool {
        self.lock().stage == Stage::Over
    }

    /// For the main thread: wait until every channel has delivered one more SYNC, and let them go on.
    pub(crate) fn pass_sync(&self) -> Result<(), MultifdError> {
        self.wait(|state| {
            let next = state.passed.saturating_add(1);
            let channels = state.syncs.iter().zip(&state.ended);
            let mut behind = channels.filter(|(syncs, _)| **syncs < next);
            if let Some(at) = behind.clone().find_map(|(_, ended)| *ended) {
                return Some(Err(MultifdError::ChannelEnded { at }));
            }
            if behind.next().is_some() {
                return None;
            }
            state.passed = next;
            Some(Ok(()))
        })
    }
}

impl State {
    /// Append to the plain stream.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), MultifdError> {
        self.write_slices(&[IoSlice::new(bytes)])
    }

    fn write_slices(&mut self, slices: &[IoSlice<'_>]) -> Result<(), MultifdError> {
        let writer = self.writer.as_mut().ok_or(FAILED)?;
        writer
            .write_vectored_all(slices)
            .map_err(MultifdError::consumer)
    }

    /// The list of blocks is through: from now on pages may be written.
    pub(crate) fn set_up(&mut self, ram: Section, footers: bool) -> Result<(), MultifdError> {
        self.ram = Some((ram, Encoder::new(footers)));
        self.stage = Stage::Pages;
        self.end_pages(SectionKind::Start)
    }

    /// The main connection comes to the body of a section of ram.
    pub(crate) fn begin_pages(&mut self, kind: SectionKind) -> Result<(), MultifdError> {
        if kind == SectionKind::End {
            self.end_ours()?;
            self.is_ending = true;
        }
        self.open_pages(kind)?;
        self.is_ours = false;
        Ok(())
    }

    /// Open a section of ram, unless one of ours is open.
    fn open_pages(&mut self, kind: SectionKind) -> Result<(), MultifdError> {
        let (Stage::Items, Some((ram, encoder))) = (self.stage, &mut self.ram) else {
            return Ok(());
        };
        let mut out = Vec::new();
        encoder.record(&Record::Section(ram.with_kind(kind)), &mut out);
        self.stage = Stage::Pages;
        self.is_ours = true;
        self.write(&out)
    }

    /// Close the open section of ram.
    pub(crate) fn end_pages(&mut self, kind: SectionKind) -> Result<(), MultifdError> {
        let (Stage::Pages, Some((ram, encoder))) = (self.stage, &mut self.ram) else {
            return Ok(());
        };
        let mut out = Vec::new();
        encoder.record(&Record::Ram(RamRecord::EndOfSection), &mut out);
        encoder.record(&Record::SectionEnd { id: ram.id }, &mut out);
        self.is_ours = false;
        self.stage = match kind {
            SectionKind::End => Stage::Over,
            _ => Stage::Items,
        };
        self.write(&out)
    }

    /// Close the open section if it is ours.
    fn end_ours(&mut self) -> Result<(), MultifdError> {
        if self.is_ours {
            self.end_pages(SectionKind::Part)?;
        }
        Ok(())
    }

    /// Append whole items that are no pages, or the beginning of one.
    pub(crate) fn write_items(&mut self, items: &[u8], is_whole: bool) -> Result<(), MultifdError> {
        self.end_ours()?;
        self.write(items)?;
        if matches!(self.stage, Stage::Items | Stage::Elsewhere) {
            self.stage = match is_whole {
                true => Stage::Items,
                false => Stage::Elsewhere,
            };
        }
        Ok(())
    }

    /// Append records of the main connection's open section, each with its payload.
    pub(crate) fn write_records(
        &mut self,
        records: &[(RamRecord, Vec<u8>)],
    ) -> Result<(), MultifdError> {
        let Some((_, encoder)) = &mut self.ram else {
            return Ok(());
        };
        let mut out = Vec::new();
        for (record, payload) in records {
            encoder.record(&Record::Ram(record.clone()), &mut out);
            out.extend(payload);
        }
        self.write(&out)
    }

    fn write_pages(&mut self, pages: &Pages<'_>) -> Result<(), MultifdError> {
        self.open_pages(SectionKind::Part)?;
        let Some((_, encoder)) = &mut self.ram else {
            return Ok(());
        };
        let page_bytes = pages.page_bytes;
        let page = |offset: &u64| RamPage {
            block: pages.block.clone(),
            offset_bytes: *offset,
        };
        let (mut heads, mut ends) = (Vec::new(), Vec::new());
        for offset in pages.normal {
            let record = RamRecord::Page {
                page: page(offset),
                bytes: page_bytes,
            };
            encoder.record(&Record::Ram(record), &mut heads);
            ends.push(heads.len());
        }
        let normal_heads_bytes = heads.len();
        for offset in pages.zero {
            let record = RamRecord::Zero {
                page: page(offset),
                fill: 0,
            };
            encoder.record(&Record::Ram(record), &mut heads);
        }
        let starts = [0].into_iter().chain(ends.iter().copied());
        let chunk_bytes = usize::try_from(page_bytes).unwrap_or(usize::MAX);
        let contents = pages.bytes.chunks(chunk_bytes);
        let mut slices = Vec::with_capacity(ends.len().saturating_mul(2).saturating_add(1));
        for ((start, end), content) in starts.zip(ends.iter().copied()).zip(contents) {
            slices.push(IoSlice::new(heads.get(start..end).unwrap_or_default()));
            slices.push(IoSlice::new(content));
        }
        slices.push(IoSlice::new(
            heads.get(normal_heads_bytes..).unwrap_or_default(),
        ));
        self.write_slices(&slices)
    }
}
