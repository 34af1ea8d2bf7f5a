//! The source against a model of a destination, with guests that write meanwhile.

mod model;
mod postcopy;
mod precopy;
mod snapshot;
mod stored;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use super::*;
use crate::block::BlockIndex;
use crate::{AnonymousRam, MarkedLog, Marker, UserfaultLog};
use model::Stream;

/// Memory of these blocks that is full of random bytes, but for some pages.
fn random_ram(blocks: &[(&str, u64)], rng: &mut fastrand::Rng) -> Arc<AnonymousRam> {
    let ram = AnonymousRam::new(blocks).expect("memory");
    for block in ram.blocks() {
        for page in 0..block.pages() {
            if rng.u8(..4) > 0 {
                write_page(block, page, rng);
            }
        }
    }
    Arc::new(ram)
}

/// Random bytes and then zeroes, so that one version of a page is often like the next.
fn write_page(block: &RamBlock, page: u64, rng: &mut fastrand::Rng) {
    let mut content = [0; 4096];
    let end = [16, 1000, 4096][rng.usize(..3)];
    rng.fill(&mut content[..end]);
    block
        .write(page * PAGE_BYTES, &content)
        .expect("in the block");
}

fn content(block: &RamBlock) -> Vec<u8> {
    let mut content = vec![0; usize::try_from(block.used_bytes()).expect("small")];
    block.read(0, &mut content).expect("in the block");
    content
}

/// A source of this memory, with whatever marks writes.
fn source(ram: &Arc<AnonymousRam>, options: RamSourceOptions) -> (RamSource, Marker) {
    let log = MarkedLog::new(&**ram);
    let marker = log.marker();
    let ram: Arc<dyn GuestRam> = Arc::clone(ram) as _;
    let source = RamSource::new(ram, Box::new(log), None, options).expect("a source");
    (source, marker)
}

/// The same, by chance with a log of the kernel's.
fn any_source(
    ram: &Arc<AnonymousRam>,
    options: RamSourceOptions,
    rng: &mut fastrand::Rng,
) -> (RamSource, Marker) {
    let (source, marker) = source(ram, options);
    if rng.bool() {
        return (source, marker);
    }
    match UserfaultLog::new() {
        Ok(log) => {
            let ram: Arc<dyn GuestRam> = Arc::clone(ram) as _;
            let source = RamSource::new(ram, Box::new(log), None, options).expect("a source");
            (source, marker)
        }
        Err(error) => {
            eprintln!("left out: {error}");
            (source, marker)
        }
    }
}

/// Write something somewhere, as a guest does: bytes, whole pages, zeroes, what was there.
fn scribble(ram: &AnonymousRam, marker: &Marker, rng: &mut fastrand::Rng) {
    let index = rng.usize(..ram.blocks().len());
    let block = &ram.blocks()[index];
    let page = match rng.bool() {
        true => rng.u64(..block.pages()),
        // Some pages are hot.
        false => rng.u64(..block.pages().min(8)),
    };
    let offset = page * PAGE_BYTES + rng.u64(..512) * 8;
    match rng.u8(..8) {
        0 => write_page(block, page, rng),
        1 => block
            .fill(page * PAGE_BYTES, 4096, 0)
            .expect("in the block"),
        2 => {}
        _ => block
            .write(offset, &rng.u64(..).to_ne_bytes())
            .expect("in the block"),
    }
    marker.mark(BlockIndex(index), page * PAGE_BYTES, PAGE_BYTES);
}

/// Threads that write until this is dropped.
struct Guest {
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Guest {
    fn run(ram: &Arc<AnonymousRam>, marker: &Marker, rng: &mut fastrand::Rng) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let thread = |_| {
            let (ram, marker, stop) = (Arc::clone(ram), marker.clone(), Arc::clone(&stop));
            let mut rng = rng.fork();
            std::thread::spawn(move || {
                while !stop.load(SeqCst) {
                    scribble(&ram, &marker, &mut rng);
                    if rng.u8(..8) == 0 {
                        std::thread::yield_now();
                    }
                }
            })
        };
        Self {
            threads: (0..2).map(thread).collect(),
            stop,
        }
    }

    fn stop(self) -> GuestStopped {
        self.stop.store(true, SeqCst);
        for thread in self.threads {
            thread.join().expect("it writes");
        }
        GuestStopped::assert_drained()
    }
}
