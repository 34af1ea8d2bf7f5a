//! The half that is written.

use std::io::IoSlice;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use rustix::event::PollFlags;
use rustix::io::{Errno, ReadWriteFlags};
use rustix::net::{SendAncillaryBuffer, SendFlags, Shutdown};

use crate::channel::Kind;
use crate::command::Command;
use crate::wait::Patience;
use crate::{ChannelError, Counter, RateLimit, Result, Stop};

const OPERATION: &str = "write to";

/// At most this much is given to the kernel at once, so that a stop event is noticed soon even by
/// a half that never has to wait.
pub(crate) const PIECE_BYTES_MAX: usize = 4 << 20;

/// Slices given to the kernel at once.
const SLICES_MAX: usize = 32;

/// A pipe that polls writable takes this much without waiting (PIPE_BUF of Linux).
const PIPE_PIECE_BYTES: usize = 4096;

/// Offset argument that means "where the file stands".
pub(crate) const CURRENT_POSITION: u64 = u64::MAX;

/// The half of a channel that is written. Waits only together with its stop event.
///
/// After an error it is unknown how much of the data went out.
#[derive(Debug)]
pub struct Writer {
    sink: Sink,
    peer: String,
    stop: Stop,
    counter: Counter,
    rate_limit: Option<RateLimit>,
}

#[derive(Debug)]
pub(crate) enum Sink {
    Socket(Arc<OwnedFd>),
    File {
        fd: Arc<OwnedFd>,
        /// The folder of a file that we have created, whose entry has to be durable too.
        directory: Option<OwnedFd>,
    },
    Pipe {
        fd: Arc<OwnedFd>,
        /// The kernel can write this without waiting (RWF_NOWAIT).
        nowait: bool,
    },
    /// The standard input of a command. Fields drop in order: the pipe closes first.
    Command {
        pipe: Box<Sink>,
        command: Arc<Command>,
    },
    /// After [`Writer::shutdown`].
    Shut,
}

impl Writer {
    pub(crate) fn new(sink: Sink, peer: String, stop: &Stop) -> Self {
        Self {
            sink,
            peer,
            stop: stop.clone(),
            counter: Counter::default(),
            rate_limit: None,
        }
    }

    /// What messages call the other side.
    #[must_use]
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// The stop event of this half.
    #[must_use]
    pub fn stop(&self) -> &Stop {
        &self.stop
    }

    /// Counts the bytes that were given to the kernel.
    #[must_use]
    pub fn counter(&self) -> &Counter {
        &self.counter
    }

    /// Obey this limit from now on; keep a clone to change it.
    pub fn set_rate_limit(&mut self, limit: RateLimit) {
        self.rate_limit = Some(limit);
    }

    /// Give all of `bytes` to the kernel.
    pub fn write_all(&mut self, bytes: &[u8]) -> Result<()> {
        self.write_vectored_all_until(&[IoSlice::new(bytes)], None)
    }

    /// [`Writer::write_all`], but [`ChannelError::TimedOut`] if it is not done at `deadline`.
    pub fn write_all_until(&mut self, bytes: &[u8], deadline: Option<Instant>) -> Result<()> {
        self.write_vectored_all_until(&[IoSlice::new(bytes)], deadline)
    }

