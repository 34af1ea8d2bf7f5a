//! `vmferry receive`: a destination in this process.

mod park;

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmferry_channel::{Channel, Listener, Stop, Uri};
use vmferry_disk::{Hold, Node};
use vmferry_migration::{
    Arrived, Coverage, DestinationDisk, DestinationJob, Published, Record, RecordFile, Residence,
    Rest, State, Status,
};
use vmferry_multifd::Joining;
use vmferry_relay::park::Parker;

use super::parking;
use crate::disks::{self, MadeFiles, OpenDisks, Past, Purpose};
use crate::exit::{Exit, Failure};
use crate::flags::ReceiveFlags;
use crate::flags::disk::DiskFlag;
use crate::output::{self, Out};
use crate::records;
use crate::render::{self, Phase, Progress, Sample};
use crate::signals::Signals;

/// Bytes of a guest's page.
const PAGE_BYTES: u64 = 4096;
/// How often progress is shown.
const INTERVAL: Duration = Duration::from_millis(250);

pub(crate) fn run(flags: &ReceiveFlags) -> Result<Exit, Failure> {
    match &flags.save {
        Some(path) if flags.disk.is_empty() => park::run(path, flags),
        _ => fill_disks(flags),
    }
}

fn fill_disks(flags: &ReceiveFlags) -> Result<Exit, Failure> {
    let signals = Signals::new()?;
    let stop = Stop::new()?;
    disks::check(&flags.disk)?;
    records::check_folder(flags.state_dir.as_deref())?;
    let plans = flags
        .disk
        .iter()
        .map(|flag| Plan::new(flag, flags.state_dir.as_deref()));
    let plans = plans.collect::<Result<Vec<_>, _>>()?;
    let OpenDisks { disks, mut made } = disks::open(&flags.disk, |flag| {
        let plan = plans.iter().find(|plan| plan.name == flag.name);
        (Purpose::Fill, plan.map_or(Past::Unknown, Plan::past))
    })?;
    for plan in &plans {
        records::check_unchanged(&plan.name, &plan.file, plan.record.as_ref())?;
    }
    let saved = flags.save.as_deref().map(|path| {
        let parker = parking::create(path, flags.index.as_deref(), &mut made)?;
        Ok::<_, Failure>(Saved(Some(parker)))
    });
    let mut saved = saved.transpose()?;
    let filled: Vec<DestinationDisk> = disks
        .into_iter()
        .zip(plans)
        .map(|(open, plan)| DestinationDisk {
            record: Some(plan.file),
            node: Node::new(open.name, open.image.into_device(), Hold::Writes),
        })
        .collect();
    let report = Report { flags };

    let listener = listener(flags)?;
    if let Some(listener) = &listener {
        report.listening(listener.local())?;
    }
    let published = Published::default();
    let job = DestinationJob {
        disks: filled.clone(),
        coverage: match flags.incremental {
            true => Coverage::Incremental,
            false => Coverage::Whole,
        },
        rest: saved.as_mut().map(|saved| saved as &mut dyn Rest),
        any_machine: true,
        keep_records: false,
    };
    let outcome = watched(&signals, &stop, &published, || {
        let (channel, joining) = match open(flags, listener, &stop) {
            Ok(opened) => opened,
            Err(failure) => return Err(failure),
        };
        let received = vmferry_migration::receive(channel, job, &published);
        received.map_err(|error| match parking::why_broken(joining) {
            Some(broken) => parking::failed(broken, &stop),
            None => parking::failed(error, &stop),
        })
    })?;
    match outcome {
        Ok(arrived) => {
            made.keep();
            report.arrived(
                &filled,
                &arrived,
                published.get().total_time.unwrap_or_default(),
            )?;
            Ok(Exit::Whole)
        }
        Err(failure) => {
            keep_what_was_filled(made, &published, flags);
            Err(if published.get().moved_bytes > 0 {
                failure.hint("the disks are not whole; the same command fills them again")
            } else {
                failure
            })
        }
    }
}

/// Once disks may have changed they stay, with records that say so: a second attempt fills them
/// again. What was saved of the rest is of no use to anybody.
fn keep_what_was_filled(made: MadeFiles, published: &Published, flags: &ReceiveFlags) {
    if published.get().setup_time.is_none() {
        return;
    }
    made.keep();
    if let Some(path) = &flags.save
        && let Err(error) = std::fs::remove_file(path)
    {
        tracing::warn!("cannot remove {}: {error}", path.display());
    }
}

/// What an earlier run says about a disk.
struct Plan {
    name: String,
    file: RecordFile,
    record: Option<Record>,
}

impl Plan {
    fn new(flag: &DiskFlag, state_dir: Option<&Path>) -> Result<Self, Failure> {
        if flag.read_only {
            return Err(Failure::usage(format!(
                "disk \"{}\": a migration cannot fill a disk with readonly=on",
                flag.name
            )));
        }
        let (file, record) = records::of_disk(flag, state_dir)?;
        match &record {
            Some(record) if record.residence == Residence::Leaving => {
                Err(Failure::refused(format!(
                    "disk \"{}\" is on its way to {}, and nobody has decided yet whether it arrived",
                    flag.name, record.peer
                ))
                .hint("serve it again with vmferry serve, then see vmferry help resolve"))
            }
            _ => Ok(Self {
                name: flag.name.clone(),
                file,
                record,
            }),
        }
    }

    fn past(&self) -> Past {
        match self.record.as_ref().map(|record| record.residence) {
            Some(Residence::Incoming) => Past::HalfFilled,
            _ => Past::Unknown,
        }
    }
}

