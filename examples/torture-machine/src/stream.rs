//! The machine as a stream, whose bytes go to or come from anywhere: for snapshots and files. (A
//! migration over a connection is `vmferry_migration`'s work.)

use std::io::{Read, Write};

use anyhow::{Result, bail};
use vmferry_savevm::{
    GuestStopped, HandlerError, LoadMachine, LoadOptions, LoadStep, Opening, Owner, Ready,
    Registry, Sink, begin, cleanup, load_cleanup,
};

use crate::machine::Machine;

/// Save everything that is registered, while the guest stands still.
pub(crate) fn save(
    registry: &mut Registry<'_>,
    stopped: &GuestStopped,
    out: &mut dyn Write,
) -> Result<()> {
    let saved = save_all(registry, stopped, &mut Output(out));
    cleanup(registry);
    saved
}

fn save_all(
    registry: &mut Registry<'_>,
    stopped: &GuestStopped,
    sink: &mut Output<'_>,
) -> Result<()> {
    let opening = Opening {
        machine: Machine::machine_type(),
        ..Opening::default()
    };
    let mut iterating = begin(&opening, registry, sink)?;
    let completing = loop {
        iterating.iterate(registry, sink)?;
        match iterating.try_complete(registry, |_| true) {
            Ready::Go(completing) => break completing,
            Ready::NotYet(again, _) => iterating = again,
        }
    };
    let live_ended = completing.end_live(stopped, registry, None, sink)?;
    live_ended
        .save_devices(stopped, registry, sink)?
        .finish(sink)?;
    Ok(())
}

struct Output<'a>(&'a mut dyn Write);

impl Sink for Output<'_> {
    fn put(&mut self, parts: &[&[u8]]) -> Result<(), HandlerError> {
        parts.iter().try_for_each(|part| self.0.write_all(part))?;
        Ok(())
    }

    fn allowance(&self) -> u64 {
        u64::MAX
    }

    fn check(&self) -> Result<(), HandlerError> {
        Ok(())
    }
}

/// Load everything that is registered. After an error devices may be half those of the stream: the
/// guest must not run.
pub(crate) fn load(registry: &mut Registry<'_>, input: &mut dyn Read) -> Result<()> {
    let mut loading = LoadMachine::new(LoadOptions {
        machine: Some(Machine::machine_type()),
        refuse_rest: Some("this machine has no such device"),
        ..LoadOptions::default()
    });
    let loaded = load_all(&mut loading, registry, input);
    load_cleanup(registry);
    loaded
}

fn load_all(
    loading: &mut LoadMachine,
    registry: &mut Registry<'_>,
    input: &mut dyn Read,
) -> Result<()> {
    let mut window = Window {
        bytes: Vec::new(),
        start: 0,
        input,
    };
    loop {
        match loading.step(window.bytes(), registry)? {
            LoadStep::End => return Ok(()),
            LoadStep::NeedMore(bytes) => {
                if !window.fill(bytes)? {
                    loading.finish_at(loading.offset() + window.bytes().len() as u64)?;
                    return Ok(());
                }
            }
            LoadStep::Record { used, .. } | LoadStep::Device { used } => window.start += used,
            LoadStep::Payload {
                bytes,
                owner: Owner::Handler,
            } => {
                window.read_exact(loading.payload(registry, bytes as usize)?)?;
                loading.payload_filled(registry)?;
            }
            // All that nobody owns is the description at the end.
            LoadStep::Payload {
                bytes,
                owner: Owner::Rest,
            } => window.read_exact(&mut vec![0; bytes as usize])?,
        }
    }
}

/// Bytes that were read and not understood yet.
struct Window<'a> {
    bytes: Vec<u8>,
    start: usize,
    input: &'a mut dyn Read,
}

/// Read at once.
const READ_BYTES: usize = 1 << 20;

impl Window<'_> {
    fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    /// False if the input ends before there are so many.
    fn fill(&mut self, bytes: usize) -> Result<bool> {
        self.bytes.drain(..std::mem::take(&mut self.start));
        while self.bytes.len() < bytes {
            let wanted = READ_BYTES.max(bytes - self.bytes.len()) as u64;
            if (&mut *self.input)
                .take(wanted)
                .read_to_end(&mut self.bytes)?
                == 0
            {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn read_exact(&mut self, room: &mut [u8]) -> Result<()> {
        if self.bytes().len() < room.len() && !self.fill(room.len())? {
            bail!("the stream ends in a page");
        }
        room.copy_from_slice(&self.bytes()[..room.len()]);
        self.start += room.len();
        Ok(())
    }
}
