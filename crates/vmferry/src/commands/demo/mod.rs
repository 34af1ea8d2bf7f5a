//! `vmferry demo`: a live migration to look at.

mod content;
mod folder;
mod gaps;
mod host;
mod load;

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde_json::json;
use vmferry_channel::Stop;
use vmferry_nbd::{Client, ClientSettings};
use vmferry_qmp::types::Migrate;

use super::daemon::Daemon;
use super::watch::{Watched, watch};
use crate::exit::{Exit, Failure};
use crate::flags::{DemoFlags, LogFlags};
use crate::output;
use crate::render::{self, Outcome, Progress, Summary};
use crate::signals::Signals;
use content::{BLOCK_BYTES, Log};
use folder::Folder;
use host::Host;
use load::{Load, Plan, Shared};

/// Smallest disk, so that there is something to see.
const SMALLEST_BYTES: u64 = 16 << 20;
/// Largest disk: the log of its writes takes 1 GiB of memory.
const LARGEST_BYTES: u64 = 1 << 40;
/// The writers update this share of the disk, ...
const HOT_SHARE: u64 = 64;
/// ... but not more than this. All of it is dirty at any time, for dirty chunks have 1 MiB, so it
/// is what has to be sent while the guest waits: a guest that writes everywhere at once cannot be
/// migrated live by anybody.
const HOT_BYTES_MAX: u64 = 16 << 20;
/// How long the writers write before the migration, and after it.
const CALM: Duration = Duration::from_secs(1);
/// Disks are filled and verified in pieces of this size.
const PIECE_BYTES: usize = 1 << 20;

pub(crate) fn run(flags: &DemoFlags, log: LogFlags) -> Result<Exit, Failure> {
    let size = flags.size.bytes;
    let is_whole = size.is_multiple_of(PIECE_BYTES as u64);
    if !is_whole || !(SMALLEST_BYTES..=LARGEST_BYTES).contains(&size) {
        return Err(Failure::usage(
            "the demo's disk is a whole number of MiB, from 16MiB to 1TiB",
        ));
    }
    let signals = Signals::new()?;
    let seed = flags.seed.unwrap_or_else(|| fastrand::u64(..));
    let tell = |text: &str| {
        if !flags.json {
            output::say(text);
        }
    };
    let folder = Folder::new()?;

    tell(&format!("filling a disk of {} (--seed {seed})", flags.size));
    let contents = Log::new(seed, size / BLOCK_BYTES as u64);
    fill(&contents, &folder, &signals)?;

    tell("starting two daemons, and four writers at the first one");
    let target = format!(",create=on,size={size}");
    let source = Host::start("source", folder.path(), ",format=raw", false, log)?;
    let destination = Host::start("destination", folder.path(), &target, true, log)?;
    let hot = hot_blocks(size);
    let plan = Plan {
        seed,
        sides: [source.nbd.clone(), destination.nbd.clone()],
        blocks: hot.clone(),
    };
    let load = Load::start(&plan, contents)?;
    let shared = Arc::clone(&load.shared);
    let begun = Instant::now();
    wait(&signals, CALM)?;
    let before = shared.gaps.take_longest();

    tell("migrating the disk to the second daemon, while the writers go on");
    let summary = migrate(&source, &destination, &signals, flags.json)?;
    wait(&signals, CALM)?;
    let downtime = shared.gaps.take_longest();
    let written = begun.elapsed();
    load.finish().context("the writers")?;

    tell("reading back every block at the destination");
    verify(&shared, &destination, &signals)?;
    source.end()?;
    destination.end()?;
    let result = Results {
        seed,
        size,
        hot_bytes: (hot.end - hot.start) * BLOCK_BYTES as u64,
        summary,
        shared,
        before,
        downtime,
        written,
    };
    if flags.json {
        render::write_json(&mut output::stdout(), &result.object())?;
    } else {
        output::stdout().write_all(result.text().as_bytes())?;
    }
    Ok(Exit::Whole)
}

/// The blocks that writers update: from the middle of the disk on.
fn hot_blocks(size: u64) -> std::ops::Range<u64> {
    let piece = PIECE_BYTES as u64;
    let length = (size / HOT_SHARE)
        .min(HOT_BYTES_MAX)
        .next_multiple_of(piece);
    let start = (size / 2) / piece * piece;
    start / BLOCK_BYTES as u64..(start + length) / BLOCK_BYTES as u64
}

