//! How fast guest memory is turned into a stream, on one core and without a network.
//!
//! ```text
//! cargo run --release -p vmferry-ram --example send_speed [MiB]
//! ```

use std::sync::Arc;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use vmferry_ram::{
    AnonymousRam, BlockIndex, GuestRam, MarkedLog, PAGE_BYTES, RamSource, RamSourceOptions,
};
use vmferry_savevm::{HandlerError, Progress, SaveHandler, Sink};

/// Copies what it gets, over what it got before: the kernel's part of a send, without the kernel.
#[derive(Default)]
struct Copies {
    last: Vec<u8>,
    bytes: u64,
    pieces: u64,
}

impl Sink for Copies {
    fn put(&mut self, parts: &[&[u8]]) -> Result<(), HandlerError> {
        self.last.clear();
        for part in parts {
            self.last.extend_from_slice(part);
            self.bytes += part.len() as u64;
        }
        self.pieces += 1;
        Ok(())
    }

    fn allowance(&self) -> u64 {
        u64::MAX
    }

    fn check(&self) -> Result<(), HandlerError> {
        Ok(())
    }
}

fn main() -> Result<(), HandlerError> {
    let mib = std::env::args()
        .nth(1)
        .map_or(Ok(1024), |mib| mib.parse())?;
    let bytes = mib << 20;
    let ram = Arc::new(AnonymousRam::new(&[("pc.ram", bytes)])?);
    let block = &ram.blocks()[0];
    let log = MarkedLog::new(&*ram);
    let marker = log.marker();
    let options = RamSourceOptions {
        xbzrle_cache_bytes: Some(2 * bytes),
        ..RamSourceOptions::default()
    };
    let mut source = RamSource::new(Arc::clone(&ram) as _, Box::new(log), None, options)?;
    let mut pass = |what: &str, is_first: bool| -> Result<(), HandlerError> {
        let mut sink = Copies::default();
        if is_first {
            source.setup(&mut sink)?;
        }
        let begun = cpu_time();
        while source.iterate(&mut sink)? != Progress::Finished {}
        report(what, bytes, cpu_time() - begun, &sink);
        Ok(())
    };
    pass("zeroes that were never touched", true)?;
    for offset in (0..bytes).step_by(4096) {
        block.write(offset, &[0; 8])?;
    }
    pass("zeroes", true)?;
    let mut rng = fastrand::Rng::with_seed(1);
    let mut page = [0; 4096];
    for offset in (0..bytes).step_by(4096) {
        rng.fill(&mut page);
        block.write(offset, &page)?;
    }
    pass("random, first pass", true)?;
    let all = || marker.mark(BlockIndex(0), 0, bytes);
    all();
    pass("random, into the cache", false)?;
    all();
    pass("nothing changed", false)?;
    for offset in (0..bytes).step_by(4096) {
        for at in (offset..offset + PAGE_BYTES).step_by(512) {
            block.write(at, &[rng.u8(..); 8])?;
        }
    }
    all();
    pass("8 of 512 bytes changed", false)?;
    Ok(())
}

/// Of this thread: what else the machine does is left out.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

fn report(what: &str, bytes: u64, took: Duration, sink: &Copies) {
    let rate = bytes as f64 / took.as_secs_f64() / 1e9;
    let pieces = sink.pieces;
    let wire = sink.bytes >> 20;
    println!("{what:32} {rate:6.2} GB/s of memory, {wire} MiB in {pieces} pieces");
}
