//! `vmferry receive`: a destination in this process.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmferry_channel::{Channel, Listener, Stop, Uri};
use vmferry_disk::{Hold, Node};
use vmferry_migration::{
    Arrived, Coverage, DestinationDisk, DestinationFailure, DestinationJob, Published, Record,
    RecordFile, Residence, Rest, State,
};

use crate::disks::{self, MadeFiles, OpenDisks, Past, Purpose};
use crate::exit::{Exit, Failure};
use crate::flags::ReceiveFlags;
use crate::flags::disk::DiskFlag;
use crate::output::{self, Out};
use crate::records;
use crate::render::{self, Phase, Progress, Sample};
use crate::signals::Signals;

/// How often progress is shown.
const INTERVAL: Duration = Duration::from_millis(250);

pub(crate) fn run(flags: &ReceiveFlags) -> Result<Exit, Failure> {
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
    let mut saved = flags.save.as_deref().map(Saved::create).transpose()?;
    if let Some(path) = &flags.save {
        made.add(path);
    }
    let filled: Vec<DestinationDisk> = disks
        .into_iter()
        .zip(plans)
        .map(|(open, plan)| DestinationDisk {
            record: Some(plan.file),
            node: Node::new(open.name, open.image.into_device(), Hold::Writes),
        })
        .collect();
    let report = Report { flags };

    let listener = match &flags.uri {
        uri @ (Uri::Tcp { .. } | Uri::Unix(_)) => Some(listen(uri)?),
        _ => None,
    };
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
        let channel = open(&flags.uri, listener, &stop)?;
        vmferry_migration::receive(channel, job, &published)
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
        Err(error) => {
            keep_what_was_filled(made, &published, flags);
            let failure = failed(&error, stop.is_triggered());
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

fn listen(uri: &Uri) -> Result<Listener, Failure> {
    Listener::bind(uri).map_err(|error| Failure::new(Exit::Failed, error))
}

fn open(
    uri: &Uri,
    listener: Option<Listener>,
    stop: &Stop,
) -> Result<Channel, vmferry_channel::ChannelError> {
    match listener {
        Some(listener) => Ok(listener.accept(stop)?.into_channel(stop)),
        None => vmferry_channel::open_incoming(uri, stop),
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
            && status.state == State::Active
        {
            let elapsed = status.begun.map_or(Duration::ZERO, |begun| begun.elapsed());
            let millis = u64::try_from(elapsed.as_millis())
                .unwrap_or(u64::MAX)
                .max(1);
            let sample = Sample {
                phase: Phase::Bulk,
                total_bytes: status.total_bytes,
                remaining_bytes: status.remaining_bytes,
                bytes_per_second: status.moved_bytes.saturating_mul(1000) / millis,
                ..Sample::default()
            };
            progress.show(&sample, start.elapsed())?;
        }
    }
    Ok(())
}

fn failed(error: &DestinationFailure, stopped: bool) -> Failure {
    if stopped {
        return Failure::new(Exit::Cancelled, "stopped before the migration was over");
    }
    Failure::new(Exit::Failed, error)
}

/// The stream without its disks, in a new file.
struct Saved {
    file: io::BufWriter<File>,
    folder: File,
}

impl Saved {
    fn create(path: &Path) -> Result<Self, Failure> {
        let failed = |error: io::Error| {
            let message = format!("cannot save to {}: {error}", path.display());
            match error.kind() {
                io::ErrorKind::AlreadyExists => Failure::refused(message),
                _ => Failure::new(Exit::Failed, message),
            }
        };
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let folder = File::open(folder).map_err(failed)?;
        let file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(failed)?;
        Ok(Self {
            file: io::BufWriter::with_capacity(1 << 20, file),
            folder,
        })
    }
}

impl Rest for Saved {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)
    }

    fn finish(&mut self) -> io::Result<()> {
        self.file.flush()?;
        self.file.get_ref().sync_all()?;
        self.folder.sync_all()
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
