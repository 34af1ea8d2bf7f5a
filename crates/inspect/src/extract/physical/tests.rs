use super::*;

fn image(name: &str, length_bytes: u64, file_offset: u64) -> BlockImage {
    BlockImage {
        name: Name::new(name).unwrap(),
        length_bytes,
        file_offset: Some(file_offset),
        data_bytes: 0,
        zero_bytes: length_bytes,
        absent_bytes: 0,
    }
}

fn ranges(kind: MachineKind, blocks: &[BlockImage], pam: Option<[u8; 7]>) -> Vec<(u64, u64, u64)> {
    let plan = Plan {
        kind,
        ram: vec![&blocks[0]],
        blocks,
        below_4g: None,
        pam,
    };
    let (memory, _) = plan.lay_out();
    let ranges = memory.ranges().iter();
    ranges
        .map(|range| (range.start, range.end() - 1, range.file_offset))
        .collect()
}

const MIB: u64 = 1 << 20;

/// What `info mtree -f` of QEMU 7.2 and 10.0 shows of RAM alone.
#[test]
fn memory_is_split_where_qemu_splits_it() {
    use MachineKind::{Isapc, Microvm, OldPc, Pc, Q35};
    let cases = [
        (Pc, 3583, 3583, 0),
        (Pc, 3584, 3072, 512),
        (Pc, 3585, 3072, 513),
        (Pc, 6144, 3072, 3072),
        (OldPc, 4096, 3584, 512),
        (Q35, 2815, 2815, 0),
        (Q35, 2816, 2048, 768),
        (Q35, 6144, 2048, 4096),
        (Microvm, 3072, 3072, 0),
        (Microvm, 3500, 3072, 428),
        (Isapc, 3500, 3500, 0),
        (Isapc, 6144, 3584, 2560),
    ];
    for (kind, ram, below, above) in cases {
        let mut expected = vec![(0, below * MIB - 1, 0)];
        if above > 0 {
            expected.push((FOUR_GIB, FOUR_GIB + above * MIB - 1, below * MIB));
        }
        let blocks = [image("m0", ram * MIB, 0)];
        assert_eq!(ranges(kind, &blocks, None), expected, "{kind:?} {ram}");
    }
}

/// Of a machine that was not started.
#[test]
fn firmware_is_where_qemu_has_it() {
    let blocks = [
        image("pc.ram", 64 * MIB, 0),
        image("pc.bios", 0x4_0000, 0x1000_0000),
        image("pc.rom", 0x2_0000, 0x2000_0000),
    ];
    assert_eq!(
        ranges(MachineKind::Q35, &blocks, Some([0; 7])),
        [
            (0, 0xb_ffff, 0),
            (0xc_0000, 0xd_ffff, 0x2000_0000),
            (0xe_0000, 0xf_ffff, 0x1002_0000),
            (0x10_0000, 0x3ff_ffff, 0x10_0000),
            (0xfffc_0000, 0xffff_ffff, 0x1000_0000),
        ]
    );
    assert_eq!(
        ranges(MachineKind::Microvm, &blocks, None),
        [
            (0, 0xd_ffff, 0),
            (0xe_0000, 0xf_ffff, 0x1002_0000),
            (0x10_0000, 0x3ff_ffff, 0x10_0000),
            (0xfffc_0000, 0xffff_ffff, 0x1000_0000),
        ]
    );
    // All shadowed, as after the firmware has run; then all but one window.
    for pam in [None, Some([0x30, 0x33, 0x33, 0x33, 0x33, 0x33, 0x33])] {
        assert_eq!(
            ranges(MachineKind::Pc, &blocks, pam),
            [(0, 0x3ff_ffff, 0), (0xfffc_0000, 0xffff_ffff, 0x1000_0000)]
        );
    }
    assert_eq!(
        ranges(
            MachineKind::Pc,
            &blocks,
            Some([0x10, 0x11, 0x12, 0x11, 0x11, 0x11, 0x11])
        ),
        [
            (0, 0xc_7fff, 0),
            (0xc_8000, 0xc_bfff, 0x2000_8000),
            (0xc_c000, 0x3ff_ffff, 0xc_c000),
            (0xfffc_0000, 0xffff_ffff, 0x1000_0000)
        ]
    );
}

