//! What a QEMU is told, and how its answers are taken: a monitor that answers from a script.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde_json::{Value, json};
use vmferry_channel::{Stop, Uri};
use vmferry_qmp::types::{MigrationStatus, RunState};
use vmferry_relay::qemu::{Qemu, QemuError, Settings};

type Answers = Box<dyn FnMut(&str, &Value) -> Result<Value, &'static str> + Send>;

/// A monitor, and what it was told.
struct Monitor {
    address: Uri,
    told: Arc<Mutex<Vec<(String, Value)>>>,
    thread: JoinHandle<()>,
    _folder: tempfile::TempDir,
}

impl Monitor {
    fn start(
        (major, minor): (u64, u64),
        answers: impl FnMut(&str, &Value) -> Result<Value, &'static str> + Send + 'static,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let told = Arc::new(Mutex::new(Vec::new()));
        let (notes, answers) = (Arc::clone(&told), Box::new(answers));
        let thread = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            converse(stream, (major, minor), &notes, answers);
        });
        Self {
            address: Uri::Unix(path),
            told,
            thread,
            _folder: folder,
        }
    }

    fn connect(&self) -> Qemu {
        Qemu::connect(&self.address, &Stop::new().unwrap()).unwrap()
    }

    /// What it was told, once its client is gone.
    fn told(self) -> Vec<(String, Value)> {
        self.thread.join().unwrap();
        Arc::try_unwrap(self.told).unwrap().into_inner().unwrap()
    }
}

fn converse(
    stream: UnixStream,
    (major, minor): (u64, u64),
    told: &Mutex<Vec<(String, Value)>>,
    mut answers: Answers,
) {
    let mut out = stream.try_clone().unwrap();
    let version = json!({"qemu": {"major": major, "minor": minor, "micro": 2}, "package": ""});
    writeln!(
        out,
        "{}",
        json!({"QMP": {"version": version, "capabilities": []}})
    )
    .unwrap();
    for line in BufReader::new(stream).lines() {
        // Its client may have gone without a word.
        let Ok(line) = line else { return };
        let request: Value = serde_json::from_str(&line).unwrap();
        let command = request.get("exec-oob").unwrap_or(&request["execute"]);
        let command = command.as_str().unwrap();
        let arguments = request.get("arguments").cloned().unwrap_or(json!({}));
        let answer = if command == "qmp_capabilities" {
            Ok(json!({}))
        } else {
            told.lock()
                .unwrap()
                .push((command.to_owned(), arguments.clone()));
            answers(command, &arguments)
        };
        let mut answer = match answer {
            Ok(value) => json!({"return": value}),
            Err(desc) => json!({"error": {"class": "GenericError", "desc": desc}}),
        };
        answer["id"] = request["id"].clone();
        writeln!(out, "{answer}").unwrap();
    }
}

/// Two capabilities and two parameters; what starts with `migrate-set` succeeds.
fn settings_of_a_qemu(command: &str) -> Value {
    match command {
        "query-migrate-capabilities" => json!([
            {"capability": "postcopy-ram", "state": false},
            {"capability": "multifd", "state": true},
        ]),
        "query-migrate-parameters" => {
            json!({"max-bandwidth": 134_217_728, "downtime-limit": 300, "tls-creds": ""})
        }
        _ => json!({}),
    }
}

#[test]
fn what_was_changed_is_put_back_and_nothing_else() {
    let monitor = Monitor::start((10, 0), |command, _| Ok(settings_of_a_qemu(command)));
    let mut qemu = monitor.connect();
    let settings = Settings::default()
        .capability("postcopy-ram", true)
        .capability("multifd", true)
        .without("mapped-ram")
        .parameter("max-bandwidth", 0)
        .parameter("downtime-limit", 300);
    let before = qemu.change(&settings).unwrap();
    qemu.put_back(&before);
    drop(qemu);
    let capability = |state: bool| {
        let list = json!([{"capability": "postcopy-ram", "state": state}]);
        (
            "migrate-set-capabilities".to_owned(),
            json!({"capabilities": list}),
        )
    };
    let bandwidth = |bytes: u64| {
        let parameters = json!({"max-bandwidth": bytes});
        ("migrate-set-parameters".to_owned(), parameters)
    };
    let told = monitor.told();
    let changes: Vec<_> = told
        .into_iter()
        .filter(|(command, _)| !command.starts_with("query"))
        .collect();
    let expected = [
        capability(true),
        bandwidth(0),
        bandwidth(134_217_728),
        capability(false),
    ];
    assert_eq!(changes, expected);
}

