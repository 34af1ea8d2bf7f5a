//! Many at the same time.

use std::fs;
use std::sync::Barrier;
use std::thread;

use vmferry_ram::BlockIndex;

use crate::script;
use crate::support::{PAGE, Parked, read_all, rng, rounds};

/// What up to that many processes would do: open an image that has no index, each with its own.
const OPENERS: usize = 8;

#[test]
fn open_an_image_without_an_index() {
    let mut rng = rng();
    for _ in 0..rounds(5) {
        let script = script::random(&mut rng, 2000).finish();
        let parked = Parked::new(&script.bytes);
        let barrier = Barrier::new(OPENERS);
        thread::scope(|scope| {
            for _ in 0..OPENERS {
                scope.spawn(|| {
                    barrier.wait();
                    let image = parked.open().unwrap();
                    assert!(read_all(&image) == script.memory);
                });
            }
        });
        let names = fs::read_dir(parked.folder()).unwrap();
        assert_eq!(names.count(), 2, "the image and one index");
        assert_eq!(parked.open_counting().1, 0);
    }
}

/// While somebody destroys the index again and again.
#[test]
fn open_an_image_whose_index_comes_and_goes() {
    let mut rng = rng();
    let script = script::random(&mut rng, 1000).finish();
    let parked = Parked::in_memory(&script.bytes);
    thread::scope(|scope| {
        let openers: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    for _ in 0..rounds(20) {
                        let image = parked.open().unwrap();
                        assert!(read_all(&image) == script.memory);
                    }
                })
            })
            .collect();
        while openers.iter().any(|opener| !opener.is_finished()) {
            match rng.u8(..3) {
                0 => drop(fs::remove_file(parked.index())),
                1 => fs::write(parked.index(), [7; 5000]).unwrap(),
                _ => thread::yield_now(),
            }
        }
    });
}

#[test]
fn read_from_one_image() {
    let mut rng = rng();
    let script = script::random(&mut rng, 3000).finish();
    let parked = Parked::new(&script.bytes);
    let image = parked.open().unwrap();
    let seed = rng.u64(..);
    thread::scope(|scope| {
        for thread in 0..6 {
            let (image, memory) = (&image, &script.memory);
            scope.spawn(move || {
                let mut rng = fastrand::Rng::with_seed(seed ^ thread);
                let mut into = vec![0; 64 * PAGE];
                for _ in 0..500 {
                    let first = rng.usize(..1300);
                    let count = rng.usize(1..=(1300 - first).min(64));
                    let into = &mut into[..count * PAGE];
                    let found = image.read_pages(BlockIndex(0), first as u64, into).unwrap();
                    for (step, page) in into.chunks(PAGE).enumerate() {
                        let expected = &memory["pc.ram"][first + step];
                        let absent = found.absent >> step & 1 != 0;
                        let zero = found.zero >> step & 1 != 0;
                        match expected {
                            None => assert!(absent && !zero),
                            Some(expected) if zero => assert!(*expected == [0; PAGE]),
                            Some(expected) => assert!(!absent && expected == page),
                        }
                    }
                }
            });
        }
    });
}
