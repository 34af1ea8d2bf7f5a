//! The machine at the destination: the shipped handler, driven as an engine does, and a guest that
//! touches memory as soon as it may.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use fastrand::Rng;
use vmferry_savevm::{
    Incoming, LoadMachine, LoadOptions, LoadStep, Machine, Owner, Registration, Registry,
    load_cleanup,
};
use vmferry_stream::return_path::ReturnMessage;
use vmferry_stream::{Command, Ending, Name, RamRecord, Record};

use super::geometry::{Contents, End, Geometry, PAGE, Page, SimRam};
use super::kernel::SimKernel;
use super::link::Link;
use super::source::{Source, nanoseconds};
use crate::{
    GuestRam, IncomingRam, PAGE_BYTES, RamDestination, RamDestinationOptions, SECTION_NAME,
    SECTION_VERSION, Sharing,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Loading,
    /// The package is being loaded, or has been: pages may be missing.
    Listening,
    /// Everything is there.
    Arrived,
    /// The connection broke before there was enough of the stream.
    Failed,
}

/// What the target may use of the world.
pub(super) struct Around<'a> {
    pub(super) now_ns: u64,
    pub(super) base: Instant,
    pub(super) rng: &'a mut Rng,
    pub(super) link: &'a mut Link,
    pub(super) source: &'a Source,
}

/// Something that touches memory: a vCPU, or before the guest runs a device that is being loaded.
struct Actor {
    next_ns: Option<u64>,
    wants: Option<Page>,
    /// The host page that it waits for.
    waits: Option<Page>,
    touches_left: u32,
}

/// A message of the kernel about a fault.
struct Fault {
    actor: usize,
    page: Page,
    /// Until then, waking the actor takes it back.
    read_ns: u64,
    handled_ns: u64,
}

pub(super) struct Target {
    geometry: Arc<Geometry>,
    machine: LoadMachine,
    registry: Registry<'static>,
    pub(super) incoming: IncomingRam,
    ram: Arc<SimRam>,
    kernel: SimKernel,
    /// What memory must hold where it is there.
    truth: Contents,
    window: Vec<u8>,
    /// Payload that was announced.
    awaited: Option<(usize, Owner)>,
    announces_package: bool,
    package: Option<(LoadMachine, Vec<u8>)>,
    discarding: Name,
    discarded: BTreeSet<Page>,
    pub(super) state: State,
    /// The guest was started, or the precopy is over.
    pub(super) guest_runs: bool,
    stream_over: bool,
    is_recovering: bool,
    is_connected: bool,
    takes_requests: bool,
    last_block: Option<Name>,
    asked: BTreeSet<Page>,
    /// Host pages that somebody is known to wait for, in that order.
    wanted: Vec<Page>,
    ask_ns: Option<u64>,
    actors: Vec<Actor>,
    faults: Vec<Fault>,
    /// Host pages that were discarded and did not come.
    pub(super) missing: BTreeSet<Page>,
    interval_ns: u64,
    /// The page that came last does not end a host page.
    is_inside: bool,
    pub(super) revived: u64,
    pub(super) faults_seen: u64,
    pub(super) torn: u64,
}

