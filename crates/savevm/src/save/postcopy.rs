//! The states of the save machine after the decision for postcopy.
//!
//! ```text
//!   END of what cannot go on │ RAM_DISCARD … │ PACKAGED { LISTEN, FULL …, RUN } │ PART … │ END of the rest │ EOF
//!   Switching                                  Packing                            Postcopy
//! ```
//!
//! Rules: `postcopy.md` §4 and §5 of the wire format notes.

use vmferry_stream::limits::MAX_PACKAGE_BYTES;
use vmferry_stream::{Command, DiscardRange, Name, Record, SectionKind};

use super::flow::{Flow, put_bytes};
use super::{Opening, SaveError, TotalPending};
use crate::handler::{GuestStopped, Progress, SaveHandler, Sink};
use crate::registry::Registry;

/// Ranges in one RAM_DISCARD, as QEMU sends them; its length field would allow 4095.
const RANGES_PER_COMMAND: usize = 12;

/// Guests are being stopped, for a postcopy.
#[derive(Debug)]
pub struct Switching {
    flow: Box<Flow>,
}

/// Everything that must be sent before was sent, but for the devices.
#[derive(Debug)]
pub struct Packing {
    flow: Box<Flow>,
}

/// The devices are saved, too.
#[derive(Debug)]
pub struct Packed {
    flow: Box<Flow>,
    command: Vec<u8>,
    package: Vec<u8>,
}

/// The guest runs, or is about to run, at the destination. There is no way back.
#[derive(Debug)]
pub struct Postcopy {
    flow: Box<Flow>,
}

impl Switching {
    pub(super) fn new(flow: Box<Flow>) -> Self {
        Self { flow }
    }

    /// Write the END of every live section that cannot go on, and what the destination must discard.
    ///
    /// # Errors
    /// A section's owner or the channel failed; RAM was advised and nothing discarded: a real
    /// destination would not run its guest.
    pub fn end_live(
        mut self,
        stopped: &GuestStopped,
        registry: &mut Registry<'_>,
        sink: &mut dyn Sink,
    ) -> Result<Packing, SaveError> {
        self.flow.announce_switchover(sink)?;
        for entry in registry.entries_mut() {
            if entry
                .saver()
                .is_some_and(|saver| saver.postcopy().is_none())
            {
                self.flow
                    .live(entry, SectionKind::End, sink, |saver, sink| {
                        saver.complete(stopped, sink)
                    })?;
            }
        }
        let discarded = self.discard(registry, sink)?;
        if self.flow.advised() == Some(true) && !discarded {
            return Err(SaveError::NothingDiscarded);
        }
        Ok(Packing { flow: self.flow })
    }

    /// True if there was something to discard.
    fn discard(
        &mut self,
        registry: &mut Registry<'_>,
        sink: &mut dyn Sink,
    ) -> Result<bool, SaveError> {
        let mut discarded = false;
        for entry in registry.entries_mut() {
            let (section, instance) = (entry.idstr().clone(), entry.instance());
            let Some(saver) = entry.saver().filter(|saver| saver.is_active()) else {
                continue;
            };
            let Some(handler) = saver.postcopy() else {
                continue;
            };
            let flow = &mut self.flow;
            let mut tell = |block: &Name, ranges: &[DiscardRange]| {
                for ranges in ranges.chunks(RANGES_PER_COMMAND) {
                    discarded = true;
                    sink.put(&[&encode_discard(flow, block, ranges)])?;
                }
                Ok(())
            };
            handler
                .discard(&mut tell)
                .map_err(|source| SaveError::Section {
                    section,
                    instance,
                    source,
                })?;
        }
        Ok(discarded)
    }
}

fn encode_discard(flow: &mut Flow, block: &Name, ranges: &[DiscardRange]) -> Vec<u8> {
    let command = Command::PostcopyRamDiscard {
        block: block.clone(),
        ranges: u16::try_from(ranges.len()).unwrap_or(u16::MAX),
    };
    let mut bytes = Vec::new();
    flow.encode(&Record::Command(command), &mut bytes);
    for range in ranges {
        flow.encode(&Record::DiscardRange(*range), &mut bytes);
    }
    bytes
}

impl Packing {
    /// Send a command before the package.
    ///
    /// # Errors
    /// The channel failed.
    pub fn command(&mut self, command: Command, sink: &mut dyn Sink) -> Result<(), SaveError> {
        self.flow.command(command, sink)
    }

