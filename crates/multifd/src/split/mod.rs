//! One plain stream in, many connections out.

mod channel;
mod lanes;
mod main_channel;
mod sent;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::Shutdown;
use vmferry_channel::{Channel, Stop, Uri};

use crate::compression::Compression;
use crate::error::MultifdError;
use crate::flush::Flush;
use crate::sockets::{PlainStream, duplicate, halves, host};
use lanes::Lanes;
use main_channel::MainChannel;

/// How to send to a destination.
#[derive(Clone, Debug)]
pub struct SplitOptions {
    /// Number of channels besides the main connection, 1 to 255.
    pub channels: u8,
    /// How pages are compressed.
    pub compression: Compression,
    /// How often channels are synchronised; `None`: as the machine type says ([`Flush::of_machine`]).
    pub flush: Option<Flush>,
    /// UUID of the destination's guest, which refuses any other. `None`: the one in the stream's
    /// configuration, or zeros if there is none, which is right for guests without a UUID.
    pub uuid: Option<[u8; 16]>,
}

impl SplitOptions {
    /// So many channels, the rest as the stream says.
    #[must_use]
    pub fn new(channels: u8, compression: Compression) -> Self {
        Self {
            channels,
            compression,
            flush: None,
            uuid: None,
        }
    }
}

/// A migration that goes over several connections.
#[derive(Debug)]
pub struct Split {
    /// Where the plain stream is written, a precopy; and the return path. Its end is told by closing or
    /// shutting down the writer. When something failed, writes fail; [`Splitting::finish`] says why.
    pub channel: Channel,
    /// The threads behind it.
    pub splitting: Splitting,
}

impl Split {
    /// Close the channel, then [`Splitting::finish`].
    pub fn finish(self) -> Result<(), MultifdError> {
        drop(self.channel);
        self.splitting.finish()
    }
}

/// The threads that spread a plain stream: one for each connection. Dropped, they are stopped.
pub struct Splitting {
    lanes: Arc<Lanes>,
    thread: Option<JoinHandle<()>>,
    /// Our end of the plain stream.
    plain: OwnedFd,
    patience: Duration,
}

impl std::fmt::Debug for Splitting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Splitting").finish_non_exhaustive()
    }
}

impl Splitting {
    /// Whoever writes the plain stream is done with it: wait until all of it was given to the kernel, as
    /// long as the destination takes some of it within the patience that it was connected with, and `stop`
    /// is not triggered.
    ///
    /// # Errors
    /// The first thing that failed. No error does not mean that the stream was whole, which its writer
    /// knows.
    pub fn finish(mut self) -> Result<(), MultifdError> {
        // What was written is still read.
        let _ = rustix::net::shutdown(&self.plain, Shutdown::Read);
        self.lanes.drain(self.patience);
        let thread = self.thread.take().map(JoinHandle::join);
        match self.lanes.outcome() {
            Ok(()) if matches!(thread, Some(Err(_))) => Err(MultifdError::Panicked),
            outcome => outcome,
        }
    }
}

impl Drop for Splitting {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.lanes.fail(MultifdError::Abandoned);
            let _ = thread.join();
        }
    }
}

/// Tells the others that a thread has panicked: they would wait for it.
pub(crate) struct PanicGuard(pub(crate) Arc<Lanes>);

impl Drop for PanicGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail(MultifdError::Panicked);
        }
    }
}

/// Connect to a destination, within `patience`. The channels are connected when the stream's configuration
/// was written, again within `patience`.
pub fn connect(
    uri: &Uri,
    options: SplitOptions,
    stop: &Stop,
    patience: Duration,
) -> Result<Split, MultifdError> {
    if options.channels == 0 {
        return Err(MultifdError::NoChannels);
    }
    let main = vmferry_channel::connect(uri, stop, patience).map_err(MultifdError::connect)?;
    let plain = PlainStream::new("the writer of the plain stream", main.peer(), stop)?;
    let sockets = vec![plain.reading, duplicate(&main)?];
    let plain_twin = duplicate(sockets.first().unwrap_or(&plain.writing))?;
    let lanes = Arc::new(Lanes::new(options.channels, sockets));
    let (main_reader, main_writer) = halves(main, stop)?;
    lanes.count(main_writer.counter());
    let main = MainChannel::new(
        Arc::clone(&lanes),
        (plain.reader, main_writer),
        options,
        uri.clone(),
        patience,
    );
    let guard = PanicGuard(Arc::clone(&lanes));
    let thread = std::thread::Builder::new()
        .name("multifd-main".to_owned())
        .spawn(move || {
            let _guard = guard;
            main.run();
        });
    Ok(Split {
        channel: Channel::TwoWay(main_reader, plain.writer),
        splitting: Splitting {
            lanes,
            thread: Some(thread.map_err(host("start"))?),
            plain: plain_twin,
            patience,
        },
    })
}
