//! `vmferry serve` with sockets in a folder of the test's.

use std::path::{Path, PathBuf};

use rustix::process::Signal;
use serde_json::{Value, json};

use super::qmp::Qmp;
use super::until;
use super::vmferry::Vmferry;

/// A running daemon; killed by its process id when dropped.
pub(crate) struct Serve {
    program: Vmferry,
    nbd: PathBuf,
    qmp: PathBuf,
    doors: Vec<Value>,
}

impl Serve {
    /// Starts it with `NAME.nbd` and `NAME.qmp` in `dir` and more arguments, and waits until it listens.
    pub(crate) fn start<A: Into<String>>(
        dir: &Path,
        name: &str,
        args: impl IntoIterator<Item = A>,
    ) -> Self {
        let [nbd, qmp] = ["nbd", "qmp"].map(|what| dir.join(format!("{name}.{what}")));
        let mut all = vec!["serve".to_owned()];
        all.extend(args.into_iter().map(Into::into));
        all.extend(["--nbd".to_owned(), format!("unix:{}", nbd.display())]);
        all.extend(["--qmp".to_owned(), format!("unix:{}", qmp.display())]);
        // The doors are reported in the order in which they are given, the wait for a migration last; all are open when
        // the first is reported.
        let waits =
            all.iter().any(|arg| arg == "--incoming") && !all.iter().any(|arg| arg == "defer");
        let last = if waits { "incoming" } else { "qmp" };
        let mut program = Vmferry::start(all);
        let mut doors = Vec::new();
        while doors.last().is_none_or(|door: &Value| door["what"] != last) {
            doors.push(program.event("listening"));
        }
        Self {
            program,
            nbd,
            qmp,
            doors,
        }
    }

    /// An export of it.
    pub(crate) fn nbd(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.nbd.display())
    }

    /// Its control address.
    pub(crate) fn control(&self) -> String {
        format!("unix:{}", self.qmp.display())
    }

    /// A control connection.
    pub(crate) fn qmp(&self) -> Qmp {
        Qmp::connect(&self.qmp)
    }

    /// Where it waits for a migration (`--incoming` with an address).
    pub(crate) fn incoming(&self) -> String {
        self.door("incoming", "")
    }

    /// An export of it through a first `--nbd tcp:…`.
    pub(crate) fn nbd_tcp(&self, export: &str) -> String {
        let address = self.door("nbd", "tcp:");
        format!("nbd://{}/{export}", address.trim_start_matches("tcp:"))
    }

    fn door(&self, what: &str, prefix: &str) -> String {
        let doors = self.doors.iter().filter(|door| door["what"] == what);
        let mut addresses = doors.filter_map(|door| door["address"].as_str());
        let address = addresses.find(|address| address.starts_with(prefix));
        address.expect("it listens there").to_owned()
    }

    /// Its NBD socket.
    pub(crate) fn nbd_socket(&self) -> &Path {
        &self.nbd
    }

    /// Kills it, as a crash of it would.
    pub(crate) fn crash(mut self) {
        self.program.signal(Signal::KILL);
        self.program.wait();
    }

    /// Starts `vmferry migrate` from here, with more arguments.
    pub(crate) fn migrate<const N: usize>(&self, uri: &str, args: [&str; N]) -> Vmferry {
        let control = self.control();
        let base = ["migrate", "--qmp", &control, uri];
        Vmferry::start(base.into_iter().chain(args))
    }

    /// `query-migrate`.
    pub(crate) fn migration(&self) -> Value {
        self.qmp().execute("query-migrate", &json!({}))
    }

    /// Waits for a status of its migration; the answer of `query-migrate`.
    pub(crate) fn wait_status(&self, wanted: &str) -> Value {
        let mut qmp = self.qmp();
        let mut last = Value::Null;
        until(&format!("the migration to be {wanted}"), || {
            last = qmp.execute("query-migrate", &json!({}));
            let failed = wanted != "failed" && last["status"] == "failed";
            assert!(!failed, "the migration failed: {last}");
            (last["status"] == wanted).then(|| last.clone())
        })
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        self.program.signal(signal);
    }

    /// Waits for its end, which must be a good one.
    pub(crate) fn ended(mut self) {
        self.program.succeeds();
    }

    /// Ends it in order.
    pub(crate) fn end(self) {
        self.signal(Signal::TERM);
        self.ended();
    }
}
