//! `vmferry serve` as a process that can be killed and started again.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use vmferry_channel::Uri;
use vmferry_nbd::NbdUri;

use crate::control::Control;
use crate::peers::{PATIENCE, until};

/// The one line of a failure that says why: there are only hints besides.
pub(crate) fn clear_line(said: &str) -> &str {
    let is_hint = |line: &str| {
        line.is_empty() || line.starts_with("hint: ") || line.starts_with("For more information")
    };
    let lines: Vec<&str> = said.lines().filter(|line| !is_hint(line)).collect();
    match lines[..] {
        [line] if line.starts_with("vmferry: error: ") || line.starts_with("error: ") => line,
        _ => panic!("not one clear line: {said}"),
    }
}

/// Name of the disk, everywhere.
pub(crate) const DISK: &str = "disk0";

/// A command line, with everything that outlives one process. Its files are called `NAME.…`.
#[derive(Clone, Debug)]
pub(crate) struct CommandLine {
    name: &'static str,
    folder: PathBuf,
    image: PathBuf,
    args: Vec<String>,
}

/// A daemon that did not start.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) status: Option<i32>,
    /// What it said on standard error.
    pub(crate) said: String,
}

impl CommandLine {
    /// Serves `NAME.raw` of this folder; `options` follow the path.
    pub(crate) fn new(name: &'static str, folder: &Path, options: &str) -> Self {
        Self::of_image(name, folder, &folder.join(format!("{name}.raw")), options)
    }

    /// Serves an image that is somewhere else.
    pub(crate) fn of_image(name: &'static str, folder: &Path, image: &Path, options: &str) -> Self {
        let line = Self {
            name,
            folder: folder.to_owned(),
            image: image.to_owned(),
            args: Vec::new(),
        };
        let disk = format!("{DISK}={}{options}", image.display());
        let [nbd, qmp] = [line.nbd_socket(), line.qmp_socket()];
        line.args([
            "--disk",
            &disk,
            "--nbd",
            &format!("unix:{}", nbd.display()),
            "--qmp",
            &format!("unix:{}", qmp.display()),
        ])
    }

    /// More arguments.
    pub(crate) fn args<const N: usize>(mut self, args: [&str; N]) -> Self {
        self.args.extend(args.map(str::to_owned));
        self
    }

    pub(crate) fn image(&self) -> &Path {
        &self.image
    }

    pub(crate) fn qmp_socket(&self) -> PathBuf {
        self.file("qmp")
    }

    pub(crate) fn nbd_socket(&self) -> PathBuf {
        self.file("nbd")
    }

    /// The disk, for NBD clients.
    pub(crate) fn export(&self) -> NbdUri {
        NbdUri {
            address: Uri::Unix(self.nbd_socket()),
            export: DISK.to_owned(),
        }
    }

    /// What all processes of this command line have said so far.
    pub(crate) fn said(&self) -> String {
        std::fs::read_to_string(self.file("log")).unwrap_or_default()
    }

    fn file(&self, kind: &str) -> PathBuf {
        self.folder.join(format!("{}.{kind}", self.name))
    }

    /// Starts it in this program, or in what this program is wrapped into.
    pub(crate) fn start(&self) -> Result<Serve, Refused> {
        self.start_in(Command::new(env!("CARGO_BIN_EXE_vmferry")))
    }

    /// Starts it and waits until it serves, or has ended.
    pub(crate) fn start_in(&self, mut program: Command) -> Result<Serve, Refused> {
        let open = OpenOptions::new()
            .append(true)
            .create(true)
            .open(self.file("log"));
        let log = open.expect("a file in the temporary folder");
        let said_before = self.said().len();
        let mut child = program
            .arg("serve")
            .args(&self.args)
            .arg("--json")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .expect("vmferry can be run");
        let mut serve = Serve {
            reports: reports(&mut child),
            child,
            line: self.clone(),
            addresses: BTreeMap::new(),
        };
        match serve.hear_of("qmp") {
            Some(_) => Ok(serve),
            None => Err(Refused {
                status: serve.wait(),
                said: self.said()[said_before..].to_owned(),
            }),
        }
    }

