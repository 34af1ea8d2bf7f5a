//! What commands do, and what they refuse.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;
use vmferry_channel::{Stop, Uri};
use vmferry_daemon::{Config, Daemon, Disk};
use vmferry_disk::simulated::MemoryDisk;
use vmferry_disk::{Hold, Node};
use vmferry_migration::{Coverage, Residence, Start};
use vmferry_qmp::types::{HandOver, HoldLevel, MigrationStatus};

use crate::host::{Host, MIB, OVER, PATIENCE, Settings, migrate_to, random, run};

#[test]
fn queries_answer_what_the_schema_promises() {
    let host = Host::new();
    host.make("root", &random(1, MIB));
    host.make("data", &[0; 4096]);
    let daemon = host.start(&["root", "data"], &Settings::default());
    let mut qmp = daemon.qmp();
    for query in qmp.run("query-commands", json!({})).as_array().unwrap() {
        let name = query["name"].as_str().unwrap();
        if name.starts_with("query-") {
            qmp.run(name, json!({}));
        }
    }
    assert_eq!(qmp.run("query-name", json!({})), json!({"name": "test"}));
    let status = qmp.run("query-status", json!({}));
    assert_eq!(status, json!({"running": true, "status": "running"}));
    assert_eq!(qmp.info().status, Some(MigrationStatus::None));
    let inserted = qmp.blocks()[0].inserted.clone().unwrap();
    assert_eq!(inserted.image.virtual_size, MIB);
    assert_eq!(qmp.blocks()[1].device, "data");
    let exports = qmp.run("query-block-exports", json!({}));
    assert_eq!(exports.as_array().unwrap().len(), 2);
    daemon.end().unwrap();
}

#[test]
fn quit_answers_says_farewell_and_syncs() {
    let disk = MemoryDisk::new(MIB);
    let dir = tempfile::tempdir().unwrap();
    let node = Node::new("root", Box::new(disk.clone()), Hold::Nothing);
    let disks = vec![Disk {
        node,
        record: None,
        start: Start::Live,
        peer: String::new(),
        taken_back: false,
        path: "root.raw".into(),
        format: "raw",
        image: None,
    }];
    let mut daemon = run(dir.path().to_owned(), disks, Vec::new(), None, None);
    let mut nbd = daemon.nbd("root");
    nbd.write(4096, b"not flushed by the guest", false).unwrap();
    let mut qmp = daemon.qmp();
    qmp.run("quit", json!({}));
    let events = qmp.events_until(|event| event.name == "SHUTDOWN");
    assert_eq!(events, ["SHUTDOWN"]);
    daemon.thread.take().unwrap().join().unwrap().unwrap();
    assert_eq!(
        disk.durable_snapshot()[4096..4120],
        *b"not flushed by the guest"
    );
    assert!(!dir.path().join("qmp.sock").exists());
    assert!(!dir.path().join("nbd.sock").exists());
}

