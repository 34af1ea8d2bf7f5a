//! The connections over which a parked machine leaves.

use std::time::{Duration, Instant};

use vmferry_channel::{Stop, Uri, open_outgoing};
use vmferry_migration::Target;
use vmferry_multifd::{Flush, SplitOptions, Splitting};
use vmferry_relay::qemu::PrivateFolder;

use super::outcome::End;
use crate::exit::{Exit, Failure};
use crate::flags::SendFlags;

/// How long connections may take.
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);

/// An open way to the destination.
pub(super) struct Way {
    /// When it began to be opened.
    pub(super) begun: Instant,
    target: Target,
    connections: Connections,
}

/// What is behind the channel that the source writes to.
#[derive(Default)]
pub(super) struct Connections {
    splitting: Option<Splitting>,
    /// Where those that follow the first lead.
    folder: Option<PrivateFolder>,
}

/// What is known of a destination beyond what the stream says.
#[derive(Clone, Copy, Default)]
pub(super) struct Peculiar {
    pub(super) flush: Option<Flush>,
    pub(super) uuid: Option<[u8; 16]>,
}

impl Way {
    /// To the URI that was given.
    pub(super) fn open(flags: &SendFlags, stop: &Stop) -> Result<Self, Failure> {
        match &flags.uri {
            Some(uri) => Self::to(uri, flags, Peculiar::default(), stop),
            // The options do not allow it.
            None => Err(Failure::usage("there is no destination")),
        }
    }

    /// To a socket in a folder of ours. The folder goes as soon as nobody connects there any more:
    /// nothing is left behind then, whatever ends this process.
    pub(super) fn within(
        folder: PrivateFolder,
        at: &Uri,
        flags: &SendFlags,
        peculiar: Peculiar,
        stop: &Stop,
    ) -> Result<Self, Failure> {
        let mut way = Self::to(at, flags, peculiar, stop)?;
        if way.connections.splitting.is_some() {
            way.connections.folder = Some(folder);
        }
        Ok(way)
    }

    fn to(uri: &Uri, flags: &SendFlags, peculiar: Peculiar, stop: &Stop) -> Result<Self, Failure> {
        let begun = Instant::now();
        let failed = |error: &dyn std::error::Error| match stop.is_triggered() {
            true => Failure::new(Exit::Cancelled, "cancelled before there was a connection"),
            false => Failure::new(Exit::Failed, error),
        };
        let Some(channels) = flags.multifd.multifd_channels else {
            let channel = open_outgoing(uri, stop, CONNECT_PATIENCE);
            return Ok(Self {
                begun,
                target: Target::Channel(channel.map_err(|error| failed(&error))?),
                connections: Connections::default(),
            });
        };
        let options = SplitOptions {
            flush: peculiar.flush,
            uuid: peculiar.uuid,
            ..SplitOptions::new(channels, flags.multifd.compression().into())
        };
        let split = vmferry_multifd::connect(uri, options, stop, CONNECT_PATIENCE);
        let split = split.map_err(|error| failed(&error))?;
        Ok(Self {
            begun,
            target: Target::Channel(split.channel),
            connections: Connections {
                splitting: Some(split.splitting),
                folder: None,
            },
        })
    }

    pub(super) fn split(self) -> (Target, Connections) {
        (self.target, self.connections)
    }
}

impl Connections {
    /// The source is done with them. Who knows only that a channel broke is told why.
    pub(super) fn explain(self, end: End) -> End {
        let Some(splitting) = self.splitting else {
            return end;
        };
        match (end, splitting.finish()) {
            (End::Failed(_), Err(error)) => End::Failed(error.to_string()),
            (end, _) => end,
        }
    }
}
