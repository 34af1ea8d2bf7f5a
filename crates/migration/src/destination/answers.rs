//! The way back to the source, which several threads use.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmferry_channel::{ChannelError, Stop, Writer};
use vmferry_stream::Name;
use vmferry_stream::return_path::ReturnMessage;

/// How long an answer may take to leave.
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);

/// The way back, once the source has opened it.
pub(super) struct Answers {
    line: Mutex<Line>,
    changed: Condvar,
}

struct Line {
    writer: Option<Writer>,
    /// Breaks off the connection that `writer` belongs to.
    stop: Stop,
    open: bool,
    /// Nothing more will be said, over no connection.
    ended: bool,
    /// The source can be asked for pages.
    takes_requests: bool,
    /// The block of the last request on this connection.
    last_block: Option<Name>,
}

/// What became of a request for pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    Sent,
    /// There is no connection that could take it.
    NotNow,
}

impl Answers {
    pub(super) fn new(writer: Option<Writer>, stop: Stop) -> Self {
        Self {
            line: Mutex::new(Line {
                writer,
                stop,
                open: false,
                ended: false,
                takes_requests: false,
                last_block: None,
            }),
            changed: Condvar::new(),
        }
    }

    /// The source listens.
    pub(super) fn open(&self) {
        self.lock().open = true;
    }

    pub(super) fn is_open(&self) -> bool {
        self.lock().open
    }

    /// Nothing can be said any more, or must not.
    pub(super) fn close(&self) {
        let mut line = self.lock();
        line.writer = None;
        line.open = false;
        line.takes_requests = false;
    }

    /// As [`Answers::close`], for ever, and break the connection off.
    pub(super) fn end(&self) {
        self.close();
        let mut line = self.lock();
        line.ended = true;
        line.stop.trigger();
    }

    /// Another connection, whose source listens already. It is broken off if nothing more is said.
    pub(super) fn reconnect(&self, writer: Writer, stop: Stop) {
        let mut line = self.lock();
        if line.ended {
            stop.trigger();
        }
        *line = Line {
            writer: (!line.ended).then_some(writer),
            stop,
            open: !line.ended,
            ended: line.ended,
            takes_requests: false,
            last_block: None,
        };
    }

    /// From now on pages can be asked for. The connection is broken off where they cannot.
    pub(super) fn take_requests(&self) {
        self.lock().takes_requests = true;
        self.changed.notify_all();
    }

    /// Nothing is sent, and that is no error, as long as nobody listens.
    pub(super) fn send(&self, message: &ReturnMessage) -> Result<(), ChannelError> {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        self.lock().send(&bytes)
    }

    /// A bitmap of the pages of a block that are here.
    pub(super) fn send_bitmap(&self, block: Name, bitmap: &[u8]) -> Result<(), ChannelError> {
        let bytes = u32::try_from(bitmap.len()).unwrap_or(u32::MAX);
        let mut message = Vec::new();
        ReturnMessage::ReceivedBitmap { block, bytes }.encode(&mut message);
        message.extend_from_slice(bitmap);
        ReturnMessage::ReceivedBitmapEnd.encode(&mut message);
        self.lock().send(&message)
    }

    /// Send, if that is possible; true if there was somebody to hear it.
    pub(super) fn say(&self, message: &ReturnMessage) -> bool {
        self.is_open() && self.send(message).is_ok()
    }

    /// Ask for pages. If the connection cannot take it, it is broken off: whoever reads it sees to
    /// the next.
    pub(super) fn request(&self, block: &Name, start_bytes: u64, length_bytes: u32) -> Asked {
        let mut line = self.lock();
        if !line.takes_requests || line.writer.is_none() {
            return Asked::NotNow;
        }
        let is_same = line.last_block.as_ref() == Some(block);
        let mut bytes = Vec::new();
        let request = ReturnMessage::RequestPages {
            block: (!is_same).then(|| block.clone()),
            start_bytes,
            length_bytes,
        };
        request.encode(&mut bytes);
        match line.send(&bytes) {
            Ok(()) => {
                line.last_block = Some(block.clone());
                Asked::Sent
            }
            Err(error) => {
                tracing::warn!(%error, "pages could not be asked for");
                line.takes_requests = false;
                line.stop.trigger();
                Asked::NotNow
            }
        }
    }

    /// Wait until pages can be asked for, at most until `deadline`.
    pub(super) fn wait_for_requests(&self, deadline: Instant) {
        let patience = deadline.saturating_duration_since(Instant::now());
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), patience, |line| !line.takes_requests);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    fn lock(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Line {
    fn send(&mut self, bytes: &[u8]) -> Result<(), ChannelError> {
        match self.writer.as_mut().filter(|_| self.open) {
            None => Ok(()),
            Some(writer) => writer.write_all_until(bytes, Some(Instant::now() + ANSWER_PATIENCE)),
        }
    }
}
