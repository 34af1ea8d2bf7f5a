//! Snapshots on the machine's own disks: `snapshot-save`, `snapshot-load`, `snapshot-delete`.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use anyhow::{Context, Result, anyhow, bail};
use vmferry_disk::Lease;
use vmferry_ram::{MarkedLog, RamDestination, RamDestinationOptions, RamSource, RamSourceOptions};
use vmferry_savevm::{GuestStopped, Registration, Registry};
use vmferry_snapshot::{Listing, Moment, NamedDisk};

use crate::machine::Machine;
use crate::stream;

impl Machine {
    /// Save the whole machine; it goes on if it ran.
    pub(crate) fn snapshot_save(&self, name: &str) -> Result<()> {
        self.paused(|stopped, disks| {
            let moment = Moment::now(self.guest_nanoseconds());
            let mut registry = self.snapshot_registry()?;
            thread::scope(|scope| {
                let (mut sender, mut receiver) = pipe();
                let saving = scope.spawn(move || {
                    stream::save(&mut registry, stopped, &mut sender)?;
                    sender.end()
                });
                let made = vmferry_snapshot::import(disks, name, moment, &mut receiver);
                drop(receiver);
                // If saving failed, that is why the other did.
                saving.join().map_err(|_| anyhow!("saving panicked"))??;
                made?;
                Ok(())
            })
        })
    }

    /// Bring the whole machine back to what it was.
    pub(crate) fn snapshot_load(&self, name: &str) -> Result<()> {
        self.paused(|_, disks| {
            // Before the disks change: what is missing, or has no machine in it, is not applied.
            let first = disks[0];
            if !first
                .disk
                .snapshots()
                .iter()
                .any(|snapshot| snapshot.name == name && snapshot.vm_state_bytes > 0)
            {
                bail!("disk '{}' has no machine saved as '{name}'", first.name);
            }
            vmferry_snapshot::apply(disks, name)?;
            let mut state = first.disk.vm_state_reader(name)?;
            stream::load(&mut self.snapshot_registry()?, &mut state)
        })
    }

    pub(crate) fn snapshot_delete(&self, name: &str) -> Result<()> {
        self.paused(|_, disks| Ok(vmferry_snapshot::delete(disks, name)?))
    }

    pub(crate) fn snapshots(&self) -> Result<Listing> {
        Ok(vmferry_snapshot::list(&self.named_disks()?))
    }

    fn named_disks(&self) -> Result<Vec<NamedDisk<'_>>> {
        let named = self.drives.iter().map(|drive| {
            let disk = drive.image.qcow2();
            let disk =
                disk.with_context(|| format!("disk '{}' cannot have snapshots", drive.name))?;
            Ok(NamedDisk {
                name: &drive.name,
                disk,
            })
        });
        named.collect()
    }

    /// Do something to disks that nobody uses meanwhile, neither guest nor migration. The guest goes
    /// on afterwards, if it ran; not if what was done to it went wrong.
    fn paused(
        &self,
        work: impl FnOnce(&GuestStopped, &[NamedDisk<'_>]) -> Result<()>,
    ) -> Result<()> {
        let disks = self.named_disks()?;
        if disks.is_empty() {
            bail!("a snapshot needs a qcow2 disk");
        }
        let leases: Result<Vec<Lease>> = self
            .drives
            .iter()
            .map(|drive| {
                drive
                    .node
                    .lease("a snapshot")
                    .with_context(|| format!("disk '{}'", drive.name))
            })
            .collect();
        let leases = leases?;
        let ran = self.is_running();
        let stopped = self.stop();
        work(&stopped, &disks)?;
        drop(leases);
        if ran {
            self.run();
        }
        Ok(())
    }

    /// Memory and devices.
    fn snapshot_registry(&self) -> Result<Registry<'static>> {
        let ram = self.memory.ram();
        // Nobody tells it of writes, for there are none while the guest stands still.
        let log = Box::new(MarkedLog::new(&*ram));
        let source = RamSource::new(Arc::clone(&ram), log, None, RamSourceOptions::default())?;
        let destination = RamDestination::new(ram, RamDestinationOptions::default())?;
        let mut registry = self.registry()?;
        registry.register(Registration::live(
            vmferry_ram::SECTION_NAME,
            vmferry_ram::SECTION_VERSION..=vmferry_ram::SECTION_VERSION,
            Box::new(source),
            Box::new(destination),
        ))?;
        Ok(registry)
    }
}

/// Bytes from one thread to another, which does not take an early end for the end.
fn pipe() -> (Sender, Incoming) {
    let (sender, receiver) = sync_channel(16);
    (
        Sender {
            sender,
            bytes: Vec::new(),
        },
        Incoming {
            receiver,
            bytes: Vec::new(),
            start: 0,
        },
    )
}

/// Sent at once.
const PIECE_BYTES: usize = 256 << 10;

struct Sender {
    /// An empty piece is the end.
    sender: SyncSender<Vec<u8>>,
    bytes: Vec<u8>,
}

impl Sender {
    fn send(&mut self) -> io::Result<()> {
        let bytes = std::mem::take(&mut self.bytes);
        self.sender
            .send(bytes)
            .map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn end(mut self) -> Result<()> {
        if !self.bytes.is_empty() {
            self.send()?;
        }
        Ok(self.send()?)
    }
}

impl Write for Sender {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes.extend_from_slice(bytes);
        if self.bytes.len() >= PIECE_BYTES {
            self.send()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Incoming {
    receiver: Receiver<Vec<u8>>,
    bytes: Vec<u8>,
    start: usize,
}

impl Read for Incoming {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        if self.start == self.bytes.len() {
            let piece = self.receiver.recv();
            self.bytes = piece.map_err(|_| io::Error::from(io::ErrorKind::UnexpectedEof))?;
            self.start = 0;
        }
        let length = (&self.bytes[self.start..]).read(room)?;
        self.start += length;
        Ok(length)
    }
}
