//! Guest-physical memory is where QEMU's own table of it says.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::{Value, json};

use super::{extracted, migrate_into, pipe_into, utf8};
use crate::need;
use crate::peers::qemu::{Machine, Version};

/// Memory at an address: first byte, last byte, RAM block, offset in that.
type Range = (u64, u64, String, u64);

fn number(text: &str) -> u64 {
    u64::from_str_radix(text, 16).expect("addresses are hexadecimal")
}

/// What the monitor's `info mtree -f` shows of these blocks in the first processor's view.
fn table(text: &str, blocks: &[&str]) -> Vec<Range> {
    let mut views = text.split("FlatView #");
    let view = views.find(|view| view.contains("AS \"cpu-memory-0\""));
    let lines = view.expect("the processor has a view").lines();
    let ranges = lines.filter_map(|line| {
        // `0000000000000000-00000000000bffff (prio 0, ram): pc.ram @0000000000100000 KVM`
        let (range, rest) = line.trim().split_once(" (prio ")?;
        let (_, rest) = rest.split_once("): ")?;
        let mut words = rest.split(' ');
        let block = words.next()?;
        let offset = words.next().and_then(|word| word.strip_prefix('@'));
        let (first, last) = range.split_once('-')?;
        let range = (
            number(first),
            number(last),
            block.to_owned(),
            offset.map_or(0, number),
        );
        blocks.contains(&block).then_some(range)
    });
    ranges.collect()
}

/// What the core's program headers say.
fn headers(core: &Path, report: &Value) -> Vec<Range> {
    let file = File::open(core).expect("the core can be opened");
    let read = |at: u64, bytes: usize| {
        let mut buffer = [0; 8];
        file.read_exact_at(&mut buffer[..bytes], at)
            .expect("the core can be read");
        u64::from_le_bytes(buffer)
    };
    let (start, count) = (read(32, 8), read(56, 2));
    let blocks = report["blocks"].as_array().expect("blocks are reported");
    let ranges = (1..count).map(|k| {
        let at = start + k * 56;
        let (offset, address, bytes) = (read(at + 8, 8), read(at + 24, 8), read(at + 32, 8));
        let block = blocks.iter().find_map(|block| {
            let inside = offset.checked_sub(block["file-offset"].as_u64()?)?;
            let name = block["name"].as_str()?;
            (inside < block["bytes"].as_u64()?).then(|| (name.to_owned(), inside))
        });
        let (block, inside) = block.expect("memory belongs to a block");
        (address, address + bytes - 1, block, inside)
    });
    ranges.collect()
}

/// A machine that is not started, with so much memory that it goes around the hole below 4 GiB.
fn is_laid_out(version: Version, machine: &str, memory: &str) {
    let qemu = need!(Machine::new(version)).args(["-M", machine, "-m", memory, "-S"]);
    let mut qemu = qemu.start();
    let command = json!({"command-line": "info mtree -f"});
    let text = qemu.qmp.execute("human-monitor-command", &command);
    let text = text.as_str().expect("the monitor answers in text");
    let expected = table(text, &["pc.ram", "microvm.ram", "pc.bios", "pc.rom"]);
    assert!(expected.len() >= 4, "{machine}: {text}");

    qemu.limits((1 << 40, 2000));
    let (stream, core) = (qemu.path("stream"), qemu.path("core"));
    migrate_into(&mut qemu, &pipe_into(&stream));
    let report = extracted(&["ram", utf8(&stream), "--core", "-o", utf8(&core)]);
    assert_eq!(report["addresses"], "physical");
    assert_eq!(headers(&core, &report), expected, "{machine} {memory}");
}

#[test]
fn pc_is_split_at_3_5_gib() {
    is_laid_out(Version::V10_0, "pc-i440fx-10.0", "3583M");
    is_laid_out(Version::V10_0, "pc-i440fx-10.0", "3584M");
    is_laid_out(Version::V7_2, "pc-i440fx-2.3", "3600M");
    is_laid_out(Version::V7_2, "pc-i440fx-1.7", "3600M");
}

#[test]
fn q35_is_split_at_2_75_gib() {
    is_laid_out(Version::V7_2, "pc-q35-7.2", "2815M");
    is_laid_out(Version::V10_0, "pc-q35-10.0", "2816M");
}

#[test]
fn microvm_and_isapc_are_split_where_they_are() {
    is_laid_out(Version::V10_0, "microvm", "3500M");
    is_laid_out(Version::V7_2, "microvm", "64M");
    is_laid_out(Version::V7_2, "isapc", "3600M");
}