impl Target {
    pub(super) fn new(
        geometry: &Arc<Geometry>,
        postcopy: bool,
        machine: Machine,
        interval_ns: u64,
        rng: &mut Rng,
    ) -> Self {
        let ram = geometry.ram(End::Destination);
        fill_with_garbage(&ram, rng);
        let mut truth = Contents::zeroes(geometry);
        for (block, shape) in geometry.shapes.iter().enumerate() {
            for page in (0..shape.pages).filter(|_| !shape.travels) {
                let page = (block, page);
                truth.page_mut(page).copy_from_slice(&ram.page(page));
            }
        }
        let options = RamDestinationOptions {
            postcopy,
            ignore_shared: geometry.ignore_shared,
        };
        let handler = RamDestination::new(ram.clone(), options).expect("right blocks");
        let incoming = handler.incoming();
        let mut registry = Registry::new();
        let versions = SECTION_VERSION..=SECTION_VERSION;
        let registration = Registration::loading(SECTION_NAME, versions, Box::new(handler));
        registry.register(registration).expect("the first");
        let options = LoadOptions {
            machine: Some(machine),
            refuse_rest: Some("no such device"),
            postcopy: match postcopy {
                true => Incoming::Ram(incoming.page_sizes()),
                false => Incoming::Refused("off"),
            },
            ..LoadOptions::default()
        };
        Self {
            geometry: Arc::clone(geometry),
            machine: LoadMachine::new(options),
            registry,
            incoming,
            kernel: SimKernel::new(Arc::clone(&ram), Arc::clone(geometry)),
            ram,
            truth,
            window: Vec::new(),
            awaited: None,
            announces_package: false,
            package: None,
            discarding: Name::default(),
            discarded: BTreeSet::new(),
            state: State::Loading,
            guest_runs: false,
            stream_over: false,
            is_recovering: false,
            is_connected: true,
            takes_requests: false,
            last_block: None,
            asked: BTreeSet::new(),
            wanted: Vec::new(),
            ask_ns: None,
            actors: Vec::new(),
            faults: Vec::new(),
            missing: BTreeSet::new(),
            interval_ns,
            is_inside: false,
            revived: 0,
            faults_seen: 0,
            torn: 0,
        }
    }

    pub(super) fn next_ns(&self) -> Option<u64> {
        let acts = self.actors.iter().filter_map(|actor| actor.next_ns);
        let faults = self.faults.iter().map(|fault| fault.handled_ns);
        acts.chain(faults).chain(self.ask_ns).min()
    }

    /// Do what is due at this time.
    pub(super) fn act(&mut self, around: &mut Around<'_>) {
        let now_ns = around.now_ns;
        if self.ask_ns.is_some_and(|at| at <= now_ns) {
            self.ask_ns = None;
            self.ask(around);
        }
        if self.stream_over {
            // The thread that reads them has ended.
            self.faults.clear();
        }
        while let Some(due) = self
            .faults
            .iter()
            .position(|fault| fault.handled_ns <= now_ns)
        {
            let fault = self.faults.swap_remove(due);
            self.handle(&fault, around);
            self.ask_soon(around);
        }
        for actor in 0..self.actors.len() {
            if self.actors[actor].next_ns.is_some_and(|at| at <= now_ns) {
                self.touch(actor, around);
            }
        }
        self.check_limits();
    }

    /// The destination gets to know that somebody waits.
    fn handle(&mut self, fault: &Fault, around: &mut Around<'_>) {
        let (page, seen) = (fault.page, around.base + nanoseconds(fault.read_ns));
        self.incoming.touched(page.0, page.1 * PAGE_BYTES, seen);
        self.faults_seen += 1;
        let revived = self.after_the_kernel(around);
        self.revived += revived.len() as u64;
        if self.missing.contains(&page) {
            assert!(revived.is_empty(), "a missing page was made up");
            if !self.wanted.contains(&page) {
                self.wanted.push(page);
            }
            return;
        }
        let waits = |actor: &Actor| actor.waits == Some(page);
        assert!(
            !self.actors.iter().any(waits),
            "nobody will wake who waits for {page:?}"
        );
    }

    /// Bytes have come over the link.
    pub(super) fn deliver(&mut self, bytes: &[u8], around: &mut Around<'_>) {
        if matches!(self.state, State::Loading | State::Listening) {
            self.window.extend_from_slice(bytes);
            self.work(around);
        }
    }

