//! How fast an image is, in one thread or several: `measure FILE WORK THREADS COUNT`, where WORK is
//! `write`, `read` (1 MiB, one after another), `random-write` or `random-read` (4 KiB, with a
//! stride of 1 MiB and 4 KiB that comes round). The image must exist. Prints seconds.

use std::error::Error;
use std::thread;
use std::time::Instant;

use vmferry_disk::BlockDevice;
use vmferry_qcow2::{ChainOptions, Qcow2Disk, open};

fn run(disk: &Qcow2Disk, work: &str, first: u64, count: u64, step: u64) {
    let size = if work.starts_with("random") {
        4096
    } else {
        1 << 20
    };
    let stride = if size == 4096 { size + (1 << 20) } else { size };
    let mut buf = vec![0x5A; size as usize];
    let length = disk.disk_bytes() / size * size;
    for number in (first..count).step_by(step as usize) {
        let offset = number * stride % length;
        let offset = offset.min(length - size);
        let result = match work.ends_with("read") {
            true => disk.read_at(&mut buf, offset),
            false => disk.write_at(&buf, offset),
        };
        result.expect("the disk works");
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, work, threads, count] = arguments.as_slice() else {
        return Err("usage: measure FILE WORK THREADS COUNT".into());
    };
    let (threads, count) = (threads.parse::<u64>()?, count.parse::<u64>()?);
    let options = ChainOptions {
        read_only: false,
        lock: true,
    };
    let disk = open(path, options)?;
    let start = Instant::now();
    thread::scope(|scope| {
        for first in 0..threads {
            let disk = &disk;
            scope.spawn(move || run(disk, work, first, count, threads));
        }
    });
    println!("{:.3} s without the flush", start.elapsed().as_secs_f64());
    disk.flush()?;
    println!("{:.3} s", start.elapsed().as_secs_f64());
    disk.close()?;
    Ok(())
}
