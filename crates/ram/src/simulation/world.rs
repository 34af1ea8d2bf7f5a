//! Everything but the source itself: one step of the clock is one call of [`World::step`].

use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use fastrand::Rng;
use vmferry_savevm::HandlerError;
use vmferry_stream::return_path::{ReturnDecoder, ReturnMessage};
use vmferry_stream::{Name, Step};

use super::Figures;
use super::ear::Ear;
use super::geometry::{Geometry, Page};
use super::link::{Cut, Link};
use super::source::{Source, nanoseconds};
use super::target::{Around, State, Target};
use crate::{OutgoingRam, PAGE_BYTES};

/// Steps in one migration.
const STEPS_MAX: u64 = 400_000;
/// Pages that the source may send before one that was asked for, beside others that were asked for
/// earlier: those that it has taken already.
const PAGES_AHEAD_MAX: usize = 16 + 4;

pub(super) fn lock(world: &Mutex<World>) -> MutexGuard<'_, World> {
    world.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the destination has said on this connection.
#[derive(Default)]
pub(super) struct Heard {
    pub(super) shut: Option<u32>,
    pub(super) pongs: Vec<u32>,
    pub(super) bitmaps: Vec<(Name, Vec<u8>)>,
    pub(super) resume_ack: Option<u32>,
}

/// A request that has reached the source.
struct Request {
    /// Its pages that were not sent then, and were not since.
    pages: BTreeSet<Page>,
    /// Pages that may be sent before the first of it.
    may_go_ahead: usize,
}

pub(super) struct World {
    pub(super) rng: Rng,
    pub(super) now_ns: u64,
    base: Instant,
    pub(super) deadline_ns: u64,
    pub(super) steps_left: u64,
    pub(super) geometry: Arc<Geometry>,
    pub(super) source: Source,
    pub(super) link: Link,
    pub(super) ear: Ear,
    pub(super) target: Target,
    pub(super) outgoing: Option<OutgoingRam>,
    pub(super) heard: Heard,
    return_path: ReturnDecoder,
    return_window: Vec<u8>,
    /// The bitmap that is being read: its block, and its length once that is announced.
    bitmap: Option<(Name, Option<usize>)>,
    requests: VecDeque<Request>,
    last_requested_block: Option<Name>,
    /// In a postcopy, what the source has not read on this connection.
    unread: BTreeSet<Page>,
    /// A section begins, and the pages that were asked for first come first.
    first: Option<BTreeSet<Page>>,
    pub(super) figures: Figures,
}

#[derive(Clone, Copy)]
enum Event {
    Writes(usize),
    Arrives,
    ArrivesBack,
    Target,
}

impl World {
    pub(super) fn new(
        rng: Rng,
        geometry: Arc<Geometry>,
        source: Source,
        link: Link,
        target: Target,
    ) -> Self {
        Self {
            rng,
            now_ns: 0,
            base: Instant::now(),
            deadline_ns: 0,
            steps_left: STEPS_MAX,
            ear: Ear::new(&geometry),
            geometry,
            source,
            link,
            target,
            outgoing: None,
            heard: Heard::default(),
            return_path: ReturnDecoder::new(),
            return_window: Vec::new(),
            bitmap: None,
            requests: VecDeque::new(),
            last_requested_block: None,
            unread: BTreeSet::new(),
            first: None,
            figures: Figures::default(),
        }
    }

    /// Another migration, to another machine.
    pub(super) fn begin(&mut self, link: Link, target: Target, deadline_ns: u64) {
        self.take_figures();
        self.ear = Ear::new(&self.geometry);
        self.target = target;
        self.deadline_ns = self.now_ns + deadline_ns;
        self.steps_left = STEPS_MAX;
        self.connect(link);
    }

    /// A new connection.
    pub(super) fn connect(&mut self, link: Link) {
        self.link = link;
        self.heard = Heard::default();
        self.return_path = ReturnDecoder::new();
        self.return_window.clear();
        self.bitmap = None;
        self.requests.clear();
        self.last_requested_block = None;
        self.first = None;
    }

    /// The source may send these pages on this connection.
    pub(super) fn must_send(&mut self, pages: BTreeSet<Page>) {
        self.unread.clone_from(&pages);
        self.ear.resume(pages);
    }

    pub(super) fn instant(&self) -> Instant {
        self.base + nanoseconds(self.now_ns)
    }

    /// The next thing happens. If there is none, nothing would ever happen any more.
    pub(super) fn step(&mut self) {
        let (at_ns, event) = self.next_event().expect("nothing would ever happen");
        self.now_ns = self.now_ns.max(at_ns);
        self.happen(event);
    }

