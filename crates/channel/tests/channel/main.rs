//! Channels of every kind, inside one process.

mod commands;
mod files;
mod halves;
mod sockets;

use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::thread::ScopedJoinHandle;

use vmferry_channel::{Channel, Direction, Reader, Stop, Uri, Writer};

/// A random generator whose seed is printed and can be given again as `VMFERRY_SEED`.
fn rng() -> fastrand::Rng {
    let seed = std::env::var("VMFERRY_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| fastrand::u64(..));
    println!("VMFERRY_SEED={seed}");
    fastrand::Rng::with_seed(seed)
}

fn stop() -> Stop {
    Stop::new().unwrap()
}

fn uri(text: &str) -> Uri {
    text.parse().unwrap()
}

fn halves(channel: Channel) -> (Reader, Writer) {
    match channel {
        Channel::TwoWay(reader, writer) => (reader, writer),
        other => panic!("not two-way: {other:?}"),
    }
}

/// The reading half of `stop` and the writing half of a stop event of its own.
fn pipe(read_stop: &Stop, write_stop: &Stop) -> (Reader, Writer) {
    let (input, output) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    (reader_of(input, read_stop), writer_of(output, write_stop))
}

fn reader_of(fd: OwnedFd, stop: &Stop) -> Reader {
    let channel = Channel::from_fd(fd, Direction::Incoming, "test input", stop).unwrap();
    channel.split().0.unwrap()
}

fn writer_of(fd: OwnedFd, stop: &Stop) -> Writer {
    let channel = Channel::from_fd(fd, Direction::Outgoing, "test output", stop).unwrap();
    channel.split().1.unwrap()
}

fn read_to_end(reader: &mut Reader) -> Vec<u8> {
    let mut all = Vec::new();
    let mut buf = vec![0; 64 * 1024];
    loop {
        match reader.read(&mut buf).unwrap() {
            0 => return all,
            got => all.extend_from_slice(&buf[..got]),
        }
    }
}

/// Start `work` in a thread, wait until the kernel has put that thread to sleep, then trigger.
/// Answers what `work` answered.
fn stop_while_blocked<T: Send>(stop: &Stop, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let (sender, receiver) = mpsc::channel();
        let worker = scope.spawn(move || {
            sender.send(rustix::thread::gettid()).unwrap();
            work()
        });
        until_asleep(receiver.recv().unwrap(), &worker);
        assert!(!worker.is_finished());
        stop.trigger();
        worker.join().unwrap()
    })
}

fn until_asleep<T>(thread: rustix::thread::Pid, worker: &ScopedJoinHandle<'_, T>) {
    let path = format!("/proc/self/task/{}/syscall", thread.as_raw_nonzero());
    // Number and arguments of the system call that the thread sleeps in, or "running".
    let polls = [libc_poll(), libc_ppoll()];
    while !worker.is_finished() {
        let call = std::fs::read_to_string(&path).unwrap_or_default();
        if call
            .split(' ')
            .next()
            .is_some_and(|call| polls.contains(&call))
        {
            return;
        }
        std::thread::yield_now();
    }
}

fn libc_poll() -> &'static str {
    if cfg!(target_arch = "x86_64") {
        "7"
    } else {
        "73"
    }
}

fn libc_ppoll() -> &'static str {
    if cfg!(target_arch = "x86_64") {
        "271"
    } else {
        "73"
    }
}
