//! A core file that a debugger opens: memory and registers of the whole machine.

use std::fs::File;

use vmferry_stream::{Name, Record, Section};
use vmferry_vmstate::{SavedBody, VmDescription};

use super::cpu::CpuState;
use super::elf;
use super::error::ExtractError;
use super::memory::{BlockImage, Blocks, MemoryImage};
use super::paging::{self, AddressSpace, Piece};
use super::physical::{MachineKind, PhysicalMemory, Plan};
use crate::walk::{Body, Event, Found, VisitError, Visitor};

/// Bytes of the processors' sections, which are kept until the description is known: 4000 of them.
const MAX_KEPT_BYTES: usize = 16 << 20;
/// Firmware of machine types before 2.0.
const OLD_FIRMWARE_BYTES: u64 = 0x2_0000;
/// The main memory's usual names.
const MAIN_MEMORY: [&str; 2] = ["pc.ram", "microvm.ram"];

/// What the stream does not say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CoreOptions {
    /// The RAM blocks that make up the main memory, in order; none: by their usual names, else the
    /// largest.
    pub memory_blocks: Vec<String>,
    /// How much of it is below 4 GiB; `None`: as the machine type has it by default.
    pub below_4g_bytes: Option<u64>,
}

/// What became of a core.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CoreReport {
    /// The machine type, if the stream names it.
    pub machine: Option<Name>,
    /// What it was laid out as; `None`: the machine type is not known, memory starts at 0.
    pub kind: Option<MachineKind>,
    /// Processors whose registers are known.
    pub cpus: Vec<CpuState>,
    /// Processors in the stream.
    pub cpu_sections: usize,
    /// Addresses in the core.
    pub addresses: Addresses,
    /// All RAM blocks.
    pub blocks: Vec<BlockImage>,
    /// Blocks whose place in the guest is not known; they are in the file, but a debugger does not
    /// see them.
    pub unplaced: Vec<Name>,
    /// The program headers that say where memory is.
    pub pieces: usize,
}

/// What addresses in a core mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Addresses {
    /// As a processor sees them.
    Virtual {
        /// Its index.
        cpu: usize,
        /// It was in user space, and its page tables hid the kernel: those of the kernel were taken.
        isolated: bool,
        /// There is more than what was found within bounds.
        cut_short: bool,
    },
    /// Guest-physical.
    Physical(WhyPhysical),
}

/// Why addresses are physical.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhyPhysical {
    /// No processor's registers are known.
    UnknownRegisters,
    /// The processor does not use paging.
    NoPaging,
    /// Its page tables map nothing.
    NothingMapped,
}

/// Makes a core of a stream.
#[derive(Debug)]
pub struct CoreImage {
    memory: MemoryImage,
    options: CoreOptions,
    machine: Option<Name>,
    description: Option<VmDescription>,
    kept: Vec<Kept>,
    kept_bytes: usize,
}

#[derive(Debug)]
struct Kept {
    section: Section,
    body: Vec<u8>,
}

impl CoreImage {
    /// A core in `file`, which is empty.
    #[must_use]
    pub fn new(file: File, options: CoreOptions) -> Self {
        let start_bytes = elf::MEMORY_START;
        Self {
            memory: MemoryImage::new(file, Blocks::All { start_bytes }),
            options,
            machine: None,
            description: None,
            kept: Vec::new(),
            kept_bytes: 0,
        }
    }

    /// The stream is over, or as much of it as there is: the core, and what is in it.
    ///
    /// # Errors
    /// There is no memory in it, or not the blocks that were asked for, or the file cannot be
    /// written.
    pub fn finish(self) -> Result<(File, CoreReport), ExtractError> {
        let (file, blocks) = self.memory.finish()?;
        let mut kept = Kepts {
            kept: &self.kept,
            description: self.description.as_ref(),
        };
        let kind = match &self.machine {
            Some(machine) => MachineKind::of_machine(machine),
            None => kept.kind(&blocks),
        };
        let plan = Plan {
            kind: kind.unwrap_or(MachineKind::Isapc),
            ram: main_memory(&blocks, &self.options.memory_blocks)?,
            blocks: if kind.is_some() { &blocks } else { &[] },
            below_4g: self.options.below_4g_bytes,
            pam: kind.and_then(|kind| kept.pam(kind)),
        };
        let (memory, placed) = plan.lay_out();
        let cpus = kept.cpus();
        let (addresses, pieces) = addresses(&cpus, &memory, &file)?;
        elf::write(&file, &cpus, &pieces).map_err(ExtractError::write)?;

        let unplaced = blocks.iter().map(|block| &block.name);
        let unplaced = unplaced.filter(|name| !placed.contains(name) && !is_blob(name));
        let report = CoreReport {
            machine: self.machine,
            kind,
            cpu_sections: kept.cpu_sections().count(),
            cpus,
            addresses,
            unplaced: unplaced.cloned().collect(),
            blocks,
            pieces: pieces.len(),
        };
        Ok((file, report))
    }