    /// Put together the package: the state of every device that needs it, and the order to run. With
    /// `ping`, the destination answers when it has loaded the devices. Nothing is sent.
    ///
    /// # Errors
    /// A device failed; the devices have too much state.
    pub fn pack(
        mut self,
        _stopped: &GuestStopped,
        registry: &mut Registry<'_>,
        ping: Option<u32>,
    ) -> Result<Packed, SaveError> {
        let flow = &mut self.flow;
        let mut package = Vec::new();
        flow.encode(&Record::Command(Command::PostcopyListen), &mut package);
        flow.encode_devices(registry, &mut package)?;
        if let Some(value) = ping {
            flow.encode(&Record::Command(Command::Ping(value)), &mut package);
        }
        flow.encode(&Record::Command(Command::PostcopyRun), &mut package);
        let mut command = Vec::new();
        let packaged = Command::Packaged {
            bytes: package_bytes(package.len())?,
        };
        flow.encode(&Record::Command(packaged), &mut command);
        Ok(Packed {
            flow: self.flow,
            command,
            package,
        })
    }
}

impl Packed {
    /// Write the package as one piece. Whoever called must serve pages at once: loading devices reads
    /// guest memory.
    ///
    /// # Errors
    /// The channel failed. A package that did not go out whole runs nothing.
    pub fn send(self, sink: &mut dyn Sink) -> Result<Postcopy, SaveError> {
        sink.put(&[&self.command, &self.package])
            .map_err(SaveError::Channel)?;
        Ok(Postcopy { flow: self.flow })
    }
}

impl Postcopy {
    /// Go on where another machine like this one has stopped, on a new connection: its sections have the
    /// numbers that they have here. The handlers know already that it is a postcopy.
    pub fn take_up(opening: &Opening, registry: &mut Registry<'_>) -> Self {
        let mut flow = Flow::new(opening);
        flow.take_up(registry, goes_on);
        Self {
            flow: Box::new(flow),
        }
    }

    /// Write one PART of each section that goes on, up to the first that is not finished.
    ///
    /// # Errors
    /// A section's owner or the channel failed.
    pub fn iterate(
        &mut self,
        registry: &mut Registry<'_>,
        sink: &mut dyn Sink,
    ) -> Result<Progress, SaveError> {
        self.flow.iterate(registry, sink, goes_on)
    }

    /// Send a command between sections.
    ///
    /// # Errors
    /// The channel failed.
    pub fn command(&mut self, command: Command, sink: &mut dyn Sink) -> Result<(), SaveError> {
        self.flow.command(command, sink)
    }

    /// What is left to send; nobody waits for it standing still.
    pub fn pending(&self, registry: &mut Registry<'_>) -> TotalPending {
        self.flow.pending(registry, goes_on)
    }

    /// Write the END of every section that went on, and EOF. What was lost on the way may be sent
    /// after that, on a new connection, and the end again.
    ///
    /// # Errors
    /// A section's owner or the channel failed. The guest runs at the destination: what is left can
    /// only be sent there, on a new connection.
    pub fn complete(
        &mut self,
        registry: &mut Registry<'_>,
        sink: &mut dyn Sink,
    ) -> Result<(), SaveError> {
        for entry in registry.entries_mut() {
            if !entry.saver().is_some_and(|saver| goes_on(&mut **saver)) {
                continue;
            }
            let end = SectionKind::End;
            self.flow
                .live(entry, end, sink, |saver, sink| match saver.postcopy() {
                    Some(handler) => handler.complete(sink),
                    None => Err("it cannot go on any more".into()),
                })?;
        }
        let mut bytes = Vec::new();
        self.flow.encode(&Record::Eof, &mut bytes);
        put_bytes(&bytes, sink)
    }
}

/// Length of a package that a destination takes.
fn package_bytes(bytes: usize) -> Result<u32, SaveError> {
    let max = MAX_PACKAGE_BYTES;
    let length = u32::try_from(bytes).ok().filter(|length| *length <= max);
    length.ok_or(SaveError::PackageTooLarge { bytes, max })
}

fn goes_on(saver: &mut dyn SaveHandler) -> bool {
    saver.postcopy().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A real package of that length would take the tests a gigabyte.
    #[test]
    fn a_package_has_at_most_256_mib() {
        let max = 256 << 20;
        for bytes in [1, max - 1, max] {
            let length = package_bytes(bytes).expect("it is taken");
            assert_eq!(length as usize, bytes);
        }
        for bytes in [max + 1, (1 << 32) + 1, usize::MAX] {
            let error = package_bytes(bytes).expect_err("too large");
            let words = format!(
                "the state of all devices has {bytes} bytes, which may be 268435456 bytes in a \
                 postcopy"
            );
            assert_eq!(error.to_string(), words);
        }
    }
}