    /// Runs a short command of this program on the daemon.
    pub(crate) fn run<const N: usize>(&self, args: [&str; N]) -> (Option<i32>, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_vmferry"))
            .args(args)
            .arg("--qmp")
            .arg(format!("unix:{}", self.qmp_socket().display()))
            .stdin(Stdio::null())
            .output()
            .expect("vmferry can be run");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), said)
    }

    /// Creates its disk file with this length and nothing in it.
    pub(crate) fn make_image(&self, length: u64) -> File {
        let file = File::create_new(self.image()).expect("a new disk");
        file.set_len(length).expect("a disk can be sized");
        file
    }
}

fn reports(child: &mut Child) -> Receiver<(String, String)> {
    let stdout = BufReader::new(child.stdout.take().expect("its output is a pipe"));
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        // A killed process may leave half a line.
        for line in stdout.lines().map_while(Result::ok) {
            let Ok(report) = serde_json::from_str::<Value>(&line) else {
                break;
            };
            let [what, address] = ["what", "address"].map(|key| report[key].as_str());
            if let (Some(what), Some(address)) = (what, address)
                && sender.send((what.to_owned(), address.to_owned())).is_err()
            {
                break;
            }
        }
    });
    receiver
}

/// A running daemon; killed when dropped.
#[derive(Debug)]
pub(crate) struct Serve {
    line: CommandLine,
    child: Child,
    reports: Receiver<(String, String)>,
    addresses: BTreeMap<String, String>,
}

impl Serve {
    /// The address of a listener; `None` if the process ends without one.
    fn hear_of(&mut self, what: &str) -> Option<String> {
        while !self.addresses.contains_key(what) {
            match self.reports.recv_timeout(PATIENCE) {
                Ok((what, address)) => self.addresses.insert(what, address),
                Err(_) => return None,
            };
        }
        self.addresses.get(what).cloned()
    }

    /// Where it waits for a migration.
    pub(crate) fn incoming(&mut self) -> String {
        let address = self.hear_of("incoming");
        address.unwrap_or_else(|| panic!("nothing waits for a migration: {}", self.line.said()))
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// One command on a connection of its own.
    pub(crate) fn query(&self, command: &str, arguments: &Value) -> std::io::Result<Value> {
        Control::connect(&self.line.qmp_socket())?.execute(command, arguments)
    }

    /// What a query says that must succeed.
    pub(crate) fn ask(&self, command: &str) -> Value {
        self.query(command, &json!({}))
            .unwrap_or_else(|error| panic!("{command}: {error}; {}", self.line.said()))
    }

    /// What guests of its disks wait for: `nothing`, `writes`, `everything`, or `departed`. Each, if they differ.
    pub(crate) fn hold(&self) -> String {
        let blocks = self.ask("query-block");
        let blocks = blocks.as_array().expect("a list of disks");
        let hold = |block: &Value| block["inserted"]["x-hold"].as_str().map(str::to_owned);
        let mut holds: Vec<String> = blocks.iter().filter_map(hold).collect();
        assert_eq!(holds.len(), blocks.len(), "a disk has a hold level");
        holds.dedup();
        holds.join(", ")
    }

    /// Its exit status once it has ended.
    pub(crate) fn wait(&mut self) -> Option<i32> {
        let status = until("a daemon to end", || {
            self.child.try_wait().expect("a child can be waited for")
        });
        status.code()
    }

    /// kill -9.
    pub(crate) fn kill(mut self) {
        // It may have been killed already.
        let _ = self.child.kill();
        self.wait();
    }

    /// The orderly end.
    pub(crate) fn terminate(mut self) {
        kill_process(self.pid(), Signal::TERM).expect("a running child can be told to end");
        let status = self.wait();
        assert_eq!(status, Some(0), "after SIGTERM: {}", self.line.said());
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        // It may have ended already: nothing to do about either error.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