    /// The connection broke.
    pub(super) fn hang_up(&mut self, around: &mut Around<'_>) {
        self.is_connected = false;
        match self.state {
            State::Loading if self.machine.ending().is_some() => self.arrive(around),
            State::Loading => {
                load_cleanup(&mut self.registry);
                self.incoming.abandon();
                self.state = State::Failed;
            }
            State::Listening if !self.stream_over => {
                self.torn += u64::from(std::mem::take(&mut self.is_inside));
                self.incoming.pause();
                self.machine = self.machine.resumed();
                self.window.clear();
                self.awaited = None;
                self.takes_requests = false;
                self.asked.clear();
                self.last_block = None;
                self.check_bitmaps();
            }
            State::Listening | State::Arrived | State::Failed => {}
        }
    }

    /// A new connection for an interrupted postcopy.
    pub(super) fn reconnect(&mut self) {
        assert!(self.state == State::Listening && !self.stream_over);
        (self.is_connected, self.is_recovering) = (true, true);
    }

    fn work(&mut self, around: &mut Around<'_>) {
        while matches!(self.state, State::Loading | State::Listening) && !self.stream_over {
            if let Some((length, owner)) = self.awaited {
                if self.window.len() < length {
                    return;
                }
                let payload: Vec<u8> = self.window.drain(..length).collect();
                self.awaited = None;
                self.payload(&payload, owner, around);
                continue;
            }
            let step = self.machine.step(&self.window, &mut self.registry);
            match step.expect("the source is honest") {
                LoadStep::NeedMore(_) => return,
                LoadStep::End => self.end_of_pages(around),
                LoadStep::Device { .. } => panic!("there are no devices"),
                LoadStep::Payload { bytes, owner } => {
                    self.awaited = Some((bytes as usize, owner));
                }
                LoadStep::Record { record, used, .. } => {
                    self.window.drain(..used);
                    self.placed_by_the_source(around);
                    self.record(&record, around);
                }
            }
        }
    }

    fn payload(&mut self, payload: &[u8], owner: Owner, around: &mut Around<'_>) {
        if owner == Owner::Handler {
            let room = self.machine.payload(&mut self.registry, payload.len());
            room.expect("room").copy_from_slice(payload);
            let filled = self.machine.payload_filled(&mut self.registry);
            filled.expect("the source is honest");
            self.placed_by_the_source(around);
        } else if std::mem::take(&mut self.announces_package) {
            self.package = Some((self.machine.package(), payload.to_vec()));
            self.load_package(around);
        } else if self.machine.ending() == Some(Ending::WithDescription) {
            self.arrive(around);
        }
    }

    fn record(&mut self, record: &Record, around: &mut Around<'_>) {
        match record {
            Record::Command(Command::Ping(value)) => self.say(&ReturnMessage::Pong(*value), around),
            Record::Command(Command::PostcopyAdvise(_)) => {
                let advised = self.incoming.advise_simulated(self.kernel.clone());
                advised.expect("it can");
            }
            Record::Command(Command::PostcopyRamDiscard { block, .. }) => {
                self.discarding = block.clone();
            }
            Record::DiscardRange(range) => {
                let discarded = self.incoming.discard(&self.discarding, *range);
                discarded.expect("whole pages");
                let block = self.geometry.index(&self.discarding);
                let end = range.start_bytes + range.length_bytes;
                let pages = range.start_bytes / PAGE_BYTES..end / PAGE_BYTES;
                self.discarded.extend(pages.map(|page| (block, page)));
            }
            Record::Command(Command::Packaged { .. }) => self.announces_package = true,
            Record::Ram(RamRecord::Zero { page, .. } | RamRecord::Page { page, .. })
                if self.state == State::Listening =>
            {
                let shape = &self.geometry.shapes[self.geometry.index(&page.block)];
                let next = page.offset_bytes / PAGE_BYTES + 1;
                self.is_inside = !next.is_multiple_of(shape.host_pages);
            }
            Record::Command(Command::ReceivedBitmap(block)) => {
                assert!(self.is_recovering);
                let bitmap = self.incoming.received(block).expect("it is here");
                let mut bytes = Vec::new();
                let message = ReturnMessage::ReceivedBitmap {
                    block: block.clone(),
                    bytes: bitmap.len() as u32,
                };
                message.encode(&mut bytes);
                bytes.extend(bitmap);
                ReturnMessage::ReceivedBitmapEnd.encode(&mut bytes);
                around.link.send_back(around.now_ns, bytes);
            }
            Record::Command(Command::PostcopyResume) => {
                assert!(std::mem::take(&mut self.is_recovering));
                self.say(&ReturnMessage::ResumeAck(1), around);
                self.takes_requests = true;
                self.ask_soon(around);
            }
            _ => {}
        }
    }

