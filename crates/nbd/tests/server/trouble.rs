//! What the server does when clients, disks or the server itself go away.

use std::io::Write;
use std::net::Shutdown;
use std::sync::Arc;
use std::time::Duration;

use crate::support::{Raw, Running, eventually, option, request, serve, serve_with};
use vmferry_channel::Stop;
use vmferry_disk::simulated::{CacheMode, MemoryDisk, Operation as Disk};
use vmferry_disk::{
    Allocation, BlockDevice, Cached, DiskError, Extent, ExtentKind, Hold, Limits, Node, Unmap,
};
use vmferry_nbd::client::{Operation, Outcome};
use vmferry_nbd::protocol::{Command, OptionCode};
use vmferry_nbd::{Client, ClientSettings, NbdError, Settings};

const LENGTH: u64 = 4 << 20;

fn write(offset: u64, length: usize) -> Operation {
    Operation::Write {
        offset,
        data: vec![7; length],
        fua: false,
    }
}

fn read(offset: u64) -> Operation {
    Operation::Read {
        offset,
        length: 512,
    }
}

#[test]
fn garbage_instead_of_a_handshake_closes() {
    let (running, _node) = serve(&MemoryDisk::new(LENGTH));
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 64], &[0; 64]] {
        let mut raw = running.raw();
        raw.send(garbage);
        assert_eq!(raw.receive_to_end().len(), 18);
    }
    running.await_connections(0);
}

#[test]
fn garbage_instead_of_a_request_closes() {
    let (running, _node) = serve(&MemoryDisk::new(LENGTH));
    let mut raw = running.raw();
    raw.enter("disk");
    raw.send(&[0x55; 28]);
    assert_eq!(raw.receive_to_end(), []);
    running.await_connections(0);
}

#[test]
fn an_unknown_export_by_its_old_option_closes() {
    let (running, _node) = serve(&MemoryDisk::new(LENGTH));
    let mut raw = running.raw();
    raw.send(&3u32.to_be_bytes());
    raw.send(&option(OptionCode::EXPORT_NAME, b"other"));
    assert_eq!(raw.receive_to_end().len(), 18);
}

#[test]
fn silence_in_the_handshake_closes() {
    let settings = Settings {
        handshake_timeout: Duration::from_millis(100),
        ..Settings::default()
    };
    let (running, _node) = serve_with(&MemoryDisk::new(LENGTH), settings);
    let mut silent = running.raw();
    assert_eq!(silent.receive_to_end().len(), 18);
    // One that asks and never reads the answers is no better.
    let mut deaf = running.raw();
    let question = option(OptionCode::LIST, &[]).repeat(1000);
    let _ = deaf.stream.write_all(&3u32.to_be_bytes());
    while deaf.stream.write_all(&question).is_ok() {}
    running.await_connections(0);
}

#[test]
fn silence_after_the_handshake_is_fine() {
    let settings = Settings {
        handshake_timeout: Duration::from_millis(200),
        ..Settings::default()
    };
    let (running, _node) = serve_with(&MemoryDisk::new(LENGTH), settings);
    let mut patient = running.client();
    let mut silent = running.raw();
    silent.receive_to_end();
    patient.read(0, &mut [0; 10]).unwrap();
}

#[test]
fn clients_over_the_limit_are_sent_away() {
    let settings = Settings {
        connections_max: 2,
        ..Settings::default()
    };
    let (running, _node) = serve_with(&MemoryDisk::new(LENGTH), settings);
    let (first, mut second) = (running.client(), running.raw());
    second.receive(18);
    assert_eq!(running.raw().receive_to_end(), []);
    first.disconnect().unwrap();
    running.await_connections(1);
    running.client().flush().unwrap();
}

