//! What the server does with well-behaved clients: data, flags, errors, durability, order.

use crate::support::{Running, random, random_bytes, request, serve, serve_with};
use vmferry_channel::Uri;
use vmferry_disk::simulated::{CacheMode, MemoryDisk, Operation as Disk};
use vmferry_disk::{ExtentKind, Hold, Limits, Node};
use vmferry_nbd::client::{Operation, Outcome};
use vmferry_nbd::protocol::{Command, Errno, transmission};
use vmferry_nbd::{Client, ClientSettings, NbdError, Settings};

const LENGTH: u64 = 4 << 20;

fn errno(result: Result<(), NbdError>) -> Errno {
    match result {
        Err(NbdError::Failed { failure, .. }) => failure.errno,
        other => panic!("not a failed request: {other:?}"),
    }
}

/// Random operations against a model, `depth` of them under way at a time on separate ranges.
fn compare_with_model(cache: CacheMode, structured: bool) {
    let mut random = random();
    let disk = MemoryDisk::new(LENGTH);
    disk.set_cache(cache);
    let (running, _node) = serve(&disk);
    let mut client = running.client_with(structured);
    let mut model = vec![0u8; LENGTH as usize];
    const LANES: usize = 8;
    let lane_bytes = model.len() / LANES;
    for _ in 0..60 {
        let mut expected = std::collections::HashMap::new();
        for lane in 0..LANES {
            let length = match random.u8(..4) {
                0 => random.usize(..200),
                1 => 4096,
                2 => random.usize(..100_000),
                _ => random.usize(..lane_bytes / 2),
            };
            let at = lane * lane_bytes + random.usize(..lane_bytes - length);
            let (offset, range) = (at as u64, at..at + length);
            let length = length as u32;
            let operation = match random.u8(..5) {
                0 | 1 => Operation::Read { offset, length },
                2 | 3 => {
                    let data = random_bytes(&mut random, length as usize);
                    model[range.clone()].copy_from_slice(&data);
                    Operation::Write {
                        offset,
                        data,
                        fua: random.bool(),
                    }
                }
                _ => {
                    model[range.clone()].fill(0);
                    Operation::WriteZeroes {
                        offset,
                        length,
                        no_hole: random.bool(),
                        fast_only: false,
                        fua: false,
                    }
                }
            };
            let outcome = match operation {
                Operation::Read { .. } => Outcome::Data(model[range].to_vec()),
                _ => Outcome::Done,
            };
            expected.insert(client.submit(operation).unwrap(), outcome);
        }
        while let Some(completion) = client.wait().unwrap() {
            let outcome = expected.remove(&completion.cookie).unwrap();
            assert!(completion.result == Ok(outcome));
        }
        assert!(expected.is_empty());
    }
    assert!(disk.snapshot() == model);
    client.disconnect().unwrap();
}

#[test]
fn cached_data_is_right() {
    compare_with_model(CacheMode::Hit, true);
    compare_with_model(CacheMode::Hit, false);
}

#[test]
fn partly_cached_data_is_right() {
    compare_with_model(CacheMode::Partial(1000), true);
    compare_with_model(CacheMode::Partial(0), false);
}

#[test]
fn data_of_a_disk_that_cannot_tell_is_right() {
    compare_with_model(CacheMode::Unsupported, true);
    compare_with_model(CacheMode::Unsupported, false);
}

#[test]
fn works_over_a_unix_socket() {
    let folder = tempfile::tempdir().unwrap();
    let disk = MemoryDisk::new(LENGTH);
    let node = Node::new("disk", Box::new(disk), Hold::Nothing);
    let address = Uri::Unix(folder.path().join("nbd"));
    let running = Running::at(&address, vec![node], Settings::default());
    let mut client = running.client();
    client.write(5, b"hello", false).unwrap();
    let mut back = [0; 7];
    client.read(4, &mut back).unwrap();
    assert_eq!(&back, b"\0hello\0");
}

#[test]
fn the_empty_name_is_the_only_export() {
    let (running, _node) = serve(&MemoryDisk::new(LENGTH));
    let stop = vmferry_channel::Stop::new().unwrap();
    let settings = ClientSettings::default();
    let client = Client::connect(&running.uri(""), &settings, &stop).unwrap();
    assert_eq!(client.length(), LENGTH);
    let error = Client::connect(&running.uri("disk2"), &settings, &stop).unwrap_err();
    assert!(error.to_string().contains("ERR_UNKNOWN"), "{error}");
}

