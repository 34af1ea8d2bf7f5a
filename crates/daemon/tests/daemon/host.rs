//! Hosts with images, records and daemons, and the clients that drive them.

use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmferry_channel::{Listener, Stop, Uri};
use vmferry_daemon::{Config, Daemon, Disk, Ender, Incoming, RunError};
use vmferry_disk::{Hold, Node, OpenOptions, RawDisk};
use vmferry_migration::{Coverage, RecordFile, Residence, Standing, Start};
use vmferry_nbd::{Client as NbdClient, ClientSettings, NbdUri};
use vmferry_qmp::types::{BlockInfo, MigrationInfo, MigrationStatus, ShutdownCause};
use vmferry_qmp::{Client, ServerEvent};
use vmferry_relay::announce::Announcer;

use crate::announce::Wire;

pub(crate) const PATIENCE: Duration = Duration::from_secs(120);
pub(crate) const MIB: u64 = 1 << 20;

/// A host: a folder with images and their records, which outlive its daemons.
pub(crate) struct Host {
    pub(crate) dir: tempfile::TempDir,
}

/// How to start a daemon on a host.
#[derive(Default)]
pub(crate) struct Settings {
    pub(crate) incoming: bool,
    pub(crate) deferred: bool,
    pub(crate) take_back: bool,
    pub(crate) once: Option<Uri>,
    /// NICs of guests, and who sees what they send.
    pub(crate) wires: Vec<Wire>,
}

pub(crate) struct Running {
    pub(crate) dir: PathBuf,
    pub(crate) ender: Ender,
    pub(crate) thread: Option<JoinHandle<Result<(), RunError>>>,
    pub(crate) incoming: Option<Uri>,
    pub(crate) stop: Stop,
}

impl Host {
    pub(crate) fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    pub(crate) fn image(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.raw"))
    }

    pub(crate) fn make(&self, name: &str, content: &[u8]) {
        std::fs::write(self.image(name), content).unwrap();
    }

    pub(crate) fn record(&self, name: &str) -> RecordFile {
        RecordFile::new(name, &self.image(name), None)
    }

    pub(crate) fn residence(&self, name: &str) -> Option<Residence> {
        let record = self.record(name).read().unwrap();
        record.map(|record| record.residence)
    }

    pub(crate) fn start(&self, names: &[&str], settings: &Settings) -> Running {
        self.try_start(names, settings).unwrap()
    }

    pub(crate) fn try_start(&self, names: &[&str], settings: &Settings) -> Result<Running, String> {
        let incoming = settings.incoming || settings.deferred || settings.once.is_some();
        let standings: Vec<Standing> = names
            .iter()
            .map(|name| {
                let record = self.record(name).read().unwrap();
                Standing {
                    disk: (*name).to_owned(),
                    record,
                    taken_back: settings.take_back,
                }
            })
            .collect();
        let starts = vmferry_migration::start(&standings, incoming).map_err(|e| e.to_string())?;
        let disks = std::iter::zip(&standings, starts).map(|(standing, start)| {
            let name = &standing.disk;
            let options = OpenOptions {
                read_only: false,
                lock: true,
            };
            let device = RawDisk::open(self.image(name), options).unwrap();
            let resting = match start {
                Start::Waiting => Hold::Writes,
                Start::Live | Start::Undecided => Hold::Nothing,
            };
            Disk {
                node: Node::new(name, Box::new(device), resting),
                record: Some(self.record(name)),
                start,
                peer: standing
                    .record
                    .as_ref()
                    .map(|record| record.peer.clone())
                    .unwrap_or_default(),
                taken_back: settings.take_back,
                path: self.image(name),
                format: "raw",
                image: None,
            }
        });
        let disks = disks.collect();
        let listener = settings
            .incoming
            .then(|| Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap());
        let at = listener.as_ref().map(|listener| listener.local().clone());
        let incoming = match listener {
            Some(listener) => Some(Incoming::Listener(listener)),
            None if settings.deferred => Some(Incoming::Deferred),
            None => settings.once.clone().map(Incoming::Once),
        };
        let nics = settings.wires.iter().map(|wire| wire.clone().boxed());
        let nics = nics.collect();
        Ok(run(self.dir.path().to_owned(), disks, nics, incoming, at))
    }
}

