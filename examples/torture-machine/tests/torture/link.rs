//! The connection between two machines, which breaks at one certain byte.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

/// When it breaks, counted from the moment when that is said.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Cut {
    /// After so many bytes of the stream.
    Forth(u64),
    /// After so many bytes of answers.
    Back(u64),
    Never,
}

/// Carries one connection from a socket of its own to another.
pub(crate) struct Link {
    path: PathBuf,
    forth: Arc<AtomicU64>,
    back: Arc<AtomicU64>,
}

impl Link {
    pub(crate) fn new(path: PathBuf, target: &Path, cut: Cut) -> Self {
        let listener = UnixListener::bind(&path).expect("a socket");
        let target = target.to_owned();
        let link = Self {
            path,
            forth: Arc::default(),
            back: Arc::default(),
        };
        link.cut(cut);
        let (forth, back) = (Arc::clone(&link.forth), Arc::clone(&link.back));
        thread::spawn(move || {
            // Either end may be dead already.
            let Ok((source, _)) = listener.accept() else {
                return;
            };
            let Ok(destination) = UnixStream::connect(target) else {
                return;
            };
            thread::scope(|scope| {
                scope.spawn(|| pump(&source, &destination, &forth));
                pump(&destination, &source, &back);
            });
        });
        link
    }

    /// Bytes of answers that went through, if it was never to break.
    pub(crate) fn answered(&self) -> u64 {
        u64::MAX - self.back.load(Ordering::SeqCst)
    }

    pub(crate) fn uri(&self) -> String {
        format!("unix:{}", self.path.display())
    }

    pub(crate) fn cut(&self, cut: Cut) {
        let (forth, back) = match cut {
            Cut::Forth(bytes) => (bytes, u64::MAX),
            Cut::Back(bytes) => (u64::MAX, bytes),
            Cut::Never => (u64::MAX, u64::MAX),
        };
        self.forth.store(forth, Ordering::SeqCst);
        self.back.store(back, Ordering::SeqCst);
    }
}

/// Carry bytes one way, as long as some are left.
fn pump(mut from: &UnixStream, mut to: &UnixStream, left: &AtomicU64) {
    let mut piece = vec![0; 64 << 10];
    loop {
        let length = match from.read(&mut piece) {
            Ok(length @ 1..) => length,
            // This side has no more to say; the other may.
            Ok(0) => return drop(to.shutdown(Shutdown::Write)),
            Err(_) => break,
        };
        let take = |left: u64| Some(left.saturating_sub(length as u64));
        let before = left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take);
        let passed = length.min(before.map_or(0, |left| left.try_into().unwrap_or(length)));
        if to.write_all(&piece[..passed]).is_err() || passed < length {
            break;
        }
    }
    for end in [from, to] {
        let _ = end.shutdown(Shutdown::Both);
    }
}