#[test]
fn announces_what_it_can_do() {
    let (running, _node) = serve(&MemoryDisk::new(LENGTH));
    let client = running.client();
    for flag in [
        transmission::SEND_FLUSH,
        transmission::SEND_FUA,
        transmission::SEND_TRIM,
        transmission::SEND_WRITE_ZEROES,
        transmission::SEND_DF,
        transmission::CAN_MULTI_CONN,
        transmission::SEND_CACHE,
        transmission::SEND_FAST_ZERO,
    ] {
        assert_ne!(client.flags() & flag, 0, "{flag:#x}");
    }
    assert!(!client.is_read_only());
    assert!(client.has_block_status());
    assert_eq!(client.payload_bytes_max(), 32 << 20);
    assert!(!running.client_with(false).has_block_status());
}

#[test]
fn the_largest_request_works_and_a_larger_one_is_refused_without_closing() {
    const LARGEST: usize = 32 << 20;
    let disk = MemoryDisk::new(64 << 20);
    let (running, _node) = serve(&disk);
    let mut client = running.client();
    let data = random_bytes(&mut random(), LARGEST);
    client.write(4096, &data, false).unwrap();
    let mut back = vec![0; LARGEST];
    client.read(4096, &mut back).unwrap();
    assert!(back == data);

    let mut raw = running.raw();
    raw.enter("disk");
    let mut larger = data;
    larger.push(1);
    raw.request(request(Command::WRITE, 1, 0, larger.len() as u32));
    raw.send(&larger);
    assert_eq!(raw.simple_reply(), (Errno::EINVAL.0, 1));
    raw.request(request(Command::READ, 2, 0, larger.len() as u32));
    assert_eq!(raw.simple_reply(), (Errno::EINVAL.0, 2));
    raw.request(request(Command::READ, 3, 0, 8));
    assert_eq!(raw.simple_reply(), (0, 3));
    assert_eq!(raw.receive(8), [0; 8]);
}

#[test]
fn requests_that_make_no_sense_are_refused_without_closing() {
    let disk = MemoryDisk::new(LENGTH);
    let (running, _node) = serve(&disk);
    let mut raw = running.raw();
    raw.enter("disk");
    let flagged = |command, flags| {
        let mut request = request(command, 9, 0, 4);
        request.flags = flags;
        request
    };
    for (request, errno) in [
        (request(Command::READ, 9, LENGTH - 1, 2), Errno::EINVAL),
        (request(Command::READ, 9, u64::MAX, 2), Errno::EINVAL),
        (request(Command::TRIM, 9, LENGTH, 1), Errno::EINVAL),
        (request(Command::WRITE_ZEROES, 9, LENGTH, 1), Errno::ENOSPC),
        (request(Command::WRITE, 9, LENGTH - 3, 4), Errno::ENOSPC),
        (request(Command(77), 9, 0, 4), Errno::EINVAL),
        // Block status was not negotiated, DF needs structured replies.
        (request(Command::BLOCK_STATUS, 9, 0, 4), Errno::EINVAL),
        (flagged(Command::READ, 1 << 2), Errno::EINVAL),
        (flagged(Command::WRITE, 1 << 9), Errno::EINVAL),
        (flagged(Command::FLUSH, 1 << 3), Errno::EINVAL),
    ] {
        raw.request(request);
        raw.send(&vec![1; request.payload_bytes()]);
        assert_eq!(raw.simple_reply(), (errno.0, 9), "{request:?}");
    }
    assert_eq!(disk.log(), []);
    for request in [
        request(Command::READ, 8, LENGTH, 0),
        request(Command::WRITE, 8, 0, 0),
        request(Command::FLUSH, 8, 0, 0),
        request(Command::CACHE, 8, 0, 1 << 20),
    ] {
        raw.request(request);
        assert_eq!(raw.simple_reply(), (0, 8), "{request:?}");
    }
}

#[test]
fn a_read_only_disk_refuses_every_write() {
    let disk = MemoryDisk::with_limits(Limits {
        length: LENGTH,
        preferred_bytes: 4096,
        cluster_bytes: None,
        read_only: true,
    });
    let (running, _node) = serve(&disk);
    let mut client = running.client();
    assert!(client.is_read_only());
    assert_eq!(errno(client.write(0, &[1; 10], false)), Errno::EPERM);
    assert_eq!(errno(client.write(0, &[1; 200_000], false)), Errno::EPERM);
    assert_eq!(errno(client.write_zeroes(0, 10, false)), Errno::EPERM);
    assert_eq!(errno(client.trim(0, 10)), Errno::EPERM);
    client.read(0, &mut [0; 10]).unwrap();
    client.flush().unwrap();
    assert_eq!(disk.count(Disk::Write), 0);
}