    /// Give all slices to the kernel, in order.
    pub fn write_vectored_all(&mut self, slices: &[IoSlice<'_>]) -> Result<()> {
        self.write_vectored_all_until(slices, None)
    }

    /// [`Writer::write_vectored_all`] with a deadline.
    pub fn write_vectored_all_until(
        &mut self,
        slices: &[IoSlice<'_>],
        deadline: Option<Instant>,
    ) -> Result<()> {
        let patience = Patience::new(OPERATION, &self.peer, &self.stop, deadline);
        let mut cursor = Cursor::new(slices);
        while !cursor.is_at_end() {
            patience.check()?;
            let piece_bytes = match &self.rate_limit {
                Some(limit) => allowed_bytes(limit, &patience)?,
                None => PIECE_BYTES_MAX,
            };
            let mut storage = [IoSlice::new(&[]); SLICES_MAX];
            let written = self
                .sink
                .write(cursor.window(piece_bytes, &mut storage), &patience)?;
            cursor.advance(written);
            self.counter.add(written);
            if let Some(limit) = &self.rate_limit {
                limit.spent(written as u64);
            }
        }
        Ok(())
    }

    /// Tell the other side that nothing follows: half-closes a socket, closes a pipe. Later writes
    /// fail. The reader half is not affected. A file is only closed; see [`Writer::sync`].
    pub fn shutdown(&mut self) -> Result<()> {
        match std::mem::replace(&mut self.sink, Sink::Shut) {
            Sink::Socket(fd) => match rustix::net::shutdown(&*fd, Shutdown::Write) {
                // The other side was faster.
                Ok(()) | Err(Errno::NOTCONN) => Ok(()),
                Err(errno) => Err(ChannelError::io("shut down", &self.peer, errno)),
            },
            _ => Ok(()),
        }
    }

    /// [`Writer::shutdown`], then wait until a command at the other end has ended, at most until
    /// `deadline`, and fail if it failed. Somebody has to read what the command writes meanwhile.
    pub fn finish(mut self, deadline: Option<Instant>) -> Result<()> {
        let command = match &self.sink {
            Sink::Command { command, .. } => Some(Arc::clone(command)),
            _ => None,
        };
        self.shutdown()?;
        match command {
            Some(command) => {
                command.check_end(&Patience::new("finish", &self.peer, &self.stop, deadline))
            }
            None => Ok(()),
        }
    }

    /// Make what was written to a file durable, and its directory entry if we created it. Nothing
    /// to do for sockets and pipes.
    pub fn sync(&mut self) -> Result<()> {
        if let Sink::File { fd, directory } = &mut self.sink {
            let failed = |errno| ChannelError::io("sync", &self.peer, errno);
            rustix::fs::fsync(&*fd).map_err(failed)?;
            if let Some(directory) = directory {
                rustix::fs::fsync(&*directory).map_err(failed)?;
            }
            *directory = None;
        }
        Ok(())
    }
}

/// Wait until the limit allows at least one byte.
fn allowed_bytes(limit: &RateLimit, patience: &Patience<'_>) -> Result<usize> {
    loop {
        if limit.bytes_per_second().is_none() {
            return Ok(PIECE_BYTES_MAX);
        }
        let now = Instant::now();
        match limit.allowance(now) {
            0 => patience.sleep_until(limit.next_slice(now))?,
            bytes => {
                return Ok(usize::try_from(bytes)
                    .map_or(PIECE_BYTES_MAX, |bytes| bytes.min(PIECE_BYTES_MAX)));
            }
        }
    }
}

impl Sink {
    pub(crate) fn over(kind: Kind, fd: Arc<OwnedFd>) -> Self {
        match kind {
            Kind::Socket => Self::Socket(fd),
            Kind::File => Self::File {
                fd,
                directory: None,
            },
            Kind::Pipe => Self::Pipe { fd, nowait: true },
        }
    }

    fn write(&mut self, slices: &[IoSlice<'_>], patience: &Patience<'_>) -> Result<usize> {
        if let Self::Command { pipe, command } = self {
            return pipe.write(slices, patience).map_err(|error| match error {
                // That it has failed explains more than that its input is closed.
                ChannelError::Closed { .. } => {
                    command.check_after_end(patience).err().unwrap_or(error)
                }
                error => error,
            });
        }
        loop {
            patience.check()?;
            let (fd, outcome) = match self {
                Self::Socket(fd) => {
                    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                    let mut no_control = SendAncillaryBuffer::default();
                    let outcome = rustix::net::sendmsg(&*fd, slices, &mut no_control, flags);
                    (fd, outcome)
                }
                Self::File { fd, .. } => {
                    let outcome = rustix::io::writev(&*fd, slices);
                    (fd, outcome)
                }
                Self::Pipe { fd, nowait: true } => {
                    let outcome = rustix::io::pwritev2(
                        &*fd,
                        slices,
                        CURRENT_POSITION,
                        ReadWriteFlags::NOWAIT,
                    );
                    (fd, outcome)
                }
                Self::Pipe { fd, nowait: false } => {
                    patience.wait(fd.as_fd(), PollFlags::OUT)?;
                    let piece = slices.first().map_or(&[][..], |slice| slice);
                    let piece = &piece[..piece.len().min(PIPE_PIECE_BYTES)];
                    let outcome = rustix::io::write(&*fd, piece);
                    (fd, outcome)
                }
                Self::Command { .. } | Self::Shut => return Err(patience.failed(Errno::PIPE)),
            };
            match outcome {
                Ok(0) => return Err(patience.failed(Errno::NOSPC)),
                Ok(written) => return Ok(written),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => patience.wait(fd.as_fd(), PollFlags::OUT)?,
                Err(errno) if lacks_nowait(errno) && self.forget_nowait() => {}
                Err(errno) => return Err(patience.failed(errno)),
            }
        }
    }

    /// True if there is another way to try.
    fn forget_nowait(&mut self) -> bool {
        match self {
            Self::Pipe { nowait, .. } => std::mem::replace(nowait, false),
            _ => false,
        }
    }
}

/// How kernels say that a descriptor cannot be used with RWF_NOWAIT.
pub(crate) fn lacks_nowait(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::SPIPE
    )
}

/// A position in a list of slices.
struct Cursor<'a> {
    slices: &'a [IoSlice<'a>],
    index: usize,
    offset: usize,
}