#[test]
fn a_migration_under_writes_loses_nothing() {
    let (source, destination) = (Host::new(), Host::new());
    let length = 24 * MIB + 4096;
    source.make("root", &random(2, length));
    source.make("data", &random(3, 3 * MIB));
    destination.make("root", &vec![0; usize::try_from(length).unwrap()]);
    destination.make("data", &random(4, 3 * MIB));
    let names = ["root", "data"];
    let from = source.start(&names, &Settings::default());
    let settings = Settings {
        incoming: true,
        ..Settings::default()
    };
    let to = destination.start(&names, &settings);

    // A guest that writes until its disk goes away, and remembers what was acknowledged.
    let migrating = Arc::new(AtomicBool::new(false));
    let guest = {
        let mut nbd = from.nbd("root");
        let migrating = Arc::clone(&migrating);
        let mut expected = std::fs::read(source.image("root")).unwrap();
        std::thread::spawn(move || {
            let mut random = fastrand::Rng::with_seed(5);
            let mut writes = 0_u64;
            let lost = loop {
                let offset = random.u64(..length / 4096) * 4096;
                let block = [random.u8(..); 4096];
                if nbd.write(offset, &block, false).is_err() {
                    break (offset, block);
                }
                let at = usize::try_from(offset).unwrap();
                expected[at..at + 4096].copy_from_slice(&block);
                writes += 1;
                if writes == 100 {
                    migrating.store(true, Ordering::Release);
                }
            };
            (expected, lost)
        })
    };
    while !migrating.load(Ordering::Acquire) {
        std::thread::yield_now();
    }
    let mut qmp = from.patient_qmp();
    let mut watcher = to.qmp();
    assert_eq!(
        watcher.run("query-status", json!({}))["status"],
        "inmigrate"
    );
    qmp.run("migrate", migrate_to(to.incoming.as_ref().unwrap()));
    let info = qmp.wait_status(&OVER);
    assert_eq!(info.status, Some(MigrationStatus::Completed), "{info:?}");
    assert_eq!(info.x_hand_over, Some(HandOver::GivenUp));
    assert_eq!(info.x_durable, Some(true));
    let disk = info.disk.unwrap();
    assert_eq!((disk.remaining, disk.total), (0, length + 3 * MIB));
    assert!(disk.transferred >= disk.total);
    assert!(info.x_disks.unwrap().iter().all(|disk| disk.remaining == 0));

    let events = qmp.events_until(|event| event.data["status"] == "completed");
    for expected in [
        "MIGRATION setup",
        "MIGRATION active",
        "STOP",
        "MIGRATION device",
    ] {
        assert!(events.contains(&expected.to_owned()), "{events:?}");
    }
    assert!(!events.contains(&"RESUME".to_owned()), "{events:?}");
    let events = watcher.events_until(|event| event.data["status"] == "completed");
    assert!(events.contains(&"RESUME".to_owned()), "{events:?}");

    // The one write that was not acknowledged may be there or not.
    let (mut expected, lost) = guest.join().unwrap();
    let mut arrived = vec![0; expected.len()];
    let mut nbd = to.nbd("root");
    for (index, chunk) in arrived.chunks_mut(1 << 20).enumerate() {
        nbd.read(index as u64 * MIB, chunk).unwrap();
    }
    let at = usize::try_from(lost.0).unwrap();
    expected[at..at + 4096].copy_from_slice(&arrived[at..at + 4096]);
    assert!(arrived == expected, "the destination's disk differs");
    nbd.write(0, b"guests go on there", false).unwrap();
    let data = std::fs::read(destination.image("data")).unwrap();
    assert!(data == random(3, 3 * MIB));

    assert!(
        from.try_nbd("root").is_err(),
        "the source serves it no more"
    );
    assert_eq!(qmp.run("query-status", json!({}))["status"], "postmigrate");
    assert_eq!(qmp.run("query-block-exports", json!({})), json!([]));
    assert_eq!(watcher.run("query-status", json!({}))["status"], "running");
    assert_eq!(source.residence("root"), Some(Residence::Moved));
    assert_eq!(destination.residence("root"), Some(Residence::Arrived));

    let jobs = qmp.run("query-jobs", json!({}));
    assert_eq!(jobs[0]["status"], "concluded");
    qmp.run("job-dismiss", json!({"id": jobs[0]["id"]}));
    assert_eq!(qmp.run("query-jobs", json!({})), json!([]));

    from.end().unwrap();
    to.end().unwrap();
    let error = source
        .try_start(&names, &Settings::default())
        .err()
        .unwrap();
    assert!(error.contains("has moved"), "{error}");
    let again = destination.start(&names, &settings);
    assert_eq!(
        again.qmp().run("query-status", json!({}))["status"],
        "running",
        "what has arrived is served under the same command line"
    );
}