    pub(super) fn run_until(&mut self, until_ns: u64) {
        while let Some((at_ns, event)) = self.next_event()
            && at_ns <= until_ns
        {
            self.now_ns = self.now_ns.max(at_ns);
            self.happen(event);
        }
        self.now_ns = self.now_ns.max(until_ns);
    }

    /// A time that hardly counts goes by.
    pub(super) fn pass_a_moment(&mut self) {
        let until_ns = self.now_ns + self.rng.u64(1..100_000);
        self.run_until(until_ns);
    }

    fn next_event(&self) -> Option<(u64, Event)> {
        let vcpus = self.source.vcpus.iter().enumerate();
        let vcpus = vcpus.filter(|_| self.source.runs);
        let writes = vcpus.map(|(index, vcpu)| (vcpu.next_ns, Event::Writes(index)));
        let arrives = self.link.next_forward_ns().map(|at| (at, Event::Arrives));
        let back = self
            .link
            .next_backward_ns()
            .map(|at| (at, Event::ArrivesBack));
        let target = self.target.next_ns().map(|at| (at, Event::Target));
        let events = writes.chain(arrives).chain(back).chain(target);
        events.min_by_key(|(at, _)| *at)
    }

    fn happen(&mut self, event: Event) {
        self.figures.events += 1;
        self.steps_left = self.steps_left.checked_sub(1).expect("it does not end");
        assert!(self.now_ns <= self.deadline_ns, "it takes too long");
        match event {
            Event::Writes(vcpu) => {
                let (now_ns, geometry) = (self.now_ns, &self.geometry);
                self.source.act(vcpu, now_ns, geometry, &mut self.rng);
            }
            Event::Arrives => {
                let bytes = self.link.deliver();
                self.with_target(|target, around| target.deliver(&bytes, around));
                if self.link.is_cut {
                    self.figures.breaks += 1;
                    self.with_target(Target::hang_up);
                }
            }
            Event::ArrivesBack => {
                let bytes = self.link.deliver_back();
                self.hear(&bytes);
            }
            Event::Target => self.with_target(Target::act),
        }
        let is_last = self.link.cut == Cut::AfterAll && self.target.state == State::Arrived;
        if is_last && !self.link.is_cut {
            self.figures.breaks += 1;
            self.link.cut();
        }
    }