#[test]
fn a_refused_parameter_takes_the_capabilities_back() {
    let monitor = Monitor::start((7, 2), |command, _| match command {
        "migrate-set-parameters" => Err("Parameter 'max-bandwidth' expects less"),
        _ => Ok(settings_of_a_qemu(command)),
    });
    let mut qemu = monitor.connect();
    let settings = Settings::default()
        .capability("multifd", false)
        .parameter("max-bandwidth", u64::MAX);
    let error = qemu.change(&settings).unwrap_err();
    assert!(error.is_refusal());
    let peer = monitor.address.to_string();
    assert_eq!(
        error.to_string(),
        format!("QEMU at {peer}: migrate-set-parameters: Parameter 'max-bandwidth' expects less")
    );
    drop(qemu);
    let told = monitor.told();
    let set: Vec<&Value> = told
        .iter()
        .filter(|(command, _)| command == "migrate-set-capabilities")
        .map(|(_, arguments)| &arguments["capabilities"][0]["state"])
        .collect();
    assert_eq!(set, [&json!(false), &json!(true)]);
}

#[test]
fn a_capability_that_nobody_knows_is_named() {
    let monitor = Monitor::start((7, 2), |command, _| Ok(settings_of_a_qemu(command)));
    let mut qemu = monitor.connect();
    let settings = Settings::default().capability("mapped-ram", true);
    let error = qemu.change(&settings).unwrap_err();
    let text = error.to_string();
    assert!(
        text.ends_with("(version 7.2.2) does not know capability 'mapped-ram'"),
        "{text}"
    );
}

#[test]
fn a_host_without_userfaultfd_is_told_what_to_do() {
    let monitor = Monitor::start((7, 2), |command, _| match command {
        "migrate-set-capabilities" => Err("Postcopy is not supported"),
        _ => Ok(settings_of_a_qemu(command)),
    });
    let mut qemu = monitor.connect();
    let settings = Settings::default().capability("postcopy-ram", true);
    let error = qemu.change(&settings).unwrap_err();
    let text = error.to_string();
    for words in [
        "Postcopy is not supported",
        "vm.unprivileged_userfaultfd=1",
        "root",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
}

#[test]
fn a_qemu_that_can_stays_when_a_migration_into_it_fails() {
    for (version, stays) in [
        ((7, 2), false),
        ((9, 0), false),
        ((9, 1), true),
        ((10, 0), true),
    ] {
        let monitor = Monitor::start(version, |_, _| Ok(json!({})));
        let mut qemu = monitor.connect();
        assert_eq!(qemu.stays(), stays, "{version:?}");
        qemu.listen(&"unix:/x".parse().unwrap()).unwrap();
        drop(qemu);
        let mut expected = json!({"uri": "unix:/x"});
        if stays {
            expected["exit-on-error"] = false.into();
        }
        assert_eq!(monitor.told(), [("migrate-incoming".to_owned(), expected)]);
    }
}

#[test]
fn states_are_read_and_members_that_nobody_knows_are_passed_over() {
    let mut asked = 0;
    let monitor = Monitor::start((10, 0), move |command, _| {
        asked += 1;
        Ok(match command {
            "query-status" => json!({"status": "paused", "running": false, "novelty": 1}),
            _ if asked < 4 => json!({"status": "active", "ram": {"total": 7, "novelty": []}}),
            _ => json!({"status": "failed", "error-desc": "it broke", "novelty": {}}),
        })
    });
    let mut qemu = monitor.connect();
    assert_eq!(qemu.run_state().unwrap(), RunState::Paused);
    let error = qemu.check_waits().unwrap_err().to_string();
    assert!(
        error.ends_with("it is 'paused', not 'inmigrate'"),
        "{error}"
    );
    let migration = qemu.migration().unwrap();
    assert_eq!(migration.ram.map(|ram| ram.total), Some(7));
    let is_over = |status| status == Some(MigrationStatus::Failed);
    let migration = qemu.wait_migration(Duration::MAX / 4, is_over).unwrap();
    assert_eq!(migration.error_desc.as_deref(), Some("it broke"));
}

#[test]
fn an_answer_that_makes_no_sense_names_its_command() {
    let monitor = Monitor::start((10, 0), |_, _| Ok(json!({"status": 7})));
    let mut qemu = monitor.connect();
    let error = qemu.migration().unwrap_err();
    assert!(matches!(
        error,
        QemuError::NotUnderstood {
            command: "query-migrate",
            ..
        }
    ));
}

#[test]
fn a_postcopy_that_has_not_noticed_is_broken_off_before_it_goes_on() {
    let mut broken = false;
    let monitor = Monitor::start((10, 0), move |command, _| match command {
        "migrate-pause" => {
            broken = true;
            Ok(json!({}))
        }
        "migrate-recover" if !broken => {
            Err("Migrate recover can only be run when postcopy is paused.")
        }
        _ => Ok(json!({})),
    });
    let mut qemu = monitor.connect();
    qemu.recover(&"unix:/x".parse().unwrap()).unwrap();
    drop(qemu);
    let commands: Vec<String> = monitor
        .told()
        .into_iter()
        .map(|(command, _)| command)
        .collect();
    assert_eq!(
        commands,
        ["migrate-recover", "migrate-pause", "migrate-recover"]
    );
}