#[test]
fn a_destination_listens_again_after_a_failure() {
    let (source, destination) = (Host::new(), Host::new());
    source.make("root", &random(6, 4 * MIB));
    destination.make("root", &vec![0; 4 << 20]);
    destination.make("other", &vec![0; 1 << 20]);
    let from = source.start(&["root"], &Settings::default());
    let settings = Settings {
        incoming: true,
        ..Settings::default()
    };
    let to = destination.start(&["root"], &settings);
    let uri = to.incoming.clone().unwrap();
    let mut watcher = to.qmp();
    // There is nothing to cancel, and who comes next is not cancelled for it.
    watcher.run("migrate_cancel", json!({}));

    // Somebody who is no source at all.
    let stop = Stop::new().unwrap();
    drop(vmferry_channel::connect(&uri, &stop, PATIENCE).unwrap());
    watcher.wait_status(&[MigrationStatus::Failed]);
    // Reads are answered, writes are held, while it waits.
    let mut nbd = to.nbd("root");
    nbd.read(0, &mut [1; 512]).unwrap();
    assert!(
        watcher
            .refused("cont", json!({}))
            .contains("waiting for an incoming")
    );
    assert!(
        watcher
            .refused("stop", json!({}))
            .contains("waiting for an incoming")
    );
    assert!(
        watcher
            .refused("migrate", migrate_to(&uri))
            .contains("waiting for an incoming")
    );
    let held = watcher.blocks()[0].inserted.clone().unwrap().x_hold;
    assert_eq!(held.map(HoldLevel::as_str), Some("writes"));

    let mut qmp = from.patient_qmp();
    qmp.run("migrate", migrate_to(&uri));
    let info = qmp.wait_status(&OVER);
    assert_eq!(info.status, Some(MigrationStatus::Completed), "{info:?}");
    watcher.wait_status(&[MigrationStatus::Completed]);
    nbd.write(0, b"now", false).unwrap();
}

#[test]
fn a_deferred_destination_is_told_where_to_listen() {
    let (source, destination) = (Host::new(), Host::new());
    source.make("root", &random(7, 2 * MIB));
    destination.make("root", &vec![0; 2 << 20]);
    let settings = Settings {
        deferred: true,
        ..Settings::default()
    };
    let to = destination.start(&["root"], &settings);
    let uri = Uri::Unix(destination.dir.path().join("migrate.sock"));
    let mut watcher = to.qmp();
    let error = watcher.refused("migrate-incoming", json!({"uri": "nowhere"}));
    assert!(error.contains("no address"), "{error}");
    watcher.run("migrate-incoming", migrate_to(&uri));
    let error = watcher.refused("migrate-incoming", migrate_to(&uri));
    assert!(error.contains("already been started"), "{error}");

    let from = source.start(&["root"], &Settings::default());
    let mut qmp = from.patient_qmp();
    let error = qmp.refused("migrate-incoming", migrate_to(&uri));
    assert!(error.contains("no disk here waits"), "{error}");
    qmp.run("migrate", migrate_to(&uri));
    let info = qmp.wait_status(&OVER);
    assert_eq!(info.status, Some(MigrationStatus::Completed), "{info:?}");
}

#[test]
fn a_migration_can_wait_be_cancelled_and_tried_again() {
    let (source, destination) = (Host::new(), Host::new());
    source.make("root", &random(8, 4 * MIB));
    destination.make("root", &vec![0; 4 << 20]);
    let from = source.start(&["root"], &Settings::default());
    let settings = Settings {
        incoming: true,
        ..Settings::default()
    };
    let to = destination.start(&["root"], &settings);
    let uri = to.incoming.clone().unwrap();
    let mut qmp = from.patient_qmp();
    let pause = |state: bool| json!({"capabilities": [{"capability": "pause-before-switchover", "state": state}]});
    qmp.run("migrate-set-capabilities", pause(true));
    qmp.run("migrate", migrate_to(&uri));
    qmp.wait_status(&[MigrationStatus::PreSwitchover]);
    assert_eq!(
        qmp.run("query-status", json!({}))["status"],
        "finish-migrate"
    );
    let blocked = qmp.blocks()[0].inserted.clone().unwrap().x_blocked_by;
    assert_eq!(blocked.as_deref(), Some("a migration"));
    assert!(
        qmp.refused("migrate", migrate_to(&uri))
            .contains("in progress")
    );
    assert!(qmp.refused("stop", json!({})).contains("in progress"));
    assert!(
        qmp.refused("migrate-set-capabilities", pause(false))
            .contains("in progress")
    );
    let error = qmp.refused("migrate-continue", json!({"state": "device"}));
    assert!(
        error.contains("not in expected state: pre-switchover"),
        "{error}"
    );
    let job = qmp.run("query-jobs", json!({}))[0].clone();
    assert_eq!(job["status"], "paused");
    let error = qmp.refused("job-dismiss", json!({"id": job["id"]}));
    assert!(error.contains("cannot accept"), "{error}");

    qmp.run("migrate_cancel", json!({}));
    let info = qmp.wait_status(&OVER);
    assert_eq!(info.status, Some(MigrationStatus::Cancelled));
    assert_eq!(info.x_hand_over, Some(HandOver::Kept));
    from.nbd("root")
        .write(0, b"the source serves on", false)
        .unwrap();
    assert_eq!(source.residence("root"), None);
    qmp.run("migrate_cancel", json!({}));

    qmp.run("migrate", migrate_to(&uri));
    qmp.wait_status(&[MigrationStatus::PreSwitchover]);
    qmp.run("migrate-continue", json!({"state": "pre-switchover"}));
    let info = qmp.wait_status(&OVER);
    assert_eq!(info.status, Some(MigrationStatus::Completed), "{info:?}");
    let mut start = [0; 20];
    to.nbd("root").read(0, &mut start).unwrap();
    assert_eq!(&start, b"the source serves on");
    assert_eq!(
        qmp.run("query-jobs", json!({})).as_array().unwrap().len(),
        2
    );
}

