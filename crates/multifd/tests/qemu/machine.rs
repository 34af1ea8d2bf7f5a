//! A machine with something in its memory.

use std::path::{Path, PathBuf};

use serde_json::json;
use tempfile::TempDir;
use vmferry_multifd::Compression;

use crate::peers::qemu::{Machine, Qemu, Version};

pub(crate) const COMPRESSIONS: [Compression; 3] =
    [Compression::None, Compression::Zlib, Compression::Zstd];

/// Both versions know it; channels are synchronised in each section.
pub(crate) const OLD: &str = "pc-i440fx-7.2";
/// Only 10.0 knows it; channels are synchronised in each round, and packets have zero pages.
pub(crate) const NEW: &str = "pc-i440fx-10.0";

const MIB: usize = 1 << 20;
const MEMORY_MIB: usize = 64;
const BIOS_BYTES: usize = 64 << 10;

/// Adds 1 to the first word of each page from 64 KiB to 640 KiB, for ever.
const CODE: [u8; 25] = [
    0xb8, 0x00, 0x10, // start: mov ax, 0x1000
    0x8e, 0xd8, // segment: mov ds, ax
    0x31, 0xdb, // xor bx, bx
    0xff, 0x07, // page: inc word [bx]
    0x81, 0xc3, 0x00, 0x10, // add bx, 0x1000
    0x75, 0xf8, // jnz page
    0x05, 0x00, 0x10, // add ax, 0x1000
    0x3d, 0x00, 0xa0, // cmp ax, 0xa000
    0x75, 0xec, // jne segment
    0xeb, 0xe7, // jmp start
];
const RESET: [u8; 5] = [0xea, 0x00, 0x00, 0x00, 0xf0];

/// Files that machines are started with.
pub(crate) struct Files {
    pub(crate) dir: TempDir,
}

impl Files {
    /// Firmware that changes memory, and 20 MiB of content: noise, patterns, and zeros between them.
    pub(crate) fn new() -> Self {
        let seed = std::env::var("VMFERRY_SEED")
            .ok()
            .and_then(|seed| seed.parse().ok())
            .unwrap_or_else(|| fastrand::u64(..));
        println!("VMFERRY_SEED={seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        let dir = tempfile::Builder::new()
            .prefix("vmferry-multifd-")
            .tempdir()
            .expect("a temporary folder");
        let mut bios = vec![0; BIOS_BYTES];
        bios[..CODE.len()].copy_from_slice(&CODE);
        bios[BIOS_BYTES - 16..][..RESET.len()].copy_from_slice(&RESET);
        let mut content = vec![0; 20 * MIB];
        for piece in content.chunks_mut(3 * 4096) {
            match rng.u8(..3) {
                0 => rng.fill(piece),
                1 => piece.fill(rng.u8(..)),
                _ => {}
            }
        }
        let files = Self { dir };
        std::fs::write(files.path("bios"), bios).expect("a file in the temporary folder");
        std::fs::write(files.path("content"), content).expect("a file in the temporary folder");
        files
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn machine(&self, version: Version, kind: &str) -> Option<Machine> {
        let bios = self.path("bios");
        Some(Machine::new(version)?.args([
            "-M",
            kind,
            "-m",
            &MEMORY_MIB.to_string(),
            "-bios",
            utf8(&bios),
            "-uuid",
            UUID,
            "-S",
        ]))
    }

    /// One with content, which does not run yet.
    pub(crate) fn source(&self, version: Version, kind: &str) -> Option<Qemu> {
        let content = self.path("content");
        let loader = format!("loader,file={},addr=0x200000,force-raw=on", utf8(&content));
        let machine = self.machine(version, kind)?;
        Some(machine.args(["-device", &loader]).start())
    }

    /// One that waits for a migration, and does not run after it.
    pub(crate) fn destination(&self, version: Version, kind: &str) -> Option<Qemu> {
        let machine = self.machine(version, kind)?;
        Some(machine.args(["-incoming", "defer"]).start())
    }
}

fn utf8(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// Of the guest.
pub(crate) const UUID: &str = "a6e8f2c0-0123-4567-89ab-cdef01234567";
pub(crate) const UUID_BYTES: [u8; 16] = [
    0xa6, 0xe8, 0xf2, 0xc0, 0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef, 0x01, 0x23, 0x45, 0x67,
];

/// Turns multifd on.
pub(crate) fn set_up(qemu: &mut Qemu, channels: u8, compression: Compression) {
    let multifd = json!([{"capability": "multifd", "state": true}]);
    qemu.qmp.execute(
        "migrate-set-capabilities",
        &json!({"capabilities": multifd}),
    );
    let parameters = json!({
        "multifd-channels": channels,
        "multifd-compression": compression.to_string(),
    });
    qemu.qmp.execute("migrate-set-parameters", &parameters);
}

/// Its memory.
pub(crate) fn memory(qemu: &mut Qemu) -> Vec<u8> {
    let path = qemu.path("memory");
    let arguments = json!({"val": 0, "size": MEMORY_MIB * MIB, "filename": utf8(&path)});
    qemu.qmp.execute("pmemsave", &arguments);
    let memory = std::fs::read(&path).expect("it was written");
    std::fs::remove_file(path).expect("it can be removed");
    memory
}

/// Fails unless two memories are equal.
pub(crate) fn assert_equal(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len());
    let pages = found.chunks(4096).zip(expected.chunks(4096));
    let wrong: Vec<usize> = pages
        .enumerate()
        .filter(|(_, (found, expected))| found != expected)
        .map(|(page, _)| page)
        .collect();
    assert!(wrong.is_empty(), "{what}: pages {wrong:x?} differ");
    assert!(expected[2 * MIB..].iter().any(|byte| *byte != 0), "{what}");
}

/// Loads a plain stream into a fresh machine; its memory.
pub(crate) fn load(files: &Files, version: Version, kind: &str, stream: &Path) -> Option<Vec<u8>> {
    let mut destination = files.destination(version, kind)?;
    let uri = format!("exec:cat {}", utf8(stream));
    destination
        .qmp
        .execute("migrate-incoming", &json!({"uri": uri}));
    destination.migrated();
    Some(memory(&mut destination))
}
