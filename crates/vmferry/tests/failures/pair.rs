//! Two hosts, and an operator who brings them back from whatever happened.

use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;
use vmferry_channel::Stop;
use vmferry_nbd::client::Operation;
use vmferry_nbd::{Client, ClientSettings, NbdError};

use crate::link::{Event, Link, Moment};
use crate::load::Load;
use crate::log::{BLOCK, Log};
use crate::peers::{disk, until};
use crate::serve::{CommandLine, DISK, Refused, Serve, clear_line};

/// How long a write is watched that must not be carried out. Too short could hide something, but not every time; too
/// long costs time.
const WATCH: Duration = Duration::from_millis(10);

/// Where the disk lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Side {
    Source,
    Destination,
}

use Side::{Destination, Source};

impl Side {
    fn other(self) -> Self {
        match self {
            Source => Destination,
            Destination => Source,
        }
    }

    fn index(self) -> usize {
        match self {
            Source => 0,
            Destination => 1,
        }
    }
}

/// How an attempt ended, before anybody decided anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Outcome {
    SourceServes,
    DestinationServes,
    /// The source holds its disk; it turned out that the destination does not serve.
    UndecidedStayed,
    /// The source holds its disk; it turned out that the destination serves.
    UndecidedMoved,
}

/// What the destination finds where its disk shall be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// A disk without data.
    Empty,
    /// A disk with other data.
    Full,
    /// Nothing.
    Made,
}

/// Length of the second disk, which always is where the first is.
const SECOND_BYTES: u64 = 256 << 10;

fn second(path: &Path, options: &str) -> String {
    format!("second={}{options}", path.display())
}

/// Two daemons with the same disks, under load.
pub(crate) struct Pair {
    lines: [CommandLine; 2],
    /// The second disk of each, to which nobody writes.
    seconds: [PathBuf; 2],
    /// `None` if it has refused to start, because the disk has moved away.
    daemons: [Option<Serve>; 2],
    load: Load,
    log: Arc<Log>,
    /// Last, for it holds everybody's files.
    _folder: TempDir,
}

impl Pair {
    /// The source has a disk of so many blocks, and one more, and a guest that writes to it; the destination waits.
    pub(crate) fn start(blocks: usize, target: Target, rng: &mut fastrand::Rng) -> Self {
        let folder = tempfile::Builder::new().prefix("vmferry-pair-").tempdir();
        let folder = folder.expect("a temporary folder");
        let length = ((blocks + 1) * BLOCK) as u64;
        let seconds =
            ["source", "destination"].map(|side| folder.path().join(side).with_extension("second"));
        let source = CommandLine::new("source", folder.path(), "")
            .args(["--disk", &second(&seconds[0], "")]);
        let options = |length: u64| match target {
            Target::Empty => String::new(),
            Target::Full => ",overwrite=on".to_owned(),
            Target::Made => format!(",create=on,size={length}"),
        };
        let destination = CommandLine::new("destination", folder.path(), &options(length))
            .args(["--disk", &second(&seconds[1], &options(SECOND_BYTES))])
            .args(["--incoming", "tcp:127.0.0.1:0"]);
        let log = Arc::new(Log::new(rng.u64(..), blocks));
        log.write_first_content(BufWriter::new(source.make_image(length)));
        disk::random(&seconds[0], SECOND_BYTES, rng);
        match target {
            Target::Made => {}
            Target::Empty => disk::sparse(&seconds[1], SECOND_BYTES, &[], rng),
            Target::Full => disk::random(&seconds[1], SECOND_BYTES, rng),
        }
        match target {
            Target::Empty => drop(destination.make_image(length)),
            Target::Full => Log::new(rng.u64(..), blocks)
                .write_first_content(BufWriter::new(destination.make_image(length))),
            Target::Made => {}
        }
        let lines = [source, destination];
        let daemons = lines.each_ref().map(|line| {
            let daemon = line.start();
            Some(daemon.unwrap_or_else(|refused| panic!("did not start: {refused:?}")))
        });
        let sides = lines.each_ref().map(CommandLine::export);
        let load = Load::start(&log, sides, rng);
        load.wait_for_writes(Source.index());
        Self {
            lines,
            seconds,
            daemons,
            load,
            log,
            _folder: folder,
        }
    }

    fn line(&self, side: Side) -> &CommandLine {
        &self.lines[side.index()]
    }

    pub(crate) fn daemon(&self, side: Side) -> &Serve {
        let daemon = self.daemons[side.index()].as_ref();
        daemon.unwrap_or_else(|| panic!("the {side:?} does not run"))
    }

