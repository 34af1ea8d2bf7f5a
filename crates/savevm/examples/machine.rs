//! A machine that can be saved and loaded: where to begin with a VMM of your own.
//!
//! Run it with `cargo run -p vmferry-savevm --example machine -- FILE`. It saves a machine with
//! memory, a clock and a serial port into the file while its guest runs, loads the file into a second
//! machine, and gives the state of the devices alone to a third. `vmferry inspect FILE` shows what
//! was saved.

use std::collections::BTreeSet;
use std::error::Error;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmferry_savevm::*;
use vmferry_stream::{Encoder, RamPage, RamRecord};
use vmferry_vmstate::*;

type Result<T, E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

/// Devices and memory belong to the guest's threads too. What is saved lives behind a mutex.
#[derive(Default)]
struct Vm {
    memory: Arc<Mutex<Memory>>,
    clock: Arc<Mutex<Clock>>,
    serial: Arc<Mutex<Serial>>,
}

#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "clock", version = 1)]
struct Clock {
    #[vmstate(uint64)]
    nanoseconds: u64,
    #[vmstate(timer)]
    alarm: Option<u64>,
}

/// Version 2 brought the line control; streams of version 1 are still loaded.
#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "serial", version = 2, minimum_version = 1, post_load = Self::check)]
struct Serial {
    #[vmstate(uint16)]
    divider: u16,
    #[vmstate(uint8, since = 2)]
    line_control: u8,
}

impl Serial {
    /// The stream comes from outside: what cannot be must not get into the machine.
    fn check(&mut self, _version: u32) -> Result<(), &'static str> {
        match self.divider {
            0 => Err("the divider is zero"),
            _ => Ok(()),
        }
    }
}

const PAGE_BYTES: usize = 4096;
const PAGES: usize = 64;
/// Pages that one round sends.
const ROUND_PAGES: usize = 16;
/// So much may be left when the guest is stopped.
const DOWNTIME_BYTES: u64 = 2 * PAGE_BYTES as u64;

/// The guest's memory, and which of its pages the destination does not have.
struct Memory {
    pages: Vec<[u8; PAGE_BYTES]>,
    dirty: BTreeSet<usize>,
    /// Each page was sent once.
    bulk_is_over: bool,
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            pages: vec![[0; PAGE_BYTES]; PAGES],
            dirty: BTreeSet::new(),
            bulk_is_over: false,
        }
    }
}

impl Memory {
    /// What the guest does, and a dirty log notes.
    fn write(&mut self, page: usize, byte: u8) {
        self.pages[page].fill(byte);
        self.dirty.insert(page);
    }
}

impl Vm {
    /// Everything that is saved, in order. Both sides build it in the same way.
    fn registry(&self) -> Result<Registry<'static>> {
        let save = Box::new(RamSource(Arc::clone(&self.memory)));
        let load = Box::new(RamTarget {
            memory: Arc::clone(&self.memory),
            page: 0,
            incoming: [0; PAGE_BYTES],
        });
        let clock = Box::new(Arc::clone(&self.clock));
        let serial = Box::new(Arc::clone(&self.serial));
        let mut registry = Registry::new();
        registry.register(Registration::live("ram", 4..=4, save, load))?;
        registry.register(Registration::device("clock", clock))?;
        registry.register(Registration::device("serial", serial).at("0000:00:03.0"))?;
        Ok(registry)
    }

    /// A moment in the guest's life.
    fn run_guest(&self, moment: u8) {
        lock(&self.memory).write(7, moment);
        lock(&self.clock).nanoseconds += 1_000_000;
    }

    /// Stop the processors, and wait for every request that is in flight.
    fn stop(&self) -> GuestStopped {
        GuestStopped::assert_drained()
    }
}

/// Source and destination must be the same kind of machine.
fn machine() -> Result<Machine> {
    Ok(Machine::named(Name::new("example-1.0")?))
}

/// Save a running machine.
fn save(vm: &Vm, sink: &mut dyn Sink) -> Result<()> {
    let mut registry = vm.registry()?;
    let saved = save_live(vm, &mut registry, sink);
    // Whatever happened: threads and dirty logs end here.
    cleanup(&mut registry);
    saved
}

fn save_live(vm: &Vm, registry: &mut Registry<'_>, sink: &mut dyn Sink) -> Result<()> {
    let opening = Opening {
        machine: machine()?,
        ..Opening::default()
    };
    let mut iterating = begin(&opening, registry, sink)?;
    let mut moment = 0;
    let completing = loop {
        iterating.iterate(registry, sink)?;
        moment += 1;
        vm.run_guest(moment);
        match iterating.try_complete(registry, |left| left.bytes <= DOWNTIME_BYTES) {
            Ready::Go(completing) => break completing,
            Ready::NotYet(again, _left) => iterating = again,
        }
    };
    let stopped = vm.stop();
    completing
        .end_live(&stopped, registry, None, sink)?
        .save_devices(&stopped, registry, sink)?
        .finish(sink)?;
    Ok(())
}

