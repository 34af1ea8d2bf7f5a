//! Three devices of a PC, described exactly as QEMU describes them.
//!
//! Shared by the tests that load them from real streams and by those that give them to a real QEMU.

use vmferry_vmstate::VmState;

/// The interval timer.
#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "i8254", version = 3, minimum_version = 2)]
pub(crate) struct Pit {
    #[vmstate(uint32, name = "channels[0].irq_disabled", since = 3)]
    pub(crate) irq_disabled: u32,
    #[vmstate(struct, since = 2)]
    pub(crate) channels: [PitChannel; 3],
    #[vmstate(int64, name = "channels[0].next_transition_time")]
    pub(crate) next_transition_time: i64,
}

/// One of its three counters.
#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "pit channel", version = 2)]
pub(crate) struct PitChannel {
    #[vmstate(int32)]
    pub(crate) count: i32,
    #[vmstate(uint16)]
    pub(crate) latched_count: u16,
    #[vmstate(uint8)]
    pub(crate) count_latched: u8,
    #[vmstate(uint8)]
    pub(crate) status_latched: u8,
    #[vmstate(uint8)]
    pub(crate) status: u8,
    #[vmstate(uint8)]
    pub(crate) read_state: u8,
    #[vmstate(uint8)]
    pub(crate) write_state: u8,
    #[vmstate(uint8)]
    pub(crate) write_latch: u8,
    #[vmstate(uint8)]
    pub(crate) rw_mode: u8,
    #[vmstate(uint8)]
    pub(crate) mode: u8,
    #[vmstate(uint8)]
    pub(crate) bcd: u8,
    #[vmstate(uint8)]
    pub(crate) gate: u8,
    #[vmstate(int64)]
    pub(crate) count_load_time: i64,
    #[vmstate(int64)]
    pub(crate) next_transition_time: i64,
}

/// The clock with its battery-backed memory.
#[derive(Clone, Debug, PartialEq, VmState)]
#[vmstate(name = "mc146818rtc", version = 3, minimum_version = 1)]
pub(crate) struct Rtc {
    #[vmstate(buffer)]
    pub(crate) cmos_data: [u8; 128],
    #[vmstate(uint8)]
    pub(crate) cmos_index: u8,
    #[vmstate(unused(28))]
    #[vmstate(timer)]
    pub(crate) periodic_timer: Option<u64>,
    #[vmstate(int64)]
    pub(crate) next_periodic_time: i64,
    #[vmstate(unused(24))]
    #[vmstate(uint32, since = 2)]
    pub(crate) irq_coalesced: u32,
    #[vmstate(uint32, since = 2)]
    pub(crate) period: u32,
    #[vmstate(uint64, since = 3)]
    pub(crate) base_rtc: u64,
    #[vmstate(uint64, since = 3)]
    pub(crate) last_update: u64,
    #[vmstate(int64, since = 3)]
    pub(crate) offset: i64,
    #[vmstate(timer, since = 3)]
    pub(crate) update_timer: Option<u64>,
    #[vmstate(uint64, since = 3)]
    pub(crate) next_alarm_time: u64,
    #[vmstate(subsection)]
    pub(crate) reinject: RtcReinject,
}

/// Interrupts of the clock that are still owed to the guest.
#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "mc146818rtc/irq_reinject_on_ack_count", version = 1, needed = Self::owes)]
pub(crate) struct RtcReinject {
    #[vmstate(uint16)]
    pub(crate) irq_reinject_on_ack_count: u16,
}

impl RtcReinject {
    fn owes(&self) -> bool {
        self.irq_reinject_on_ack_count != 0
    }
}

impl Default for Rtc {
    fn default() -> Self {
        Self {
            cmos_data: [0; 128],
            cmos_index: 0,
            periodic_timer: None,
            next_periodic_time: 0,
            irq_coalesced: 0,
            period: 0,
            base_rtc: 0,
            last_update: 0,
            offset: 0,
            update_timer: None,
            next_alarm_time: 0,
            reinject: RtcReinject::default(),
        }
    }
}

/// The device that hands configuration to the firmware.
#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "fw_cfg", version = 2, minimum_version = 1)]
pub(crate) struct FwCfg {
    #[vmstate(uint16)]
    pub(crate) cur_entry: u16,
    // Version 1 had half of it.
    #[vmstate(uint16, as = u16, condition = Self::is_version_1)]
    #[vmstate(uint32, since = 2)]
    pub(crate) cur_offset: u32,
    #[vmstate(subsection, needed = Self::dma_enabled)]
    pub(crate) dma: FwCfgDma,
    #[vmstate(subsection, needed = Self::has_acpi_tables)]
    pub(crate) acpi: FwCfgAcpi,
    #[vmstate(skip = "set by the machine")]
    pub(crate) dma_enabled: bool,
    #[vmstate(skip = "set by the machine")]
    pub(crate) has_acpi_tables: bool,
}

/// Where the guest wants a transfer.
#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "fw_cfg/dma", version = 0)]
pub(crate) struct FwCfgDma {
    #[vmstate(uint64)]
    pub(crate) dma_addr: u64,
}

/// Sizes of the ACPI tables.
#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "fw_cfg/acpi_mr", version = 1)]
pub(crate) struct FwCfgAcpi {
    #[vmstate(uint64)]
    pub(crate) table_mr_size: u64,
    #[vmstate(uint64)]
    pub(crate) linker_mr_size: u64,
    #[vmstate(uint64)]
    pub(crate) rsdp_mr_size: u64,
}

impl FwCfg {
    fn is_version_1(&self, version: u32) -> bool {
        version == 1
    }

    fn dma_enabled(&self) -> bool {
        self.dma_enabled
    }

    fn has_acpi_tables(&self) -> bool {
        self.has_acpi_tables
    }
}