impl<'a> Cursor<'a> {
    fn new(slices: &'a [IoSlice<'a>]) -> Self {
        let mut cursor = Self {
            slices,
            index: 0,
            offset: 0,
        };
        cursor.advance(0);
        cursor
    }

    fn is_at_end(&self) -> bool {
        self.index >= self.slices.len()
    }

    /// The next slices, at most `bytes` in all; never empty before the end if `bytes` is not 0.
    fn window<'w>(
        &self,
        mut bytes: usize,
        storage: &'w mut [IoSlice<'a>; SLICES_MAX],
    ) -> &'w [IoSlice<'a>] {
        let mut used = 0;
        let mut offset = self.offset;
        for (slot, slice) in storage.iter_mut().zip(&self.slices[self.index..]) {
            let rest = &slice[offset..];
            let rest = &rest[..rest.len().min(bytes)];
            if bytes == 0 {
                break;
            }
            *slot = IoSlice::new(rest);
            bytes -= rest.len();
            used += 1;
            offset = 0;
        }
        &storage[..used]
    }

    /// Step over `bytes`, and over slices that are empty.
    fn advance(&mut self, bytes: usize) {
        self.offset += bytes;
        while let Some(slice) = self.slices.get(self.index)
            && self.offset >= slice.len()
        {
            self.offset -= slice.len();
            self.index += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Reader;
    use crate::reader::Source;

    #[test]
    fn a_cursor_gives_every_byte_once_in_windows_of_any_size() {
        let mut rng = crate::test_rng();
        for _ in 0..500 {
            let data: Vec<Vec<u8>> = (0..rng.usize(0..2 * SLICES_MAX))
                .map(|_| (0..rng.usize(0..6)).map(|_| rng.u8(..)).collect())
                .collect();
            let slices: Vec<IoSlice<'_>> = data.iter().map(|data| IoSlice::new(data)).collect();
            let mut cursor = Cursor::new(&slices);
            let mut seen = Vec::new();
            while !cursor.is_at_end() {
                let limit = rng.usize(1..40);
                let mut storage = [IoSlice::new(&[]); SLICES_MAX];
                let window: Vec<u8> = cursor
                    .window(limit, &mut storage)
                    .iter()
                    .flat_map(|slice| slice.to_vec())
                    .collect();
                assert!(!window.is_empty() && window.len() <= limit);
                let written = rng.usize(1..=window.len());
                seen.extend_from_slice(&window[..written]);
                cursor.advance(written);
            }
            assert_eq!(seen, data.concat());
        }
    }

    /// Both ends of a pipe on a kernel without RWF_NOWAIT for pipes.
    fn polite_pipe(stop: &Stop) -> (Reader, Writer) {
        let (input, output) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let source = Source::Pipe {
            fd: Arc::new(input),
            nowait: false,
        };
        let sink = Sink::Pipe {
            fd: Arc::new(output),
            nowait: false,
        };
        (
            Reader::new(source, "input".to_owned(), stop),
            Writer::new(sink, "output".to_owned(), stop),
        )
    }

    #[test]
    fn a_pipe_that_must_be_polled_first_never_blocks_and_loses_nothing() {
        let mut rng = crate::test_rng();
        let mut data = vec![0; 500_000];
        rng.fill(&mut data);
        let (mut reader, mut writer) = polite_pipe(&Stop::new().unwrap());
        let past = Some(Instant::now());
        let error = reader.read_until(&mut [0; 1], past).unwrap_err();
        assert!(matches!(error, ChannelError::TimedOut { .. }), "{error}");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for piece in data.chunks(rng.usize(1..20_000)) {
                    writer.write_all(piece).unwrap();
                }
                drop(writer);
            });
            let mut seen = vec![0; data.len()];
            for piece in seen.chunks_mut(777) {
                reader.read_exact(piece).unwrap();
            }
            assert!(seen == data);
            assert_eq!(reader.read(&mut [0; 1]).unwrap(), 0);
        });
        // With nobody reading, a full pipe ends in the deadline, not in a write that hangs.
        let (_reader, mut writer) = polite_pipe(&Stop::new().unwrap());
        let error = writer.write_all_until(&[0; 1 << 20], past).unwrap_err();
        assert!(matches!(error, ChannelError::TimedOut { .. }), "{error}");
        assert!(writer.counter().bytes() > 0);
    }

    #[test]
    fn a_descriptor_that_lacks_nowait_is_used_all_the_same() {
        let mut sink = Sink::over(
            Kind::Pipe,
            Arc::new(std::fs::File::create("/dev/null").unwrap().into()),
        );
        assert!(sink.forget_nowait());
        assert!(!sink.forget_nowait(), "an error after that is final");
    }
}