/// Load a stream that is in memory. A VMM that reads gigabytes from a socket calls
/// [`LoadMachine::step`] in a loop instead, and reads pages straight to their place.
fn load(vm: &Vm, stream: &[u8]) -> Result<()> {
    let mut registry = vm.registry()?;
    let mut loading = LoadMachine::new(LoadOptions {
        machine: Some(machine()?),
        refuse_rest: Some("this machine has no such device"),
        ..LoadOptions::default()
    });
    let loaded = loading.load_slice(stream, &mut registry);
    load_cleanup(&mut registry);
    // After an error devices may be half those of the stream: do not run this machine.
    loaded?;
    Ok(())
}

/// Save the devices alone, of a machine that stands still: memory goes another way, or stays.
fn save_devices(vm: &Vm) -> Result<Vec<u8>> {
    let mut stream = Vec::new();
    save_device_state(true, &vm.stop(), &mut vm.registry()?, &mut stream)?;
    Ok(stream)
}

fn load_devices(vm: &Vm, stream: &[u8]) -> Result<()> {
    let mut loading = LoadMachine::of_device_state(Footers::Present, &vm.stop());
    loading.load_slice(stream, &mut vm.registry()?)?;
    Ok(())
}

/// Puts the stream into a file.
struct FileSink(File);

impl Sink for FileSink {
    fn put(&mut self, parts: &[&[u8]]) -> Result<(), HandlerError> {
        for part in parts {
            self.0.write_all(part)?;
        }
        Ok(())
    }

    /// A channel has a rate limit here.
    fn allowance(&self) -> u64 {
        u64::MAX
    }

    /// And says here that somebody cancelled.
    fn check(&self) -> Result<(), HandlerError> {
        Ok(())
    }
}

/// Sends memory, as QEMU does.
struct RamSource(Arc<Mutex<Memory>>);

impl RamSource {
    /// The body of a section: records, each followed by its payload.
    fn body(&self, records: &[(RamRecord, &[u8])], sink: &mut dyn Sink) -> Result<()> {
        let mut encoder = Encoder::new(true);
        let mut bytes = Vec::new();
        for (record, payload) in records {
            encoder.record(&Record::Ram(record.clone()), &mut bytes);
            bytes.extend_from_slice(payload);
        }
        encoder.record(&Record::Ram(RamRecord::EndOfSection), &mut bytes);
        sink.put(&[&bytes])
    }

    /// Send dirty pages, at most so many. Each is taken from the log before it is read: a guest that
    /// writes it meanwhile makes it dirty again.
    fn send(&self, most: usize, sink: &mut dyn Sink) -> Result<()> {
        let mut memory = lock(&self.0);
        let mut pages = Vec::new();
        while pages.len() < most
            && let Some(page) = memory.dirty.pop_first()
        {
            pages.push((page, memory.pages[page]));
        }
        memory.bulk_is_over |= memory.dirty.is_empty();
        drop(memory);
        let mut records = Vec::new();
        for (page, bytes) in &pages {
            let page = RamPage {
                block: block()?,
                offset_bytes: (page * PAGE_BYTES) as u64,
            };
            let bytes = bytes.as_slice();
            records.push(match bytes.iter().all(|byte| *byte == 0) {
                true => (RamRecord::Zero { page, fill: 0 }, &[][..]),
                false => {
                    let length = PAGE_BYTES as u32;
                    (
                        RamRecord::Page {
                            page,
                            bytes: length,
                        },
                        bytes,
                    )
                }
            });
        }
        self.body(&records, sink)
    }
}

impl SaveHandler for RamSource {
    fn is_active(&self) -> bool {
        true
    }

    fn setup(&mut self, sink: &mut dyn Sink) -> Result<(), HandlerError> {
        let mut memory = lock(&self.0);
        memory.dirty = (0..PAGES).collect();
        memory.bulk_is_over = false;
        drop(memory);
        let total_bytes = (PAGES * PAGE_BYTES) as u64;
        let block = RamRecord::Block {
            name: block()?,
            used_bytes: total_bytes,
            page_bytes: None,
            guest_address: None,
            mapped: None,
        };
        let list = RamRecord::BlockList { total_bytes };
        self.body(&[(list, &[]), (block, &[])], sink)
    }