#[test]
fn parameters_are_kept_and_bounded() {
    let host = Host::new();
    host.make("root", &[0; 4096]);
    let daemon = host.start(&["root"], &Settings::default());
    let mut qmp = daemon.qmp();
    let before = qmp.run("query-migrate-parameters", json!({}));
    let defaults = json!({
        "max-bandwidth": 0, "downtime-limit": 300, "block-incremental": false,
        "announce-initial": 50, "announce-max": 550, "announce-rounds": 5, "announce-step": 100,
    });
    assert_eq!(before, defaults);
    let longest = json!({
        "downtime-limit": 2_000_000, "max-bandwidth": 1000, "block-incremental": true,
        "announce-initial": 100_000, "announce-max": 100_000, "announce-rounds": 1000,
        "announce-step": 10_000,
    });
    qmp.run("migrate-set-parameters", longest.clone());
    assert_eq!(qmp.run("query-migrate-parameters", json!({})), longest);
    let announce =
        |name, max| format!("Parameter 'announce_{name}' expects a value between 0 and {max}");
    for (wrong, why) in [
        (
            json!({"downtime-limit": 2_000_001}),
            "in the range of 0 to 2000000".to_owned(),
        ),
        (
            json!({"announce-initial": 100_001}),
            announce("initial", 100_000),
        ),
        (json!({"announce-max": 100_001}), announce("max", 100_000)),
        (json!({"announce-rounds": 1001}), announce("rounds", 1000)),
        (json!({"announce-step": 10_001}), announce("step", 10_000)),
        (json!({"announce-step": 0}), announce("step", 10_000)),
        // All or nothing.
        (
            json!({"max-bandwidth": 7, "block-incremental": false, "announce-step": 1, "announce-max": 100_001}),
            announce("max", 100_000),
        ),
    ] {
        let error = qmp.refused("migrate-set-parameters", wrong);
        assert!(error.contains(&why), "{error}");
        assert_eq!(qmp.run("query-migrate-parameters", json!({})), longest);
    }
    let least = json!({
        "announce-initial": 0, "announce-max": 0, "announce-rounds": 0, "announce-step": 1,
        "downtime-limit": 0, "max-bandwidth": 0, "block-incremental": false,
    });
    qmp.run("migrate-set-parameters", least.clone());
    assert_eq!(qmp.run("query-migrate-parameters", json!({})), least);

    let capabilities = json!({"capabilities": [
        {"capability": "zero-blocks", "state": false},
        {"capability": "events", "state": false},
    ]});
    qmp.run("migrate-set-capabilities", capabilities);
    for capability in qmp
        .run("query-migrate-capabilities", json!({}))
        .as_array()
        .unwrap()
    {
        let on = ["return-path", "block"].contains(&capability["capability"].as_str().unwrap());
        assert_eq!(capability["state"], on, "{capability}");
    }
    let block = |state: bool| {
        json!({"capabilities": [
            {"capability": "zero-blocks", "state": true},
            {"capability": "block", "state": state},
        ]})
    };
    let error = qmp.refused("migrate-set-capabilities", block(false));
    assert!(error.contains("'block' cannot be off"), "{error}");
    let now = qmp.run("query-migrate-capabilities", json!({}));
    let zero_blocks = json!({"capability": "zero-blocks", "state": false});
    assert!(now.as_array().unwrap().contains(&zero_blocks), "{now}");
    qmp.run("migrate-set-capabilities", block(true));
}

