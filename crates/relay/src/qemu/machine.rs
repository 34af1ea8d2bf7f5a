//! Typed calls of a QEMU's monitor.

use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};
use std::{fmt, fs, io};

use serde_json::{Value, json};
use vmferry_channel::{Stop, Uri};
use vmferry_qmp::types::{MigrationInfo, MigrationStatus, RunState, StatusInfo};
use vmferry_qmp::{Client, ServerEvent};

use super::{PrivateFolder, QemuError};

/// How often a QEMU is asked while something is awaited.
const INTERVAL: Duration = Duration::from_millis(20);

/// How long a QEMU may take to notice that the connection of a postcopy is broken.
const PAUSE_PATIENCE: Duration = Duration::from_secs(3);

/// The version of a QEMU, such as 10.0.2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// First number.
    pub major: u64,
    /// Second number.
    pub minor: u64,
    /// Third number.
    pub micro: u64,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// The first version that can be told to stay when an incoming migration fails, so that it can be
/// asked why.
const CAN_STAY: (u64, u64) = (9, 1);

/// A QEMU, over its QMP socket.
#[derive(Debug)]
pub struct Qemu {
    client: Client,
    /// Who owns its socket: as a rule, the user that it runs as.
    user: Option<u32>,
}

impl Qemu {
    /// Connect to its monitor. `stop` calls off this and everything later.
    ///
    /// # Errors
    /// Nobody is there, or it does not greet: another client may hold the socket.
    pub fn connect(address: &Uri, stop: &Stop) -> Result<Self, QemuError> {
        let client = Client::connect(address, stop).map_err(QemuError::Client)?;
        let user = match address {
            Uri::Unix(path) => fs::metadata(path).ok().map(|socket| socket.uid()),
            _ => None,
        };
        Ok(Self { client, user })
    }

    /// What messages call it: its socket.
    #[must_use]
    pub fn peer(&self) -> &str {
        self.client.peer()
    }

    /// Its version.
    #[must_use]
    pub fn version(&self) -> Version {
        let version = &self.client.version().qemu;
        Version {
            major: version.major,
            minor: version.minor,
            micro: version.micro,
        }
    }