/// Where connections can come, that is where to listen.
fn listener(flags: &ReceiveFlags) -> Result<Option<Listener>, Failure> {
    match &flags.uri {
        uri @ (Uri::Tcp { .. } | Uri::Unix(_)) => Listener::bind(uri)
            .map(Some)
            .map_err(|error| Failure::new(Exit::Failed, error)),
        uri if flags.multifd.multifd_channels.is_some() => Err(Failure::usage(format!(
            "--multifd-channels needs an address for several connections (tcp: or unix:), not {uri}"
        ))),
        _ => Ok(None),
    }
}

fn open(
    flags: &ReceiveFlags,
    listener: Option<Listener>,
    stop: &Stop,
) -> Result<(Channel, Option<Joining>), Failure> {
    match listener {
        Some(listener) => parking::accept(&listener, &flags.multifd, stop, stop),
        None => vmferry_channel::open_incoming(&flags.uri, stop)
            .map(|channel| (channel, None))
            .map_err(|error| parking::failed(error, stop)),
    }
}

/// Run `receive` beside a thread that shows progress and passes signals on.
fn watched<T: Send>(
    signals: &Signals,
    stop: &Stop,
    published: &Published,
    receive: impl FnOnce() -> T,
) -> io::Result<T> {
    let over = Stop::new()?;
    thread::scope(|scope| {
        let watcher = scope.spawn(|| watch(signals, stop, published, &over));
        let outcome = receive();
        over.trigger();
        match watcher.join() {
            Ok(watched) => watched.map(|()| outcome),
            Err(_) => Err(io::Error::other("the thread that shows progress panicked")),
        }
    })
}

fn watch(signals: &Signals, stop: &Stop, published: &Published, over: &Stop) -> io::Result<()> {
    let start = Instant::now();
    let mut progress = io::stderr().is_terminal().then(|| Progress::new(None));
    while !over.is_triggered() {
        if signals
            .wait_beside(&[std::os::fd::AsFd::as_fd(over)], Some(INTERVAL))?
            .is_some()
        {
            stop.trigger();
        }
        let status = published.get();
        if let Some(progress) = &mut progress
            && matches!(status.state, State::Active | State::PostcopyActive)
        {
            progress.show(&sample(&status), start.elapsed())?;
        }
    }
    Ok(())
}

/// Of disks that are filled, or of a machine that is parked.
fn sample(status: &Status) -> Sample {
    let elapsed = status.begun.map_or(Duration::ZERO, |begun| begun.elapsed());
    let millis = u64::try_from(elapsed.as_millis())
        .unwrap_or(u64::MAX)
        .max(1);
    let (total_bytes, remaining_bytes, moved_bytes) = match &status.ram {
        None => (
            status.total_bytes,
            status.remaining_bytes,
            status.moved_bytes,
        ),
        Some(ram) => {
            let pages = ram.normal_pages + ram.zero_pages + ram.xbzrle_pages;
            let done = pages.saturating_mul(PAGE_BYTES);
            let left = ram.total_bytes.saturating_sub(done);
            (
                ram.total_bytes,
                left.max(ram.remaining_bytes),
                status.wire_bytes,
            )
        }
    };
    Sample {
        phase: match status.state {
            State::PostcopyActive => Phase::Postcopy,
            _ => Phase::Bulk,
        },
        total_bytes,
        remaining_bytes,
        bytes_per_second: moved_bytes.saturating_mul(1000) / millis,
        ..Sample::default()
    }
}

/// The stream without its disks, on its way into a file.
struct Saved(Option<Parker>);

impl Rest for Saved {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.0 {
            Some(parker) => parker.push(bytes).map_err(io::Error::other),
            None => Err(io::Error::other("it is closed")),
        }
    }

    fn finish(&mut self) -> io::Result<()> {
        let Some(parker) = self.0.take() else {
            return Ok(());
        };
        parker.finish().map(drop).map_err(io::Error::other)
    }
}

/// Tells what happens.
struct Report<'a> {
    flags: &'a ReceiveFlags,
}

impl Report<'_> {
    fn listening(&self, address: &Uri) -> io::Result<()> {
        if self.flags.json {
            return self.object(&render::listening("incoming", address));
        }
        output::say(&format!("waiting for a migration at {address}"));
        Ok(())
    }

    fn arrived(
        &self,
        disks: &[DestinationDisk],
        arrived: &Arrived,
        elapsed: Duration,
    ) -> io::Result<()> {
        if self.flags.json {
            let disks: Vec<Value> = disks
                .iter()
                .map(|disk| json!({"name": disk.node.name(), "bytes": disk.node.limits().length}))
                .collect();
            return self.object(&json!({
                "event": "completed",
                "disks": disks,
                "stream-bytes": arrived.wire_bytes,
                "elapsed-ms": u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
                "durable": true,
                "source-told": arrived.source_told,
            }));
        }
        writeln!(self.out(), "{}", summary(disks, arrived, elapsed))
    }

    fn object(&self, object: &Value) -> io::Result<()> {
        render::write_json(&mut self.out(), object)
    }

    /// Standard output, unless the way back to the source may be there.
    fn out(&self) -> Out {
        match self.flags.uri {
            Uri::Stdio | Uri::Fd(1) => output::stderr(),
            _ => output::stdout(),
        }
    }
}

fn summary(disks: &[DestinationDisk], arrived: &Arrived, elapsed: Duration) -> String {
    let length: u64 = disks.iter().map(|disk| disk.node.limits().length).sum();
    format!(
        "received {} of {}, a stream of {} in {}; whole, and on stable storage",
        render::count(disks.len() as u64, "disk"),
        render::bytes(length),
        render::bytes(arrived.wire_bytes),
        render::time(elapsed),
    )
}
