//! Values that are computed for the stream, and what they see of their owner.

mod round_trip;
mod sections;

use round_trip::{decode, encode, is_refused, is_sent_as};
use sections::{capture, round_trip};
use vmferry_vmstate::{BoxError, View, VmState};

/// A card that waits to send on as many queues as it has: the values that are computed are counted,
/// checked and chosen by their owner.
#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "card", version = 1, subsections(Statistics))]
struct Card {
    #[vmstate(uint16)]
    pairs: u16,
    #[vmstate(bool)]
    has_limit: bool,
    #[vmstate(tmp = Waiting, name = "waiting")]
    waiting: Vec<u32>,
    #[vmstate(skip = "how it was built")]
    model: u16,
    #[vmstate(skip = "sent by `Waiting`, if `has_limit`")]
    limit: u8,
    #[vmstate(skip = "sent by `Statistics`")]
    sent: Vec<u8>,
}

#[derive(VmState)]
#[vmstate(name = "card-waiting", version = 1)]
struct Waiting {
    #[vmstate(skip = "the owner's")]
    pairs: u16,
    #[vmstate(skip = "the owner's")]
    has_limit: bool,
    #[vmstate(uint32, count = pairs, max = 4)]
    waiting: Vec<u32>,
    #[vmstate(uint16_equal)]
    model: u16,
    #[vmstate(uint8, condition = Self::is_limited)]
    limit: u8,
}

impl Waiting {
    fn is_limited(&self, _version: u32) -> bool {
        self.has_limit
    }
}

impl View<Card> for Waiting {
    fn is_needed_by(_: &Card) -> bool {
        true
    }

    fn take(card: &mut Card) -> Result<Self, BoxError> {
        Ok(Self {
            waiting: card.waiting.clone(),
            ..Self::template(card)
        })
    }

    fn template(card: &Card) -> Self {
        Self {
            pairs: card.pairs,
            has_limit: card.has_limit,
            waiting: Vec::new(),
            model: card.model,
            limit: card.limit,
        }
    }

    fn put(self, card: &mut Card, _version: u32) -> Result<(), BoxError> {
        card.waiting = self.waiting;
        card.limit = self.limit;
        Ok(())
    }
}

#[derive(VmState)]
#[vmstate(name = "card/statistics", version = 1)]
struct Statistics {
    #[vmstate(skip = "the owner's")]
    pairs: u16,
    #[vmstate(uint8, count = pairs, max = 4)]
    sent: Vec<u8>,
}

impl View<Card> for Statistics {
    fn is_needed_by(card: &Card) -> bool {
        !card.sent.is_empty()
    }

    fn take(card: &mut Card) -> Result<Self, BoxError> {
        Ok(Self {
            sent: card.sent.clone(),
            ..Self::template(card)
        })
    }

    fn template(card: &Card) -> Self {
        Self {
            pairs: card.pairs,
            sent: Vec::new(),
        }
    }

    fn put(self, card: &mut Card, _version: u32) -> Result<(), BoxError> {
        card.sent = self.sent;
        Ok(())
    }
}

fn card(model: u16) -> Card {
    Card {
        model,
        limit: 7,
        ..Card::default()
    }
}

#[test]
fn they_are_counted_checked_and_chosen_by_their_owner() {
    let waiting = Card {
        pairs: 2,
        waiting: vec![8, 9],
        ..card(0x1af4)
    };
    is_sent_as(
        waiting.clone(),
        &card(0x1af4),
        b"\0\x02\0\0\0\0\x08\0\0\0\x09\x1a\xf4",
    );
    let limited = Card {
        has_limit: true,
        limit: 3,
        sent: vec![5, 6],
        ..waiting
    };
    is_sent_as(
        limited,
        &card(0x1af4),
        b"\0\x02\x01\0\0\0\x08\0\0\0\x09\x1a\xf4\x03\x05\x0fcard/statistics\0\0\0\x01\x05\x06",
    );
    is_refused(
        card(2),
        b"\0\0\0\0\x01",
        "field 'waiting.model' (byte 3 of the device): is 1, must be 2 as on this side",
    );
    is_refused(
        card(2),
        b"\0\x05\0",
        "field 'waiting.waiting' (byte 2 of the device): its count is 5, at most 4 are allowed",
    );
    // What was not sent is as it was.
    let loaded = decode(card(2), b"\0\0\0\0\x02").unwrap();
    assert_eq!(loaded, card(2));
    assert_eq!(encode(&mut card(2)), b"\0\0\0\0\x02");
}

