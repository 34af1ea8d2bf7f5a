//! Our client with a real QEMU program, and QEMU's own client library with our server. Each test
//! says plainly when its counterpart is not installed and it was left out.

use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmferry_channel::{Listener, Stop, Uri};
use vmferry_qmp::types::{
    BlockDeviceInfo, BlockExportInfo, JobInfo, MigrationEvent, MigrationStatus, VersionInfo,
    VersionTriple,
};
use vmferry_qmp::{
    Broadcast, Client, ClientContext, ClientError, Command, CommandError, ErrorClass, Event,
    Handler, Server,
};

const PATIENCE: Duration = Duration::from_secs(60);

/// A real QEMU's storage daemon; ended when dropped.
struct StorageDaemon {
    child: Child,
    uri: Uri,
    _dir: tempfile::TempDir,
}

impl StorageDaemon {
    fn start() -> Option<Self> {
        let program = std::env::var("VMFERRY_QEMU_STORAGE_DAEMON")
            .unwrap_or_else(|_| "qemu-storage-daemon".to_owned());
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp.sock");
        let disk = dir.path().join("disk.raw");
        std::fs::File::create(&disk)
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
        let child = Process::new(program)
            .arg("--chardev")
            .arg(format!(
                "socket,path={},server=on,wait=off,id=q",
                socket.display()
            ))
            .args(["--monitor", "q", "--blockdev"])
            .arg(format!(
                "driver=file,filename={},node-name=disk0",
                disk.display()
            ))
            .arg("--nbd-server")
            .arg(format!(
                "addr.type=unix,addr.path={}",
                dir.path().join("nbd.sock").display()
            ))
            .args(["--export", "type=nbd,id=e0,node-name=disk0,name=disk0"])
            .stdin(Stdio::null())
            .spawn();
        match child {
            Ok(child) => Some(Self {
                child,
                uri: Uri::Unix(socket),
                _dir: dir,
            }),
            Err(error) => {
                println!("LEFT OUT: no qemu-storage-daemon ({error})");
                None
            }
        }
    }

    fn client(&self) -> Client {
        let stop = Stop::new().unwrap();
        let end = Instant::now() + PATIENCE;
        loop {
            match Client::connect(&self.uri, &stop) {
                // Not listening yet; or caught it while it was starting, which it does not take well
                // (GLib complains, and what it then says need not be QMP).
                Err(ClientError::Channel(_) | ClientError::NotQmp { .. })
                    if Instant::now() < end =>
                {
                    std::thread::yield_now();
                }
                outcome => return outcome.unwrap(),
            }
        }
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn our_client_speaks_with_a_real_qemu() {
    let Some(mut daemon) = StorageDaemon::start() else {
        return;
    };
    let mut client = daemon.client();
    assert!(client.version().qemu.major >= 7);

    let error = client.execute("no-such-thing", json!({})).unwrap_err();
    assert_eq!(error.class(), Some(ErrorClass::CommandNotFound));
    let error = client.execute("job-dismiss", json!({})).unwrap_err();
    assert_eq!(error.to_string(), "job-dismiss: Parameter 'id' is missing");

    // Its answers fit our types.
    let value = client
        .execute("query-named-block-nodes", json!({}))
        .unwrap();
    let nodes: Vec<BlockDeviceInfo> = serde_json::from_value(value).unwrap();
    let node = nodes
        .iter()
        .find(|node| node.node_name.as_deref() == Some("disk0"));
    assert_eq!(node.unwrap().image.virtual_size, 1 << 20);
    let value = client.execute("query-block-exports", json!({})).unwrap();
    let exports: Vec<BlockExportInfo> = serde_json::from_value(value).unwrap();
    assert_eq!(exports[0].node_name, "disk0");
    let value = client.execute("query-jobs", json!({})).unwrap();
    assert_eq!(serde_json::from_value::<Vec<JobInfo>>(value).unwrap(), []);

    // A second client finds the socket taken and is told what would help.
    let stop = Stop::new().unwrap();
    let error = Client::connect(&daemon.uri, &stop).unwrap_err();
    assert!(matches!(error, ClientError::NoGreeting { .. }), "{error}");

    client.execute("quit", json!({})).unwrap();
    assert!(daemon.child.wait().unwrap().success());
}

/// Where a real QEMU has a command, event or member of ours, it has the same type.
#[test]
fn our_schema_agrees_with_a_real_qemu() {
    let Some(daemon) = StorageDaemon::start() else {
        return;
    };
    let theirs = daemon
        .client()
        .execute("query-qmp-schema", json!({}))
        .unwrap();
    let theirs = Schema(&theirs);
    let ours = vmferry_qmp::introspect();
    let ours = Schema(&ours);
    let mut compared = 0;
    for entry in ours.0.as_array().unwrap() {
        let name = entry["name"].as_str().unwrap();
        if !["command", "event"].contains(&entry["meta-type"].as_str().unwrap()) {
            continue;
        }
        let Some(real) = theirs.find(name) else {
            continue;
        };
        for key in ["arg-type", "ret-type"] {
            if let (Some(our), Some(their)) = (entry.get(key), real.get(key)) {
                compare(ours, our, theirs, their, name, key == "ret-type");
                compared += 1;
            }
        }
    }
    assert!(compared >= 15, "{compared}");
}

#[derive(Clone, Copy)]
struct Schema<'a>(&'a Value);

impl<'a> Schema<'a> {
    fn find(self, name: &str) -> Option<&'a Value> {
        self.0
            .as_array()
            .unwrap()
            .iter()
            .find(|entry| entry["name"] == name)
    }
}