    fn keep(&mut self, body: Body<'_>) -> Result<(), ExtractError> {
        let name = &body.section.name;
        if name != "cpu" && !is_chipset(name) {
            return Ok(());
        }
        self.kept_bytes = self.kept_bytes.saturating_add(body.bytes.len());
        if self.kept_bytes > MAX_KEPT_BYTES {
            return Err(ExtractError::TooMuch {
                what: "the state of all processors".into(),
                max: u64::try_from(MAX_KEPT_BYTES).unwrap_or(u64::MAX),
            });
        }
        self.kept.push(Kept {
            section: body.section.clone(),
            body: body.bytes.to_vec(),
        });
        Ok(())
    }
}

impl Visitor for CoreImage {
    fn event(&mut self, event: Event<'_>) -> Result<(), VisitError> {
        match event {
            Event::Record(_, Record::Configuration(configuration)) => {
                self.machine = Some(configuration.machine.clone());
            }
            Event::Device(body) if body.found != Found::Cut => self.keep(body)?,
            Event::Description(description) => {
                self.description = description.parsed.ok();
                return Ok(());
            }
            _ => {}
        }
        self.memory.event(event)
    }
}

/// A file that the firmware reads through a device; at no address.
fn is_blob(name: &str) -> bool {
    name.starts_with("/rom@")
}

fn is_chipset(name: &str) -> bool {
    name.ends_with("/I440FX") || name.ends_with("/mch")
}

/// The blocks that make up the main memory.
fn main_memory<'a>(
    blocks: &'a [BlockImage],
    wanted: &[String],
) -> Result<Vec<&'a BlockImage>, ExtractError> {
    let find = |name: &str| blocks.iter().find(|block| block.name == *name);
    if wanted.is_empty() {
        let usual = MAIN_MEMORY.into_iter().find_map(find);
        let largest = || blocks.iter().max_by_key(|block| block.length_bytes);
        return Ok(usual.or_else(largest).into_iter().collect());
    }
    let found = wanted.iter().map(|name| {
        find(name).ok_or_else(|| ExtractError::NotFound {
            what: "RAM block",
            name: name.clone(),
            choices: blocks.iter().map(|block| block.name.to_string()).collect(),
        })
    });
    found.collect()
}

/// What addresses mean, and where they are in the file.
fn addresses(
    cpus: &[CpuState],
    memory: &PhysicalMemory,
    file: &File,
) -> Result<(Addresses, Vec<Piece>), ExtractError> {
    // The kernel's view is the widest.
    let privileged = cpus.iter().position(CpuState::is_privileged);
    let number = privileged.unwrap_or(0);
    let why = match cpus.get(number) {
        None => WhyPhysical::UnknownRegisters,
        Some(cpu) => match paging::address_space(cpu, memory, file)? {
            None => WhyPhysical::NoPaging,
            Some(AddressSpace { pieces, .. }) if pieces.is_empty() => WhyPhysical::NothingMapped,
            Some(space) => {
                let addresses = Addresses::Virtual {
                    cpu: number,
                    isolated: space.isolated,
                    cut_short: space.cut_short,
                };
                return Ok((addresses, space.pieces));
            }
        },
    };
    let pieces = memory.ranges().iter().map(|range| Piece {
        address: range.start,
        physical: range.start,
        bytes: range.bytes,
        file_offset: range.file_offset,
    });
    Ok((Addresses::Physical(why), pieces.collect()))
}

