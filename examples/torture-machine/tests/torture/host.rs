//! A torture machine in a process of its own.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmferry_channel::{Stop, Uri};
use vmferry_qmp::{Client, ClientError};

/// Only ever waited out by a test that fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(2);

pub(crate) struct Host {
    process: Child,
    client: Client,
    folder: PathBuf,
    name: String,
}

impl Host {
    /// Its control socket is there when this returns. `name` is its own among all processes of a test.
    pub(crate) fn start(folder: &Path, name: String, arguments: &[String]) -> Self {
        let program = Command::new(env!("CARGO_BIN_EXE_torture-machine"));
        Self::start_program(program, folder, name, arguments)
    }

    pub(crate) fn start_program(
        mut program: Command,
        folder: &Path,
        name: String,
        arguments: &[String],
    ) -> Self {
        let socket = folder.join(&name);
        let log = File::create(folder.join(&name).with_extension("log")).expect("a log");
        program
            .arg("--qmp")
            .arg(&socket)
            .args(arguments)
            .stderr(log);
        let mut process = program.spawn().expect("the machine starts");
        let uri: Uri = format!("unix:{}", socket.display()).parse().expect("a URI");
        let (stop, begun) = (Stop::new().expect("a descriptor"), Instant::now());
        let client = loop {
            if let Ok(client) = Client::connect(&uri, &stop) {
                break client;
            }
            let ended = process.try_wait().expect("it is a child");
            let log = || fs::read_to_string(socket.with_extension("log")).unwrap_or_default();
            assert!(
                ended.is_none() && begun.elapsed() < PATIENCE,
                "{name}: {}",
                log()
            );
            thread::sleep(POLL);
        };
        Self {
            process,
            client,
            folder: folder.to_owned(),
            name,
        }
    }

    /// What a command returned; `None` if the process is dead.
    pub(crate) fn ask(&mut self, command: &str, arguments: Value) -> Option<Result<Value, String>> {
        match self.client.execute(command, arguments) {
            Ok(value) => Some(Ok(value)),
            Err(ClientError::Refused { description, .. }) => Some(Err(description)),
            Err(_) => None,
        }
    }

    /// A command that must work.
    pub(crate) fn must(&mut self, command: &str, arguments: Value) -> Value {
        match self.ask(command, arguments) {
            Some(Ok(value)) => value,
            other => panic!("{}: {command}: {other:?}; {}", self.name, self.log()),
        }
    }

    /// Wait until a query's answer is as wanted.
    pub(crate) fn wait(&mut self, query: &str, mut wanted: impl FnMut(&Value) -> bool) -> Value {
        let begun = Instant::now();
        loop {
            let answer = self.must(query, json!({}));
            if wanted(&answer) {
                return answer;
            }
            let log = || self.log();
            assert!(
                begun.elapsed() < PATIENCE,
                "{}: {query}: {answer}; {}",
                self.name,
                log()
            );
            thread::sleep(POLL);
        }
    }

    pub(crate) fn wait_for_migration(&mut self, wanted: &[&str]) -> String {
        let state = |answer: &Value| answer["status"].as_str().unwrap_or("none").to_owned();
        state(&self.wait("query-migrate", |answer| wanted.contains(&&*state(answer))))
    }

    /// Let the guest do so many steps, each of which checks something.
    pub(crate) fn go_on(&mut self, steps: u64) {
        let done = |answer: &Value| answer["x-steps"].as_u64().expect("a number");
        let target = done(&self.must("query-status", json!({}))) + steps;
        self.wait("query-status", |answer| done(answer) >= target);
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.must("query-status", json!({}))["running"] == true
    }

    /// Of a machine that stands still.
    pub(crate) fn digests(&mut self) -> Value {
        self.must("x-check", json!({}))
    }

    pub(crate) fn set_capabilities(&mut self, capabilities: &[(&str, bool)]) {
        let changes = capabilities.iter();
        let changes = changes.map(|(name, state)| json!({"capability": name, "state": state}));
        let arguments = json!({"capabilities": changes.collect::<Value>()});
        self.must("migrate-set-capabilities", arguments);
    }

    /// Do a job to its end; what went wrong.
    pub(crate) fn job(&mut self, command: &str, tag: &str) -> Result<(), String> {
        self.must(command, json!({"job-id": "job", "tag": tag}));
        let jobs = self.wait("query-jobs", |jobs| jobs[0]["status"] == "concluded");
        self.must("job-dismiss", json!({"id": "job"}));
        match jobs[0]["error"].as_str() {
            None => Ok(()),
            Some(error) => Err(error.to_owned()),
        }
    }

    /// kill -9.
    pub(crate) fn kill(&mut self) {
        self.process.kill().expect("it is a child");
        self.process.wait().expect("it is a child");
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.folder.join(&self.name).with_extension("log")).unwrap_or_default()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // A guest that has found something wrong has said so, and must not be overlooked.
        let log = self.log();
        if log.contains("self-check failed") && !thread::panicking() {
            panic!("{}: {log}", self.name);
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
