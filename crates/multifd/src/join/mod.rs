//! Many connections in, one plain stream out.

mod channel;
mod junction;
mod main_channel;

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use vmferry_channel::{Channel, Listener, Stop};

use crate::compression::Compression;
use crate::error::MultifdError;
use crate::gather::{Gathered, gather};
use crate::sockets::{PlainStream, duplicate, halves, host};
use junction::Junction;
use main_channel::MainChannel;

/// How long all connections may take to come after the first.
const PATIENCE: Duration = Duration::from_secs(30);

/// What to expect of a source.
#[derive(Clone, Debug)]
pub struct JoinOptions {
    /// Number of channels besides the main connection, 1 to 255.
    pub channels: u8,
    /// How it compresses pages.
    pub compression: Compression,
    /// UUID of the guest; `None` takes any, but the same from all channels.
    pub uuid: Option<[u8; 16]>,
    /// How long all connections may take to come after the first, and how long a connection may say
    /// nothing.
    pub patience: Duration,
}

impl JoinOptions {
    /// So many channels, any guest, 30 s of patience.
    #[must_use]
    pub fn new(channels: u8, compression: Compression) -> Self {
        Self {
            channels,
            compression,
            uuid: None,
            patience: PATIENCE,
        }
    }
}

/// A migration that comes over several connections.
#[derive(Debug)]
pub struct Joined {
    /// The plain stream, and the way back to the source. The stream ends early when something failed;
    /// [`Joining::finish`] says what.
    pub channel: Channel,
    /// The threads behind it.
    pub joining: Joining,
}

impl Joined {
    /// Close the channel, then [`Joining::finish`].
    pub fn finish(self) -> Result<(), MultifdError> {
        drop(self.channel);
        self.joining.finish()
    }
}

/// The threads that put a plain stream together: one for each connection. Dropped, they are stopped.
pub struct Joining {
    junction: Arc<Junction>,
    threads: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Joining {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Joining").finish_non_exhaustive()
    }
}

impl Joining {
    /// Whoever reads the plain stream is done with it: stop what still runs, and say what went wrong.
    /// What the channel's writer was given before is still delivered.
    ///
    /// # Errors
    /// The first thing that failed. No error does not mean that the stream was whole, which its reader
    /// has seen: it may have been called before all pages were through.
    pub fn finish(mut self) -> Result<(), MultifdError> {
        let has_panicked = self.end();
        match self.junction.outcome() {
            Ok(()) if has_panicked => Err(MultifdError::Panicked),
            outcome => outcome,
        }
    }

    /// True if a thread has panicked.
    fn end(&mut self) -> bool {
        self.junction.give_up();
        let ends: Vec<_> = self.threads.drain(..).map(JoinHandle::join).collect();
        ends.iter().any(Result::is_err)
    }
}

impl Drop for Joining {
    fn drop(&mut self) {
        self.end();
    }
}

/// Wait for all connections of a migration, in any order, and join them into one plain stream.
///
/// Waits for the first without end (but for `stop`), for the others as long as the options say. Strangers
/// that connect meanwhile are sent away. While the migration is set up, the listener is looked at for
/// channels that the source has in excess: their pages would be missing.
pub fn accept(
    listener: &Listener,
    options: &JoinOptions,
    stop: &Stop,
) -> Result<Joined, MultifdError> {
    if options.channels == 0 {
        return Err(MultifdError::NoChannels);
    }
    let gathered = gather(listener, options, stop)?;
    let listener = listener.try_clone().map_err(host("duplicate"))?;
    join(gathered, listener, options, stop)
}

fn join(
    gathered: Gathered,
    listener: Listener,
    options: &JoinOptions,
    stop: &Stop,
) -> Result<Joined, MultifdError> {
    let plain = PlainStream::new(gathered.main.peer(), "the reader of the plain stream", stop)?;
    let mut sockets = vec![plain.writing];
    for socket in [&gathered.main].into_iter().chain(&gathered.channels) {
        sockets.push(duplicate(socket)?);
    }
    let count = gathered.channels.len();
    let junction = Arc::new(Junction::new(plain.writer, sockets, count));
    let mut joining = Joining {
        junction: Arc::clone(&junction),
        threads: Vec::new(),
    };
    let (main_reader, main_writer) = halves(gathered.main, stop)?;
    let main = MainChannel::new(
        Arc::clone(&junction),
        main_reader,
        gathered.main_bytes,
        listener,
        (gathered.uuid, options.channels),
    );
    joining.spawn("multifd-main".to_owned(), move || main.run())?;
    for (number, socket) in (0..options.channels).zip(gathered.channels) {
        let (reader, _) = halves(socket, stop)?;
        let junction = Arc::clone(&junction);
        let channel = channel::Channel::new(junction, reader, number, options.compression);
        joining.spawn(format!("multifd-{number}"), move || channel.run())?;
    }
    Ok(Joined {
        channel: Channel::TwoWay(plain.reader, main_writer),
        joining,
    })
}

impl Joining {
    fn spawn(
        &mut self,
        name: String,
        run: impl FnOnce() + Send + 'static,
    ) -> Result<(), MultifdError> {
        let guard = PanicGuard(Arc::clone(&self.junction));
        let thread = std::thread::Builder::new().name(name);
        let thread = thread.spawn(move || {
            let _guard = guard;
            run();
        });
        self.threads.push(thread.map_err(host("start a thread"))?);
        Ok(())
    }
}

/// Tells the others that a thread has panicked: they would wait for it.
struct PanicGuard(Arc<Junction>);

impl Drop for PanicGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail(MultifdError::Panicked);
        }
    }
}
