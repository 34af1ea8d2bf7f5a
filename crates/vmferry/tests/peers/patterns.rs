//! What the guest of [`super::guest`] does instead when its disk shall be looked at all the time: it writes patterns to one
//! place after the other and reads older ones back, past its cache.

use std::path::{Path, PathBuf};

/// Bytes of a pattern, and the unit of its place on the disk.
const SLOT: usize = 64 << 10;
/// The first block of a pattern has its number; the others are the same everywhere.
const BLOCK: usize = 4 << 10;
/// Where the next pattern goes, in slots, modulo their number.
const STRIDE: usize = 7919;

/// In the initial RAM disk, and on the kernel's command line.
pub(crate) const PROGRAM: &str = "patterns";

/// Pattern `n` lies in slot `n * 7919` modulo their number. An older pattern that is read back is the newest of its slot.
const SCRIPT: &str = r#"#!/bin/busybox sh
bb=/bin/busybox
$bb mount -t devtmpfs dev /dev
$bb mount -t proc proc /proc
$bb mount -t sysfs sys /sys
exec </dev/ttyS0 >/dev/ttyS0 2>&1
while read -r module; do
  [ ! -e "/modules/$module.ko" ] || $bb insmod "/modules/$module.ko" || echo "FAILED to load $module"
done </modules/order
cd /ram
$bb dd if=/dev/urandom of=base bs=4k count=15 2>/dev/null
slots=$(($($bb cat /sys/block/vda/size) / 128))
pattern() {
  printf 'PATTERN %-4088d' "$1"
  $bb cat base
}
echo "READY slots=$slots"
n=0
while :; do
  pattern $n >out
  $bb dd if=out of=/dev/vda bs=64k seek=$((n * 7919 % slots)) conv=notrunc,fsync 2>/dev/null || echo "WRITE FAILED $n"
  reach=$slots
  [ $n -ge $slots ] || reach=$((n + 1))
  old=$((n - (n * 31 + 7) % reach))
  pattern $old >wanted
  $bb dd if=/dev/vda of=found bs=64k skip=$((old * 7919 % slots)) count=1 iflag=direct 2>/dev/null || echo "READ FAILED $old"
  $bb cmp wanted found || echo "FAILED: pattern $old is not there after $n"
  echo "TICK $n ram=ok"
  n=$((n + 1))
done
"#;

/// An initial RAM disk like `base` that has the program, too.
pub(crate) fn initrd(base: &Path, folder: &Path) -> PathBuf {
    initrd_with(base, folder, PROGRAM, SCRIPT)
}

/// An initial RAM disk like `base` with one more program in it: archives may follow one another.
pub(crate) fn initrd_with(base: &Path, folder: &Path, program: &str, script: &str) -> PathBuf {
    let mut bytes = std::fs::read(base).expect("the guest's RAM disk can be read");
    pad(&mut bytes);
    member(&mut bytes, program, 0o100_755, script.as_bytes());
    member(&mut bytes, "TRAILER!!!", 0, b"");
    let path = folder.join("initrd");
    std::fs::write(&path, bytes).expect("a file in the temporary folder");
    path
}

/// One member of a cpio archive of the kind "newc".
fn member(archive: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]) {
    let length = u32::try_from(content.len()).expect("a program is small");
    let name_length = u32::try_from(name.len() + 1).expect("a name is small");
    // Inode, mode, owner, group, links, time, length, four device numbers, length of the name, no checksum.
    let fields = [1, mode, 0, 0, 1, 0, length, 0, 0, 0, 0, name_length, 0];
    archive.extend_from_slice(b"070701");
    for field in fields {
        archive.extend_from_slice(format!("{field:08X}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    pad(archive);
    archive.extend_from_slice(content);
    pad(archive);
}

fn pad(archive: &mut Vec<u8>) {
    archive.resize(archive.len().next_multiple_of(4), 0);
}

/// Fails unless each block of the disk, in a raw file, is from a pattern of its place, or was never written. The number of
/// patterns.
pub(crate) fn assert_patterns(disk: &Path) -> usize {
    let bytes = std::fs::read(disk).expect("a disk can be read");
    let slots = bytes.len() / SLOT;
    let mut base: Vec<Option<&[u8]>> = vec![None; SLOT / BLOCK];
    let mut patterns = 0;
    for (slot, content) in bytes.chunks(SLOT).enumerate() {
        for (part, block) in content.chunks(BLOCK).enumerate() {
            let place = format!("block {part} of slot {slot} of {}", disk.display());
            if block.iter().all(|byte| *byte == 0) {
                continue;
            }
            if part > 0 {
                let known = base[part].get_or_insert(block);
                assert!(*known == block, "{place} holds what nobody wrote");
                continue;
            }
            let text = std::str::from_utf8(block).unwrap_or_default();
            let number = text.strip_prefix("PATTERN ").map(str::trim_end);
            let number: Option<usize> = number.and_then(|number| number.parse().ok());
            let number = number.unwrap_or_else(|| panic!("{place} holds what nobody wrote"));
            assert_eq!(
                number * STRIDE % slots,
                slot,
                "{place} holds pattern {number}"
            );
            patterns += 1;
        }
    }
    patterns
}
