//! Disks at both ends, and a migration between them.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmferry_channel::{Channel, Direction, Stop};
use vmferry_disk::simulated::MemoryDisk;
use vmferry_disk::{Hold, Node};
use vmferry_migration::{
    Arrived, Capabilities, Coverage, DestinationDisk, DestinationFailure, DestinationJob,
    Parameters, Published, RecordFile, Residence, RunningSource, SourceDisk, SourceJob, Standing,
    Start, StartError, State, Status, Target, receive, start,
};

/// Only ever waited out by a test that fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// A generator with the seed of `VMFERRY_SEED`, or a random one; it is printed.
pub(crate) fn rng() -> fastrand::Rng {
    let seed = std::env::var("VMFERRY_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| fastrand::u64(..));
    println!("VMFERRY_SEED={seed}");
    fastrand::Rng::with_seed(seed)
}

/// The disks of one host.
pub(crate) struct Host {
    pub(crate) memories: Vec<MemoryDisk>,
    pub(crate) nodes: Vec<Arc<Node>>,
    pub(crate) records: Vec<RecordFile>,
    _folder: tempfile::TempDir,
}

impl Host {
    pub(crate) fn new(memories: Vec<MemoryDisk>, resting: Hold) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let name = |index: usize| format!("disk{index}");
        Self {
            nodes: (0..)
                .zip(&memories)
                .map(|(index, disk)| Node::new(name(index), Box::new(disk.clone()), resting))
                .collect(),
            records: (0..memories.len())
                .map(|index| RecordFile::new(&name(index), folder.path(), Some(folder.path())))
                .collect(),
            memories,
            _folder: folder,
        }
    }

    /// Disks of these lengths with a little on them.
    pub(crate) fn source(lengths: &[usize], rng: &mut fastrand::Rng) -> Self {
        let disk = |length: &usize| {
            let disk = MemoryDisk::new(*length as u64);
            for _ in 0..rng.usize(1..20) {
                let start = rng.usize(..*length);
                let mut bytes = vec![0; rng.usize(..5000).min(*length - start)];
                rng.fill(&mut bytes);
                disk.fill(start as u64, &bytes);
            }
            disk
        };
        Self::new(lengths.iter().map(disk).collect(), Hold::Nothing)
    }

    /// Disks to be filled.
    pub(crate) fn target(lengths: &[usize]) -> Self {
        let disk = |length: &usize| MemoryDisk::new(*length as u64);
        Self::new(lengths.iter().map(disk).collect(), Hold::Writes)
    }

    /// What the records say.
    pub(crate) fn says(&self) -> Vec<Option<Residence>> {
        let says = |record: &RecordFile| record.read().expect("readable").map(|r| r.residence);
        self.records.iter().map(says).collect()
    }

    /// How the disks would begin if the daemon was started again now.
    pub(crate) fn restart(&self, incoming: bool) -> Result<Vec<Start>, StartError> {
        let standing = |record: &RecordFile| {
            let record = record.read().expect("readable");
            Standing {
                disk: "disk".to_owned(),
                record,
                taken_back: false,
            }
        };
        start(
            &self.records.iter().map(standing).collect::<Vec<_>>(),
            incoming,
        )
    }

    /// Would any disk be served after a restart?
    pub(crate) fn would_be_live(&self, incoming: bool) -> bool {
        let starts = self.restart(incoming).unwrap_or_default();
        starts.contains(&Start::Live)
    }

    pub(crate) fn all_held(&self, hold: Option<Hold>) -> bool {
        self.nodes.iter().all(|node| node.held() == hold)
    }
}

/// A channel over one end of a socket pair.
pub(crate) fn channel(socket: UnixStream, direction: Direction, stop: &Stop) -> Channel {
    Channel::from_fd(OwnedFd::from(socket), direction, "the test", stop).expect("a socket")
}

pub(crate) fn start_source(
    host: &Host,
    socket: UnixStream,
    parameters: Parameters,
    capabilities: Capabilities,
) -> RunningSource {
    start_watched(host, socket, parameters, capabilities, Published::default())
}

pub(crate) fn start_watched(
    host: &Host,
    socket: UnixStream,
    parameters: Parameters,
    capabilities: Capabilities,
    published: Published,
) -> RunningSource {
    let stop = Stop::new().expect("an event");
    let job = SourceJob {
        disks: source_disks(host),
        target: Target::Channel(channel(socket, Direction::Outgoing, &stop)),
        parameters,
        capabilities,
        stop,
    };
    RunningSource::start(job, published).expect("a migration")
}

pub(crate) fn source_disks(host: &Host) -> Vec<SourceDisk> {
    let disk = |(node, record): (&Arc<Node>, &RecordFile)| SourceDisk {
        node: Arc::clone(node),
        record: Some(record.clone()),
    };
    host.nodes.iter().zip(&host.records).map(disk).collect()
}

pub(crate) fn destination_disks(host: &Host) -> Vec<DestinationDisk> {
    let disk = |(node, record): (&Arc<Node>, &RecordFile)| DestinationDisk {
        node: Arc::clone(node),
        record: Some(record.clone()),
    };
    host.nodes.iter().zip(&host.records).map(disk).collect()
}

pub(crate) type Received = Result<Arrived, DestinationFailure>;

pub(crate) fn start_destination(host: &Host, socket: UnixStream) -> JoinHandle<Received> {
    start_destination_with(host, socket, Stop::new().expect("an event"))
}

pub(crate) fn start_destination_with(
    host: &Host,
    socket: UnixStream,
    stop: Stop,
) -> JoinHandle<Received> {
    let disks = destination_disks(host);
    thread::spawn(move || {
        let job = DestinationJob {
            disks,
            coverage: Coverage::Whole,
            rest: None,
            any_machine: false,
            keep_records: true,
        };
        let channel = channel(socket, Direction::Incoming, &stop);
        receive(channel, job, &Published::default())
    })
}

/// The status when the source is over or does not know.
pub(crate) fn wait(source: &RunningSource) -> Status {
    wait_for(source, |s| s.state.is_over() || s.undecided)
}

pub(crate) fn wait_for(source: &RunningSource, done: impl Fn(&Status) -> bool) -> Status {
    let status = source.published().wait_until(PATIENCE, &done);
    assert!(done(&status), "never happened: {status:?}");
    status
}

/// A migration that nothing disturbs.
pub(crate) fn migrate_undisturbed(source: &Host, target: &Host) {
    let (here, there) = UnixStream::pair().expect("a pair");
    let destination = start_destination(target, there);
    let running = start_source(source, here, Parameters::default(), Capabilities::default());
    let status = wait(&running);
    let received = destination.join().expect("no panic");
    assert_eq!(status.state, State::Completed, "{status:?} {received:?}");
    assert!(received.expect("arrived").source_told);
}
