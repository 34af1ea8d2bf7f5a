//! Whoever connects to the door for migrations and is not the source.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;

use serde_json::json;

use crate::pair::{Pair, Side, Target};
use crate::peers::{PATIENCE, seeded, until};

/// Header, and the configuration of a machine without a name.
const GREETING: &[u8] = b"QEVM\0\0\0\x03\x07\0\0\0\0";

fn stranger(address: &str, says: &[u8]) -> TcpStream {
    let address = address.strip_prefix("tcp:").expect("a TCP address");
    let mut stranger = TcpStream::connect(address).expect("the destination listens");
    stranger
        .set_read_timeout(Some(PATIENCE))
        .expect("a timeout can be set");
    match stranger.write_all(says) {
        Ok(()) => {}
        // It may have been refused at the first bytes.
        Err(error)
            if [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset].contains(&error.kind()) => {}
        Err(error) => panic!("a stranger's bytes: {error}"),
    }
    stranger
}

/// Waits until the daemon has hung up.
fn is_shown_out(mut stranger: TcpStream) {
    let mut answer = Vec::new();
    match stranger.read_to_end(&mut answer) {
        Ok(_) => assert!(answer.is_empty(), "a stranger is answered {answer:?}"),
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}"),
    }
}

/// Whatever strangers send, or if they send nothing at all, the daemon goes on listening, its disk is not touched, and
/// then a real migration succeeds.
#[test]
fn strangers_do_not_keep_a_migration_away() {
    let mut rng = seeded();
    let mut pair = Pair::start(512, Target::Empty, &mut rng);
    let address = pair.incoming();
    let mut noise = vec![0; 100_000];
    rng.fill(&mut noise);
    let mut sayings: Vec<&[u8]> = vec![
        b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"{\"execute\": \"qmp_capabilities\"}\n",
        b"NBDMAGICIHAVEOPT",
        b"QEVM\0\0\0\x02",
        b"QEVM\0\0\0\x03\x07\0\0\0\x0cpc-i440fx-7.",
        b"QEVM\0\0\0\x03\x07\xff\xff\xff\xff",
        b"\0",
    ];
    sayings.push(&noise);
    sayings.extend(noise.chunks(1000).take(20));
    for says in &sayings {
        let stranger = stranger(&address, says);
        // Who says too little is a stranger once nothing more can come.
        let _ = stranger.shutdown(std::net::Shutdown::Write);
        is_shown_out(stranger);
    }
    until("a word about each stranger", || {
        let said = pair.said(Side::Destination);
        let words = said
            .lines()
            .filter(|line| line.contains("did not arrive"))
            .count();
        (words == sayings.len()).then_some(())
    });
    // None of them came so far that the disk might have been changed.
    assert!(!pair.has_record(Side::Destination));
    assert_eq!(
        pair.daemon(Side::Destination).ask("query-status")["status"],
        "inmigrate"
    );
    pair.check(Side::Source);

    let silent = stranger(&address, b"");
    pair.migrate_well();
    is_shown_out(silent);
    pair.check(Side::Destination);
}

/// Somebody who begins as a source would and then says nothing may be a slow source, so a person has to end it.
#[test]
fn a_source_that_falls_silent_is_broken_off_by_a_cancel() {
    let mut pair = Pair::start(512, Target::Empty, &mut seeded());
    let address = pair.incoming();
    // The first byte of a command.
    let silent = stranger(&address, &[GREETING, &[8, 0, 1, 0, 0, 8]].concat());
    until("the migration to begin", || {
        let info = pair.daemon(Side::Destination).ask("query-migrate");
        (info["status"] == "active").then_some(())
    });
    let cancel = pair
        .daemon(Side::Destination)
        .query("migrate_cancel", &json!({}));
    cancel.expect("a cancel is heard");
    drop(silent);
    pair.migrate_well();
    pair.check(Side::Destination);
}
