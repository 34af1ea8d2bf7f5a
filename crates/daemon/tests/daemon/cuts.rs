//! Connections that break, anywhere: whatever happens, a disk lives on exactly one side, or is held.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread::JoinHandle;

use serde_json::json;
use vmferry_channel::Uri;
use vmferry_migration::Residence;
use vmferry_qmp::types::{HandOver, MigrationInfo, MigrationStatus};

use crate::host::{Host, MIB, Qmp, Running, Settings, migrate_to, random};

/// What a link does to a migration.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// Both directions end after so many bytes towards the destination.
    Cut(u64),
    /// Answers after the barrier's PONG are swallowed; the connection ends when the destination
    /// ends it.
    LoseShut,
    /// Nothing.
    None,
}

/// A link to `target` that is used once. Answers how many bytes went towards the destination.
fn link(target: &Uri, fault: Fault) -> (Uri, JoinHandle<u64>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let target = target.to_string().trim_start_matches("tcp:").to_owned();
    let thread = std::thread::spawn(move || {
        let (source, _) = listener.accept().unwrap();
        let destination = TcpStream::connect(target).unwrap();
        let back = {
            let (source, destination) = (
                source.try_clone().unwrap(),
                destination.try_clone().unwrap(),
            );
            std::thread::spawn(move || carry_back(destination, source, fault))
        };
        let count = carry_forth(&source, &destination, fault);
        back.join().unwrap();
        count
    });
    let uri = format!("tcp:127.0.0.1:{port}").parse().unwrap();
    (uri, thread)
}

fn carry_forth(mut from: &TcpStream, mut to: &TcpStream, fault: Fault) -> u64 {
    let limit = match fault {
        Fault::Cut(limit) => limit,
        Fault::LoseShut | Fault::None => u64::MAX,
    };
    let mut buf = vec![0; 64 << 10];
    let mut count = 0;
    while count < limit {
        let room = usize::try_from(limit - count).unwrap_or(usize::MAX);
        let room = room.min(buf.len());
        let length = match from.read(&mut buf[..room]) {
            Ok(0) | Err(_) => break,
            Ok(length) => length,
        };
        if to.write_all(&buf[..length]).is_err() {
            break;
        }
        count += length as u64;
    }
    if count == limit {
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    } else {
        let _ = to.shutdown(Shutdown::Write);
    }
    count
}

/// Answers are a type, a length and that many bytes.
fn carry_back(mut from: TcpStream, mut to: TcpStream, fault: Fault) {
    let mut swallow = false;
    let mut header = [0; 4];
    while from.read_exact(&mut header).is_ok() {
        let length = u16::from_be_bytes([header[2], header[3]]);
        let mut body = vec![0; usize::from(length)];
        if from.read_exact(&mut body).is_err() {
            break;
        }
        if !swallow && to.write_all(&[&header[..], &body].concat()).is_err() {
            break;
        }
        swallow |= matches!(fault, Fault::LoseShut) && body == [0xff; 4];
    }
    let _ = to.shutdown(Shutdown::Both);
}

struct Pair {
    source: Host,
    destination: Host,
    from: Running,
    to: Running,
}

const LENGTH: u64 = 2 * MIB + 512;

impl Pair {
    fn start(seed: u64) -> Self {
        let (source, destination) = (Host::new(), Host::new());
        source.make("root", &random(seed, LENGTH));
        destination.make("root", &random(seed + 1, LENGTH));
        let from = source.start(&["root"], &Settings::default());
        let settings = Settings {
            incoming: true,
            ..Settings::default()
        };
        let to = destination.start(&["root"], &settings);
        Self {
            source,
            destination,
            from,
            to,
        }
    }

    /// Migrate through a link; both sides' ends, and the bytes that went through.
    fn migrate(&self, fault: Fault) -> (MigrationInfo, u64) {
        let (uri, link) = link(self.to.incoming.as_ref().unwrap(), fault);
        let mut qmp = self.from.patient_qmp();
        qmp.run("migrate", migrate_to(&uri));
        let info = wait_end(&mut qmp);
        (info, link.join().unwrap())
    }

    fn is_live(&self, side: &Running) -> bool {
        let status = side.qmp().run("query-status", json!({}));
        status["running"] == true
    }
}

/// Over, or undecided.
fn wait_end(qmp: &mut Qmp) -> MigrationInfo {
    qmp.wait(|info| {
        info.x_hand_over
            .is_some_and(|hand_over| hand_over != HandOver::NotYet)
    })
}