#[test]
fn held_writes_wait_while_reads_and_flushes_go_on() {
    let disk = MemoryDisk::new(LENGTH);
    let (running, node) = serve(&disk);
    let mut client = running.client();
    let lease = node.lease("test").unwrap();
    lease.hold(Hold::Writes);
    let mut held = Vec::new();
    for length in [10, 4096, 100_000] {
        held.push(client.submit(write(0, length)).unwrap());
    }
    let trim = Operation::Trim {
        offset: 1 << 20,
        length: 4096,
    };
    held.push(client.submit(trim).unwrap());
    for operation in [read(0), Operation::Flush, read(1 << 20)] {
        let cookie = client.submit(operation).unwrap();
        assert_eq!(client.wait().unwrap().unwrap().cookie, cookie);
    }
    assert_eq!(disk.count(Disk::Write) + disk.count(Disk::Discard), 0);
    assert!(lease.drain(Duration::ZERO), "nothing is in flight");
    drop(lease);
    for _ in 0..held.len() {
        let completion = client.wait().unwrap().unwrap();
        held.retain(|cookie| *cookie != completion.cookie);
        assert_eq!(completion.result, Ok(Outcome::Done));
    }
    assert!(held.is_empty());
    assert!(disk.snapshot()[..100_000].iter().all(|byte| *byte == 7));
    assert_eq!(node.dirty().count(), 2);
}

#[test]
fn reads_wait_too_when_everything_is_held() {
    let disk = MemoryDisk::new(LENGTH);
    let (running, node) = serve(&disk);
    let mut client = running.client();
    let lease = node.lease("test").unwrap();
    lease.hold(Hold::Everything);
    let status = Operation::BlockStatus {
        offset: 0,
        length: 512,
    };
    for operation in [read(0), status, write(0, 1)] {
        client.submit(operation).unwrap();
    }
    let flush = client.submit(Operation::Flush).unwrap();
    assert_eq!(client.wait().unwrap().unwrap().cookie, flush);
    assert_eq!(disk.count(Disk::Read) + disk.count(Disk::Status), 0);
    lease.hold(Hold::Writes);
    client.wait().unwrap().unwrap().result.unwrap();
    client.wait().unwrap().unwrap().result.unwrap();
    assert_eq!(disk.count(Disk::Write), 0);
    drop(lease);
    client.wait().unwrap().unwrap().result.unwrap();
}

#[test]
fn many_held_writes_do_not_stop_what_comes_behind_them() {
    let disk = MemoryDisk::new(LENGTH);
    let (running, node) = serve(&disk);
    let mut client = running.client();
    let lease = node.lease("test").unwrap();
    lease.hold(Hold::Writes);
    let mut held = Vec::new();
    for _ in 0..48 {
        held.push(client.submit(write(0, 1 << 20)).unwrap());
    }
    for operation in [read(0), Operation::Flush] {
        let cookie = client.submit(operation).unwrap();
        assert_eq!(client.wait().unwrap().unwrap().cookie, cookie);
    }
    drop(lease);
    for _ in 0..held.len() {
        let completion = client.wait().unwrap().unwrap();
        held.retain(|cookie| *cookie != completion.cookie);
        assert_eq!(completion.result, Ok(Outcome::Done));
    }
    assert!(held.is_empty());
}

#[test]
fn held_reads_count_what_they_will_need() {
    let disk = MemoryDisk::new(LENGTH);
    let settings = Settings {
        held_bytes_max: 1 << 20,
        ..Settings::default()
    };
    let (running, node) = serve_with(&disk, settings);
    let mut raw = running.raw();
    raw.enter("disk");
    let lease = node.lease("test").unwrap();
    lease.hold(Hold::Everything);
    raw.request(request(Command::READ, 1, 0, 512 << 10));
    raw.request(request(Command::FLUSH, 2, 0, 0));
    assert_eq!(raw.simple_reply(), (0, 2), "there is room");
    raw.request(request(Command::READ, 3, 0, 512 << 10));
    raw.request(request(Command::FLUSH, 4, 0, 0));
    assert!(raw.is_silent(), "the second read fills the list");
    drop(lease);
    let mut cookies: Vec<u64> = Vec::new();
    for _ in 0..3 {
        let (error, cookie) = raw.simple_reply();
        assert_eq!(error, 0);
        if cookie != 4 {
            raw.receive(512 << 10);
        }
        cookies.push(cookie);
    }
    cookies.sort_unstable();
    assert_eq!(cookies, [1, 3, 4]);
}

