use std::os::unix::fs::FileExt;

use super::super::cpu::Segment;
use super::super::physical::PhysicalRange;
use super::*;

const WRITABLE: u64 = 2;
const USER: u64 = 4;
/// Present and writable, as most entries are.
const P: u64 = PRESENT | WRITABLE;
const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;
/// Where memory is in the file.
const BASE: u64 = 0x1_0000;

/// A guest with 4 GiB of memory from 0 on.
struct Guest {
    file: File,
    memory: PhysicalMemory,
    cpu: CpuState,
}

impl Guest {
    fn long_mode(root: u64) -> Self {
        let mut cpu = CpuState {
            efer: EFER_LONG_MODE,
            control: [CR0_PAGING, 0, root, CR4_PAE],
            ..CpuState::default()
        };
        cpu.segments[1] = Segment {
            selector: 0x10,
            base: 0,
        };
        Self {
            file: tempfile::tempfile().unwrap(),
            memory: vec![PhysicalRange {
                start: 0,
                bytes: 4 * GIB,
                file_offset: BASE,
            }]
            .into(),
            cpu,
        }
    }

    fn entry(&self, table: u64, index: u64, entry: u64) {
        let at = BASE + table + index * 8;
        self.file.write_all_at(&entry.to_le_bytes(), at).unwrap();
    }

    fn short_entry(&self, table: u64, index: u64, entry: u32) {
        let at = BASE + table + index * 4;
        self.file.write_all_at(&entry.to_le_bytes(), at).unwrap();
    }

    fn space(&self) -> AddressSpace {
        let space = address_space(&self.cpu, &self.memory, &self.file).unwrap();
        space.unwrap()
    }

    /// Address, physical address, length.
    fn pieces(&self) -> Vec<(u64, u64, u64)> {
        let pieces = self.space().pieces.into_iter();
        pieces
            .map(|piece| {
                assert_eq!(piece.file_offset, piece.physical + BASE);
                (piece.address, piece.physical, piece.bytes)
            })
            .collect()
    }
}

#[test]
fn pages_of_every_size_are_found_and_joined() {
    let guest = Guest::long_mode(0x1000);
    guest.entry(0x1000, 0, 0x2000 | P);
    guest.entry(0x1000, 511, 0x5000 | P);
    // 1 GiB at 1 GiB, then a table.
    guest.entry(0x2000, 1, GIB | LARGE | P);
    guest.entry(0x2000, 2, 0x3000 | P | NO_EXECUTE);
    // 2 MiB that follow on it, 4 KiB that follow on that, and one that does not.
    guest.entry(0x3000, 0, (2 * GIB) | LARGE | P | NO_EXECUTE);
    guest.entry(0x3000, 1, 0x4000 | P);
    guest.entry(0x4000, 0, (2 * GIB + 2 * MIB) | P | LARGE);
    guest.entry(0x4000, 2, 0x7000 | P);
    guest.entry(0x4000, 3, 0x8000 | WRITABLE);
    // The last 2 MiB of all addresses.
    guest.entry(0x5000, 511, 0x6000 | P);
    guest.entry(0x6000, 511, (4 * MIB) | LARGE | P);
    assert_eq!(
        guest.pieces(),
        [
            (GIB, GIB, GIB + 2 * MIB + 4096),
            (2 * GIB + 2 * MIB + 8192, 0x7000, 4096),
            (u64::MAX - 2 * MIB + 1, 4 * MIB, 2 * MIB),
        ]
    );
}

#[test]
fn five_levels_are_walked_where_the_guest_has_them() {
    let mut guest = Guest::long_mode(0x1000);
    for (table, next) in [(0x1000, 0x2000), (0x2000, 0x3000), (0x3000, 0x4000)] {
        guest.entry(table, 256, next | P);
    }
    guest.entry(0x4000, 0, (6 * MIB) | LARGE | P);
    guest.cpu.control[3] |= CR4_FIVE_LEVELS;
    let address = u64::MAX << 56 | 256 << 39 | 256 << 48 | 256 << 30;
    assert_eq!(guest.pieces(), [(address, 6 * MIB, 2 * MIB)]);
}

#[test]
fn tables_of_32_bits_are_walked_too() {
    let mut guest = Guest::long_mode(0x1020);
    guest.cpu.efer = 0;
    guest.entry(0x1020, 3, 0x2000 | P);
    guest.entry(0x2000, 511, (2 * MIB) | LARGE | P);
    assert_eq!(guest.pieces(), [(0xffe0_0000, 2 * MIB, 2 * MIB)]);

    let mut guest = Guest::long_mode(0x1000);
    guest.cpu.efer = 0;
    guest.cpu.control[3] = CR4_LARGE_PAGES;
    guest.short_entry(0x1000, 0, 0x2000 | 3);
    guest.short_entry(0x1000, 768, 0x0080_0000 | 0x83);
    guest.short_entry(0x2000, 1, 0x3000 | 3);
    let small = (4096, 0x3000, 4096);
    let large = (0xc000_0000, 8 * MIB, 4 * MIB);
    assert_eq!(guest.pieces(), [small, large]);
    // Without large pages the bit means nothing.
    guest.cpu.control[3] = 0;
    assert_eq!(guest.pieces(), [small]);
}