/// A processor, as QEMU 10.0 and 7.2 describe it when they emulate it themselves.
#[derive(Clone, Debug, Default, VmState)]
#[vmstate(name = "cpu", version = 12)]
struct Processor {
    #[vmstate(uint64, name = "env.regs")]
    regs: [u64; 16],
    #[vmstate(uint64, name = "env.eip")]
    eip: u64,
    #[vmstate(uint64, name = "env.eflags")]
    eflags: u64,
    #[vmstate(uint32, name = "env.hflags")]
    hflags: u32,
    #[vmstate(uint16, name = "env.fpuc")]
    fpuc: u16,
    #[vmstate(uint16, name = "env.fpus_vmstate")]
    fpus_vmstate: u16,
    #[vmstate(uint16, name = "env.fptag_vmstate")]
    fptag_vmstate: u16,
    #[vmstate(uint16, name = "env.fpregs_format_vmstate")]
    fpregs_format_vmstate: u16,
    #[vmstate(struct, name = "env.fpregs")]
    fpregs: [FpuRegister; 8],
    #[vmstate(struct, name = "env.segs")]
    segs: [Segment; 6],
    #[vmstate(struct, name = "env.ldt")]
    ldt: Segment,
    #[vmstate(struct, name = "env.tr")]
    tr: Segment,
    #[vmstate(struct, name = "env.gdt")]
    gdt: Segment,
    #[vmstate(struct, name = "env.idt")]
    idt: Segment,
    #[vmstate(uint32, name = "env.sysenter_cs")]
    sysenter_cs: u32,
    #[vmstate(uint64, name = "env.sysenter_esp")]
    sysenter_esp: u64,
    #[vmstate(uint64, name = "env.sysenter_eip")]
    sysenter_eip: u64,
    #[vmstate(uint64, name = "env.cr[0]")]
    cr_0: u64,
    #[vmstate(uint64, name = "env.cr[2]")]
    cr_2: u64,
    #[vmstate(uint64, name = "env.cr[3]")]
    cr_3: u64,
    #[vmstate(uint64, name = "env.cr[4]")]
    cr_4: u64,
    #[vmstate(uint64, name = "env.dr")]
    dr: [u64; 8],
    #[vmstate(int32, name = "env.a20_mask")]
    a20_mask: i32,
    #[vmstate(uint32, name = "env.mxcsr")]
    mxcsr: u32,
    #[vmstate(struct, name = "env.xmm_regs")]
    xmm_low: [XmmLow; 16],
    #[vmstate(uint64, name = "env.efer")]
    efer: u64,
    #[vmstate(uint64, name = "env.star")]
    star: u64,
    #[vmstate(uint64, name = "env.lstar")]
    lstar: u64,
    #[vmstate(uint64, name = "env.cstar")]
    cstar: u64,
    #[vmstate(uint64, name = "env.fmask")]
    fmask: u64,
    #[vmstate(uint64, name = "env.kernelgsbase")]
    kernelgsbase: u64,
    #[vmstate(uint32, name = "env.smbase")]
    smbase: u32,
    #[vmstate(uint64, name = "env.pat")]
    pat: u64,
    #[vmstate(uint32, name = "env.hflags2")]
    hflags2: u32,
    #[vmstate(uint64, name = "env.vm_hsave")]
    vm_hsave: u64,
    #[vmstate(uint64, name = "env.vm_vmcb")]
    vm_vmcb: u64,
    #[vmstate(uint64, name = "env.tsc_offset")]
    tsc_offset: u64,
    #[vmstate(uint64, name = "env.intercept")]
    intercept: u64,
    #[vmstate(uint16, name = "env.intercept_cr_read")]
    intercept_cr_read: u16,
    #[vmstate(uint16, name = "env.intercept_cr_write")]
    intercept_cr_write: u16,
    #[vmstate(uint16, name = "env.intercept_dr_read")]
    intercept_dr_read: u16,
    #[vmstate(uint16, name = "env.intercept_dr_write")]
    intercept_dr_write: u16,
    #[vmstate(uint32, name = "env.intercept_exceptions")]
    intercept_exceptions: u32,
    #[vmstate(uint8, name = "env.v_tpr")]
    v_tpr: u8,
    #[vmstate(uint64, name = "env.mtrr_fixed")]
    mtrr_fixed: [u64; 11],
    #[vmstate(uint64, name = "env.mtrr_deftype")]
    mtrr_deftype: u64,
    #[vmstate(struct, name = "env.mtrr_var")]
    mtrr_var: [Mtrr; 8],
    #[vmstate(int32, name = "env.interrupt_injected")]
    interrupt_injected: i32,
    #[vmstate(uint32, name = "env.mp_state")]
    mp_state: u32,
    #[vmstate(uint64, name = "env.tsc")]
    tsc: u64,
    #[vmstate(int32, name = "env.exception_nr")]
    exception_nr: i32,
    #[vmstate(uint8, name = "env.soft_interrupt")]
    soft_interrupt: u8,
    #[vmstate(uint8, name = "env.nmi_injected")]
    nmi_injected: u8,
    #[vmstate(uint8, name = "env.nmi_pending")]
    nmi_pending: u8,
    #[vmstate(uint8, name = "env.has_error_code")]
    has_error_code: u8,
    #[vmstate(uint32, name = "env.sipi_vector")]
    sipi_vector: u32,
    #[vmstate(uint64, name = "env.mcg_cap")]
    mcg_cap: u64,
    #[vmstate(uint64, name = "env.mcg_status")]
    mcg_status: u64,
    #[vmstate(uint64, name = "env.mcg_ctl")]
    mcg_ctl: u64,
    #[vmstate(uint64, name = "env.mce_banks", count = 40)]
    mce_banks: Vec<u64>,
    #[vmstate(uint64, name = "env.tsc_aux")]
    tsc_aux: u64,
    #[vmstate(uint64, name = "env.system_time_msr")]
    system_time_msr: u64,
    #[vmstate(uint64, name = "env.wall_clock_msr")]
    wall_clock_msr: u64,
    #[vmstate(uint64, name = "env.xcr0")]
    xcr0: u64,
    #[vmstate(uint64, name = "env.xstate_bv")]
    xstate_bv: u64,
    #[vmstate(struct, name = "env.xmm_regs")]
    xmm_high: [XmmHigh; 16],
    #[vmstate(subsection)]
    poll_control: PollControl,
}

