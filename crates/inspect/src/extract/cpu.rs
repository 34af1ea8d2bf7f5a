//! Registers of an x86-64 processor, from its `cpu` section.

use vmferry_vmstate::{Content, SavedState, Value};

/// The `cpu` section's version whose beginning is known without a description: QEMU since 0.14.
const KNOWN_VERSION: u32 = 12;
/// Wire offsets of that version.
const REGISTERS: usize = 0;
const RIP: usize = 128;
const RFLAGS: usize = 136;
const SEGMENTS: usize = 236;
const SEGMENT_BYTES: usize = 20;
const CONTROL: usize = 456;
const EFER: usize = 816;

/// What a debugger, and a walk through page tables, want of a processor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuState {
    /// rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 to r15.
    pub registers: [u64; 16],
    /// Instruction pointer, without the code segment's base.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// es, cs, ss, ds, fs, gs.
    pub segments: [Segment; 6],
    /// cr0, cr2, cr3, cr4.
    pub control: [u64; 4],
    /// Extended features.
    pub efer: u64,
}

/// A segment register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Its visible part.
    pub selector: u64,
    /// Its hidden base.
    pub base: u64,
}

impl CpuState {
    /// From a section that was decoded with the stream's description; `None` if it is not that of an
    /// x86-64 processor.
    #[must_use]
    pub fn from_saved(state: &SavedState) -> Option<Self> {
        let mut cpu = Self {
            rip: number(state, "env.eip")?,
            rflags: number(state, "env.eflags")?,
            efer: number(state, "env.efer")?,
            ..Self::default()
        };
        let registers = state.field("env.regs")?;
        fill(&mut cpu.registers, registers.values().map(unsigned))?;
        let Content::Structs(segments) = &state.field("env.segs")?.content else {
            return None;
        };
        let segments = segments.iter().map(|segment| {
            Some(Segment {
                selector: number(segment, "selector")?,
                base: number(segment, "base")?,
            })
        });
        fill(&mut cpu.segments, segments)?;
        let control = ["env.cr[0]", "env.cr[2]", "env.cr[3]", "env.cr[4]"];
        fill(&mut cpu.control, control.map(|name| number(state, name)))?;
        Some(cpu)
    }

    /// From the bytes of a section without a description, if its version's layout is known.
    #[must_use]
    pub fn from_body(version: u32, body: &[u8]) -> Option<Self> {
        if version != KNOWN_VERSION {
            return None;
        }
        let mut cpu = Self {
            rip: u64_at(body, RIP)?,
            rflags: u64_at(body, RFLAGS)?,
            efer: u64_at(body, EFER)?,
            ..Self::default()
        };
        let words = |start: usize| {
            (0_usize..).map(move |k| u64_at(body, start.checked_add(k.checked_mul(8)?)?))
        };
        fill(&mut cpu.registers, words(REGISTERS))?;
        fill(&mut cpu.control, words(CONTROL))?;
        let segments = (0_usize..).map(|k| {
            let at = SEGMENTS.checked_add(k.checked_mul(SEGMENT_BYTES)?)?;
            Some(Segment {
                selector: u32_at(body, at)?.into(),
                base: u64_at(body, at.checked_add(4)?)?,
            })
        });
        fill(&mut cpu.segments, segments)?;
        Some(cpu)
    }

    /// Does it run the guest's kernel?
    pub(crate) fn is_privileged(&self) -> bool {
        let [_, cs, ..] = self.segments;
        cs.selector & 3 == 0
    }
}

/// Fill all of `places`, or nothing is known.
fn fill<T>(places: &mut [T], values: impl IntoIterator<Item = Option<T>>) -> Option<()> {
    let mut values = values.into_iter();
    for place in places {
        *place = values.next()??;
    }
    Some(())
}

fn number(state: &SavedState, name: &str) -> Option<u64> {
    unsigned(state.field(name)?.values().next()?)
}

fn unsigned(value: Value<'_>) -> Option<u64> {
    match value {
        Value::Uint(value) => Some(value),
        _ => None,
    }
}

fn u64_at(body: &[u8], at: usize) -> Option<u64> {
    let bytes = body.get(at..)?.first_chunk()?;
    Some(u64::from_be_bytes(*bytes))
}

fn u32_at(body: &[u8], at: usize) -> Option<u32> {
    let bytes = body.get(at..)?.first_chunk()?;
    Some(u32::from_be_bytes(*bytes))
}
