//! A connection that breaks at a certain byte.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// Carries the bytes of one connection both ways, until it is cut or an end closes.
#[derive(Clone)]
pub(crate) struct Link(Arc<Inner>);

struct Inner {
    ends: [UnixStream; 2],
    /// Bytes of the stream, from the source on, that were carried; and how many may be.
    progress: Mutex<Progress>,
    is_slow: AtomicBool,
}

struct Progress {
    carried: u64,
    limit: u64,
}

impl Link {
    /// The source's end and the destination's.
    pub(crate) fn new(source: UnixStream, destination: UnixStream) -> Self {
        let link = Self(Arc::new(Inner {
            ends: [source, destination],
            progress: Mutex::new(Progress {
                carried: 0,
                limit: u64::MAX,
            }),
            is_slow: AtomicBool::new(false),
        }));
        let [forth, back] = [link.clone(), link.clone()];
        thread::spawn(move || forth.carry_stream());
        thread::spawn(move || back.carry_answers());
        link
    }

    /// Cut it when `bytes` more of the stream were carried.
    pub(crate) fn cut_after(&self, bytes: u64) {
        let mut progress = self.0.progress.lock().expect("no panic");
        progress.limit = progress.limit.min(progress.carried + bytes);
        let is_over = progress.limit == progress.carried;
        drop(progress);
        if is_over {
            self.cut();
        }
    }

    /// From now on it carries no more than 16 KiB in a millisecond.
    pub(crate) fn slow_down(&self) {
        self.0.is_slow.store(true, Ordering::Relaxed);
    }

    /// Bytes of the stream so far.
    pub(crate) fn carried(&self) -> u64 {
        self.0.progress.lock().expect("no panic").carried
    }

    fn carry_stream(&self) {
        let [mut source, mut destination] = [&self.0.ends[0], &self.0.ends[1]];
        let mut piece = [0; 16 << 10];
        while let Ok(read @ 1..) = source.read(&mut piece) {
            let mut progress = self.0.progress.lock().expect("no panic");
            let room = progress.limit - progress.carried;
            let length = read.min(usize::try_from(room).unwrap_or(usize::MAX));
            progress.carried += length as u64;
            let is_over = progress.limit == progress.carried;
            drop(progress);
            if destination.write_all(&piece[..length]).is_err() || is_over {
                break;
            }
            if self.0.is_slow.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(1));
            }
        }
        self.cut();
    }

    fn carry_answers(&self) {
        let [mut source, mut destination] = [&self.0.ends[0], &self.0.ends[1]];
        let mut piece = [0; 4 << 10];
        while let Ok(length @ 1..) = destination.read(&mut piece) {
            if source.write_all(&piece[..length]).is_err() {
                break;
            }
        }
        self.cut();
    }

    fn cut(&self) {
        for end in &self.0.ends {
            // It may be closed already.
            let _ = end.shutdown(Shutdown::Both);
        }
    }
}