#[test]
fn a_check_finds_a_record_that_cannot_be_written() {
    let host = Host::new();
    host.make("root", &random(9, MIB));
    let daemon = host.start(&["root"], &Settings::default());
    let mut qmp = daemon.qmp();
    let check = json!({"uri": "unix:/nowhere/at/all", "x-check": true});
    let folder = host.dir.path();
    let aside = folder.with_extension("aside");
    std::fs::rename(folder, &aside).unwrap();
    let error = qmp.refused("migrate", check.clone());
    std::fs::rename(&aside, folder).unwrap();
    assert!(error.contains("that cannot be written"), "{error}");
    let names = || std::fs::read_dir(folder).unwrap().count();
    let before = names();
    qmp.run("migrate", check);
    assert_eq!(names(), before, "a check left something behind");
}

#[test]
fn what_cannot_be_migrated_is_refused_by_name_before_anything_is_sent() {
    let host = Host::new();
    host.make("root", &random(9, MIB));
    let daemon = host.start(&["root"], &Settings::default());
    let mut qmp = daemon.qmp();
    let somewhere = "unix:/nowhere/at/all";
    for (arguments, expected) in [
        (
            json!({"uri": somewhere, "x-disks": ["rot"]}),
            "Device 'rot' not found",
        ),
        (
            json!({"uri": somewhere, "x-disks": ["root", "root"]}),
            "named twice",
        ),
        (json!({"uri": somewhere, "x-disks": []}), "no writable disk"),
        (json!({"uri": somewhere, "blk": false}), "'blk'"),
        (json!({"uri": "exec:cat"}), "getfd"),
        (json!({"uri": "fd:7"}), "'7' not found"),
        (json!({"uri": "udp:x:1"}), "transport is unknown"),
        (json!({"uri": "file:/x", "x-check": true}), "one-way"),
    ] {
        let error = qmp.refused("migrate", arguments);
        assert!(error.contains(expected), "{error}");
    }
    qmp.run("migrate", json!({"uri": somewhere, "x-check": true}));
    qmp.run(
        "migrate",
        json!({"uri": "file:/x", "x-check": true, "x-one-way": true}),
    );
    assert_eq!(
        qmp.info().status,
        Some(MigrationStatus::None),
        "nothing was started"
    );

    qmp.run("migrate", json!({"uri": somewhere}));
    let info = qmp.wait_status(&OVER);
    assert_eq!(info.status, Some(MigrationStatus::Failed));
    assert!(info.error_desc.unwrap().contains("/nowhere/at/all"));
    daemon.nbd("root").write(0, b"served on", false).unwrap();
}

#[test]
fn a_descriptor_that_was_handed_in_carries_a_one_way_migration() {
    use std::os::fd::AsFd;
    let host = Host::new();
    host.make("root", &random(10, 2 * MIB));
    let daemon = host.start(&["root"], &Settings::default());
    let mut qmp = daemon.qmp();
    let stream = host.dir.path().join("stream");
    let file = std::fs::File::create(&stream).unwrap();
    qmp.0.getfd("out", file.as_fd()).unwrap();
    // A file cannot answer.
    qmp.run("migrate", json!({"uri": "fd:out"}));
    let info = qmp.wait_status(&OVER);
    assert_eq!(info.status, Some(MigrationStatus::Failed));
    assert!(info.error_desc.unwrap().contains("one-way"));

    qmp.0.getfd("out", file.as_fd()).unwrap();
    qmp.run("migrate", json!({"uri": "fd:out", "x-one-way": true}));
    let info = qmp.wait_status(&OVER);
    assert_eq!(info.status, Some(MigrationStatus::Completed), "{info:?}");
    assert_eq!(info.x_durable, None, "nobody confirms");
    assert!(std::fs::metadata(&stream).unwrap().len() > 2 * MIB);
}

