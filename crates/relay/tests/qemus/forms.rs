//! Parked machines in other forms, loaded by real QEMUs.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use serde_json::json;
use vmferry_image::{FileStorage, Image, IndexPlace, Storage};
use vmferry_relay::convert::{to_mapped_ram, to_stream};

use crate::checker::Checker;
use crate::contents::{assert_same_memory, memory_of};
use crate::journeys::{goes_on, load, with_more};
use crate::need;
use crate::parking::{Way, park};
use crate::peers::qemu::{Machine, Qemu, Version};

fn open(path: &Path) -> Image {
    let storage: Arc<dyn Storage> = Arc::new(FileStorage::open(path, 0).unwrap());
    Image::open(storage, &IndexPlace::Beside, &mut |_| ()).unwrap()
}

fn mapped_ram(qemu: &mut Qemu) {
    let capabilities = json!({"capabilities": [{"capability": "mapped-ram", "state": true}]});
    qemu.qmp.execute("migrate-set-capabilities", &capabilities);
}

/// Load a mapped-ram file; the guest waits.
fn load_mapped(host: Machine, file: &Path) -> Qemu {
    let mut qemu = host.args(["-S", "-incoming", "defer"]).start();
    mapped_ram(&mut qemu);
    let uri = format!("file:{}", file.display());
    qemu.qmp.execute("migrate-incoming", &json!({"uri": uri}));
    qemu.migrated();
    qemu
}

/// What 7.2 parked, 10.0 loads as a mapped-ram file of ours.
#[test]
fn a_mapped_ram_file_of_ours_is_loaded() {
    for from in [Version::V7_2, Version::V10_0] {
        let folder = tempfile::tempdir().unwrap();
        let [file, mapped] = ["parked.vm", "mapped"].map(|name| folder.path().join(name));
        let mut checker = Checker::new();
        let mut source = need!(checker.host(from)).start();
        checker.goes_on(3);
        let (parked, _) = park(&mut source, &file, &Way::precopy(false));
        parked.unwrap();
        source.migrated();
        let memory = memory_of(&mut source);
        drop(source);
        let out = File::create_new(&mapped).unwrap();
        to_mapped_ram(&open(&file), &out, &mut |_| ()).unwrap();
        let mut fresh = load_mapped(need!(checker.host(Version::V10_0)), &mapped);
        assert_same_memory("mapped-ram", &memory, &memory_of(&mut fresh));
        goes_on(&checker, &mut fresh);
    }
}

/// A mapped-ram file of 10.0, as a plain stream, is loaded by 7.2.
#[test]
fn a_mapped_ram_file_goes_to_older_versions() {
    let folder = tempfile::tempdir().unwrap();
    let [mapped, plain] = ["mapped", "plain"].map(|name| folder.path().join(name));
    let mut checker = Checker::new();
    let mut source = need!(checker.host(Version::V10_0)).start();
    checker.goes_on(3);
    mapped_ram(&mut source);
    source.limits((1 << 40, 300));
    let uri = format!("file:{}", mapped.display());
    source.qmp.execute("migrate", &json!({"uri": uri}));
    source.migrated();
    let memory = memory_of(&mut source);
    drop(source);
    let image = open(&mapped);
    assert!(image.is_mapped());
    to_stream(&image, &mut File::create_new(&plain).unwrap(), &mut |_| ()).unwrap();
    for to in [Version::V7_2, Version::V10_0] {
        let mut twin = checker.clone();
        let mut fresh = load(need!(twin.host(to)), &plain);
        assert_same_memory("plain", &memory, &memory_of(&mut fresh));
        goes_on(&twin, &mut fresh);
    }
}

/// A device that comes before all memory does so in every form.
#[test]
fn memory_that_is_not_plugged_in_goes_into_every_form() {
    let folder = tempfile::tempdir().unwrap();
    let [file, plain, mapped] = ["parked.vm", "plain", "mapped"].map(|it| folder.path().join(it));
    let mut checker = Checker::on("pc-i440fx-10.0");
    let mut source = with_more(need!(checker.host(Version::V10_0))).start();
    checker.goes_on(3);
    park(&mut source, &file, &Way::precopy(true)).0.unwrap();
    source.migrated();
    let memory = memory_of(&mut source);
    drop(source);
    let image = open(&file);
    assert!(image.head().early_devices > 0);
    to_stream(&image, &mut File::create_new(&plain).unwrap(), &mut |_| ()).unwrap();
    to_mapped_ram(&image, &File::create_new(&mapped).unwrap(), &mut |_| ()).unwrap();
    for (path, load) in [(&plain, load as fn(_, &_) -> _), (&mapped, load_mapped)] {
        let mut twin = checker.clone();
        let mut fresh = load(with_more(need!(twin.host(Version::V10_0))), path.as_path());
        assert_same_memory("converted", &memory, &memory_of(&mut fresh));
        goes_on(&twin, &mut fresh);
    }
}
