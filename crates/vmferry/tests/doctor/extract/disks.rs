//! A disk that a QEMU 7.2 sent.

use serde_json::json;

use super::{extracted, pipe_into, utf8};
use crate::need;
use crate::peers::disk::{assert_same, data_bytes, sparse};
use crate::peers::qemu::{EVERY_BLOCK, Machine, Version};
use crate::peers::seeded;

const MIB: u64 = 1 << 20;

#[test]
fn a_disk_comes_out_as_it_went_in() {
    let machine = need!(Machine::new(Version::V7_2));
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (from, other) = (dir.path().join("from"), dir.path().join("other"));
    let size = 96 * MIB + 5 * 512;
    let data = [(0, MIB), (40 * MIB, 8 * MIB), (96 * MIB, 5 * 512)];
    sparse(&from, size, &data, &mut seeded());
    sparse(&other, 8 * MIB, &[(0, MIB)], &mut seeded());
    let machine = machine.args(["-S"]).disk("disk0", &from);
    let mut qemu = machine.disk("disk1", &other).start();
    qemu.limits(EVERY_BLOCK);
    let stream = dir.path().join("stream");
    let capabilities = json!({"capabilities": [{"capability": "zero-blocks", "state": true}]});
    qemu.qmp.execute("migrate-set-capabilities", &capabilities);
    qemu.migrate_with_disks(&pipe_into(&stream));
    qemu.migrated();

    let image = dir.path().join("image");
    let length = size.to_string();
    let args = [
        "disk",
        utf8(&stream),
        "disk0",
        "-o",
        utf8(&image),
        "--size",
        &length,
    ];
    let report = extracted(&args);
    assert_eq!(report["absent-bytes"], 0, "{report}");
    assert_same(&from, &image);
    assert!(data_bytes(&image) <= 11 * MIB);
    let image = dir.path().join("image1");
    extracted(&["disk", utf8(&stream), "disk1", "-o", utf8(&image)]);
    assert_same(&other, &image);
}