#[test]
fn stop_holds_writes_until_cont() {
    let host = Host::new();
    host.make("root", &random(11, MIB));
    let daemon = host.start(&["root"], &Settings::default());
    let mut qmp = daemon.qmp();
    qmp.run("stop", json!({}));
    qmp.run("stop", json!({}));
    let status = qmp.run("query-status", json!({}));
    assert_eq!(status, json!({"running": false, "status": "paused"}));
    assert!(
        qmp.refused("migrate", json!({"uri": "unix:/x"}))
            .contains("`cont`")
    );
    let mut nbd = daemon.nbd("root");
    nbd.read(0, &mut [0; 512]).unwrap();
    let write = std::thread::spawn(move || nbd.write(0, b"held", false));
    qmp.run("cont", json!({}));
    write.join().unwrap().unwrap();
    qmp.run("cont", json!({}));
    let events = qmp.events_until(|event| event.name == "RESUME");
    assert_eq!(events, ["STOP", "RESUME"]);
}

/// A daemon that starts with a record that says `leaving` holds its disk until somebody decides.
#[test]
fn an_undecided_disk_is_held_across_a_restart() {
    for decision in ["cont", "serve", "give-up"] {
        let host = Host::new();
        host.make("root", &random(12, MIB));
        host.record("root")
            .write(Residence::Leaving, "tcp:there:1")
            .unwrap();
        let daemon = host.start(&["root"], &Settings::default());
        let mut qmp = daemon.qmp();
        let info = qmp.info();
        assert_eq!(info.x_hand_over, Some(HandOver::Undecided));
        assert!(info.error_desc.unwrap().contains("tcp:there:1"));
        let held = qmp.blocks()[0].inserted.clone().unwrap().x_hold;
        assert_eq!(held.map(HoldLevel::as_str), Some("everything"));
        for command in ["stop", "migrate"] {
            let arguments = match command {
                "migrate" => json!({"uri": "unix:/x"}),
                _ => json!({}),
            };
            let error = qmp.refused(command, arguments);
            assert!(error.contains("x-resolve"), "{error}");
        }
        match decision {
            "cont" => qmp.run("cont", json!({})),
            _ => qmp.run("x-resolve", json!({"decision": decision})),
        };
        let error = qmp.refused("x-resolve", json!({"decision": "serve"}));
        assert!(error.contains("not undecided"), "{error}");
        if decision == "give-up" {
            assert!(daemon.try_nbd("root").is_err());
            assert_eq!(host.residence("root"), Some(Residence::Moved));
            assert!(qmp.refused("cont", json!({})).contains("moved away"));
        } else {
            daemon.nbd("root").write(0, b"live", false).unwrap();
            assert_eq!(qmp.events_until(|_| true), ["RESUME"]);
        }
    }
}

#[test]
fn a_disk_that_is_taken_back_is_written_down_as_arrived_before_it_is_served() {
    let host = Host::new();
    host.make("root", &random(13, MIB));
    host.record("root")
        .write(Residence::Moved, "tcp:there:1")
        .unwrap();
    let settings = Settings {
        take_back: true,
        ..Settings::default()
    };
    let daemon = host.start(&["root"], &settings);
    assert_eq!(host.residence("root"), Some(Residence::Arrived));
    daemon.nbd("root").write(0, b"live", false).unwrap();
    drop(daemon);
    // The same command line goes on, until the disk has left once more.
    drop(host.start(&["root"], &settings));
    host.record("root")
        .write(Residence::Moved, "tcp:there:1")
        .unwrap();
    let error = host.try_start(&["root"], &settings).map(drop).unwrap_err();
    assert!(error.contains("was taken back before"), "{error}");
}

