//! A migration into here.
//!
//! The thread that calls [`receive`] owns the load machine and reads the channel. Nothing touches a
//! disk before header and configuration were accepted; from then on the disks' records say
//! `incoming`. Every PING is answered after all that came before it was written and synced, so the
//! PONG of the source's barrier says that the disks are whole and durable.
//!
//! A stream whose `block` section has ended, and that ends itself with EOF and description, is a
//! success, whether or not the source is there to hear it: it has given the disks up by then, or
//! holds them. First the record is made durable, then SHUT 0 is sent, then guests are let in. SHUT 1
//! is sent only where no guest was let in.
//!
//! A machine may come as a postcopy: see `postcopy.rs`.

mod answers;
mod input;
mod landing;
mod loading;
mod postcopy;
mod reconnections;

use std::io;
use std::sync::Arc;
use std::time::Instant;

use vmferry_block_migration::{ApplyError, Coverage, DestinationError};
use vmferry_channel::{Channel, ChannelError};
use vmferry_disk::{InUse, Node};
use vmferry_ram::{IncomingRam, RamDestinationError};
use vmferry_savevm::{LoadError, RegisterError};
use vmferry_stream::Ending;
use vmferry_stream::return_path::ReturnMessage;

use crate::guest::DestinationMachine;
use crate::record::{RecordError, RecordFile};
use crate::status::{Published, State};

use answers::Answers;
use loading::Loading;
pub use reconnections::{NotPaused, Reconnections};

/// A disk that can be filled.
#[derive(Clone, Debug)]
pub struct DestinationDisk {
    /// The disk, with guests' writes held.
    pub node: Arc<Node>,
    /// Where it is written down what became of it.
    pub record: Option<RecordFile>,
}

/// Takes the stream without its disks.
pub trait Rest {
    /// Bytes of the rest, in order.
    ///
    /// # Errors
    /// What the host said.
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Everything has come: make it durable.
    ///
    /// # Errors
    /// What the host said.
    fn finish(&mut self) -> io::Result<()>;
}

/// What to receive.
pub struct DestinationJob<'a> {
    /// The disks to fill.
    pub disks: Vec<DestinationDisk>,
    /// Does every block come, or only what the source has allocated in its top layers?
    pub coverage: Coverage,
    /// Takes the rest of the stream. Without it, a stream that has more than disks is refused.
    pub rest: Option<&'a mut dyn Rest>,
    /// Is a stream of any machine welcome, or only one without a machine?
    pub any_machine: bool,
    /// Do the records stay, for a daemon that is restarted? Else they go when all is over.
    pub keep_records: bool,
}