pub(crate) fn run(
    dir: PathBuf,
    disks: Vec<Disk>,
    nics: Vec<Box<dyn Announcer>>,
    incoming: Option<Incoming>,
    at: Option<Uri>,
) -> Running {
    let bind = |name: &str| Listener::bind(&Uri::Unix(dir.join(name))).unwrap();
    let daemon = Daemon::start(Config {
        name: Some("test".to_owned()),
        disks,
        nbd: vec![bind("nbd.sock")],
        qmp: vec![bind("qmp.sock")],
        incoming,
        coverage: Coverage::Whole,
        nics,
    });
    let daemon = daemon.unwrap();
    Running {
        dir,
        ender: daemon.ender(),
        thread: Some(std::thread::spawn(move || daemon.run())),
        incoming: at,
        stop: Stop::new().unwrap(),
    }
}

impl Running {
    pub(crate) fn qmp(&self) -> Qmp {
        let uri = Uri::Unix(self.dir.join("qmp.sock"));
        Qmp(Client::connect(&uri, &self.stop).unwrap())
    }

    /// A client of a daemon whose migrations end however slow this machine syncs now.
    pub(crate) fn patient_qmp(&self) -> Qmp {
        let mut qmp = self.qmp();
        qmp.run(
            "migrate-set-parameters",
            json!({"downtime-limit": 2_000_000}),
        );
        qmp
    }

    pub(crate) fn nbd(&self, disk: &str) -> NbdClient {
        self.try_nbd(disk).unwrap()
    }

    pub(crate) fn try_nbd(&self, disk: &str) -> Result<NbdClient, String> {
        let socket = self.dir.join("nbd.sock");
        let uri: NbdUri = format!("nbd+unix:///{disk}?socket={}", socket.display())
            .parse()
            .unwrap();
        NbdClient::connect(&uri, &ClientSettings::default(), &self.stop).map_err(|e| e.to_string())
    }

    pub(crate) fn end(mut self) -> Result<(), RunError> {
        self.ender.end(ShutdownCause::HostSignal);
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.ender.end(ShutdownCause::HostSignal);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A QMP client that checks every answer against the schema.
pub(crate) struct Qmp(pub(crate) Client);

impl Qmp {
    pub(crate) fn run(&mut self, command: &str, arguments: Value) -> Value {
        let value = self.0.execute(command, arguments).unwrap();
        vmferry_qmp::check_returned(command, &value).unwrap();
        value
    }

    pub(crate) fn refused(&mut self, command: &str, arguments: Value) -> String {
        self.0.execute(command, arguments).unwrap_err().to_string()
    }

    pub(crate) fn info(&mut self) -> MigrationInfo {
        serde_json::from_value(self.run("query-migrate", json!({}))).unwrap()
    }

    pub(crate) fn blocks(&mut self) -> Vec<BlockInfo> {
        serde_json::from_value(self.run("query-block", json!({}))).unwrap()
    }

    /// Wait until the migration is in one of these states.
    pub(crate) fn wait_status(&mut self, wanted: &[MigrationStatus]) -> MigrationInfo {
        self.wait(|info| info.status.is_some_and(|status| wanted.contains(&status)))
    }

    pub(crate) fn wait(&mut self, done: impl Fn(&MigrationInfo) -> bool) -> MigrationInfo {
        let end = Instant::now() + PATIENCE;
        loop {
            let info = self.info();
            if done(&info) {
                return info;
            }
            assert!(Instant::now() < end, "still {info:?}");
            std::thread::yield_now();
        }
    }

    /// Events up to the one that `last` accepts.
    pub(crate) fn events_until(&mut self, last: impl Fn(&ServerEvent) -> bool) -> Vec<String> {
        let deadline = Instant::now().checked_add(PATIENCE);
        let mut names = Vec::new();
        loop {
            let event = self.0.wait_event(deadline).unwrap().expect("an event");
            let end = last(&event);
            names.push(match event.data["status"].as_str() {
                Some(status) => format!("{} {status}", event.name),
                None => event.name,
            });
            if end {
                return names;
            }
        }
    }
}

pub(crate) const OVER: [MigrationStatus; 3] = [
    MigrationStatus::Completed,
    MigrationStatus::Failed,
    MigrationStatus::Cancelled,
];

pub(crate) fn random(seed: u64, length: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; usize::try_from(length).unwrap()];
    random.fill(&mut bytes);
    bytes
}

pub(crate) fn migrate_to(uri: &Uri) -> Value {
    json!({"uri": uri.to_string()})
}