    pub(super) fn with_target<T>(
        &mut self,
        act: impl FnOnce(&mut Target, &mut Around<'_>) -> T,
    ) -> T {
        let mut around = Around {
            now_ns: self.now_ns,
            base: self.base,
            rng: &mut self.rng,
            link: &mut self.link,
            source: &self.source,
        };
        act(&mut self.target, &mut around)
    }

    /// The source sends.
    pub(super) fn put(&mut self, bytes: &[u8]) -> Result<(), HandlerError> {
        if self.link.is_cut {
            return Err("cut".into());
        }
        let was_postcopy = self.ear.is_postcopy;
        if self.ear.hear(bytes, &self.source, &self.geometry) {
            self.link.package_begins();
        }
        if self.ear.is_postcopy && !was_postcopy {
            self.unread.clone_from(&self.ear.expected);
        }
        if std::mem::take(&mut self.ear.section_ended) {
            self.check_left();
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            let length = self.rng.usize(1..=self.link.piece_max()).min(rest.len());
            let (piece, behind) = rest.split_at(length);
            while !self.link.has_room(piece.len()) {
                self.step();
            }
            if self.link.is_cut {
                return Err("cut".into());
            }
            self.link.send(self.now_ns, piece);
            rest = behind;
        }
        Ok(())
    }

    /// Something that the source did not expect happens while it works.
    pub(super) fn source_reads(&mut self, page: Page) {
        match self.ear.is_postcopy {
            true => self.is_read_in_postcopy(page),
            false => self.source.is_read(page),
        }
        match self.rng.u8(..24) {
            0 | 1 => self.pass_a_moment(),
            2..5 => self.guest_writes_now(page),
            _ => {}
        }
    }

    pub(super) fn guest_writes_now(&mut self, page: Page) {
        if self.source.runs && !self.source.vcpus.is_empty() {
            self.figures.interleaved_writes += 1;
            self.source.write(None, page, &mut self.rng);
        }
    }

    fn is_read_in_postcopy(&mut self, page: Page) {
        if !self.unread.remove(&page) {
            return;
        }
        if let Some(first) = self.first.take() {
            assert!(
                first.contains(&page),
                "a page was asked for, and another is sent first"
            );
        }
        let mut is_requested = false;
        for request in &mut self.requests {
            is_requested |= request.pages.remove(&page);
        }
        self.requests.retain(|request| !request.pages.is_empty());
        for request in self.requests.iter_mut().filter(|_| !is_requested) {
            let left = request.may_go_ahead.checked_sub(1);
            request.may_go_ahead = left.expect("a page that was asked for has to wait");
        }
    }

    /// The source begins a section.
    pub(super) fn section_begins(&mut self) {
        self.first = self.requests.front().map(|request| request.pages.clone());
    }

    /// The source has ended sections; everything that it has read is on the link.
    pub(super) fn sections_ended(&mut self) {
        self.first = None;
        if !self.ear.is_postcopy {
            self.check_precopy();
        }
    }

    /// A section has ended, and nothing was read or reported since: what the source takes for left is
    /// what is left.
    fn check_left(&self) {
        let Some(outgoing) = &self.outgoing else {
            return;
        };
        let left = match self.ear.is_postcopy {
            true => self.ear.expected.len(),
            false => self
                .geometry
                .pages()
                .filter(|page| self.source.to_send[*page])
                .count(),
        };
        let remaining = outgoing.stats().remaining_bytes.load(Relaxed);
        assert_eq!(remaining, left as u64 * PAGE_BYTES);
        assert!(outgoing.0.queued_requests() <= self.geometry.pages().count());
    }

    /// Where nothing is left to be sent, what was sent is what is here.
    fn check_precopy(&self) {
        let source = &self.source;
        for page in self.geometry.pages() {
            let is_known = source.to_send[page] || source.logged[page] || source.is_unmarked(page);
            assert!(
                is_known || self.ear.shadow.page(page) == source.truth.page(page),
                "page {page:?} was written, and nobody knows"
            );
        }
    }

    /// Bytes of the return path.
    fn hear(&mut self, bytes: &[u8]) {
        self.return_window.extend_from_slice(bytes);
        loop {
            if let Some((name, Some(length))) = &self.bitmap {
                if self.return_window.len() < *length {
                    return;
                }
                let bitmap = self.return_window.drain(..*length).collect();
                self.heard.bitmaps.push((name.clone(), bitmap));
                self.bitmap = None;
            }
            match self
                .return_path
                .step(&self.return_window)
                .expect("an honest destination")
            {
                Step::Record { record, used } => {
                    self.return_window.drain(..used);
                    self.message(record);
                }
                Step::Payload(bytes) => {
                    let (_, length) = self.bitmap.as_mut().expect("of a bitmap");
                    *length = Some(bytes as usize);
                }
                Step::NeedMore(_) | Step::End => return,
            }
        }
    }

    fn message(&mut self, message: ReturnMessage) {
        match message {
            ReturnMessage::Shut(status) => self.heard.shut = Some(status),
            ReturnMessage::Pong(value) => self.heard.pongs.push(value),
            ReturnMessage::ReceivedBitmap { block, .. } => self.bitmap = Some((block, None)),
            ReturnMessage::ResumeAck(value) => self.heard.resume_ack = Some(value),
            ReturnMessage::RequestPages {
                block,
                start_bytes,
                length_bytes,
            } => self.request(block, start_bytes, u64::from(length_bytes)),
            ReturnMessage::ReceivedBitmapEnd | ReturnMessage::SwitchoverAck => {}
        }
    }

    fn request(&mut self, block: Option<Name>, start: u64, bytes: u64) {
        let outgoing = self.outgoing.as_ref().expect("a migration");
        let requested = outgoing.request(block.as_ref(), start, bytes);
        requested.expect("an honest destination");
        if block.is_some() {
            self.last_requested_block = block;
        }
        let name = self
            .last_requested_block
            .as_ref()
            .expect("the first has a name");
        let index = self.geometry.index(name);
        let pages = start / PAGE_BYTES..(start + bytes) / PAGE_BYTES;
        let pages = pages.map(|page| (index, page));
        let pages: BTreeSet<Page> = pages.filter(|page| self.unread.contains(page)).collect();
        self.figures.requests += 1;
        if !pages.is_empty() {
            self.requests.push_back(Request {
                pages,
                may_go_ahead: PAGES_AHEAD_MAX,
            });
        }
    }

    pub(super) fn take_figures(&mut self) {
        self.figures.pages += self.ear.pages;
        self.figures.xbzrle_pages += self.ear.xbzrle_pages;
        self.figures.revived += self.target.revived;
        self.figures.faults += self.target.faults_seen;
        self.figures.torn_host_pages += self.target.torn;
    }
}
