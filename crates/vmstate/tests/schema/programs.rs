//! The whole of what real programs write. Needs `VMFERRY_QEMU72` and `VMFERRY_QEMU10`, which
//! `scripts/peers` prints; without them the tests say so and pass, unless `VMFERRY_REQUIRE_PEERS=1`.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use vmferry_vmstate::schema::{Comparison, DeviceComparison, Presence, Schema, Verdict, compare};

fn program(variable: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable).map(PathBuf::from);
    let found = path.filter(|path| path.exists());
    let required = std::env::var("VMFERRY_REQUIRE_PEERS").as_deref() == Ok("1");
    assert!(found.is_some() || !required, "{variable} is required");
    if found.is_none() {
        println!("left out: needs {variable} (scripts/peers)");
    }
    found
}

/// What it dumps for a machine type.
fn dumped(variable: &str, machine: &str) -> Option<String> {
    let folder = tempfile();
    let file = folder.join("schema.json");
    let output = Command::new(program(variable)?)
        .args([
            "-M",
            machine,
            "-accel",
            "tcg",
            "-nodefaults",
            "-nic",
            "none",
        ])
        .args(["-display", "none", "-dump-vmstate"])
        .arg(&file)
        .stdin(Stdio::null())
        .output()
        .expect("it can be run");
    let text = std::fs::read_to_string(&file);
    std::fs::remove_dir_all(&folder).expect("the folder can be removed");
    Some(text.unwrap_or_else(|error| panic!("{error}: {output:?}")))
}

/// A folder of its own.
fn tempfile() -> PathBuf {
    let name = format!(
        "vmferry-schema-{}-{}",
        std::process::id(),
        fastrand::u64(..)
    );
    let folder = std::env::temp_dir().join(name);
    std::fs::create_dir(&folder).expect("a new folder");
    folder
}

fn named(comparison: &Comparison, presence: Presence, verdict: Verdict) -> Vec<&str> {
    let mut names: Vec<_> = comparison
        .devices
        .iter()
        .filter(|device| device.presence == presence && device.verdict() == verdict)
        .map(|device| &*device.name)
        .collect();
    names.sort_unstable();
    names
}

#[test]
fn a_whole_dump_is_written_again_to_the_last_byte_and_equals_itself() {
    for variable in ["VMFERRY_QEMU72", "VMFERRY_QEMU10"] {
        for machine in ["pc-i440fx-7.2", "pc-q35-7.2", "microvm", "none"] {
            let Some(text) = dumped(variable, machine) else {
                continue;
            };
            let schema = Schema::parse(text.as_bytes()).expect("it is a schema");
            assert!(schema.to_string() == text, "{variable} {machine}");
            assert_eq!(schema.machine, machine);
            let compared = compare(&schema, &schema);
            assert!(!compared.devices.iter().any(DeviceComparison::differs));
            assert!(schema.devices.len() > 200);
        }
    }
}

/// Both programs load each other's streams of these machine types. What does not fit was tried out:
/// see `two_real_programs_are_told_apart`.
#[test]
fn nothing_but_what_is_known_keeps_two_programs_apart() {
    for machine in ["pc-i440fx-7.2", "pc-q35-7.2"] {
        let old = dumped("VMFERRY_QEMU72", machine);
        let new = dumped("VMFERRY_QEMU10", machine);
        let (Some(old), Some(new)) = (old, new) else {
            return;
        };
        let old = Schema::parse(old.as_bytes()).expect("it is a schema");
        let new = Schema::parse(new.as_bytes()).expect("it is a schema");
        let compared = compare(&old, &new);
        assert_eq!(
            named(&compared, Presence::Both, Verdict::No),
            ["am53c974", "dc390", "sysbus-esp", "vhost-user-fs-device"]
        );
        assert_eq!(
            named(&compared, Presence::Both, Verdict::Depends),
            [
                "acpi-ged",
                "e1000e",
                "isa-i8259",
                "kvm-i8259",
                "pic-common",
                "sd-card",
                "virtio-gpu-device",
            ]
        );
    }
}