#[test]
fn reads_pass_a_held_write_that_came_before_them() {
    let disk = MemoryDisk::new(LENGTH);
    let (running, node) = serve(&disk);
    let mut client = running.client();
    let lease = node.lease("test").unwrap();
    lease.hold(Hold::Everything);
    let write = client.submit(write(0, 1)).unwrap();
    let status = Operation::BlockStatus {
        offset: 0,
        length: 512,
    };
    let mut passing = vec![client.submit(read(0)).unwrap()];
    passing.push(client.submit(status).unwrap());
    let flush = client.submit(Operation::Flush).unwrap();
    assert_eq!(client.wait().unwrap().unwrap().cookie, flush);
    lease.hold(Hold::Writes);
    for _ in 0..passing.len() {
        let completion = client.wait().unwrap().unwrap();
        completion.result.unwrap();
        passing.retain(|cookie| *cookie != completion.cookie);
    }
    assert!(passing.is_empty());
    assert_eq!(disk.count(Disk::Write), 0);
    drop(lease);
    assert_eq!(client.wait().unwrap().unwrap().cookie, write);
}

#[test]
fn a_large_write_stays_outside_when_too_much_is_held_by_all() {
    let disk = MemoryDisk::new(32 << 20);
    let settings = Settings {
        held_bytes_max_of_all: 512,
        ..Settings::default()
    };
    let (running, node) = serve_with(&disk, settings);
    let lease = node.lease("test").unwrap();
    lease.hold(Hold::Writes);
    let [mut first, mut outside] = [running.raw(), running.raw()];
    first.enter("disk");
    outside.enter("disk");
    // What comes together is answered together: after this, the write is held.
    let mut message = request(Command::READ, 2, 0, 0).encode().to_vec();
    message.extend(request(Command::WRITE, 1, 0, 512).encode());
    message.extend([7; 512]);
    first.send(&message);
    assert_eq!(first.simple_reply(), (0, 2));
    // More than a socket takes.
    outside.request(request(Command::WRITE, 1, 0, 32 << 20));
    let data = vec![7; 32 << 20];
    let timeout = Some(Duration::from_millis(300));
    outside.stream.set_write_timeout(timeout).unwrap();
    let mut sent = 0;
    while let Ok(count) = outside.stream.write(&data[sent..]) {
        sent += count;
        assert!(sent < data.len(), "the server takes it all");
    }
    drop(lease);
    let patience = Some(crate::support::PATIENCE);
    outside.stream.set_write_timeout(patience).unwrap();
    outside.send(&data[sent..]);
    for raw in [&mut first, &mut outside] {
        assert_eq!(raw.simple_reply(), (0, 1));
    }
}

