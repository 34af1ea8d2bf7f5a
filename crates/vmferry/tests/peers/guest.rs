//! The Linux guest of `scripts/guest`: it checks its memory, writes a numbered record to its disk, and says so.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::qemu::{Machine, Version};
use super::{find, patterns, until};

/// Bytes of a record, and the unit of its place on the disk.
const RECORD: usize = 4096;

fn utf8(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// One line of the guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tick {
    /// Counts from 0.
    pub(crate) number: u64,
    /// Whether the memory was as it should be.
    pub(crate) ram_ok: bool,
}

impl Tick {
    /// What such a line says.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let (number, ram) = line.strip_prefix("TICK ")?.split_once(" ram=")?;
        Some(Self {
            number: number.parse().ok()?,
            ram_ok: ram == "ok",
        })
    }
}

/// A guest and what it printed, on one host after the other.
pub(crate) struct Guest {
    dir: TempDir,
    consoles: Vec<PathBuf>,
}

impl Guest {
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("vmferry-guest-")
            .tempdir()
            .expect("a temporary folder");
        Self {
            dir,
            consoles: Vec::new(),
        }
    }

    /// A host for it, the first time where it boots and later where it goes next, with its disk, which is called
    /// `disk0`; `None` if the guest or this QEMU is not there. With `churn` its memory changes at each tick.
    pub(crate) fn host(&mut self, version: Version, disk: &Path, churn: bool) -> Option<Machine> {
        Some(self.diskless(version, churn)?.disk("disk0", disk))
    }

    /// The same with a disk that is an NBD export. QEMU waits half a minute for a server that is gone, and stops the guest
    /// at an error instead of telling it.
    pub(crate) fn host_on_export(&mut self, socket: &Path, export: &str) -> Option<Machine> {
        let machine = self.diskless(Version::V10_0, false)?;
        let drive = drive(socket, export);
        Some(machine.args(["-drive", &drive]))
    }

    /// The same for a guest that writes and verifies patterns. With `writethrough` no write is acknowledged before it is
    /// durable: a server that dies takes none with it that the guest believes to be on the disk.
    pub(crate) fn host_of_patterns(
        &mut self,
        socket: &Path,
        export: &str,
        writethrough: bool,
    ) -> Option<Machine> {
        let initrd = find("VMFERRY_GUEST_INITRD", "the Linux guest")?;
        let initrd = patterns::initrd(&initrd, self.dir.path());
        let line = format!("console=ttyS0 quiet rdinit=/{}", patterns::PROGRAM);
        let machine = self.machine(Version::V10_0, &initrd, &line)?;
        let cache = match writethrough {
            true => "writethrough",
            false => "writeback",
        };
        let drive = format!("{},cache={cache}", drive(socket, export));
        Some(machine.args(["-drive", &drive]))
    }

    fn diskless(&mut self, version: Version, churn: bool) -> Option<Machine> {
        let initrd = find("VMFERRY_GUEST_INITRD", "the Linux guest")?;
        let line = if churn {
            "console=ttyS0 quiet ferry.churn"
        } else {
            "console=ttyS0 quiet"
        };
        self.machine(version, &initrd, line)
    }

    fn machine(&mut self, version: Version, initrd: &Path, line: &str) -> Option<Machine> {
        let kernel = find("VMFERRY_GUEST_KERNEL", "the Linux guest")?;
        let machine = Machine::new(version)?;
        let console = self
            .dir
            .path()
            .join(format!("console-{}", self.consoles.len()));
        let serial = format!("file:{}", console.display());
        self.consoles.push(console);
        let machine = machine.args([
            "-m",
            "128",
            "-kernel",
            utf8(&kernel),
            "-initrd",
            utf8(initrd),
            "-append",
            line,
        ]);
        Some(machine.args(["-serial", &serial]))
    }

    /// All whole lines so far: a move may cut a line, whose rest the next host prints.
    pub(crate) fn text(&self) -> String {
        let bytes: Vec<u8> = self
            .consoles
            .iter()
            .flat_map(|path| std::fs::read(path).unwrap_or_default())
            .collect();
        let text = String::from_utf8_lossy(&bytes).replace('\r', "");
        let end = text.rfind('\n').map_or(0, |end| end + 1);
        text[..end].to_owned()
    }

    /// All ticks so far.
    ///
    /// # Panics
    /// If one is missing, or memory was bad, or a write failed.
    pub(crate) fn ticks(&self) -> Vec<Tick> {
        let text = self.text();
        assert!(
            ["FAILED", "Kernel panic", "I/O error", "rejecting I/O"]
                .iter()
                .all(|trouble| !text.contains(trouble)),
            "the guest is unwell: {text}"
        );
        let ticks: Vec<Tick> = text.lines().filter_map(Tick::parse).collect();
        for (expected, tick) in ticks.iter().enumerate() {
            assert_eq!(
                *tick,
                Tick {
                    number: expected as u64,
                    ram_ok: true
                },
                "the guest said:\n{text}"
            );
        }
        ticks
    }

    /// Waits for `more` ticks beyond those that are there; the number of ticks then.
    pub(crate) fn wait_more_ticks(&self, more: usize) -> u64 {
        let wanted = self.ticks().len() + more;
        until(&format!("tick {wanted} of the guest"), || {
            (self.ticks().len() >= wanted).then_some(wanted as u64)
        })
    }

    /// Fails unless the record of every tick is on the disk.
    pub(crate) fn assert_records(&self, disk: &Path) {
        let file = File::open(disk).expect("a disk can be opened");
        let blocks = file.metadata().expect("a disk has metadata").len() / RECORD as u64;
        let ticks = self.ticks();
        // A later record may have taken an earlier one's place only after all places were used.
        assert!(
            (ticks.len() as u64) < blocks,
            "the disk is too small for {} records",
            ticks.len()
        );
        for Tick { number, .. } in ticks {
            let mut record = [0; RECORD];
            let place = number * 4099 % blocks;
            file.read_exact_at(&mut record, place * RECORD as u64)
                .expect("a disk can be read");
            let mut expected = [0; RECORD];
            let text = format!("VMFERRY RECORD {number}\n");
            expected[..text.len()].copy_from_slice(text.as_bytes());
            assert!(
                record == expected,
                "record {number} is not at block {place} of {}",
                disk.display()
            );
        }
    }
}

/// An NBD export as `disk0`.
fn drive(socket: &Path, export: &str) -> String {
    let server = format!(
        "file.server.type=unix,file.server.path={}",
        socket.display()
    );
    let node = format!("file.driver=nbd,file.export={export},{server},file.reconnect-delay=30");
    format!("{node},format=raw,if=virtio,id=disk0,werror=stop,rerror=stop")
}