fn compare(
    ours: Schema<'_>,
    our: &Value,
    theirs: Schema<'_>,
    their: &Value,
    path: &str,
    returned: bool,
) {
    let our = ours.find(our.as_str().unwrap()).unwrap();
    let their = theirs.find(their.as_str().unwrap()).unwrap();
    let kind = our["meta-type"].as_str().unwrap();
    assert_eq!(kind, their["meta-type"], "{path}");
    match kind {
        "builtin" => assert_eq!(our["json-type"], their["json-type"], "{path}"),
        "array" => {
            let (our, their) = (&our["element-type"], &their["element-type"]);
            compare(ours, our, theirs, their, &format!("{path}[]"), returned);
        }
        "enum" => {
            let their = their["values"].as_array().unwrap();
            for value in our["values"].as_array().unwrap() {
                let own = value.as_str().unwrap().starts_with("x-");
                assert!(own || their.contains(value), "{path}: {value}");
            }
        }
        // A union, which we have only one of: the schema's own entries.
        _ if their.get("variants").is_some() => {}
        _ => compare_members(ours, our, theirs, their, path, returned),
    }
}

fn compare_members(
    ours: Schema<'_>,
    our: &Value,
    theirs: Schema<'_>,
    their: &Value,
    path: &str,
    returned: bool,
) {
    let (our, their) = (&our["members"], &their["members"]);
    let find = |members: &Value, name: &Value| {
        let mut found = members.as_array().unwrap().iter();
        found.find(|member| member["name"] == *name).cloned()
    };
    for member in our.as_array().unwrap() {
        let path = format!("{path}.{}", member["name"].as_str().unwrap());
        match find(their, &member["name"]) {
            Some(real) => {
                compare(
                    ours,
                    &member["type"],
                    theirs,
                    &real["type"],
                    &path,
                    returned,
                );
            }
            None => assert!(path.contains(".x-"), "{path} is none of QEMU's"),
        }
    }
    // A client may rely on every member that QEMU always returns.
    for member in their.as_array().unwrap() {
        if returned && member.get("default").is_none() {
            let our = find(our, &member["name"]);
            let always = our.is_some_and(|our| our.get("default").is_none());
            assert!(always, "{path} lacks {}", member["name"]);
        }
    }
}

struct TestHandler {
    broadcast: Broadcast,
}

impl Handler for TestHandler {
    fn execute(&self, _client: &ClientContext, command: Command) -> Result<Value, CommandError> {
        if let Command::Migrate(_) = command {
            self.broadcast.publish(&Event::Migration(MigrationEvent {
                status: MigrationStatus::Setup,
            }));
        }
        Ok(json!({}))
    }
}

/// What a user of QEMU's library would write.
const SCRIPT: &str = r#"
import asyncio, sys
from qemu.qmp import QMPClient, ExecuteError

async def main():
    client = QMPClient("test")
    await client.connect(sys.argv[1])
    assert client.greeting.QMP.version["qemu"]["major"] == 10, client.greeting
    names = [command["name"] for command in await client.execute("query-commands")]
    assert "migrate" in names and "qmp_capabilities" in names, names
    try:
        await client.execute("migrate", {"url": "x"})
        raise AssertionError("accepted")
    except ExecuteError as error:
        assert error.error_class == "GenericError", error
        assert str(error) == "Parameter 'url' is unexpected", error
    try:
        await client.execute("no-such-thing")
        raise AssertionError("accepted")
    except ExecuteError as error:
        assert error.error_class == "CommandNotFound", error
    with client.listener("MIGRATION") as events:
        await client.execute("migrate", {"uri": "tcp:nowhere:1", "detach": True})
        event = await asyncio.wait_for(events.get(), 60)
        assert event["data"]["status"] == "setup", event
        assert event["timestamp"]["seconds"] > 1600000000
    schema = await client.execute("query-qmp-schema")
    assert any(entry["meta-type"] == "event" for entry in schema)
    await client.disconnect()

asyncio.run(main())
print("ALL GOOD")
"#;

#[test]
fn qemus_client_library_speaks_with_our_server() {
    let Some(python) = python_with_qmp() else {
        println!("LEFT OUT: no Python with the package qemu.qmp");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("qmp.sock");
    let broadcast = Broadcast::default();
    let handler = TestHandler {
        broadcast: broadcast.clone(),
    };
    let version = VersionInfo {
        qemu: VersionTriple {
            major: 10,
            minor: 0,
            micro: 0,
        },
        package: "vmferry".to_owned(),
    };
    let listener = Listener::bind(&Uri::Unix(socket.clone())).unwrap();
    let _server = Server::start(vec![listener], version, Arc::new(handler), broadcast).unwrap();
    let output = Process::new(python)
        .args(["-c", SCRIPT])
        .arg(&socket)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && said.contains("ALL GOOD"),
        "{said}{complaint}"
    );
}

/// A Python that has `qemu.qmp`: the host's, or one in a virtual environment that is made here
/// once.
fn python_with_qmp() -> Option<PathBuf> {
    let has_it = |python: &Path| {
        let output = Process::new(python)
            .args(["-c", "import qemu.qmp"])
            .output();
        output.is_ok_and(|output| output.status.success())
    };
    let host = PathBuf::from("python3");
    if has_it(&host) {
        return Some(host);
    }
    let environment = Path::new(env!("CARGO_TARGET_TMPDIR")).join("qemu-qmp");
    let python = environment.join("bin/python3");
    if has_it(&python) {
        return Some(python);
    }
    let made = Process::new(&host)
        .args(["-m", "venv"])
        .arg(&environment)
        .output();
    made.ok().filter(|output| output.status.success())?;
    let _ = Process::new(&python)
        .args(["-m", "pip", "install", "--quiet", "qemu.qmp"])
        .output();
    has_it(&python).then_some(python)
}