#[test]
fn a_flush_covers_the_writes_of_other_connections() {
    let disk = MemoryDisk::new(LENGTH);
    let (running, _node) = serve(&disk);
    let (mut a, mut b) = (running.client(), running.client());
    a.write(0, b"small", false).unwrap();
    a.write(1 << 20, &[7; 300_000], false).unwrap();
    b.flush().unwrap();
    a.write(9000, b"late", false).unwrap();
    disk.crash();
    let after = disk.snapshot();
    assert_eq!(&after[..5], b"small");
    assert!(after[1 << 20..][..300_000] == [7; 300_000]);
    assert_eq!(after[9000..9004], [0; 4]);
}

#[test]
fn fua_means_durable() {
    let disk = MemoryDisk::new(LENGTH);
    disk.fill(0, &[9; 100_000]);
    let (running, _node) = serve(&disk);
    let mut client = running.client();
    client.write(0, &[1; 10], true).unwrap();
    client.write_zeroes(20_000, 10_000, true).unwrap();
    client.write(50_000, &[1; 10], false).unwrap();
    disk.crash();
    let after = disk.snapshot();
    assert_eq!(after[..11], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 9]);
    assert!(after[20_000..30_000] == [0; 10_000]);
    assert_eq!(after[50_000], 9);
}

#[test]
fn zeroes_keep_to_their_flags() {
    let disk = MemoryDisk::new(LENGTH);
    disk.fill(0, &[9; 65536]);
    let (running, _node) = serve(&disk);
    let mut client = running.client();
    let mut zero = |offset, no_hole, fast_only| {
        let operation = Operation::WriteZeroes {
            offset,
            length: 8192,
            no_hole,
            fast_only,
            fua: false,
        };
        let cookie = client.submit(operation).unwrap();
        client.wait_for(cookie).unwrap().result
    };
    zero(0, true, false).unwrap();
    zero(8192, false, false).unwrap();
    disk.set_quick_zeroes(false);
    let failure = zero(16384, false, true).unwrap_err();
    assert_eq!(failure.errno, Errno::ENOTSUP);
    let kinds: Vec<_> = client.block_status(0, 32768).unwrap();
    let kinds: Vec<_> = kinds.iter().map(|e| (e.length, e.kind)).collect();
    assert_eq!(
        kinds,
        [
            (8192, ExtentKind::Zero),
            (8192, ExtentKind::Hole),
            (16384, ExtentKind::Data)
        ]
    );
}

#[test]
fn block_status_tells_holes_and_heeds_one_extent_requests() {
    let disk = MemoryDisk::new(LENGTH);
    disk.fill(1 << 20, &[1; 8192]);
    let (running, _node) = serve(&disk);
    let mut client = running.client();
    let extents = client.block_status(4096, LENGTH as u32 - 4096).unwrap();
    let lengths: Vec<u64> = extents.iter().map(|extent| extent.length).collect();
    assert_eq!(lengths, [(1 << 20) - 4096, 8192, LENGTH - (1 << 20) - 8192]);
    let kinds: Vec<ExtentKind> = extents.iter().map(|extent| extent.kind).collect();
    assert_eq!(
        kinds,
        [ExtentKind::Hole, ExtentKind::Data, ExtentKind::Hole]
    );
    assert_eq!(
        client.block_status(1 << 20, 512).unwrap(),
        [vmferry_disk::Extent {
            length: 512,
            kind: ExtentKind::Data
        }]
    );
}

#[test]
fn disk_errors_reach_the_client_and_only_its_request() {
    let disk = MemoryDisk::new(LENGTH);
    let (running, _node) = serve(&disk);
    for structured in [false, true] {
        let mut client = running.client_with(structured);
        for (operation, os, expected) in [
            (Disk::Write, 28, Errno::ENOSPC),
            (Disk::Read, 5, Errno::EIO),
            (Disk::Flush, 5, Errno::EIO),
            (Disk::Discard, 1, Errno::EPERM),
        ] {
            disk.fail(operation, 1, os);
            let mut call = || match operation {
                Disk::Write => client.write(4096, &[1; 100], false),
                Disk::Read => client.read(4096, &mut [0; 100]),
                Disk::Flush => client.flush(),
                _ => client.trim(4096, 4096),
            };
            assert_eq!(errno(call()), expected, "{operation:?}");
            call().unwrap();
        }
    }
    disk.fail(Disk::Flush, 1, 5);
    assert_eq!(errno(running.client().write(0, &[1], true)), Errno::EIO);
    disk.fail(Disk::Read, 1, 5);
    let error = running.client().read(4096, &mut [0; 100]).unwrap_err();
    assert!(error.to_string().contains("4096"), "{error}");
}