    fn iterate(&mut self, sink: &mut dyn Sink) -> Result<Progress, HandlerError> {
        self.send(ROUND_PAGES, sink)?;
        Ok(match lock(&self.0).dirty.is_empty() {
            true => Progress::Finished,
            false => Progress::Unfinished,
        })
    }

    fn pending(&mut self) -> Pending {
        let memory = lock(&self.0);
        let bytes = (memory.dirty.len() * PAGE_BYTES) as u64;
        match memory.bulk_is_over {
            false => Pending::Bulk { bytes },
            true => Pending::Dirty {
                bytes,
                later_bytes: 0,
                read_time: Duration::ZERO,
            },
        }
    }

    fn complete(&mut self, _: &GuestStopped, sink: &mut dyn Sink) -> Result<(), HandlerError> {
        self.send(PAGES, sink)
    }

    fn postcopy(&mut self) -> Option<&mut dyn PostcopyHandler> {
        None
    }

    fn cleanup(&mut self) {
        lock(&self.0).dirty.clear();
    }
}

/// Receives memory.
struct RamTarget {
    memory: Arc<Mutex<Memory>>,
    /// Where the payload that comes next belongs.
    page: usize,
    incoming: [u8; PAGE_BYTES],
}

impl RamTarget {
    /// The decoder does not know how large memory is here.
    fn find(&self, page: &RamPage) -> Result<usize> {
        let number = usize::try_from(page.offset_bytes)? / PAGE_BYTES;
        match page.block == block()? && number < PAGES {
            true => Ok(number),
            false => Err(format!("there is no page {:#x} here", page.offset_bytes).into()),
        }
    }
}

impl LoadHandler for RamTarget {
    fn start(&mut self, _version: u32) -> Result<(), HandlerError> {
        Ok(())
    }

    fn record(&mut self, record: &Record) -> Result<(), HandlerError> {
        match record {
            Record::Ram(RamRecord::BlockList { total_bytes }) => {
                let here = (PAGES * PAGE_BYTES) as u64;
                match *total_bytes == here {
                    true => Ok(()),
                    false => Err(format!("memory has {total_bytes} bytes, here {here}").into()),
                }
            }
            Record::Ram(RamRecord::Zero { page, fill }) => {
                let page = self.find(page)?;
                lock(&self.memory).pages[page].fill(*fill);
                Ok(())
            }
            Record::Ram(RamRecord::Page { page, .. }) => {
                self.page = self.find(page)?;
                Ok(())
            }
            Record::Ram(RamRecord::Block { .. } | RamRecord::EndOfSection) => Ok(()),
            // Only what a source was asked for comes: compression and the like are turned on there.
            _ => Err("this is not understood here".into()),
        }
    }

    fn payload(&mut self, length: usize) -> Result<&mut [u8], HandlerError> {
        let incoming = self.incoming.get_mut(..length);
        incoming.ok_or_else(|| "this is no page".into())
    }

    fn payload_filled(&mut self) -> Result<(), HandlerError> {
        lock(&self.memory).pages[self.page] = self.incoming;
        Ok(())
    }

    fn end(&mut self) -> Result<(), HandlerError> {
        Ok(())
    }

    fn cleanup(&mut self) {}
}

fn block() -> Result<Name> {
    Ok(Name::new("pc.ram")?)
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Save into `file`, load it again, hand the devices on.
pub(crate) fn run(file: &Path) -> Result<()> {
    let source = Vm::default();
    lock(&source.serial).divider = 12;
    lock(&source.clock).alarm = Some(5_000_000_000);
    (0..PAGES).for_each(|page| lock(&source.memory).write(page, page as u8));
    save(&source, &mut FileSink(File::create(file)?))?;

    let destination = Vm::default();
    load(&destination, &fs::read(file)?)?;
    assert_eq!(lock(&destination.memory).pages, lock(&source.memory).pages);
    assert_eq!(*lock(&destination.clock), *lock(&source.clock));
    assert_eq!(*lock(&destination.serial), *lock(&source.serial));
    println!("loaded {:?}", lock(&destination.clock));

    let third = Vm::default();
    load_devices(&third, &save_devices(&destination)?)?;
    assert_eq!(*lock(&third.serial), *lock(&source.serial));
    println!("handed on {:?}", lock(&third.serial));

    // A stream of memory and devices is more than the third machine wants.
    let refused = load_devices(&third, &fs::read(file)?).map_err(|error| error.to_string());
    println!("refused: {}", refused.expect_err("it has a configuration"));
    Ok(())
}

fn main() -> Result<()> {
    let file = std::env::args_os().nth(1);
    let file = file.ok_or("which file shall be written?")?;
    run(Path::new(&file))
}