    /// Up to LISTEN; the rest when the devices are loaded.
    fn load_package(&mut self, around: &mut Around<'_>) {
        while let Some((nested, bytes)) = &mut self.package {
            let step = nested.step(bytes, &mut self.registry);
            let LoadStep::Record { record, used, .. } = step.expect("our own package") else {
                break;
            };
            bytes.drain(..used);
            match record {
                Record::Command(Command::PostcopyListen) => return self.listen(around),
                Record::Command(Command::Ping(value)) => {
                    self.say(&ReturnMessage::Pong(value), around);
                }
                Record::Command(Command::PostcopyRun) => return self.run(around),
                other => panic!("{other:?} in the package"),
            }
        }
        panic!("the package does not start the guest");
    }

    fn listen(&mut self, around: &mut Around<'_>) {
        self.state = State::Listening;
        self.take_truth(around.source);
        let listening = self
            .incoming
            .listen_simulated(Arc::new(self.kernel.clone()));
        listening.expect("it can");
        let host_page = |page: &Page| self.geometry.host_page(*page);
        self.missing = self.discarded.iter().map(host_page).collect();
        self.kernel.set_absent(self.missing.clone());
        for page in self.geometry.pages() {
            let content = self.ram.page(page);
            match self.discarded.contains(&page) {
                true => assert!(content == [0; PAGE], "{page:?} is not empty"),
                false => assert!(content == self.truth.page(page), "{page:?} is wrong"),
            }
        }
        self.check_bitmaps();
        self.takes_requests = self.is_connected;
        // Devices that are loaded read memory.
        let devices = around.rng.u32(0..3);
        self.actors = (0..=devices)
            .map(|device| Actor {
                next_ns: Some(around.now_ns + around.rng.u64(1..self.interval_ns)),
                wants: None,
                waits: None,
                touches_left: if device == 0 { 0 } else { around.rng.u32(0..3) },
            })
            .collect();
    }

    fn run(&mut self, around: &mut Around<'_>) {
        self.guest_runs = true;
        let host_pages = |page: &Page| self.geometry.shapes[page.0].host_pages;
        let missing: u64 = self.missing.iter().map(host_pages).sum();
        around.link.guest_runs(missing * PAGE_BYTES);
        self.start_vcpus(around);
        self.end_if_over(around);
    }

    fn start_vcpus(&mut self, around: &mut Around<'_>) {
        // No fewer than there were devices, whose turn it may be.
        let vcpus = around.rng.u32(3..9);
        let vcpu = |_| Actor {
            next_ns: Some(around.now_ns + 1),
            wants: None,
            waits: None,
            touches_left: u32::MAX,
        };
        self.actors = (0..vcpus).map(vcpu).collect();
    }

    /// EOF of a postcopy.
    fn end_of_pages(&mut self, around: &mut Around<'_>) {
        assert!(self.missing.is_empty(), "EOF, without {:?}", self.missing);
        assert!(self.incoming.is_whole());
        self.incoming.finish().expect("nothing is missing");
        self.stream_over = true;
        self.after_the_kernel(around);
        self.end_if_over(around);
    }

    /// The stream, and the package.
    fn end_if_over(&mut self, around: &mut Around<'_>) {
        if !self.guest_runs || !self.stream_over {
            return;
        }
        let (package, rest) = self.package.take().expect("it was loaded");
        assert!(rest.is_empty());
        self.machine.leave_package(package).expect("it has run");
        load_cleanup(&mut self.registry);
        self.state = State::Arrived;
        self.say(&ReturnMessage::Shut(0), around);
    }