#[test]
fn a_lost_answer_leaves_the_disk_held_until_it_is_resolved() {
    for decision in ["give-up", "serve"] {
        let pair = Pair::start(21);
        let (info, _) = pair.migrate(Fault::LoseShut);
        assert_eq!(info.x_hand_over, Some(HandOver::Undecided), "{info:?}");
        assert_eq!(info.status, Some(MigrationStatus::Device));
        assert_eq!(pair.source.residence("root"), Some(Residence::Leaving));
        let mut qmp = pair.from.qmp();
        let error = qmp.refused("migrate_cancel", json!({}));
        assert!(error.contains("too late"), "{error}");
        let error = qmp.refused("migrate", json!({"uri": "unix:/x"}));
        assert!(error.contains("x-resolve"), "{error}");
        assert!(!pair.is_live(&pair.from));
        let mut reader = pair.from.nbd("root");
        let read = std::thread::spawn(move || reader.read(0, &mut [0; 512]).is_ok());

        qmp.run("x-resolve", json!({"decision": decision}));
        let info = qmp.info();
        let live = decision == "serve";
        assert_eq!(
            read.join().unwrap(),
            live,
            "a held read ends with the decision"
        );
        let expected = match live {
            true => (HandOver::Kept, MigrationStatus::Failed, None),
            false => (
                HandOver::GivenUp,
                MigrationStatus::Completed,
                Some(Residence::Moved),
            ),
        };
        assert_eq!(info.x_hand_over, Some(expected.0));
        assert_eq!(info.status, Some(expected.1));
        assert_eq!(pair.source.residence("root"), expected.2);
        assert_eq!(pair.is_live(&pair.from), live);
    }
}

#[test]
fn the_end_of_a_daemon_leaves_an_undecided_disk_held() {
    let pair = Pair::start(22);
    let (info, _) = pair.migrate(Fault::LoseShut);
    assert_eq!(info.x_hand_over, Some(HandOver::Undecided));
    let Pair { source, from, .. } = pair;
    from.end().unwrap();
    assert_eq!(source.residence("root"), Some(Residence::Leaving));
    let again = source.start(&["root"], &Settings::default());
    assert_eq!(
        again.qmp().info().x_hand_over,
        Some(HandOver::Undecided),
        "also after a restart"
    );
}

#[test]
fn wherever_the_connection_breaks_the_disk_lives_on_one_side() {
    let seed = std::env::var("VMFERRY_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| fastrand::u64(..1 << 32));
    println!("VMFERRY_SEED={seed}");
    let mut cuts = fastrand::Rng::with_seed(seed);
    let (info, whole) = Pair::start(seed).migrate(Fault::None);
    assert_eq!(info.status, Some(MigrationStatus::Completed), "{info:?}");
    let rounds = match std::env::var_os("VMFERRY_LONG") {
        Some(_) => 300,
        None => 12,
    };
    for round in 0..rounds {
        let near_end = whole - 200;
        let cut = match round % 3 {
            0 => cuts.u64(..whole),
            _ => cuts.u64(near_end..=whole),
        };
        println!("cut after {cut} of {whole} bytes");
        survive(seed, cut);
    }
}

/// After a cut at this byte, and whatever must be decided, the disk is whole and lives on one side.
fn survive(seed: u64, cut: u64) {
    let pair = Pair::start(seed);
    let (info, _) = pair.migrate(Fault::Cut(cut));
    // The destination knows by now, or soon: its connection has ended.
    let arrival = pair.to.qmp().wait(|info| {
        [MigrationStatus::Completed, MigrationStatus::Failed].contains(&info.status.unwrap())
    });
    let arrived = arrival.status == Some(MigrationStatus::Completed);
    let mut qmp = pair.from.qmp();
    match info.x_hand_over.unwrap() {
        HandOver::GivenUp => assert!(arrived, "given up to nobody: {info:?}"),
        HandOver::Kept => assert!(!arrived, "both have it: {info:?}"),
        HandOver::Undecided => {
            assert!(!pair.is_live(&pair.from));
            let decision = if arrived { "give-up" } else { "serve" };
            qmp.run("x-resolve", json!({"decision": decision}));
        }
        HandOver::NotYet => panic!("{info:?}"),
    }
    assert_eq!(pair.is_live(&pair.from), !arrived);
    assert_eq!(pair.is_live(&pair.to), arrived);
    if !arrived {
        pair.from.nbd("root").write(0, b"here", false).unwrap();
        let (info, _) = pair.migrate(Fault::None);
        assert_eq!(info.status, Some(MigrationStatus::Completed), "{info:?}");
    }
    let mut expected = random(seed, LENGTH);
    if !arrived {
        expected[..4].copy_from_slice(b"here");
    }
    let image = std::fs::read(pair.destination.image("root")).unwrap();
    assert!(image == expected, "the destination's disk differs");
}
