//! Many machines out of one image at the same time.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::checker::Checker;
use crate::host::Host;
use crate::need;
use crate::peers::long;
use crate::peers::qemu::Version;
use crate::peers::vmferry::{PROGRAM, Vmferry};
use crate::ways::{Park, Restore, postcopy};

/// Runs `vmferry` where this folder is mounted read-only; `None` if that cannot be had here.
fn where_read_only(folder: &Path, words: &[OsString]) -> Option<Vmferry> {
    let unshare = |words: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--map-root-user", "sh", "-c"]);
        command.args(words).stdin(Stdio::null());
        command
    };
    let mount = r#"mount --bind -o ro "$0" "$0" && ! touch "$0/x" 2>/dev/null"#;
    let folder = folder.to_str().expect("test paths are UTF-8");
    let worked = unshare(&[mount, folder]).stderr(Stdio::null()).status();
    if !worked.is_ok_and(|status| status.success()) {
        println!("left out: a folder that is read-only (needs unshare --mount --map-root-user)");
        return None;
    }
    let run = format!("{mount} && exec {PROGRAM} \"$@\"");
    let mut command = unshare(&[&run, folder]);
    command.args(words);
    Some(Vmferry::spawn(command))
}

/// Each runs on from the same moment, however it was restored; the image is as it was, and nothing is left beside it.
#[test]
fn many_machines_come_out_of_one_image_at_the_same_time() {
    need!(postcopy());
    let dir = tempfile::tempdir().expect("a temporary folder");
    let image = dir.path().join("image");
    let mut checker = Checker::new();
    let mut source = Host::running(need!(checker.host(Version::V10_0)));
    checker.goes_on(2);
    Park::Migrate.park(&mut source, &image);
    drop(source);
    let parked = fs::read(&image).expect("it is there");
    // Others find the image without its index, where none can be written.
    let bare = dir.path().join("bare");
    fs::create_dir(&bare).expect("a folder");
    fs::write(bare.join("image"), &parked).expect("room for a copy");

    let count = if long() { 100 } else { 20 };
    let mut hosts = Vec::new();
    for number in 0..count {
        let to = [Version::V10_0, Version::V7_2][number % 2];
        let mut branch = checker.clone();
        let host = Host::waiting(need!(branch.host(to)));
        hosts.push((branch, host));
    }
    let mut sends = Vec::new();
    for (number, (_, host)) in hosts.iter_mut().enumerate() {
        let restore = Restore::ALL[number / 2 % Restore::ALL.len()];
        let send = match number % 5 {
            4 => {
                let words = restore.words(&bare.join("image"), host);
                need!(where_read_only(&bare, &words))
            }
            3 => {
                let words = restore.words(&image, host);
                need!(where_read_only(dir.path(), &words))
            }
            _ => restore.start(&image, host, &[]),
        };
        sends.push(send);
    }
    for send in &mut sends {
        send.event("completed");
        send.succeeds();
    }
    for (branch, mut host) in hosts {
        host.qemu.migrated();
        host.qemu.wait_run_state("running");
        branch.goes_on(2);
    }
    assert!(fs::read(&image).expect("it is there") == parked);
    let left = fs::read_dir(&bare).expect("the folder is there").count();
    assert_eq!(left, 1, "only the image is there");
}

/// Several that find no index build it at the same time, and one of them stays.
#[test]
fn many_find_an_image_without_an_index() {
    need!(postcopy());
    let dir = tempfile::tempdir().expect("a temporary folder");
    let image = dir.path().join("image");
    let mut checker = Checker::new();
    let mut source = Host::running(need!(checker.host(Version::V10_0)));
    checker.goes_on(2);
    Park::Migrate.park(&mut source, &image);
    drop(source);
    let names = |folder: &Path| {
        let entries = fs::read_dir(folder).expect("the folder is there");
        let mut names: Vec<_> = entries
            .map(|entry| entry.expect("an entry").file_name())
            .collect();
        names.sort();
        names
    };
    let before = names(dir.path());
    assert_eq!(before, ["image", "image.index"]);
    let path = dir.path().join("image.index");
    let whole = fs::read(&path).expect("it is there");
    // One that is cut, one that is empty, and what is not an index: nobody writes over that.
    for found in [&whole[..whole.len() / 2], b"", b"something else"] {
        fs::write(&path, found).expect("room");
        let mut hosts = Vec::new();
        for _ in 0..4 {
            let mut branch = checker.clone();
            let mut host = Host::waiting(need!(branch.host(Version::V10_0)));
            let send = Restore::POSTCOPY.start(&image, &mut host, &[]);
            hosts.push((branch, host, send));
        }
        for (branch, mut host, mut send) in hosts {
            send.event("completed");
            send.succeeds();
            host.qemu.migrated();
            branch.goes_on(1);
        }
        assert_eq!(names(dir.path()), before);
        let index = fs::read(&path).expect("it is there");
        match found {
            b"something else" => assert_eq!(index, found),
            _ => assert_eq!(index.len(), whole.len(), "it was not built again"),
        }
    }
}

/// An index that was put elsewhere is found there; the folder of the image needs nothing but the image.
#[test]
fn an_index_may_be_elsewhere() {
    need!(postcopy());
    let [images, indexes] = [(), ()].map(|()| tempfile::tempdir().expect("a temporary folder"));
    let image = images.path().join("image");
    let index = indexes.path().join("index").display().to_string();
    let mut checker = Checker::new();
    let mut source = Host::running(need!(checker.host(Version::V10_0)));
    checker.goes_on(2);
    Park::Migrate.park_with(&mut source, &image, &["--index", &index]);
    drop(source);
    let built = fs::read(&index).expect("it is there");
    for to in [Version::V7_2, Version::V10_0] {
        let mut branch = checker.clone();
        let mut host = Host::waiting(need!(branch.host(to)));
        let words = Restore::POSTCOPY.words(&image, &mut host);
        let words = words
            .into_iter()
            .chain(["--index", &index].map(OsString::from));
        let words: Vec<OsString> = words.collect();
        let mut send = need!(where_read_only(images.path(), &words));
        send.event("completed");
        send.succeeds();
        host.qemu.migrated();
        branch.goes_on(2);
        assert!(fs::read(&index).expect("it is there") == built);
    }
    let left = fs::read_dir(images.path()).expect("the folder is there");
    assert_eq!(left.count(), 1, "only the image is there");
}