    /// A precopy is over.
    fn arrive(&mut self, around: &mut Around<'_>) {
        self.incoming.finish().expect("a precopy");
        load_cleanup(&mut self.registry);
        self.take_truth(around.source);
        (self.state, self.guest_runs) = (State::Arrived, true);
        self.check_memory();
        self.say(&ReturnMessage::Shut(0), around);
        self.start_vcpus(around);
    }

    fn take_truth(&mut self, source: &Source) {
        assert!(!source.runs, "two guests run");
        for page in self.geometry.pages() {
            let content = source.truth.page(page);
            self.truth.page_mut(page).copy_from_slice(content);
        }
    }

    fn say(&self, message: &ReturnMessage, around: &mut Around<'_>) {
        if self.is_connected {
            let mut bytes = Vec::new();
            message.encode(&mut bytes);
            around.link.send_back(around.now_ns, bytes);
        }
    }

    /// What was placed just now is right, was missing, and whoever waited goes on.
    fn placed_by_the_source(&mut self, around: &mut Around<'_>) {
        for page in self.after_the_kernel(around) {
            assert!(self.missing.remove(&page), "{page:?} came, but was there");
            self.wanted.retain(|wanted| *wanted != page);
            for page in self.geometry.host_page_pages(page) {
                assert!(
                    self.ram.page(page) == self.truth.page(page),
                    "{page:?} is wrong"
                );
            }
        }
    }

    /// Who was woken goes on; what was placed.
    fn after_the_kernel(&mut self, around: &mut Around<'_>) -> Vec<Page> {
        let (placed, woken) = self.kernel.take_events();
        for (index, actor) in self.actors.iter_mut().enumerate() {
            if actor.waits.is_some_and(|page| woken.contains(&page)) {
                actor.waits = None;
                actor.next_ns = Some(around.now_ns + around.rng.u64(1..1000));
                let now_ns = around.now_ns;
                self.faults
                    .retain(|fault| fault.actor != index || fault.read_ns <= now_ns);
            }
        }
        placed
    }

    fn touch(&mut self, index: usize, around: &mut Around<'_>) {
        let actor = &mut self.actors[index];
        actor.next_ns = None;
        if actor.touches_left == 0 {
            if !self.guest_runs && self.actors.iter().all(|actor| actor.touches_left == 0) {
                self.load_package(around);
            }
            return;
        }
        let page = actor.wants.unwrap_or_else(|| {
            let block = around.rng.usize(..self.geometry.shapes.len());
            (block, around.rng.u64(..self.geometry.shapes[block].pages))
        });
        actor.wants = Some(page);
        let host_page = self.geometry.host_page(page);
        if self.kernel.is_absent(host_page) {
            actor.waits = Some(host_page);
            let read_ns = around.now_ns + around.rng.u64(1..self.interval_ns);
            self.faults.push(Fault {
                actor: index,
                page: host_page,
                read_ns,
                handled_ns: read_ns + around.rng.u64(1..self.interval_ns),
            });
            return;
        }
        assert!(
            self.ram.page(page) == self.truth.page(page),
            "whoever touches {page:?} at the destination finds something else"
        );
        actor.wants = None;
        actor.touches_left -= 1;
        actor.next_ns = Some(around.now_ns + around.rng.u64(1..2 * self.interval_ns));
        match around.rng.u8(..8) {
            0..3 => self.write(page, around.rng),
            3 => self.give_back(host_page),
            _ => {}
        }
    }

    fn write(&mut self, page: Page, rng: &mut Rng) {
        let word = rng.usize(..PAGE / 8) * 8;
        let content = &mut self.truth.page_mut(page)[word..word + 8];
        rng.fill(content);
        let block = &self.ram.blocks()[page.0];
        let written = block.write(page.1 * PAGE_BYTES + word as u64, content);
        written.expect("in use");
    }

