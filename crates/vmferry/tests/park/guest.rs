//! A Linux guest that has something in most of its memory, looks at a sixteenth of it at each tick, and changes a little.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tempfile::TempDir;

use crate::peers::guest::Tick;
use crate::peers::qemu::{Machine, Version};
use crate::peers::{find, long, patterns, until};

/// In the initial RAM disk, and on the kernel's command line.
const PROGRAM: &str = "filled";

/// So many ticks, and all of it was looked at.
pub(crate) const PIECES: usize = 16;

/// Tick `n` is about file `n % 16`. The kernel passes `ferry.piece`, the MiB of each file.
const SCRIPT: &str = r#"#!/bin/busybox sh
bb=/bin/busybox
$bb mount -t devtmpfs dev /dev
$bb mount -t proc proc /proc
exec </dev/ttyS0 >/dev/ttyS0 2>&1
for word in $($bb cat /proc/cmdline); do
  case $word in ferry.piece=*) piece=${word#*=} ;; esac
done
$bb mount -t tmpfs -o size=100% none /ram
cd /ram
for i in 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do
  $bb dd if=/dev/urandom of=$i bs=64k count=$((piece * 16)) 2>/dev/null || echo "FAILED: no room"
  $bb md5sum $i >sum$i
done
echo READY
n=0
while :; do
  i=$((n % 16))
  ram=ok
  $bb md5sum -s -c sum$i 2>/dev/null || ram=BAD
  echo "TICK $n ram=$ram"
  $bb dd if=/dev/urandom of=$i bs=64k count=1 seek=$((n / 16 % (piece * 16))) conv=notrunc 2>/dev/null
  $bb md5sum $i >sum$i
  n=$((n + 1))
done
"#;

/// The guest and what it printed, on one host after the other. A clone has the same past, and a future of its own.
#[derive(Clone)]
pub(crate) struct Guest {
    dir: Arc<TempDir>,
    hosts: Arc<AtomicU64>,
    consoles: Vec<PathBuf>,
    /// Of the machine, and of each piece.
    mib: [u64; 2],
}

impl Guest {
    /// One with 96 MiB of memory that it looks at; with `VMFERRY_LONG` it has 832 MiB of 1 GiB.
    pub(crate) fn new() -> Self {
        Self::with_memory(if long() { [1024, 52] } else { [256, 6] })
    }

    /// One with so many MiB, and so many in each piece.
    pub(crate) fn with_memory(mib: [u64; 2]) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("vmferry-filled-")
            .tempdir()
            .expect("a temporary folder");
        Self {
            dir: Arc::new(dir),
            hosts: Arc::default(),
            consoles: Vec::new(),
            mib,
        }
    }

    /// A host for it, the first time where it boots and later where it goes next; `None` if the guest or this QEMU is not
    /// there.
    pub(crate) fn host(&mut self, version: Version) -> Option<Machine> {
        let [mib, piece_mib] = self.mib.map(|mib| mib.to_string());
        let kernel = find("VMFERRY_GUEST_KERNEL", "the Linux guest")?;
        let initrd = find("VMFERRY_GUEST_INITRD", "the Linux guest")?;
        let machine = Machine::new(version)?;
        let initrd = patterns::initrd_with(&initrd, self.dir.path(), PROGRAM, SCRIPT);
        let number = self.hosts.fetch_add(1, Ordering::Relaxed);
        let console = self.dir.path().join(format!("console-{number}"));
        let serial = format!("file:{}", console.display());
        self.consoles.push(console);
        let line = format!("console=ttyS0 quiet rdinit=/{PROGRAM} ferry.piece={piece_mib}");
        let [kernel, initrd] = [kernel, initrd].map(|path| path.display().to_string());
        let machine = machine.args(["-m", &mib, "-kernel", &kernel, "-initrd", &initrd]);
        Some(machine.args(["-append", &line, "-serial", &serial]))
    }

    /// How many ticks there were.
    ///
    /// # Panics
    /// If one is missing, or memory was bad.
    pub(crate) fn ticks(&self) -> usize {
        let bytes: Vec<u8> = self
            .consoles
            .iter()
            .flat_map(|path| std::fs::read(path).unwrap_or_default())
            .collect();
        let text = String::from_utf8_lossy(&bytes).replace('\r', "");
        // A move may cut a line, whose rest the next host prints.
        let text = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
        let unwell = ["FAILED", "Kernel panic", "BUG:", "Oops"];
        assert!(
            unwell.iter().all(|trouble| !text.contains(trouble)),
            "the guest is unwell: {text}"
        );
        let ticks: Vec<Tick> = text.lines().filter_map(Tick::parse).collect();
        for (number, tick) in ticks.iter().enumerate() {
            let expected = Tick {
                number: number as u64,
                ram_ok: true,
            };
            assert_eq!(*tick, expected, "the guest said:\n{text}");
        }
        ticks.len()
    }

    /// Waits for `more` ticks beyond those that are there.
    pub(crate) fn goes_on(&self, more: usize) {
        let wanted = self.ticks() + more;
        until(&format!("tick {wanted} of the guest"), || {
            (self.ticks() >= wanted).then_some(())
        });
    }
}