    /// What the daemons of this side have said.
    pub(crate) fn said(&self, side: Side) -> String {
        self.line(side).said()
    }

    /// Whether it is written down beside the disk where it lives.
    pub(crate) fn has_record(&self, side: Side) -> bool {
        self.line(side)
            .image()
            .with_extension("raw.vmferry")
            .exists()
    }

    /// Where QMP clients of this side come.
    pub(crate) fn socket(&self, side: Side) -> PathBuf {
        self.line(side).qmp_socket()
    }

    /// Where the destination waits for its migration.
    pub(crate) fn incoming(&mut self) -> String {
        let daemon = self.daemons[Destination.index()].as_mut();
        daemon.expect("the destination runs").incoming()
    }

    /// A link to the destination.
    pub(crate) fn link(&mut self, moment: Moment, event: Event) -> Link {
        Link::new(&self.incoming(), moment, event)
    }

    /// Starts a migration; false if the source has died over it.
    pub(crate) fn migrate(&self, uri: &str, bandwidth: u64) -> bool {
        let source = self.daemon(Source);
        let parameters = json!({"max-bandwidth": bandwidth});
        source
            .query("migrate-set-parameters", &parameters)
            .and_then(|_| source.query("migrate", &json!({"uri": uri})))
            .is_ok()
    }

    /// Migrates with `vmferry migrate`, which ends when it is known how that went, or that it is not known. Its exit
    /// status.
    pub(crate) fn migrate_by_command(&self, uri: &str) -> Option<i32> {
        let (status, said) = self.line(Source).run(["migrate", uri, "--json"]);
        if status != Some(0) {
            clear_line(&said);
        }
        status
    }

    /// Waits until the source's migration is over, or the source.
    pub(crate) fn wait_for_source_or_death(&self) {
        until("the source's migration to end", || {
            let info = self.daemon(Source).query("query-migrate", &json!({}));
            info.map_or(Some(()), |info| is_over(&info).then_some(()))
        });
    }

    /// Waits until the source knows how its migration went, or knows that it does not know.
    pub(crate) fn wait_for_source(&self) -> Value {
        until("the source's migration to end", || {
            let info = self.daemon(Source).ask("query-migrate");
            is_over(&info).then_some(info)
        })
    }

    /// Waits until the destination is through with its newest attempt.
    pub(crate) fn wait_for_destination(&self) {
        until("the destination's migration to end", || {
            let info = self.daemon(Destination).ask("query-migrate");
            let status = info["status"].as_str().unwrap_or("none");
            ["none", "completed", "failed"]
                .contains(&status)
                .then_some(())
        });
    }

    /// What an operator finds, and does about it. Afterwards the disk is live on one side.
    pub(crate) fn settle(&mut self, rng: &mut fastrand::Rng) -> (Outcome, Side) {
        self.wait_for_destination();
        if self.daemons[Source.index()].is_none() {
            return (Outcome::DestinationServes, Destination);
        }
        let info = self.daemon(Source).ask("query-migrate");
        match (info["x-hand-over"].as_str(), info["status"].as_str()) {
            (Some("kept"), _) | (None, None | Some("none")) => (Outcome::SourceServes, Source),
            (Some("given-up"), _) => (Outcome::DestinationServes, Destination),
            (Some("undecided"), _) => self.resolve(rng),
            _ => panic!("the source is not through: {info}"),
        }
    }

    /// Looks at the destination, and decides.
    fn resolve(&mut self, rng: &mut fastrand::Rng) -> (Outcome, Side) {
        assert_eq!(self.daemon(Source).hold(), "everything");
        assert!(!self.takes_writes(Source), "an undecided disk is live");
        if rng.bool() {
            self.restart(Source, rng.bool());
            assert_eq!(self.daemon(Source).hold(), "everything");
        }
        // Whatever it answers, nothing may change.
        let _ = self.daemon(Source).query("migrate_cancel", &json!({}));
        assert_eq!(self.daemon(Source).hold(), "everything");
        let runs = self.daemon(Destination).ask("query-status")["running"] == true;
        let (decision, outcome, side) = match runs {
            true => ("give-up", Outcome::UndecidedMoved, Destination),
            false => ("serve", Outcome::UndecidedStayed, Source),
        };
        let (status, said) = self.line(Source).run(["resolve", decision]);
        assert_eq!(status, Some(0), "resolve {decision}: {said}");
        (outcome, side)
    }

