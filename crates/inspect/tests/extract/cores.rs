//! Cores of real streams.

use vmferry_inspect::{
    Addresses, CoreImage, CoreOptions, CpuState, Event, MachineKind, VisitError, Visitor,
    WhyPhysical, walk,
};
use vmferry_vmstate::{SavedBody, VmDescription};

use crate::{bytes_of, capture, captures};

/// The registers of a capture's first processor, both ways.
#[derive(Default)]
struct Both {
    description: Option<VmDescription>,
    described: Option<CpuState>,
    known: Option<CpuState>,
}

impl Visitor for Both {
    fn event(&mut self, event: Event<'_>) -> Result<(), VisitError> {
        match event {
            Event::Device(body) if body.section.name == "cpu" => {
                self.known = CpuState::from_body(body.section.version, body.bytes);
                let description = self.description.as_ref();
                let layout = description.and_then(|description| description.device("cpu", 0));
                if let Some(SavedBody::Described(state)) =
                    layout.map(|layout| layout.decode(body.bytes).unwrap())
                {
                    self.described = CpuState::from_saved(&state);
                }
            }
            Event::Description(description) => {
                self.description = Some(description.parsed.unwrap());
            }
            _ => {}
        }
        Ok(())
    }
}

/// What is known of a processor's section without a description is what descriptions say.
#[test]
fn registers_are_the_same_with_and_without_a_description() {
    let mut compared = 0;
    for name in captures() {
        let mut both = Both::default();
        // Some are channels that are no stream of their own.
        if walk(capture(&name).as_slice(), &mut both).is_err() {
            continue;
        }
        if let Some(described) = both.described {
            println!("{name}");
            assert_eq!(both.known, Some(described));
            assert_eq!(described.control[0] & 1 << 4, 1 << 4);
            compared += 1;
        }
    }
    assert!(compared > 30, "{compared}");
}

/// The program headers of a core: type, file offset, address, physical address, length.
fn headers(core: &[u8]) -> Vec<(u32, u64, u64, u64, u64)> {
    let half = |at: usize| u16::from_le_bytes(core[at..at + 2].try_into().unwrap());
    let word = |at: usize| u32::from_le_bytes(core[at..at + 4].try_into().unwrap());
    let long = |at: usize| u64::from_le_bytes(core[at..at + 8].try_into().unwrap());
    assert_eq!(&core[..7], b"\x7fELF\x02\x01\x01");
    assert_eq!((half(16), half(18)), (4, 62));
    let start = usize::try_from(long(32)).unwrap();
    let headers = (0..usize::from(half(56))).map(|k| start + k * 56);
    headers
        .map(|at| {
            (
                word(at),
                long(at + 8),
                long(at + 16),
                long(at + 24),
                long(at + 32),
            )
        })
        .collect()
}

#[test]
fn a_machine_that_never_ran_has_its_firmware_at_its_places() {
    let machines = [
        ("pc-72", MachineKind::Pc),
        ("pc-100", MachineKind::Pc),
        ("pc-2.2-72", MachineKind::Pc),
        ("q35-100", MachineKind::Q35),
        ("isapc-72", MachineKind::Isapc),
        ("no-vmdesc-100", MachineKind::Microvm),
    ];
    for (name, kind) in machines {
        println!("{name}");
        let mut image = CoreImage::new(tempfile::tempfile().unwrap(), CoreOptions::default());
        walk(capture(name).as_slice(), &mut image).unwrap();
        let (file, report) = image.finish().unwrap();
        assert_eq!(report.kind, Some(kind));
        assert_eq!(report.addresses, Addresses::Physical(WhyPhysical::NoPaging));
        assert_eq!((report.cpus.len(), report.cpu_sections), (1, 1));
        assert_eq!(report.cpus[0].rip, 0xfff0);
        assert!(report.unplaced.is_empty(), "{:?}", report.unplaced);

        let core = bytes_of(&file);
        let headers = headers(&core);
        assert_eq!(headers.len(), report.pieces + 1);
        let (kind, offset, _, _, length) = headers[0];
        assert_eq!((kind, length), (4, 12 + 8 + 336));
        let rip = usize::try_from(offset).unwrap() + 20 + 112 + 16 * 8;
        assert_eq!(core[rip..rip + 8], 0xfff0_u64.to_le_bytes());
        // Both copies of the first instruction.
        for address in [0xf_fff0, 0xffff_fff0] {
            let memory = headers[1..]
                .iter()
                .find(|(.., at, length)| (*at..at + length).contains(&address));
            let (kind, offset, virt, phys, _) = *memory.unwrap();
            assert_eq!((kind, virt), (1, phys));
            let at = usize::try_from(offset + address - phys).unwrap();
            assert_eq!(core[at], 0xea, "{address:#x}");
        }
    }
}

#[test]
fn other_blocks_can_be_the_memory() {
    let core = |options| {
        let mut image = CoreImage::new(tempfile::tempfile().unwrap(), options);
        walk(capture("postcopy-hugepages-100.fwd").as_slice(), &mut image).unwrap();
        image.finish()
    };
    let (_, report) = core(CoreOptions::default()).unwrap();
    assert!(report.unplaced.is_empty(), "the largest is the memory");
    let (_, report) = core(CoreOptions {
        memory_blocks: vec!["pc.rom".into()],
        below_4g_bytes: Some(4096),
    })
    .unwrap();
    assert_eq!(report.unplaced, ["m0"]);
    let missing = CoreOptions {
        memory_blocks: vec!["m1".into()],
        ..CoreOptions::default()
    };
    assert!(core(missing).is_err());
}