#[derive(Clone, Debug, Default, VmState)]
#[vmstate(name = "cpu/poll_control_msr", version = 1, needed = Self::is_off)]
struct PollControl {
    #[vmstate(uint64, name = "env.poll_control_msr")]
    value: u64,
}

impl PollControl {
    fn is_off(&self) -> bool {
        self.value != 1
    }
}

/// A register of 80 bits.
#[derive(Clone, Debug, Default, VmState)]
#[vmstate(name = "fpreg", version = 0)]
struct FpuRegister {
    #[vmstate(tmp = FpuParts)]
    bits: u128,
}

#[derive(VmState)]
#[vmstate(name = "fpreg_tmp", version = 0)]
struct FpuParts {
    #[vmstate(uint64, name = "tmp_mant")]
    mantissa: u64,
    #[vmstate(uint16, name = "tmp_exp")]
    exponent: u16,
}

impl View<FpuRegister> for FpuParts {
    fn is_needed_by(_: &FpuRegister) -> bool {
        true
    }

    fn take(register: &mut FpuRegister) -> Result<Self, BoxError> {
        Ok(Self {
            mantissa: u64::try_from(register.bits & u128::from(u64::MAX))?,
            exponent: u16::try_from(register.bits >> 64)?,
        })
    }

    fn template(_: &FpuRegister) -> Self {
        Self {
            mantissa: 0,
            exponent: 0,
        }
    }

    fn put(self, register: &mut FpuRegister, _version: u32) -> Result<(), BoxError> {
        register.bits = u128::from(self.exponent) << 64 | u128::from(self.mantissa);
        Ok(())
    }
}

#[derive(Clone, Debug, Default, VmState)]
#[vmstate(name = "segment", version = 1)]
struct Segment {
    #[vmstate(uint32)]
    selector: u32,
    #[vmstate(uint64)]
    base: u64,
    #[vmstate(uint32)]
    limit: u32,
    #[vmstate(uint32)]
    flags: u32,
}

#[derive(Clone, Debug, Default, VmState)]
#[vmstate(name = "xmm_reg", version = 1)]
struct XmmLow {
    #[vmstate(uint64, name = "_q_ZMMReg[0]")]
    first: u64,
    #[vmstate(uint64, name = "_q_ZMMReg[1]")]
    second: u64,
}

#[derive(Clone, Debug, Default, VmState)]
#[vmstate(name = "ymmh_reg", version = 1)]
struct XmmHigh {
    #[vmstate(uint64, name = "_q_ZMMReg[2]")]
    third: u64,
    #[vmstate(uint64, name = "_q_ZMMReg[3]")]
    fourth: u64,
}

#[derive(Clone, Debug, Default, VmState)]
#[vmstate(name = "mtrr_var", version = 1)]
struct Mtrr {
    #[vmstate(uint64)]
    base: u64,
    #[vmstate(uint64)]
    mask: u64,
}

#[test]
fn a_processor_of_real_streams() {
    for name in ["pc-72", "pc-100", "running-72", "running-100"] {
        let processor = round_trip(&capture(name), name, "cpu", Processor::default());
        assert_eq!(processor.fpuc, 0x37f, "{name}");
        assert_ne!(processor.cr_0, 0, "{name}");
    }
}