    /// Fails unless the disk is live on this side, has everything that was acknowledged, and is not live on the other.
    pub(crate) fn check(&self, live: Side) {
        let hold = self.daemon(live).hold();
        assert_eq!(
            hold, "nothing",
            "the {live:?}, where the disk should be live"
        );
        self.load.wait_for_writes(live.index());
        let other = live.other();
        if let Some(daemon) = &self.daemons[other.index()] {
            let expected = match other {
                Source => "departed",
                Destination => "writes",
            };
            assert_eq!(
                daemon.hold(),
                expected,
                "the {other:?} of a disk that is live on the other side"
            );
            assert!(!self.takes_writes(other), "the disk is live on two sides");
        }
        self.check_content(live);
        disk::assert_same(&self.seconds[0], &self.seconds[live.index()]);
    }

    /// Would a guest's write be carried out? It goes to the last block, which nobody else writes.
    fn takes_writes(&self, side: Side) -> bool {
        let settings = ClientSettings {
            silence_timeout: Some(WATCH),
            ..ClientSettings::default()
        };
        let stop = Stop::new().expect("an event can be made");
        let Ok(mut client) = Client::connect(&self.line(side).export(), &settings, &stop) else {
            return false;
        };
        let write = Operation::Write {
            offset: (self.log.blocks() * BLOCK) as u64,
            data: vec![1; BLOCK],
            fua: false,
        };
        match client.submit(write).and_then(|_| client.wait()) {
            Ok(Some(completion)) => completion.result.is_ok(),
            Ok(None)
            | Err(NbdError::Silent { .. } | NbdError::Closed { .. } | NbdError::Socket { .. }) => {
                false
            }
            Err(error) => panic!("a write to the {side:?}: {error}"),
        }
    }

    /// Fails unless the disk of this side, as a guest reads it, has everything that was acknowledged before.
    fn check_content(&self, side: Side) {
        let stop = Stop::new().expect("an event can be made");
        let export = self.line(side).export();
        let mut client = Client::connect(&export, &ClientSettings::default(), &stop)
            .unwrap_or_else(|error| panic!("the disk of the {side:?}: {error}"));
        for block in 0..self.log.blocks() {
            let checked = until("a block that holds still", || {
                // What is acknowledged while it is read may or may not be there.
                let newest = self.log.newest(block);
                let mut found = [0; BLOCK];
                client
                    .read((block * BLOCK) as u64, &mut found)
                    .unwrap_or_else(|error| panic!("the disk of the {side:?}: {error}"));
                self.log.check(newest, &found)
            });
            checked.unwrap_or_else(|lost| panic!("the disk of the {side:?}: {lost}"));
        }
    }

    /// Ends a daemon, by kill -9 or in order, and starts it with the same command line. Only a disk that has moved away
    /// is a reason not to start.
    pub(crate) fn restart(&mut self, side: Side, kill: bool) {
        if let Some(daemon) = self.daemons[side.index()].take() {
            match kill {
                true => daemon.kill(),
                false => daemon.terminate(),
            }
        }
        self.daemons[side.index()] = match self.line(side).start() {
            Ok(daemon) => Some(daemon),
            Err(Refused { status, said }) => {
                assert_eq!(status, Some(4), "{side:?}: {said}");
                let moved = format!("vmferry: error: disk '{DISK}' has moved to tcp:127.0.0.1:");
                let line = clear_line(&said);
                assert!(line.starts_with(&moved), "{side:?}: {said}");
                None
            }
        };
    }

    /// Migrates through a link that does nothing. The disk is live at the destination afterwards.
    pub(crate) fn migrate_well(&mut self) {
        let link = self.link(Moment::Never, Event::Close);
        let begun = self.migrate(&link.uri(), 0);
        assert!(
            begun,
            "a second try cannot begin: {}",
            self.line(Source).said()
        );
        let info = self.wait_for_source();
        assert_eq!(info["status"], "completed", "{info}");
        assert_eq!(info["x-durable"], true, "{info}");
        until("the migration to arrive", || {
            let info = self.daemon(Destination).ask("query-migrate");
            (info["status"] == "completed").then_some(())
        });
        let passed = link.end();
        assert!(
            passed.ping && passed.pong,
            "the link did not find the barrier"
        );
    }
}

fn is_over(info: &Value) -> bool {
    let over = ["completed", "failed", "cancelled"];
    let status = info["status"].as_str().unwrap_or_default();
    over.contains(&status) || info["x-hand-over"] == "undecided"
}

impl Drop for Pair {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for line in &self.lines {
                eprintln!("{} said:\n{}", line.image().display(), line.said());
            }
        }
    }
}
