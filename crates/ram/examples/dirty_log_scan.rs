//! How long it takes to find out which pages of a GiB were written, for each kind of memory.
//!
//! ```sh
//! cargo run --release -p vmferry-ram --example dirty_log_scan [MiB]
//! ```

use std::time::{Duration, Instant};

use vmferry_ram::{
    AnonymousRam, BlockLayout, DirtyLog, GuestRam, PAGE_BYTES, RamBlock, Sharing, UserfaultLog,
};
use vmferry_stream::Name;

/// Each is done as often; the median counts.
const TIMES: usize = 5;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mib: u64 = match std::env::args().nth(1) {
        Some(mib) => mib.parse()?,
        None => 1024,
    };
    println!("{mib} MiB; milliseconds per GiB, median of {TIMES}");
    println!("| memory | written | scan | first writes after it |");
    println!("|---|---|---|---|");
    for (name, sharing, is_transparent) in [
        ("private", Sharing::Private, false),
        ("private, transparent huge pages", Sharing::Private, true),
        ("shared", Sharing::Shared, false),
    ] {
        let bytes = mib << 20;
        let ram = AnonymousRam::with_layouts(vec![BlockLayout {
            idstr: Name::new("pc.ram")?,
            used_bytes: bytes,
            max_bytes: bytes,
            page_bytes: PAGE_BYTES,
            guest_address: Some(0),
            sharing,
        }])?;
        let block = &ram.blocks()[0];
        match is_transparent {
            true => block.allow_huge_pages(),
            false => block.forbid_huge_pages(),
        }
        write(block, 1);
        let mut log = UserfaultLog::new()?;
        let began = Instant::now();
        log.start(&ram)?;
        println!(
            "| {name} | start | {:.2} | |",
            per_gib(began.elapsed(), mib)
        );
        // The last one splits all huge pages.
        for (written, step) in [("0 %", 0), ("1 %", 100), ("100 %", 1)] {
            let (mut scans, mut writes) = (Vec::new(), Vec::new());
            for _ in 0..TIMES {
                let began = Instant::now();
                let expected = write(block, step);
                writes.push(began.elapsed());
                let mut found = 0;
                let began = Instant::now();
                log.collect(&ram, &mut |_, pages| found += pages.end - pages.start)?;
                scans.push(began.elapsed());
                assert_eq!(found, expected);
            }
            println!(
                "| {name} | {written} | {:.2} | {:.2} |",
                per_gib(median(scans), mib),
                per_gib(median(writes), mib)
            );
        }
    }
    Ok(())
}

/// Write to every `step`th page, or to none; gives how many.
fn write(block: &RamBlock, step: u64) -> u64 {
    let pages = match step {
        0 => 0,
        step => block.pages().div_ceil(step),
    };
    for page in 0..pages {
        let at = page * step * PAGE_BYTES;
        let words = block.words(at, 8).expect("it is in the block");
        words[0].fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }
    pages
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn per_gib(time: Duration, mib: u64) -> f64 {
    time.as_secs_f64() * 1e3 * 1024.0 / mib as f64
}
