//! A small VMM that migrates in every way, and checks itself while it does.
//!
//! It has everything that a migration touches (memory, vCPUs, devices, disks) but for a CPU to run real
//! code: its vCPUs are threads that write memory and disks, and check at every pass that what they have
//! written is still there. Whoever wants to add migration to a VMM can copy from here:
//!
//! | to see how | look at |
//! |---|---|
//! | guest memory is described | `memory.rs` |
//! | devices describe their state | `devices.rs`, `disk.rs` |
//! | vCPUs stop quickly, also while they wait for a page | `gate.rs` |
//! | requests to disks wait while a disk is held | `disk.rs` |
//! | a machine is put together, saved and loaded | `machine.rs`, `stream.rs` |
//! | snapshots are taken | `snapshot.rs` |
//! | a machine migrates out and in, with postcopy and recovery | `migrate.rs` |
//! | an operator controls all that | `vm.rs`, `control.rs` |
//!
//! ```text
//! torture-machine --qmp a.sock --disk root=a.img,size=64M &
//! torture-machine --qmp b.sock --disk root=b.img,size=64M --incoming unix:link &
//! printf '%s\n' '{"execute": "qmp_capabilities"}' \
//!     '{"execute": "migrate", "arguments": {"uri": "unix:link"}}' | nc -U a.sock
//! ```

mod control;
mod cpu;
mod devices;
mod disk;
mod gate;
mod image;
mod machine;
mod memory;
mod migrate;
mod snapshot;
mod stream;
#[cfg(test)]
mod tests;
mod vm;

use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;

use crate::image::DiskFlag;
use crate::machine::{Layout, Machine};
use crate::vm::{Place, Vm};

/// A small VMM that migrates in every way, and checks itself while it does.
#[derive(Debug, Parser)]
struct Flags {
    /// Control socket, which speaks QMP
    #[arg(long, value_name = "PATH")]
    qmp: PathBuf,
    /// Memory, with K, M or G
    #[arg(long, value_name = "BYTES", default_value = "64M", value_parser = bytes)]
    memory: u64,
    /// What memory holds at the beginning, for measurements: a guest with vCPUs or disks expects zeroes
    #[arg(long, value_name = "FILE")]
    contents: Option<PathBuf>,
    /// Firmware tables, whose length may differ between source and destination
    #[arg(long, value_name = "BYTES", default_value = "64K", value_parser = bytes)]
    tables: u64,
    /// vCPUs
    #[arg(long, value_name = "NUMBER", default_value_t = 2)]
    cpus: u32,
    /// Pages that each vCPU checks and writes in a second
    #[arg(long, value_name = "NUMBER", default_value_t = 5000)]
    speed: u32,
    /// How often in a second the guest reads or writes a piece of each disk
    #[arg(long, value_name = "NUMBER", default_value_t = 100)]
    disk_speed: u32,
    /// Seed of everything that the guest does
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
    /// A disk; a size makes it if it is not there
    #[arg(long, value_name = "NAME=PATH[,format=raw|qcow2][,size=BYTES]")]
    disk: Vec<DiskFlag>,
    /// Wait for a migration there, or with "defer" for the command migrate-incoming
    #[arg(long, value_name = "URI")]
    incoming: Option<String>,
    /// Do not run before the command cont
    #[arg(long, short = 'S')]
    paused: bool,
    /// Where the serial port's output goes
    #[arg(long, value_name = "FILE")]
    serial: Option<PathBuf>,
    /// Where the frames go by which the NIC announces an arrived guest
    #[arg(long, value_name = "FILE")]
    network: Option<PathBuf>,
}

/// A number of bytes, with K, M or G.
fn bytes(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|error| format!("{text}: {error}"))?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("{text} is too large"))
}

fn main() -> Result<()> {
    let flags = Flags::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    let machine = Machine::new(&Layout {
        memory_bytes: flags.memory,
        contents: flags.contents,
        tables_bytes: flags.tables,
        cpus: flags.cpus,
        speed: flags.speed,
        disk_speed: flags.disk_speed,
        seed: flags.seed,
        disks: flags.disk,
        incoming: flags.incoming.is_some(),
        serial: flags.serial,
        network: flags.network,
    })?;
    let place = if flags.incoming.is_some() {
        Place::Coming
    } else {
        Place::Here
    };
    let vm = Vm::new(machine, place, !flags.paused);
    match flags.incoming.as_deref() {
        Some("defer") => {}
        Some(uri) => vm.expect(uri)?,
        None if flags.paused => {}
        None => vm.run(),
    }
    let listener = UnixListener::bind(&flags.qmp);
    let listener = listener.with_context(|| format!("control socket {}", flags.qmp.display()))?;
    control::serve(listener, vm)?;
    // Everything else has its own thread; the command "quit" ends the program.
    loop {
        std::thread::park();
    }
}