#[test]
fn a_live_disk_against_its_record_is_not_served() {
    let host = Host::new();
    host.make("root", &random(14, MIB));
    host.record("root")
        .write(Residence::Moved, "tcp:there:1")
        .unwrap();
    let device = vmferry_disk::RawDisk::open(
        host.image("root"),
        vmferry_disk::OpenOptions {
            read_only: false,
            lock: true,
        },
    );
    let disk = Disk {
        node: Node::new("root", Box::new(device.unwrap()), Hold::Nothing),
        record: Some(host.record("root")),
        start: vmferry_migration::Start::Live,
        peer: String::new(),
        taken_back: false,
        path: host.image("root"),
        format: "raw",
        image: None,
    };
    let error = Daemon::start(Config {
        name: None,
        disks: vec![disk],
        nbd: Vec::new(),
        qmp: Vec::new(),
        incoming: None,
        coverage: Coverage::Whole,
        nics: Vec::new(),
    })
    .unwrap_err();
    assert!(
        error.to_string().contains("is moved by its record"),
        "{error}"
    );
    assert_eq!(host.residence("root"), Some(Residence::Moved));
}

#[test]
fn the_end_cancels_a_running_migration() {
    let (source, destination) = (Host::new(), Host::new());
    source.make("root", &random(14, 4 * MIB));
    destination.make("root", &vec![0; 4 << 20]);
    let from = source.start(&["root"], &Settings::default());
    let settings = Settings {
        incoming: true,
        ..Settings::default()
    };
    let to = destination.start(&["root"], &settings);
    let mut qmp = from.patient_qmp();
    qmp.run(
        "migrate-set-capabilities",
        json!({"capabilities": [{"capability": "pause-before-switchover", "state": true}]}),
    );
    qmp.run("migrate", migrate_to(to.incoming.as_ref().unwrap()));
    qmp.wait_status(&[MigrationStatus::PreSwitchover]);
    from.end().unwrap();
    let events = qmp.events_until(|event| event.name == "SHUTDOWN");
    assert!(
        events.contains(&"MIGRATION cancelled".to_owned()),
        "{events:?}"
    );
    assert_eq!(source.residence("root"), None);
    let info = to.qmp().wait_status(&OVER);
    assert_eq!(info.status, Some(MigrationStatus::Failed));
    // The destination ends in order, too, while it waits.
    to.end().unwrap();
    assert_eq!(destination.residence("root"), Some(Residence::Incoming));
}

#[test]
fn two_disks_of_a_name_are_refused() {
    let disk = |name: &str| Disk {
        node: Node::new(name, Box::new(MemoryDisk::new(MIB)), Hold::Nothing),
        record: None,
        start: Start::Live,
        peer: String::new(),
        taken_back: false,
        path: "x".into(),
        format: "raw",
        image: None,
    };
    let config = Config {
        name: None,
        disks: vec![disk("a"), disk("b"), disk("a")],
        nbd: Vec::new(),
        qmp: Vec::new(),
        incoming: None,
        coverage: Coverage::Whole,
        nics: Vec::new(),
    };
    let error = Daemon::start(config).unwrap_err().to_string();
    assert!(error.contains("'a'"), "{error}");
}

/// What comes incrementally is refused where nobody said that it may; disks without bases come whole
/// all the same.
#[test]
fn an_incremental_migration_needs_leave_on_both_sides() {
    let (source, destination) = (Host::new(), Host::new());
    let content = random(31, 3 * MIB);
    source.make("root", &content);
    destination.make("root", &vec![0; content.len()]);
    let settings = Settings {
        incoming: true,
        ..Settings::default()
    };
    let from = source.start(&["root"], &Settings::default());
    let to = destination.start(&["root"], &settings);
    let (mut here, mut there) = (from.patient_qmp(), to.qmp());
    let uri = to.incoming.clone().unwrap().to_string();
    here.run("migrate", json!({"uri": uri, "inc": true}));
    let info = there.wait_status(&[MigrationStatus::Failed]);
    let why = info.error_desc.unwrap_or_default();
    assert!(
        why.contains("only what lies in its disks' top layers"),
        "{why}"
    );
    let info = here.wait_status(&OVER);
    assert_eq!(info.status, Some(MigrationStatus::Failed), "{info:?}");

    there.run("migrate-set-parameters", json!({"block-incremental": true}));
    here.run("migrate-set-parameters", json!({"block-incremental": true}));
    here.run("migrate", json!({"uri": uri}));
    let info = here.wait_status(&OVER);
    assert_eq!(info.status, Some(MigrationStatus::Completed), "{info:?}");
    let mut now = vec![0; content.len()];
    to.nbd("root").read(0, &mut now).unwrap();
    assert!(now == content);
}
