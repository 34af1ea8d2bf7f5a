//! How fast an image is, as `qemu-img bench` asks it: `measure FILE read|write SIZE STEP COUNT
//! THREADS`. Request number n has SIZE bytes and begins n times STEP bytes into the disk, from the
//! start again behind its end; THREADS of them are under way at a time. The image must exist. Prints
//! seconds, the flush at the end of a write included.

use std::error::Error;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use vmferry_disk::{BlockDevice, DiskError};
use vmferry_qcow2::{ChainOptions, Qcow2Disk, open};

struct Work {
    writes: bool,
    size: u64,
    step: u64,
    count: u64,
    next: AtomicU64,
}

impl Work {
    fn run(&self, disk: &Qcow2Disk) -> Result<(), DiskError> {
        let mut buf = vec![0x5A; self.size as usize];
        let ends = disk.disk_bytes() - self.size + 1;
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if number >= self.count {
                return Ok(());
            }
            let offset = number * self.step % disk.disk_bytes();
            let offset = if offset < ends { offset } else { 0 };
            match self.writes {
                true => disk.write_at(&buf, offset)?,
                false => disk.read_at(&mut buf, offset)?,
            }
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, kind, size, step, count, threads] = arguments.as_slice() else {
        return Err("usage: measure FILE read|write SIZE STEP COUNT THREADS".into());
    };
    let work = Work {
        writes: kind == "write",
        size: size.parse()?,
        step: step.parse()?,
        count: count.parse()?,
        next: AtomicU64::new(0),
    };
    let options = ChainOptions {
        read_only: !work.writes,
        lock: true,
    };
    let disk = open(path, options)?;
    if work.size > disk.disk_bytes() {
        return Err("the disk is shorter than one request".into());
    }
    let threads: u64 = threads.parse()?;
    let start = Instant::now();
    thread::scope(|scope| {
        let running: Vec<_> = (0..threads)
            .map(|_| scope.spawn(|| work.run(&disk)))
            .collect();
        running
            .into_iter()
            .try_for_each(|thread| thread.join().expect("no thread panics"))
    })?;
    if work.writes {
        disk.flush()?;
    }
    println!("{:.3}", start.elapsed().as_secs_f64());
    disk.close()?;
    Ok(())
}