    /// A folder for sockets that it can use, too: a QEMU often runs as a user of its own.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn private_folder(&self) -> io::Result<PrivateFolder> {
        let mut folder = PrivateFolder::new()?;
        if let Some(user) = self.user
            && let Err(error) = folder.give_to(user)
        {
            // Then it is told by QEMU itself, unless that is root.
            tracing::debug!(%error, user, "cannot give a folder to a QEMU");
        }
        Ok(folder)
    }

    /// How the machine is: `running`, `paused`, `inmigrate`, …
    ///
    /// # Errors
    /// Its monitor is gone.
    pub fn run_state(&mut self) -> Result<RunState, QemuError> {
        const COMMAND: &str = "query-status";
        let answer = self.execute(COMMAND, json!({}))?;
        let info = serde_json::from_value::<StatusInfo>(answer);
        info.map(|info| info.status)
            .map_err(|error| self.not_understood(COMMAND, error.to_string()))
    }

    /// The UUID of its guest; zeros if it has none.
    ///
    /// # Errors
    /// Its monitor is gone.
    pub fn uuid(&mut self) -> Result<[u8; 16], QemuError> {
        const COMMAND: &str = "query-uuid";
        let answer = self.execute(COMMAND, json!({}))?;
        let text = answer.get("UUID").and_then(Value::as_str);
        let digits = text.unwrap_or_default().replace('-', "");
        u128::from_str_radix(&digits, 16)
            .map(u128::to_be_bytes)
            .map_err(|error| self.not_understood(COMMAND, error.to_string()))
    }

    /// How its migration stands, be it out of it or into it.
    ///
    /// # Errors
    /// Its monitor is gone.
    pub fn migration(&mut self) -> Result<MigrationInfo, QemuError> {
        const COMMAND: &str = "query-migrate";
        let answer = self.execute(COMMAND, json!({}))?;
        serde_json::from_value(answer)
            .map_err(|error| self.not_understood(COMMAND, error.to_string()))
    }

    /// Does it wait for a migration (`-incoming defer`)?
    ///
    /// # Errors
    /// It does not.
    pub fn check_waits(&mut self) -> Result<(), QemuError> {
        match self.run_state()? {
            RunState::Inmigrate => Ok(()),
            state => Err(QemuError::NotWaiting {
                peer: self.peer().to_owned(),
                state,
            }),
        }
    }

    /// Let its guest leave.
    ///
    /// # Errors
    /// QEMU refuses.
    pub fn migrate(&mut self, to: &Uri) -> Result<(), QemuError> {
        let arguments = json!({"uri": to.to_string()});
        self.execute("migrate", arguments).map(drop)
    }

    /// Go on with a postcopy out of it that was interrupted.
    ///
    /// # Errors
    /// QEMU refuses.
    pub fn resume(&mut self, to: &Uri) -> Result<(), QemuError> {
        let arguments = json!({"uri": to.to_string(), "resume": true});
        self.execute("migrate", arguments).map(drop)
    }

    /// Call a migration out of it off.
    ///
    /// # Errors
    /// Its monitor is gone.
    pub fn cancel(&mut self) -> Result<(), QemuError> {
        self.execute("migrate_cancel", json!({})).map(drop)
    }

    /// Wait for a migration at this address. A QEMU that can stays when it fails, so that
    /// [`Qemu::migration`] says why.
    ///
    /// # Errors
    /// QEMU refuses.
    pub fn listen(&mut self, at: &Uri) -> Result<(), QemuError> {
        let mut arguments = json!({"uri": at.to_string()});
        if self.stays() {
            arguments["exit-on-error"] = false.into();
        }
        self.execute("migrate-incoming", arguments).map(drop)
    }

    /// Does it stay when an incoming migration fails? Else it ends.
    #[must_use]
    pub fn stays(&self) -> bool {
        let version = self.version();
        (version.major, version.minor) >= CAN_STAY
    }

    /// Wait at another address for the rest of a postcopy into it that was interrupted. One that has
    /// not noticed yet that it was is told so. All this is said out of band: a guest that waits for its
    /// memory may keep QEMU from answering anything else.
    ///
    /// # Errors
    /// QEMU refuses: it is not in a postcopy, or waits for the rest already.
    pub fn recover(&mut self, at: &Uri) -> Result<(), QemuError> {
        let deadline = Instant::now() + PAUSE_PATIENCE;
        loop {
            let arguments = json!({"uri": at.to_string()});
            let Err(error) = self.execute_out_of_band("migrate-recover", arguments) else {
                return Ok(());
            };
            let is_over = !error.is_refusal() || Instant::now() >= deadline;
            // It breaks the connection off only where one is in use: refused elsewhere.
            if is_over || self.pause().is_err_and(|error| !error.is_refusal()) {
                return Err(error);
            }
            self.wait_event(INTERVAL)?;
        }
    }

    /// Break the connection of a postcopy off, so that it can go on over another one.
    ///
    /// # Errors
    /// QEMU refuses: it is not in a postcopy.
    pub fn pause(&mut self) -> Result<(), QemuError> {
        self.execute_out_of_band("migrate-pause", json!({}))
            .map(drop)
    }

    /// Let the guest go on at the destination as soon as possible.
    ///
    /// # Errors
    /// QEMU refuses.
    pub fn start_postcopy(&mut self) -> Result<(), QemuError> {
        self.execute("migrate-start-postcopy", json!({})).map(drop)
    }

    /// Let the guest run.
    ///
    /// # Errors
    /// QEMU refuses.
    pub fn cont(&mut self) -> Result<(), QemuError> {
        self.execute("cont", json!({})).map(drop)
    }

    /// Stop the guest.
    ///
    /// # Errors
    /// QEMU refuses.
    pub fn stop(&mut self) -> Result<(), QemuError> {
        self.execute("stop", json!({})).map(drop)
    }

    /// End it.
    ///
    /// # Errors
    /// Its monitor was gone before.
    pub fn quit(&mut self) -> Result<(), QemuError> {
        self.execute("quit", json!({})).map(drop)
    }

    /// The next event, which may have come before; `None` when none comes within `patience`.
    ///
    /// # Errors
    /// Its monitor is gone.
    pub fn wait_event(&mut self, patience: Duration) -> Result<Option<ServerEvent>, QemuError> {
        let deadline = Instant::now().checked_add(patience);
        let event = self.client.wait_event(deadline);
        event.map_err(|error| QemuError::of(self.client.peer(), error))
    }

    /// Ask until its migration is as `done` wants it, at most for `patience`; how it was at last.
    ///
    /// # Errors
    /// Its monitor is gone.
    pub fn wait_migration(
        &mut self,
        patience: Duration,
        done: impl Fn(Option<MigrationStatus>) -> bool,
    ) -> Result<MigrationInfo, QemuError> {
        let deadline = Instant::now() + patience;
        loop {
            let info = self.migration()?;
            if done(info.status) || Instant::now() >= deadline {
                return Ok(info);
            }
            self.wait_event(INTERVAL)?;
        }
    }

    /// Ask until the machine is as `done` wants it, at most for `patience`; how it was at last.
    ///
    /// # Errors
    /// Its monitor is gone.
    pub fn wait_run_state(
        &mut self,
        patience: Duration,
        done: impl Fn(RunState) -> bool,
    ) -> Result<RunState, QemuError> {
        let deadline = Instant::now() + patience;
        loop {
            let state = self.run_state()?;
            if done(state) || Instant::now() >= deadline {
                return Ok(state);
            }
            self.wait_event(INTERVAL)?;
        }
    }

    pub(super) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QemuError> {
        let answer = self.client.execute(command, arguments);
        answer.map_err(|error| QemuError::of(self.client.peer(), error))
    }

    fn execute_out_of_band(&mut self, command: &str, arguments: Value) -> Result<Value, QemuError> {
        let answer = self.client.execute_out_of_band(command, arguments);
        answer.map_err(|error| QemuError::of(self.client.peer(), error))
    }

    pub(super) fn unknown(&self, what: &'static str, name: &str) -> QemuError {
        QemuError::Unknown {
            peer: self.peer().to_owned(),
            version: self.version(),
            what,
            name: name.to_owned(),
        }
    }

    pub(super) fn not_understood(
        &self,
        command: &'static str,
        reason: impl Into<String>,
    ) -> QemuError {
        QemuError::NotUnderstood {
            peer: self.peer().to_owned(),
            command,
            reason: reason.into(),
        }
    }
}