/// A migration did not arrive. No guest was let in.
#[derive(Debug, thiserror::Error)]
pub enum DestinationFailure {
    /// A disk is in use.
    #[error("disk '{disk}' is {source}")]
    InUse {
        /// Its name.
        disk: String,
        /// By whom.
        source: InUse,
    },
    /// The disks cannot be filled.
    #[error(transparent)]
    Disks(#[from] DestinationError),
    /// What arrived could not be written.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// The channel failed.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The stream is wrong.
    #[error("{0}")]
    Load(LoadError),
    /// The stream asks for something that cannot be done with it here.
    #[error("byte {offset}: the source sent {command}: {reason}")]
    Command {
        /// Where in the stream.
        offset: u64,
        /// Which command.
        command: &'static str,
        /// Why not.
        reason: &'static str,
    },
    /// Offsets in the stream are those of a file, and taking disks out of it moves them.
    #[error(
        "byte {offset}: the stream has its memory at fixed file offsets (capability mapped-ram), \
         which cannot be received"
    )]
    MappedRam {
        /// Where in the stream.
        offset: u64,
    },
    /// The stream goes on without the disks.
    #[error(
        "byte {offset}: the stream goes on with a device's state, but its disks have not ended"
    )]
    DisksMissing {
        /// Where in the stream.
        offset: u64,
    },
    /// The stream ended without the disks.
    #[error("the stream has ended without disks, but {} expected here: {}", if names.len() == 1 { "one is" } else { "some are" }, names.join(", "))]
    NoDisks {
        /// The disks that were expected.
        names: Vec<String>,
    },
    /// The machine's memory cannot be filled.
    #[error(transparent)]
    Ram(#[from] RamDestinationError),
    /// Two sections have one name.
    #[error(transparent)]
    Register(#[from] RegisterError),
    /// The guest runs here, but not all of its memory has come, and nobody brings it any more. Who
    /// touches what is missing waits for ever, rather than to find zeroes and write them to its
    /// disks, unless `memory` is abandoned.
    #[error("the postcopy was given up: {reason}")]
    Interrupted {
        /// Why it was interrupted.
        reason: String,
        /// The memory.
        memory: Box<IncomingRam>,
    },
    /// The rest could not be saved.
    #[error("the rest of the stream could not be saved: {0}")]
    Rest(io::Error),
    /// A record could not be written.
    #[error(transparent)]
    Record(#[from] RecordError),
}

impl From<LoadError> for DestinationFailure {
    fn from(error: LoadError) -> Self {
        Self::Load(error)
    }
}

/// A migration that arrived.
#[derive(Debug)]
pub struct Arrived {
    /// Does the stream describe its devices?
    pub ending: Ending,
    /// Bytes of the stream.
    pub wire_bytes: u64,
    /// The source was told; if not, it may hold its disks until somebody decides there.
    pub source_told: bool,
}

/// Receive one migration. Ends with the channel, the stream, or the channel's stop.
///
/// # Errors
/// See [`DestinationFailure`]. The disks then still hold guests' writes.
pub fn receive<'a>(
    channel: Channel,
    job: DestinationJob<'a>,
    published: &'a Published,
) -> Result<Arrived, DestinationFailure> {
    receive_any(channel, job, None, published)
}

/// Receive a machine, with its disks; its guest runs when this has succeeded, or, in a postcopy,
/// before. A postcopy whose connection breaks waits for the next of `reconnections`.
///
/// # Errors
/// See [`DestinationFailure`]. The guest was not let run, but for
/// [`DestinationFailure::Interrupted`].
pub fn receive_machine<'a>(
    channel: Channel,
    job: DestinationJob<'a>,
    machine: DestinationMachine,
    reconnections: &'a Reconnections,
    published: &'a Published,
) -> Result<Arrived, DestinationFailure> {
    receive_any(channel, job, Some((machine, reconnections)), published)
}

fn receive_any<'a>(
    channel: Channel,
    job: DestinationJob<'a>,
    machine: Option<(DestinationMachine, &'a Reconnections)>,
    published: &'a Published,
) -> Result<Arrived, DestinationFailure> {
    let peer = channel.peer().to_owned();
    let (reader, writer) = channel.split();
    let Some(reader) = reader else {
        return Err(ChannelError::Unsuitable {
            peer,
            reason: "it cannot be read",
        }
        .into());
    };
    published.update(|status| {
        status.state = State::Setup;
        status.peer = peer.clone();
        status.begun = Some(Instant::now());
        status.total_bytes = job.disks.iter().map(|disk| disk.node.limits().length).sum();
        status.remaining_bytes = status.total_bytes;
    });
    let answers = Answers::new(writer, reader.stop().clone());
    let result = Loading::new(reader, job, machine, published, peer)
        .and_then(|loading| loading.run(&answers));
    match &result {
        Ok(_) => published.update(|status| {
            status.state = State::Completed;
            status.durable = Some(true);
            status.remaining_bytes = 0;
            status.error = None;
            status.total_time = status.begun.map(|begun| begun.elapsed());
        }),
        Err(error) => {
            // Where a guest was let in, nobody listens any more.
            answers.say(&ReturnMessage::Shut(1));
            published.update(|status| {
                status.state = State::Failed;
                status.error = Some(error.to_string());
                status.total_time = status.begun.map(|begun| begun.elapsed());
            });
        }
    }
    result
}