#[test]
fn what_is_no_memory_is_left_out() {
    let mut guest = Guest::long_mode(0x1000);
    guest.memory = vec![
        PhysicalRange {
            start: 0,
            bytes: GIB + MIB,
            file_offset: BASE,
        },
        PhysicalRange {
            start: GIB + 2 * MIB,
            bytes: MIB,
            file_offset: BASE + GIB + 2 * MIB,
        },
    ]
    .into();
    guest.entry(0x1000, 0, 0x2000 | P);
    guest.entry(0x2000, 5, GIB | LARGE | P);
    guest.entry(0x2000, 6, (8 * GIB) | LARGE | P);
    // A table in nothing.
    guest.entry(0x2000, 7, (16 * GIB) | P);
    assert_eq!(
        guest.pieces(),
        [(5 * GIB, GIB, MIB), (5 * GIB + 2 * MIB, GIB + 2 * MIB, MIB)]
    );
}

#[test]
fn a_processor_without_paging_has_no_tables() {
    let mut guest = Guest::long_mode(0x1000);
    guest.cpu.control[0] = 1;
    let space = address_space(&guest.cpu, &guest.memory, &guest.file);
    assert_eq!(space.unwrap(), None);
}

#[test]
fn a_table_that_maps_itself_is_entered_once() {
    let guest = Guest::long_mode(0x1000);
    guest.entry(0x1000, 0, 0x2000 | P);
    guest.entry(0x1000, 300, 0x1000 | P);
    guest.entry(0x2000, 0, GIB | LARGE | P);
    guest.entry(0x2000, 1, 0x1000 | P);
    let space = guest.space();
    assert_eq!(space.pieces.len(), 1);
    assert!(!space.cut_short);
}

/// Every entry of every table leads to one table of the next level: 2^36 pages.
#[test]
fn endless_tables_come_to_an_end_and_the_kernel_comes_first() {
    let guest = Guest::long_mode(0x1000);
    for (table, next) in [(0x1000, 0x2000), (0x2000, 0x3000), (0x3000, 0x4000)] {
        for index in 0..512 {
            guest.entry(table, index, next | P);
        }
    }
    for index in 0..512 {
        guest.entry(0x4000, index, 0x5000 | P);
    }
    let space = guest.space();
    assert!(space.cut_short);
    assert_eq!(space.pieces.len(), MAX_PIECES);
    assert_eq!(space.pieces[0].address, 0xffff_8000_0000_0000);
}

#[test]
fn isolation_is_left_only_where_it_is() {
    let mut guest = Guest::long_mode(0x3000);
    guest.cpu.segments[1].selector = 0x33;
    // Of the user: its own page, and a bit of the kernel.
    guest.entry(0x3000, 0, 0x4000 | P | USER);
    guest.entry(0x3000, 511, 0x5000 | P);
    guest.entry(0x4000, 0, GIB | LARGE | P | USER);
    guest.entry(0x5000, 1, (2 * GIB) | LARGE | P);
    // Of the kernel: the same page, not to be executed, and all of the kernel.
    guest.entry(0x2000, 0, 0x4000 | P | USER | NO_EXECUTE);
    guest.entry(0x2000, 511, 0x6000 | P);
    guest.entry(0x6000, 1, (2 * GIB) | LARGE | P);
    guest.entry(0x6000, 2, GIB | LARGE | P);
    let space = guest.space();
    assert!(space.isolated);
    assert_eq!(space.pieces.len(), 3);

    guest.cpu.segments[1].selector = 0x10;
    assert!(!guest.space().isolated);
    guest.cpu.segments[1].selector = 0x33;
    guest.entry(0x2000, 1, 0x4000 | P | USER);
    let space = guest.space();
    assert!(!space.isolated);
    assert_eq!(space.pieces.len(), 2);
}

/// Tables without end that map nothing.
#[test]
fn only_so_many_tables_are_read() {
    let guest = Guest::long_mode(0x1000);
    for (table, next) in [(0x1000, 0x2000), (0x2000, 0x3000)] {
        for index in 0..512 {
            guest.entry(table, index, next | P);
        }
    }
    // 1 + 512 + 512 * 512 tables.
    assert!(guest.space().cut_short);
    for index in 508..512 {
        guest.entry(0x1000, index, 0);
    }
    // 1 + 508 + 508 * 512 tables.
    let space = guest.space();
    assert!(!space.cut_short && space.pieces.is_empty());
}