fn fill(contents: &Log, folder: &Folder, signals: &Signals) -> Result<(), Failure> {
    let path = folder.path().join("source.raw");
    let mut file = File::create_new(&path).with_context(|| format!("create {}", path.display()))?;
    let mut piece = vec![0; PIECE_BYTES];
    for first in (0..contents.blocks()).step_by(PIECE_BYTES / BLOCK_BYTES) {
        wait(signals, Duration::ZERO)?;
        contents.first_content(first, &mut piece);
        file.write_all(&piece)
            .with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

fn wait(signals: &Signals, time: Duration) -> Result<(), Failure> {
    match signals.wait(Some(time))? {
        None => Ok(()),
        Some(_) => Err(Failure::new(Exit::Cancelled, "the demo was stopped")),
    }
}

fn migrate(
    source: &Host,
    destination: &Host,
    signals: &Signals,
    json: bool,
) -> Result<Summary, Failure> {
    let mut daemon = Daemon::connect(&source.qmp)?;
    let uri = destination
        .incoming
        .clone()
        .context("the second daemon has no address")?;
    daemon.execute(
        "migrate",
        &Migrate {
            uri: Some(uri),
            ..Migrate::default()
        },
    )?;
    let out: Option<Box<dyn Write>> = json.then(|| Box::new(output::stdout()) as Box<dyn Write>);
    match watch(&mut daemon, signals, &mut Progress::new(out))? {
        Watched::Over(Outcome::Completed(summary)) => Ok(summary),
        Watched::Over(outcome) => match outcome.into_result() {
            Ok(_) => Err(Failure::new(
                Exit::Failed,
                "the migration ended without a result",
            )),
            Err(failure) => Err(failure),
        },
        Watched::Detached => Err(Failure::new(Exit::Cancelled, "the demo was stopped")),
    }
}

/// Read the whole disk through NBD and compare it with the log.
fn verify(shared: &Shared, destination: &Host, signals: &Signals) -> Result<(), Failure> {
    let stop = Stop::new()?;
    let mut client = Client::connect(&destination.nbd, &ClientSettings::default(), &stop)
        .context("the destination")?;
    let mut piece = vec![0; PIECE_BYTES];
    for first in (0..shared.log.blocks()).step_by(PIECE_BYTES / BLOCK_BYTES) {
        wait(signals, Duration::ZERO)?;
        client
            .read(first * BLOCK_BYTES as u64, &mut piece)
            .context("the destination")?;
        shared
            .log
            .check(first, &piece)
            .context("a write was lost")?;
    }
    client.disconnect().context("the destination")?;
    Ok(())
}

/// What there is to tell.
struct Results {
    seed: u64,
    size: u64,
    hot_bytes: u64,
    summary: Summary,
    shared: Arc<Shared>,
    /// Longest time without a completed write before the migration.
    before: Duration,
    /// The same during and after it.
    downtime: Duration,
    /// How long the writers wrote.
    written: Duration,
}

impl Results {
    fn writes(&self) -> u64 {
        self.shared.acknowledged.load(Ordering::SeqCst)
    }

    fn replayed(&self) -> u64 {
        self.shared.replayed.load(Ordering::SeqCst)
    }

    fn text(&self) -> String {
        let Self { seed, summary, .. } = self;
        let per_second = self.writes() as f64 / self.written.as_secs_f64().max(0.001);
        let source_says = summary
            .downtime
            .map(|downtime| format!(" (the source says {})", render::time(downtime)))
            .unwrap_or_default();
        format!(
            "\
The disk has moved, and no write was lost.
  disk      {} of random data; {} writers update {} of it, 4 KiB at a time, as fast as they can
  sent      {} in {} ({}), {}
  downtime  {}{source_says}: the longest time without a completed write; before, it was {}
  writes    {} acknowledged ({per_second:.0} a second), {} sent again at the switch-over
  verified  every block of the disk at the destination, each write that was acknowledged
  seed      {seed}
",
            render::bytes(self.size),
            load::WRITERS,
            render::bytes(self.hot_bytes),
            render::bytes(summary.sent_bytes),
            render::time(summary.elapsed),
            render::rate(summary.bytes_per_second()),
            render::count(summary.passes, "pass"),
            render::time(self.downtime),
            render::time(self.before),
            self.writes(),
            self.replayed(),
        )
    }

    fn object(&self) -> serde_json::Value {
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        json!({
            "event": "demo",
            "seed": self.seed,
            "disk-bytes": self.size,
            "hot-bytes": self.hot_bytes,
            "sent-bytes": self.summary.sent_bytes,
            "elapsed-ms": ms(self.summary.elapsed),
            "passes": self.summary.passes,
            "durable": self.summary.durable,
            "downtime-ms": ms(self.downtime),
            "downtime-source-ms": self.summary.downtime.map(ms),
            "longest-gap-before-ms": ms(self.before),
            "writes": self.writes(),
            "writes-replayed": self.replayed(),
            "writes-verified": self.shared.log.writes(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hot_part_lies_on_the_disk_and_is_shared_evenly() {
        for size in [SMALLEST_BYTES, 17 << 20, 1 << 30, 1 << 40] {
            let hot = hot_blocks(size);
            assert!(hot.end * BLOCK_BYTES as u64 <= size);
            assert!(hot.end - hot.start >= load::WRITERS * 16);
            assert_eq!((hot.end - hot.start) % load::WRITERS, 0);
            assert!((hot.end - hot.start) * BLOCK_BYTES as u64 <= HOT_BYTES_MAX);
        }
    }
}
