//! `send` is killed while a guest runs whose memory it has.

use std::ffi::OsString;
use std::path::Path;
use std::thread;
use std::time::Duration;

use rustix::process::Signal;

use crate::checker::Checker;
use crate::host::Host;
use crate::need;
use crate::peers::qemu::Version;
use crate::peers::vmferry::Vmferry;
use crate::peers::{long, seeded, until};
use crate::ways::{Park, Restore, postcopy, slow_link};

/// Kills `send` at a random moment after the guest has begun to run; false if it had ended before.
fn kill(send: &mut Vmferry, host: &mut Host, rng: &mut fastrand::Rng) -> bool {
    host.qemu.wait_run_state("running");
    thread::sleep(Duration::from_millis(rng.u64(..900)));
    send.signal(Signal::KILL);
    !send.wait().success()
}

/// Takes the guest up again: the operator has told the destination where to wait, which is slow to reach, or `vmferry`
/// does.
fn resume(image: &Path, host: &mut Host, number: usize, vm: bool) -> Vmferry {
    let words = ["send", "--postcopy", "--resume"].map(OsString::from);
    let mut words: Vec<OsString> = words.into_iter().chain([image.into()]).collect();
    if vm {
        words.extend(["--vm".into(), host.vm().into()]);
        return Vmferry::start(words);
    }
    let socket = format!("again-{number}");
    let uri = format!("unix:{}", host.qemu.path(&socket).display());
    assert!(host.out_of_band().recover(&uri), "{}", host.qemu.errors());
    let (slow, accept) = slow_link(host, &socket);
    words.push(slow.into());
    let send = Vmferry::start(words);
    accept();
    send
}

/// Killed once or more often, at random moments, another `send` takes the guest up again, and every page is right.
#[test]
fn a_guest_goes_on_when_its_send_was_killed() {
    need!(postcopy());
    let mut rng = seeded();
    let dir = tempfile::tempdir().expect("a temporary folder");
    let image = dir.path().join("image");
    let mut checker = Checker::new();
    let mut source = Host::running(need!(checker.host(Version::V10_0)));
    checker.goes_on(2);
    Park::Migrate.park(&mut source, &image);
    drop(source);
    let parked = std::fs::read(&image).expect("it is there");
    let (rounds, mut kills) = (if long() { 50 } else { 3 }, 0);
    for round in 0..rounds {
        let to = [Version::V10_0, Version::V7_2][round % 2];
        let vm = round % 3 != 1;
        let mut branch = checker.clone();
        let mut host = Host::waiting(need!(branch.host(to)));
        let (mut send, _) = Restore::POSTCOPY.start_slowly(&image, &mut host, &[]);
        let most = rng.usize(1..4);
        println!("round {round}: {to:?}, at last --vm {vm}, {most} kills");
        for number in 1..=most {
            if !kill(&mut send, &mut host, &mut rng) {
                break;
            }
            kills += 1;
            send = resume(&image, &mut host, number, vm && number == most);
            if number < most {
                // A QEMU may not survive a break inside the handshake.
                until("the guest to be taken up again", || {
                    let answer = host.migration();
                    let status = answer["status"].as_str().unwrap_or_default();
                    ["postcopy-active", "completed"]
                        .contains(&status)
                        .then_some(())
                });
            }
        }
        for number in most + 1.. {
            let status = send.wait();
            if status.success() {
                break;
            }
            // Seldom a QEMU names the block in what it says on the connection that breaks, and not on the next one.
            let line = send.fails(1);
            println!("again: {line}");
            assert!(
                line.contains("names no RAM block") && number < most + 5,
                "{line}"
            );
            send = resume(&image, &mut host, number, vm);
        }
        host.qemu.migrated();
        host.qemu.wait_run_state("running");
        branch.goes_on(2);
    }
    println!("{kills} kills in {rounds} rounds");
    assert!(kills > 0, "it was never killed in time");
    assert!(
        std::fs::read(&image).expect("it is there") == parked,
        "the image has changed"
    );
}

/// Killed before the guest runs, or while its devices are on their way, it leaves an image that starts elsewhere.
#[test]
fn a_send_killed_early_harms_nothing() {
    need!(postcopy());
    let mut rng = seeded();
    let dir = tempfile::tempdir().expect("a temporary folder");
    let image = dir.path().join("image");
    let mut checker = Checker::new();
    let mut source = Host::running(need!(checker.host(Version::V10_0)));
    checker.goes_on(2);
    Park::Migrate.park(&mut source, &image);
    drop(source);
    for round in 0..if long() { 50 } else { 3 } {
        let to = [Version::V10_0, Version::V7_2][round % 2];
        let restore = Restore::ALL[round % Restore::ALL.len()];
        let mut host = Host::waiting(need!(checker.clone().host(to)));
        let send = restore.start(&image, &mut host, &[]);
        let moment = rng.u64(..60);
        println!("round {round}: {to:?} {restore:?}, killed after {moment} ms");
        thread::sleep(Duration::from_millis(moment));
        drop(send);
        drop(host);
        let mut branch = checker.clone();
        let mut host = Host::waiting(need!(branch.host(to)));
        restore.restore(&image, &mut host);
        host.qemu.wait_run_state("running");
        branch.goes_on(2);
    }
}