#[test]
fn a_full_list_of_held_writes_stops_the_reading_and_nothing_is_lost() {
    let disk = MemoryDisk::new(LENGTH);
    let settings = Settings {
        held_bytes_max: 1 << 20,
        ..Settings::default()
    };
    let (running, node) = serve_with(&disk, settings);
    let mut other = running.client();
    let mut raw = running.raw();
    raw.enter("disk");
    let lease = node.lease("test").unwrap();
    lease.hold(Hold::Writes);
    // A correct server leaves these in the socket sooner or later. A wrong one that is slow might
    // pass, a correct one never fails.
    raw.stream
        .set_write_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    let mut message = request(Command::WRITE, 1, 0, 65536).encode().to_vec();
    message.extend([7; 65536]);
    let (mut sent, mut rest) = (0usize, &message[..]);
    loop {
        match raw.stream.write(rest) {
            Ok(count) => {
                sent += count;
                rest = &rest[count..];
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
            Err(error) => panic!("{error}"),
        }
        if rest.is_empty() {
            rest = &message;
        }
        assert!(sent < 64 << 20, "the server swallows everything");
    }
    other.read(0, &mut [0; 512]).unwrap();
    assert_eq!(disk.count(Disk::Write), 0);
    drop(lease);
    let mut stream = raw.stream.try_clone().unwrap();
    let missing = rest.to_vec();
    let sender = std::thread::spawn(move || {
        stream
            .set_write_timeout(Some(crate::support::PATIENCE))
            .unwrap();
        stream.write_all(&missing).unwrap();
    });
    for _ in 0..sent.div_ceil(message.len()) {
        assert_eq!(raw.simple_reply(), (0, 1));
    }
    sender.join().unwrap();
}

#[test]
fn held_writes_of_a_client_that_goes_away_are_not_done() {
    let disk = MemoryDisk::new(LENGTH);
    let settings = Settings {
        held_bytes_max: 4096,
        ..Settings::default()
    };
    let (running, node) = serve_with(&disk, settings);
    let lease = node.lease("test").unwrap();
    lease.hold(Hold::Writes);
    // One whose socket is still read, and one whose list is full.
    let mut reading = running.client();
    reading.submit(write(0, 10)).unwrap();
    reading.read(0, &mut [0; 10]).unwrap();
    let mut full = running.raw();
    full.enter("disk");
    full.request(request(Command::WRITE, 1, 0, 8192));
    full.send(&[7; 8192]);
    full.request(request(Command::READ, 2, 0, 512));
    drop(reading);
    full.stream.shutdown(Shutdown::Write).unwrap();
    running.await_connections(0);
    drop(lease);
    running.client().flush().unwrap();
    assert_eq!(disk.count(Disk::Write), 0);
}

#[test]
fn a_disk_that_departs_closes_its_clients_without_an_answer() {
    let disk = MemoryDisk::new(LENGTH);
    let (running, node) = serve(&disk);
    let (mut waiting, mut idle) = (running.client(), running.client());
    let lease = node.lease("test").unwrap();
    lease.hold(Hold::Writes);
    waiting.submit(write(0, 10)).unwrap();
    waiting.submit(write(0, 100_000)).unwrap();
    waiting.read(0, &mut [0; 10]).unwrap();
    lease.leave().give_up();
    assert!(matches!(waiting.wait(), Err(NbdError::Closed { .. })));
    assert!(matches!(idle.flush(), Err(NbdError::Closed { .. })));
    running.await_connections(0);
    assert_eq!(disk.count(Disk::Write), 0);
    let stop = Stop::new().unwrap();
    let again = Client::connect(&running.uri("disk"), &ClientSettings::default(), &stop);
    let error = again.unwrap_err().to_string();
    assert!(error.contains("ERR_SHUTDOWN"), "{error}");
}

#[test]
fn a_client_that_goes_away_in_the_middle_of_a_write_changes_nothing() {
    let disk = MemoryDisk::new(LENGTH);
    let (running, node) = serve(&disk);
    for (length, sent) in [
        (4096, 4095),
        (1 << 20, 0),
        (1 << 20, 1000),
        (1 << 20, 999_999),
    ] {
        let mut raw = running.raw();
        raw.enter("disk");
        raw.request(request(Command::READ, 1, 0, 1));
        raw.request(request(Command::WRITE, 2, 0, length));
        raw.send(&vec![7; sent]);
        raw.receive(17);
        drop(raw);
        running.await_connections(0);
    }
    assert_eq!(disk.count(Disk::Write), 0);
    assert_eq!(node.dirty().count(), 0);
    running.client().write(0, &[1], false).unwrap();
}

#[test]
fn a_client_that_goes_away_while_its_write_is_in_the_disk_harms_nobody() {
    let disk = MemoryDisk::new(LENGTH);
    let (running, node) = serve(&disk);
    let mut other = running.client();
    let gate = disk.gate_range(Disk::Write, 0..1 << 20);
    let mut leaver = running.client();
    leaver.submit(write(0, 200_000)).unwrap();
    gate.wait_reached(1);
    drop(leaver);
    other.write(2 << 20, &[1; 100], false).unwrap();
    other.read(2 << 20, &mut [0; 100]).unwrap();
    gate.open();
    running.await_connections(1);
    assert_eq!(
        node.dirty().count(),
        2,
        "whatever became of it, it is dirty"
    );
}

/// A client that has announced a write of 1 MiB and sent a part of it, which the server has taken.
fn unfinished_write(running: &Running) -> Raw {
    let mut raw = running.raw();
    raw.enter("disk");
    raw.request(request(Command::WRITE, 1, 0, 1 << 20));
    raw.send(&[7; 100_000]);
    raw
}

#[test]
fn large_requests_over_the_budget_of_all_wait_for_their_turn() {
    let disk = MemoryDisk::new(LENGTH);
    let settings = Settings {
        in_flight_bytes_max_of_all: 1 << 20,
        ..Settings::default()
    };
    let (running, _node) = serve_with(&disk, settings);
    let gate = disk.gate_range(Disk::Write, 0..1 << 20);
    let large = |command: Command| {
        let mut raw = running.raw();
        raw.enter("disk");
        raw.request(request(command, 1, 0, 1 << 20));
        if command == Command::WRITE {
            raw.send(&vec![7; 1 << 20]);
        }
        raw
    };
    // One fits, two have the reserve.
    let mut admitted: Vec<Raw> = (0..3).map(|_| large(Command::WRITE)).collect();
    gate.wait_reached(3);
    let mut waiting = large(Command::READ);
    assert!(waiting.is_silent());
    assert_eq!(disk.count(Disk::Read), 0);
    // What is small goes on.
    let mut other = running.client();
    other.write(2 << 20, &[1; 4096], false).unwrap();
    other.read(2 << 20, &mut [0; 4096]).unwrap();
    gate.open();
    for raw in &mut admitted {
        assert_eq!(raw.simple_reply(), (0, 1));
    }
    assert_eq!(waiting.simple_reply(), (0, 1));
    assert_eq!(waiting.receive(1 << 20), vec![7; 1 << 20]);
}

#[test]
fn a_write_whose_data_stays_away_ends_its_connection() {
    let disk = MemoryDisk::new(LENGTH);
    let settings = Settings {
        in_flight_bytes_max_of_all: 1 << 20,
        stall_timeout: Duration::from_millis(200),
        ..Settings::default()
    };
    let (running, node) = serve_with(&disk, settings);
    let mut stalled: Vec<Raw> = (0..5).map(|_| unfinished_write(&running)).collect();
    for raw in &mut stalled {
        assert_eq!(raw.receive_to_end(), []);
    }
    running.await_connections(0);
    assert_eq!((disk.count(Disk::Write), node.dirty().count()), (0, 0));
    running.client().write(0, &vec![1; 1 << 20], false).unwrap();
}

#[test]
fn replies_that_are_not_read_do_not_keep_the_memory_that_others_need() {
    let disk = MemoryDisk::new(16 << 20);
    let settings = Settings {
        // The write below does not fit, so it needs the reserve, which the deaf have.
        in_flight_bytes_max_of_all: 512 << 10,
        stall_timeout: Duration::from_millis(200),
        ..Settings::default()
    };
    let (running, _node) = serve_with(&disk, settings);
    // More than a socket takes.
    let mut deaf: Vec<Raw> = Vec::new();
    for _ in 0..3 {
        let mut raw = running.raw();
        raw.enter("disk");
        raw.request(request(Command::READ, 1, 0, 16 << 20));
        deaf.push(raw);
    }
    eventually(|| disk.count(Disk::Read) >= 2);
    running.client().write(0, &vec![1; 1 << 20], false).unwrap();
}

#[test]
fn a_client_that_never_reads_its_replies_harms_nobody() {
    let disk = MemoryDisk::new(LENGTH);
    let settings = Settings {
        in_flight_bytes_max: 1 << 20,
        drain_timeout: Duration::from_millis(100),
        ..Settings::default()
    };
    let (mut running, _node) = serve_with(&disk, settings);
    let mut deaf = running.raw();
    deaf.enter("disk");
    deaf.stream
        .set_write_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    let reads = request(Command::READ, 1, 0, 1 << 20).encode().repeat(1000);
    // It ends when the server takes no more.
    for _ in 0..100 {
        if deaf.stream.write_all(&reads).is_err() {
            break;
        }
    }
    let mut other = running.client();
    for _ in 0..100 {
        other.read(0, &mut [0; 4096]).unwrap();
        other.flush().unwrap();
    }
    running.finish();
}

#[test]
fn a_stop_lets_requests_in_the_disk_finish_and_drops_held_ones() {
    let disk = MemoryDisk::new(LENGTH);
    let (mut running, node) = serve(&disk);
    let mut client = running.client();
    let gate = disk.gate(Disk::Write);
    let done = client.submit(write(0, 100_000)).unwrap();
    gate.wait_reached(1);
    let lease = node.lease("test").unwrap();
    lease.hold(Hold::Writes);
    client.submit(write(1 << 20, 10)).unwrap();
    client.read(0, &mut [0; 10]).unwrap();
    running.stop.trigger();
    gate.open();
    running.finish();
    let completion = client.wait().unwrap().unwrap();
    assert_eq!(
        (completion.cookie, completion.result),
        (done, Ok(Outcome::Done))
    );
    assert!(matches!(client.wait(), Err(NbdError::Closed { .. })));
    drop(lease);
    assert_eq!(disk.count(Disk::Write), 1);
    assert_eq!(running.server.connections(), 0);
}

#[test]
fn a_disk_that_hangs_leaves_workers_for_the_others() {
    let disks = [MemoryDisk::new(LENGTH), MemoryDisk::new(LENGTH)];
    let nodes: Vec<_> = ["disk", "other"]
        .iter()
        .zip(&disks)
        .map(|(name, disk)| Node::new(*name, Box::new(disk.clone()), Hold::Nothing))
        .collect();
    let running = Running::new(nodes, Settings::default());
    let gate = disks[0].gate(Disk::Flush);
    let mut hanging = running.client();
    for _ in 0..20 {
        hanging.submit(Operation::Flush).unwrap();
    }
    gate.wait_reached(6);
    let settings = ClientSettings::default();
    let stop = Stop::new().unwrap();
    let mut other = Client::connect(&running.uri("other"), &settings, &stop).unwrap();
    for _ in 0..10 {
        other.flush().unwrap();
    }
    assert_eq!(disks[0].count(Disk::Flush), 6);
    gate.open();
    for _ in 0..20 {
        hanging.wait().unwrap().unwrap().result.unwrap();
    }
}

#[test]
fn reading_ahead_takes_one_worker_of_each_connection() {
    let disk = MemoryDisk::new(LENGTH);
    disk.set_cache(CacheMode::Partial(0));
    let (running, _node) = serve(&disk);
    let gate = disk.gate_range(Disk::Read, 0..1 << 20);
    let mut raw = running.raw();
    raw.enter("disk");
    for cookie in 0..20 {
        raw.request(request(Command::CACHE, cookie, 0, 1 << 20));
    }
    gate.wait_reached(1);
    raw.request(request(Command::READ, 100, 2 << 20, 512));
    assert_eq!(raw.simple_reply(), (0, 100));
    raw.receive(512);
    running.client().read(2 << 20, &mut [0; 512]).unwrap();
    gate.open();
    let mut cookies: Vec<u64> = (0..20).map(|_| raw.simple_reply().1).collect();
    cookies.sort_unstable();
    assert!(cookies.into_iter().eq(0..20));
}

#[test]
fn the_clients_of_one_disk_can_be_cut_off() {
    let disks = [MemoryDisk::new(LENGTH), MemoryDisk::new(LENGTH)];
    let nodes: Vec<_> = ["disk", "other"]
        .iter()
        .zip(&disks)
        .map(|(name, disk)| Node::new(*name, Box::new(disk.clone()), Hold::Nothing))
        .collect();
    let running = Running::new(nodes.clone(), Settings::default());
    let stop = Stop::new().unwrap();
    let mut victim = running.client();
    let settings = ClientSettings::default();
    let mut other = Client::connect(&running.uri("other"), &settings, &stop).unwrap();
    eventually(|| running.server.connections_of(&nodes[0]) == 1);
    running.server.disconnect(&nodes[0]);
    assert!(matches!(victim.flush(), Err(NbdError::Closed { .. })));
    eventually(|| running.server.connections_of(&nodes[0]) == 0);
    other.flush().unwrap();
    assert_eq!(running.server.connections_of(&nodes[1]), 1);
}

/// A disk with a bug.
struct Panicking;

impl BlockDevice for Panicking {
    fn limits(&self) -> Limits {
        Limits {
            length: LENGTH,
            preferred_bytes: 512,
            cluster_bytes: None,
            read_only: false,
        }
    }

    fn read_at(&self, _: &mut [u8], offset: u64) -> Result<(), DiskError> {
        assert_ne!(offset, 0, "a bug that the test put there");
        Ok(())
    }

    fn read_cached_at(&self, _: &mut [u8], _: u64) -> Result<Cached, DiskError> {
        Ok(Cached::Miss)
    }

    fn write_at(&self, _: &[u8], _: u64) -> Result<(), DiskError> {
        panic!("a bug that the test put there");
    }

    fn write_zeroes(&self, _: u64, _: u64, _: Unmap, _: bool) -> Result<(), DiskError> {
        Ok(())
    }

    fn discard(&self, _: u64, _: u64) -> Result<(), DiskError> {
        Ok(())
    }

    fn status(&self, _: u64, length: u64) -> Result<Extent, DiskError> {
        Ok(Extent {
            length,
            kind: ExtentKind::Data,
        })
    }

    fn allocation(&self, _: u64, length: u64) -> Result<Allocation, DiskError> {
        let is_own = true;
        Ok(Allocation { length, is_own })
    }

    fn below(&self) -> Option<&dyn BlockDevice> {
        None
    }

    fn start_writeback(&self, _: u64, _: u64) -> Result<(), DiskError> {
        Ok(())
    }

    fn flush(&self) -> Result<(), DiskError> {
        Ok(())
    }
}

#[test]
fn a_panic_ends_its_connection_and_nothing_else() {
    let node = Node::new("disk", Box::new(Panicking), Hold::Nothing);
    let settings = Settings {
        workers: 1,
        ..Settings::default()
    };
    let running = Running::new(vec![Arc::clone(&node)], settings);
    let mut other = running.client();
    for operation in [read(0), write(0, 10), write(0, 100_000)] {
        let mut client = running.client();
        client.submit(operation).unwrap();
        assert!(matches!(client.wait(), Err(NbdError::Closed { .. })));
        running.await_connections(1);
        other.read(512, &mut [0; 512]).unwrap();
    }
    let lease = node.lease("test").unwrap();
    lease.hold(Hold::Writes);
    assert!(lease.drain(Duration::ZERO), "no write is counted for ever");
}