#[test]
fn several_blocks_are_one_memory_and_its_split_can_be_said() {
    let blocks = [image("a", 2048 * MIB, 0), image("b", 2048 * MIB, 1 << 32)];
    let mut plan = Plan {
        kind: MachineKind::Pc,
        ram: blocks.iter().collect(),
        blocks: &blocks,
        below_4g: None,
        pam: None,
    };
    let (memory, placed) = plan.lay_out();
    let range = |start, mib: u64, file_offset| PhysicalRange {
        start,
        bytes: mib * MIB,
        file_offset,
    };
    assert_eq!(
        memory.ranges(),
        [
            range(0, 2048, 0),
            range(2048 * MIB, 1024, 1 << 32),
            range(FOUR_GIB, 1024, (1 << 32) + 1024 * MIB)
        ]
    );
    assert_eq!(placed.len(), 2);
    plan.below_4g = Some(1024 * MIB);
    assert_eq!(
        plan.lay_out().0.ranges(),
        [
            range(0, 1024, 0),
            range(FOUR_GIB, 1024, 1024 * MIB),
            range(FOUR_GIB + 1024 * MIB, 2048, 1 << 32)
        ]
    );
}

#[test]
fn lengths_that_no_machine_has_do_no_harm() {
    let blocks = [
        image("pc.ram", u64::MAX - 4095, 0),
        image("pc.bios", u64::MAX - 4095, 0),
        image("pc.rom", u64::MAX - 4095, 0),
    ];
    for kind in [MachineKind::Pc, MachineKind::Isapc, MachineKind::Microvm] {
        assert!(!ranges(kind, &blocks, Some([0; 7])).is_empty());
    }
    let none = [image("pc.ram", 0, 0), image("pc.bios", 0, 0)];
    assert!(ranges(MachineKind::Pc, &none, None).is_empty());
}

#[test]
fn parts_of_memory_are_found_across_its_holes() {
    let blocks = [image("pc.ram", 4096 * MIB, 1 << 16)];
    let plan = Plan {
        kind: MachineKind::Pc,
        ram: vec![&blocks[0]],
        blocks: &blocks,
        below_4g: None,
        pam: None,
    };
    let (memory, _) = plan.lay_out();
    let parts: Vec<_> = memory.parts(3 * GIB - 16, GIB + 32).collect();
    let part = |start, bytes, file_offset| PhysicalRange {
        start,
        bytes,
        file_offset,
    };
    assert_eq!(
        parts,
        [
            part(3 * GIB - 16, 16, (1 << 16) + 3 * GIB - 16),
            part(FOUR_GIB, 16, (1 << 16) + 3 * GIB)
        ]
    );
    assert_eq!(memory.parts(3 * GIB, 4096).count(), 0);
    assert_eq!(memory.parts(u64::MAX, 4096).count(), 0);
}

#[test]
fn machines_are_known_by_their_names() {
    let kinds = [
        ("pc-i440fx-7.2", Some(MachineKind::Pc)),
        ("pc-i440fx-1.7", Some(MachineKind::OldPc)),
        ("pc-1.3", Some(MachineKind::OldPc)),
        ("pc-q35-10.0", Some(MachineKind::Q35)),
        ("microvm", Some(MachineKind::Microvm)),
        ("isapc", Some(MachineKind::Isapc)),
        ("virt-10.0", None),
        ("", None),
    ];
    for (name, kind) in kinds {
        assert_eq!(MachineKind::of_machine(name), kind, "{name}");
    }
}
