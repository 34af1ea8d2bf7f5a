//! One process: the guest checks itself, stands still when it is stopped, and goes on from a snapshot.

use std::time::{Duration, Instant};

use crate::machine::{Layout, Machine};

fn layout(folder: &tempfile::TempDir, seed: u64) -> Layout {
    let disk = |name: &str, rest: &str| {
        format!(
            "{name}={}/{name}.img,size=2M{rest}",
            folder.path().display()
        )
        .parse()
        .unwrap()
    };
    Layout {
        memory_bytes: 8 << 20,
        tables_bytes: 64 << 10,
        cpus: 2,
        speed: 20_000,
        disk_speed: 1000,
        seed,
        disks: vec![
            disk("first", ",format=qcow2"),
            disk("second", ",format=qcow2"),
        ],
        ..Layout::default()
    }
}

fn seed() -> u64 {
    let given = std::env::var("VMFERRY_SEED")
        .ok()
        .map(|text| text.parse().expect("a number"));
    let seed = given.unwrap_or_else(|| fastrand::u64(..));
    println!("VMFERRY_SEED={seed}");
    seed
}

/// Run until so many steps were done, by all vCPUs together.
fn run_for_steps(machine: &Machine, steps: u64) {
    let target = machine.steps() + steps;
    machine.run();
    let deadline = Instant::now() + Duration::from_secs(120);
    while machine.steps() < target {
        assert!(Instant::now() < deadline, "the guest stands still");
        std::thread::yield_now();
    }
    machine.stop();
}

#[test]
fn nothing_changes_while_it_stands_still() {
    let folder = tempfile::tempdir().unwrap();
    let machine = Machine::new(&layout(&folder, seed())).unwrap();
    let mut last = machine.digests().unwrap();
    for _ in 0..5 {
        run_for_steps(&machine, 3000);
        let digests = machine.digests().unwrap();
        assert_eq!(digests, machine.digests().unwrap());
        assert_ne!(digests, last);
        last = digests;
    }
}

#[test]
fn a_snapshot_brings_everything_back() {
    let folder = tempfile::tempdir().unwrap();
    let machine = Machine::new(&layout(&folder, seed())).unwrap();
    run_for_steps(&machine, 20_000);
    let before = machine.digests().unwrap();
    machine.snapshot_save("a").unwrap();
    assert_eq!(machine.digests().unwrap(), before);
    run_for_steps(&machine, 20_000);
    assert_ne!(machine.digests().unwrap(), before);
    machine.snapshot_load("a").unwrap();
    assert_eq!(machine.digests().unwrap(), before);
    // It checks itself.
    run_for_steps(&machine, 20_000);
    machine.run();
    machine.snapshot_load("a").unwrap();
    assert!(machine.is_running());
    machine.snapshot_save("b").unwrap();
    assert!(machine.snapshot_save("b").is_err());
    machine.stop();
    assert_eq!(machine.snapshots().unwrap().whole.len(), 2);
    machine.snapshot_delete("a").unwrap();
    assert!(machine.snapshot_load("a").is_err());
    machine.snapshot_load("b").unwrap();
    run_for_steps(&machine, 5000);
}