#[test]
fn a_failed_write_is_dirty() {
    let disk = MemoryDisk::new(LENGTH);
    let (running, node) = serve(&disk);
    disk.fail_after_bytes(Disk::Write, 1, 5, 10);
    assert_eq!(
        errno(running.client().write(0, &[1; 100], false)),
        Errno::EIO
    );
    assert_eq!(node.dirty().count(), 1);
}

#[test]
fn a_slow_read_does_not_stop_the_others() {
    let disk = MemoryDisk::new(LENGTH);
    disk.fill(0, &[1; 8192]);
    let (running, _node) = serve(&disk);
    let mut client = running.client();
    let gate = disk.gate_range(Disk::Read, 0..4096);
    let slow = client
        .submit(Operation::Read {
            offset: 0,
            length: 4096,
        })
        .unwrap();
    gate.wait_reached(1);
    let quick = client
        .submit(Operation::Read {
            offset: 4096,
            length: 4096,
        })
        .unwrap();
    client.submit(Operation::Flush).unwrap();
    let mut first_two = [(); 2].map(|()| client.wait().unwrap().unwrap().cookie);
    first_two.sort_unstable();
    assert_eq!(first_two, [quick, quick + 1]);
    gate.open();
    assert_eq!(client.wait().unwrap().unwrap().cookie, slow);
}

#[test]
fn one_worker_and_small_budgets_still_finish_everything() {
    let disk = MemoryDisk::new(LENGTH);
    disk.set_cache(CacheMode::Partial(0));
    let settings = Settings {
        workers: 1,
        in_flight_requests_max: 2,
        in_flight_bytes_max: 4096,
        in_flight_bytes_max_of_all: 1,
        ..Settings::default()
    };
    let (running, _node) = serve_with(&disk, settings);
    let mut clients = [running.client(), running.client()];
    for client in &mut clients {
        for number in 0..200u64 {
            let offset = number * 4096;
            let data = vec![number as u8; if number % 10 == 0 { 70_000 } else { 4096 }];
            let write = Operation::Write {
                offset,
                data,
                fua: true,
            };
            client.submit(write).unwrap();
            let length = 30_000;
            client.submit(Operation::Read { offset, length }).unwrap();
        }
    }
    for client in &mut clients {
        let mut count = 0;
        while let Some(completion) = client.wait().unwrap() {
            completion.result.unwrap();
            count += 1;
        }
        assert_eq!(count, 400);
    }
}

#[test]
fn any_split_of_the_requests_gives_the_same_disk_and_replies() {
    let mut random = random();
    let mut script = Vec::new();
    let mut replies = 0;
    for number in 0..100u64 {
        let length = [0, 1, 511, 4096, 65536, 65537, 150_000][random.usize(..7)];
        let offset = random.u64(..LENGTH - u64::from(length));
        script.extend(request(Command::WRITE, number, offset, length).encode());
        script.extend(random_bytes(&mut random, length as usize));
        replies += 1;
        if random.bool() {
            script.extend(request(Command(0x99), number, 0, 0).encode());
            replies += 1;
        }
    }
    // Overlapping writes may be done in any order, so each request is let finish.
    let mut images = Vec::new();
    for largest in [usize::MAX, 100_000, 5_000] {
        let disk = MemoryDisk::new(LENGTH);
        let settings = Settings {
            in_flight_requests_max: 1,
            ..Settings::default()
        };
        let (running, _node) = serve_with(&disk, settings);
        let mut raw = running.raw();
        raw.enter("disk");
        let mut stream = raw.stream.try_clone().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut rest = &script[..];
                while !rest.is_empty() {
                    let count = random.usize(1..=rest.len().min(largest));
                    std::io::Write::write_all(&mut stream, &rest[..count]).unwrap();
                    rest = &rest[count..];
                }
            });
            for _ in 0..replies {
                raw.simple_reply();
            }
        });
        images.push(disk.snapshot());
    }
    assert!(images.windows(2).all(|pair| pair[0] == pair[1]));
    assert!(images[0].iter().any(|byte| *byte != 0));
}
