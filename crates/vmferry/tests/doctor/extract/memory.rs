//! Guest memory, byte for byte what QEMU's own dump of it is.

use serde_json::json;

use super::{extracted, linux, memory_of, migrate_into, pipe_into, utf8};
use crate::need;
use crate::peers::disk::assert_same;
use crate::peers::qemu::{Qemu, Version};
use crate::peers::until;

fn capability(qemu: &mut Qemu, name: &str) {
    let capabilities = json!([{"capability": name, "state": true}]);
    let capabilities = json!({"capabilities": capabilities});
    qemu.qmp.execute("migrate-set-capabilities", &capabilities);
}

/// 7.2 under TCG may lose writes of a guest that runs ("RAM" wire notes, §5): this one is stopped.
#[test]
fn a_stopped_guests_memory_is_what_qemu_7_2_says() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (_guest, mut qemu) = need!(linux(Version::V7_2, dir.path(), false, &[]));
    qemu.qmp.execute("stop", &json!({}));
    let (stream, image) = (dir.path().join("stream"), dir.path().join("image"));
    migrate_into(&mut qemu, &pipe_into(&stream));
    extracted(&["ram", utf8(&stream), "pc.ram", "-o", utf8(&image)]);
    assert_same(&image, &memory_of(&mut qemu));
}

#[test]
fn a_running_guests_memory_is_what_qemu_10_0_says_after_many_changes() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (_guest, mut qemu) = need!(linux(Version::V10_0, dir.path(), true, &[]));
    capability(&mut qemu, "xbzrle");
    let cache = json!({"xbzrle-cache-size": 256 << 20});
    qemu.qmp.execute("migrate-set-parameters", &cache);
    // It cannot finish before the guest has changed pages that were sent, and these were sent.
    qemu.limits((64 << 20, 1));
    let (stream, image) = (dir.path().join("stream"), dir.path().join("image"));
    let uri = pipe_into(&stream);
    qemu.qmp.execute("migrate", &json!({"uri": uri}));
    until("pages to be sent as changes", || {
        let answer = qemu.qmp.execute("query-migrate", &json!({}));
        let pages = answer["xbzrle-cache"]["pages"].as_u64();
        pages.filter(|pages| *pages > 0)
    });
    qemu.limits((1 << 30, 2000));
    qemu.migrated();
    let report = extracted(&["ram", utf8(&stream), "pc.ram", "-o", utf8(&image)]);
    assert_eq!(report["blocks"][0]["absent-bytes"], 0, "{report}");
    assert_same(&image, &memory_of(&mut qemu));
}

#[test]
fn a_mapped_ram_file_of_a_running_guest_holds_its_memory() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (_guest, mut qemu) = need!(linux(Version::V10_0, dir.path(), true, &[]));
    capability(&mut qemu, "mapped-ram");
    let (stream, image) = (dir.path().join("stream"), dir.path().join("image"));
    migrate_into(&mut qemu, &format!("file:{}", stream.display()));
    extracted(&["ram", utf8(&stream), "pc.ram", "-o", utf8(&image)]);
    assert_same(&image, &memory_of(&mut qemu));
}