    /// A balloon takes a host page.
    fn give_back(&mut self, host_page: Page) {
        let block = &self.ram.blocks()[host_page.0];
        if block.sharing() == Sharing::Private && self.kernel.watches(host_page.0) {
            self.kernel.give_back(host_page);
            for page in self.geometry.clone().host_page_pages(host_page) {
                self.truth.page_mut(page).fill(0);
            }
        }
    }

    fn ask_soon(&mut self, around: &mut Around<'_>) {
        if self.ask_ns.is_none() {
            self.ask_ns = Some(around.now_ns + around.rng.u64(1..self.interval_ns));
        }
    }

    fn ask(&mut self, around: &mut Around<'_>) {
        while self.takes_requests
            && let Some(request) = self.incoming.next_request(around.base)
        {
            let page = (
                self.geometry.index(&request.block),
                request.start / PAGE_BYTES,
            );
            let host_pages = self.geometry.shapes[page.0].host_pages;
            assert_eq!(page, self.geometry.host_page(page));
            assert_eq!(u64::from(request.bytes), host_pages * PAGE_BYTES);
            let mut wanted = self.wanted.iter();
            let first = wanted.find(|page| !self.asked.contains(page));
            assert_eq!(first, Some(&page), "who came first is asked for first");
            self.asked.insert(page);
            let is_same = self.last_block.as_ref() == Some(&request.block);
            let message = ReturnMessage::RequestPages {
                block: (!is_same).then(|| request.block.clone()),
                start_bytes: request.start,
                length_bytes: request.bytes,
            };
            self.last_block = Some(request.block);
            self.say(&message, around);
        }
        let is_asked = |page: &Page| self.asked.contains(page);
        assert!(
            !self.takes_requests || self.wanted.iter().all(is_asked),
            "somebody waits for a page that is not asked for"
        );
    }

    /// What is told to be here is what is here.
    fn check_bitmaps(&mut self) {
        for (block, shape) in self.geometry.shapes.iter().enumerate() {
            let bitmap = self.incoming.received(&shape.name).expect("it is here");
            let mut came_in_part = 0;
            for page in 0..shape.pages {
                let is_here = bitmap[page as usize / 8] >> (page % 8) & 1 == 1;
                let host_page = self.geometry.host_page((block, page));
                assert_eq!(
                    is_here,
                    !self.missing.contains(&host_page),
                    "{:?}",
                    (block, page)
                );
                came_in_part += u64::from(is_here);
            }
            assert_eq!(came_in_part % shape.host_pages, 0);
        }
    }

    /// Every page is as it must be, and nobody waits.
    pub(super) fn check_memory(&self) {
        for (block, shape) in self.geometry.shapes.iter().enumerate() {
            let pages = self.ram.blocks()[block].pages();
            assert!(
                pages == shape.pages || !shape.travels,
                "{} has {pages} pages",
                shape.name
            );
            for page in 0..shape.pages {
                let page = (block, page);
                assert!(
                    self.ram.page(page) == self.truth.page(page),
                    "{page:?} is wrong"
                );
            }
        }
    }

    pub(super) fn check_nobody_waits(&self) {
        assert!(self.actors.iter().all(|actor| actor.waits.is_none()));
    }

    fn check_limits(&self) {
        let host_pages = self.geometry.pages().count();
        let entries = self.incoming.request_entries();
        assert!(
            entries <= host_pages + 3 * self.actors.len() + 65,
            "{entries} entries"
        );
    }
}

/// Memory of a machine that was used before.
fn fill_with_garbage(ram: &SimRam, rng: &mut Rng) {
    let mut page = [0; PAGE];
    for block in ram.blocks() {
        for number in 0..block.pages() {
            if rng.bool() {
                rng.fill(&mut page);
                block.write(number * PAGE_BYTES, &page).expect("in use");
            }
        }
    }
}
