//! Other people's QMP clients against the daemon, and what operators do with a migration that runs.

use std::process::{Command, Stdio};

use serde_json::json;
use vmferry_channel::Stop;
use vmferry_nbd::client::{Operation, Outcome};
use vmferry_nbd::{Client, ClientSettings};

use crate::hosts::{Hosts, MIB};
use crate::need;
use crate::peers::serve::Serve;
use crate::peers::writer::Writer;
use crate::peers::{disk, find, seeded};

#[test]
fn the_qmp_client_of_qemu_s_project_drives_a_migration() {
    let python = need!(find("VMFERRY_PYTHON", "the qemu.qmp client"));
    let hosts = Hosts::new(16 * MIB, &mut seeded());
    let strip = |address: String| address.trim_start_matches("unix:").to_owned();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/interop/qmp_client.py");
    let output = Command::new(python)
        .arg(script)
        .args([&hosts.source, &hosts.destination].map(|host| strip(host.control())))
        .arg(hosts.destination.incoming())
        .stdin(Stdio::null())
        .output()
        .expect("Python can be run");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", output.status);
    // It has told the destination to quit.
    hosts.destination.ended();
    hosts.source.end();
    disk::assert_same(&hosts.from, &hosts.to);
}

/// A daemon that was started without an address gets it from `migrate-incoming`.
#[test]
fn migrate_incoming_says_where_to_wait() {
    let hosts = Hosts::new(4 * MIB, &mut seeded());
    let to = hosts.dir.path().join("late");
    let made = format!("disk0={},create=on,size={}", to.display(), 4 * MIB);
    let late = Serve::start(
        hosts.dir.path(),
        "late",
        ["--disk", &made, "--incoming", "defer"],
    );
    let uri = format!("unix:{}", hosts.dir.path().join("in").display());
    let mut qmp = late.qmp();
    qmp.execute("migrate-incoming", &json!({"uri": uri}));
    let again = qmp.try_execute("migrate-incoming", &json!({"uri": uri}));
    assert!(again.is_err(), "{again:?}");
    hosts.source.migrate(&uri, []).succeeds();
    late.wait_status("completed");
    late.end();
    hosts.source.end();
    disk::assert_same(&hosts.from, &to);
}

/// One write of a guest that is held: a read that was asked for later is answered, with the old content.
struct Held {
    client: Client,
    write: u64,
    offset: u64,
}

impl Held {
    fn new(export: &str, offset: u64) -> Self {
        let settings = ClientSettings {
            silence_timeout: None,
            ..ClientSettings::default()
        };
        let uri = export.parse().expect("an NBD address");
        let stop = Stop::new().expect("an event");
        let mut client = Client::connect(&uri, &settings, &stop).expect("the export takes clients");
        let mut before = vec![0; 4096];
        client
            .read(offset, &mut before)
            .expect("a read is not held");
        let write = Operation::Write {
            offset,
            data: vec![0xa5; 4096],
            fua: false,
        };
        let write = client.submit(write).expect("a write can be sent");
        for operation in [
            Operation::Flush,
            Operation::Read {
                offset,
                length: 4096,
            },
        ] {
            let flush = operation == Operation::Flush;
            let asked = client.submit(operation).expect("a request can be sent");
            let first = client.wait().expect("an answer").expect("an answer");
            assert_eq!(first.cookie, asked, "the write was not held");
            let expected = if flush {
                Outcome::Done
            } else {
                Outcome::Data(before.clone())
            };
            assert!(first.result == Ok(expected), "{:?}", first.result);
        }
        Self {
            client,
            write,
            offset,
        }
    }

    /// It is carried out.
    fn ends_well(mut self) {
        let completion = self.client.wait_for(self.write).expect("an answer");
        assert_eq!(completion.result, Ok(Outcome::Done));
        let mut after = vec![0; 4096];
        self.client.read(self.offset, &mut after).expect("a read");
        assert!(
            after.iter().all(|&byte| byte == 0xa5),
            "the write is not there"
        );
    }

    /// It never is.
    fn ends_badly(mut self) {
        if let Ok(completion) = self.client.wait_for(self.write) {
            assert!(completion.result.is_err(), "{:?}", completion.result);
        }
    }
}

/// In `pre-switchover` guests' writes are held, reads are not; a cancel lets them go, and a second migration that is told
/// to continue takes the disk away with everything that was acknowledged.
#[test]
fn a_migration_waits_before_the_switch_over_until_it_is_told_to_continue() {
    let mut rng = seeded();
    let hosts = Hosts::new(16 * MIB, &mut rng);
    let capability = json!({"capability": "pause-before-switchover", "state": true});
    let capabilities = json!({"capabilities": [capability]});
    let mut qmp = hosts.source.qmp();
    qmp.execute("migrate-set-capabilities", &capabilities);
    qmp.execute("migrate-set-parameters", &json!({"downtime-limit": 20_000}));
    let go_on = |status: &str| json!({"state": status});
    let target = json!({"uri": hosts.destination.incoming()});

    qmp.execute("migrate", &target);
    hosts.source.wait_status("pre-switchover");
    let held = Held::new(&hosts.source.nbd("disk0"), 5 * MIB);
    let status = hosts.source.migration();
    assert_eq!(status["status"], "pre-switchover", "{status}");
    let wrong = qmp.try_execute("migrate-continue", &go_on("device"));
    assert!(wrong.is_err(), "{wrong:?}");
    qmp.execute("migrate_cancel", &json!({}));
    hosts.source.wait_status("cancelled");
    held.ends_well();

    let writer = Writer::start(&hosts.source.nbd("disk0"), &mut rng);
    writer.wait_more(50);
    qmp.execute("migrate", &target);
    hosts.source.wait_status("pre-switchover");
    let held = Held::new(&hosts.source.nbd("disk0"), 7 * MIB);
    qmp.execute("migrate-continue", &go_on("pre-switchover"));
    hosts.source.wait_status("completed");
    held.ends_badly();
    let log = writer.left_behind();
    hosts.destination.wait_status("completed");
    hosts.source.end();
    hosts.destination.end();
    log.verify(&hosts.to);
    disk::assert_same(&hosts.from, &hosts.to);
}