/// Sections that were kept, and how to read them.
struct Kepts<'a> {
    kept: &'a [Kept],
    description: Option<&'a VmDescription>,
}

impl Kepts<'_> {
    fn cpu_sections(&self) -> impl Iterator<Item = &Kept> {
        self.kept.iter().filter(|kept| kept.section.name == "cpu")
    }

    fn cpus(&mut self) -> Vec<CpuState> {
        self.cpu_sections()
            .filter_map(|kept| self.cpu(kept))
            .collect()
    }

    fn cpu(&self, kept: &Kept) -> Option<CpuState> {
        let described = || {
            let layout = self.description?.device("cpu", kept.section.instance.0)?;
            match layout.decode(&kept.body).ok()? {
                SavedBody::Described(state) => CpuState::from_saved(&state),
                SavedBody::OldStyle(_) => None,
            }
        };
        described().or_else(|| CpuState::from_body(kept.section.version, &kept.body))
    }

    /// The kind of a machine without a name (types up to 2.3), by its chipset; and by the length of
    /// its firmware, which doubled with 2.0.
    fn kind(&self, blocks: &[BlockImage]) -> Option<MachineKind> {
        let mut kept = self.kept.iter();
        let chipset = kept.find(|kept| is_chipset(&kept.section.name))?;
        let bios = blocks.iter().find(|block| block.name == "pc.bios");
        let is_old = bios.is_some_and(|bios| bios.length_bytes == OLD_FIRMWARE_BYTES);
        Some(match (chipset.section.name.ends_with("/mch"), is_old) {
            (true, _) => MachineKind::Q35,
            (false, true) => MachineKind::OldPc,
            (false, false) => MachineKind::Pc,
        })
    }

    /// The registers that map ROM or RAM below 1 MiB. A PCI device's body starts with a version of
    /// four bytes and its configuration space.
    fn pam(&self, kind: MachineKind) -> Option<[u8; 7]> {
        let start = kind.pam_offset()?.checked_add(4)?;
        let chipset = self
            .kept
            .iter()
            .find(|kept| is_chipset(&kept.section.name))?;
        chipset.body.get(start..)?.first_chunk().copied()
    }
}

#[cfg(test)]
mod tests {
    use vmferry_stream::{InstanceId, RamRecord, SectionId, SectionKind};

    use super::*;
    use crate::walk::Found;

    fn image() -> CoreImage {
        CoreImage::new(tempfile::tempfile().unwrap(), CoreOptions::default())
    }

    fn cpu(image: &mut CoreImage, version: u32, bytes: usize) -> Result<(), String> {
        let section = Section {
            kind: SectionKind::Full,
            id: SectionId(7),
            name: Name::new("cpu").unwrap(),
            instance: InstanceId(0),
            version,
        };
        let told = image.event(Event::Device(Body {
            section: &section,
            offset: 0,
            bytes: &vec![0; bytes],
            found: Found::ByFooter,
        }));
        told.map_err(|error| error.to_string())
    }

    #[test]
    fn the_state_of_processors_has_a_bound() {
        let mut image = image();
        assert!(cpu(&mut image, 12, MAX_KEPT_BYTES - 1).is_ok());
        assert!(cpu(&mut image, 12, 1).is_ok());
        assert_eq!(
            cpu(&mut image, 12, 1).unwrap_err(),
            "the state of all processors has more than 16777216 bytes, which is as much as is held"
        );
    }

    #[test]
    fn without_registers_addresses_are_physical() {
        let mut image = image();
        let block = RamRecord::Block {
            name: Name::new("pc.ram").unwrap(),
            used_bytes: 4096,
            page_bytes: None,
            guest_address: None,
            mapped: None,
        };
        image.event(Event::Record(0, &Record::Ram(block))).unwrap();
        // Another architecture's, and one that is too short.
        cpu(&mut image, 22, 4096).unwrap();
        cpu(&mut image, 12, 100).unwrap();
        let (_, report) = image.finish().unwrap();
        let why = WhyPhysical::UnknownRegisters;
        assert_eq!(report.addresses, Addresses::Physical(why));
        assert_eq!((report.cpu_sections, report.cpus.len()), (2, 0));
        assert_eq!((report.kind, report.pieces), (None, 1));
    }
}
