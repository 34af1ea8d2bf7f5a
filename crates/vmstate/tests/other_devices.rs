//! Real devices with what the three of `real_devices.rs` do not have: elements described one by one,
//! subsections inside an array, equal-checked and counted fields, formats of their own.

mod sections;

use sections::{capture, round_trip};
use vmferry_vmstate::wire::Codec;
use vmferry_vmstate::{DeviceError, Loader, VmState};

#[derive(Clone, VmState)]
#[vmstate(name = "fdc", version = 2)]
struct IsaFloppy {
    #[vmstate(struct)]
    state: Floppy,
}

#[derive(Clone, VmState)]
#[vmstate(name = "fdc", version = 2)]
struct Floppy {
    #[vmstate(uint8)]
    sra: u8,
    #[vmstate(uint8)]
    srb: u8,
    #[vmstate(uint8)]
    dor_vmstate: u8,
    #[vmstate(uint8)]
    tdr: u8,
    #[vmstate(uint8)]
    dsr: u8,
    #[vmstate(uint8)]
    msr: u8,
    #[vmstate(uint8)]
    status0: u8,
    #[vmstate(uint8)]
    status1: u8,
    #[vmstate(uint8)]
    status2: u8,
    #[vmstate(skip = "fixed")]
    fifo_size: i32,
    #[vmstate(uint8, count = fifo_size, max = 512)]
    fifo: Vec<u8>,
    #[vmstate(uint32)]
    data_pos: u32,
    #[vmstate(uint32)]
    data_len: u32,
    #[vmstate(uint8)]
    data_state: u8,
    #[vmstate(uint8)]
    data_dir: u8,
    #[vmstate(uint8)]
    eot: u8,
    #[vmstate(uint8)]
    timer0: u8,
    #[vmstate(uint8)]
    timer1: u8,
    #[vmstate(uint8)]
    precomp_trk: u8,
    #[vmstate(uint8)]
    config: u8,
    #[vmstate(uint8)]
    lock: u8,
    #[vmstate(uint8)]
    pwrd: u8,
    #[vmstate(uint8_equal)]
    num_floppies: u8,
    #[vmstate(struct, since = 1)]
    drives: [Drive; 2],
}

#[derive(Clone, Default, VmState)]
#[vmstate(name = "fdrive", version = 1)]
struct Drive {
    #[vmstate(uint8)]
    head: u8,
    #[vmstate(uint8)]
    track: u8,
    #[vmstate(uint8)]
    sect: u8,
    #[vmstate(subsection, needed = Self::never)]
    changed: MediaChanged,
    #[vmstate(subsection)]
    rate: MediaRate,
}

impl Drive {
    fn never(&self) -> bool {
        false
    }
}

#[derive(Clone, Default, VmState)]
#[vmstate(name = "fdrive/media_changed", version = 1)]
struct MediaChanged {
    #[vmstate(uint8)]
    media_changed: u8,
}

#[derive(Clone, Default, VmState)]
#[vmstate(name = "fdrive/media_rate", version = 1)]
struct MediaRate {
    #[vmstate(uint8)]
    media_rate: u8,
}

#[derive(Clone, VmState)]
#[vmstate(name = "PCIBUS", version = 1)]
struct PciBus {
    #[vmstate(int32_equal)]
    nirq: i32,
    #[vmstate(int32, count = nirq, max = 256)]
    irq_count: Vec<i32>,
}

#[derive(Clone, Default, VmState)]
#[vmstate(name = "hpet", version = 2, minimum_version = 1)]
struct Hpet {
    #[vmstate(uint64)]
    config: u64,
    #[vmstate(uint64)]
    isr: u64,
    #[vmstate(uint64)]
    hpet_counter: u64,
    #[vmstate(uint8, since = 2)]
    num_timers_save: u8,
    #[vmstate(struct, count = num_timers_save, max = 32)]
    timer: Vec<HpetTimer>,
}

#[derive(Clone, Default, VmState)]
#[vmstate(name = "hpet_timer", version = 1)]
struct HpetTimer {
    #[vmstate(uint8)]
    tn: u8,
    #[vmstate(uint64)]
    config: u64,
    #[vmstate(uint64)]
    cmp: u64,
    #[vmstate(uint64)]
    fsb: u64,
    #[vmstate(uint64)]
    period: u64,
    #[vmstate(uint8)]
    wrap_flag: u8,
    #[vmstate(timer)]
    qemu_timer: Option<u64>,
}

#[derive(Clone, VmState)]
#[vmstate(name = "I440FX", version = 3)]
struct HostBridge {
    #[vmstate(struct)]
    parent_obj: PciDevice,
    #[vmstate(unused(1))]
    #[vmstate(skip = "set by the machine")]
    _has_hole: bool,
}

#[derive(Clone, VmState)]
#[vmstate(name = "PCIDevice", version = 2)]
struct PciDevice {
    #[vmstate(int32_le)]
    version_id: i32,
    #[vmstate(custom = PciConfig, name = "config", condition = Self::is_conventional)]
    config: [u8; 256],
    #[vmstate(custom = PciConfig, name = "config", condition = Self::is_express)]
    extended: Box<[u8; 4096]>,
    #[vmstate(custom = PciIrqState)]
    irq_state: [u32; 4],
}

impl PciDevice {
    fn is_conventional(&self, _: u32) -> bool {
        true
    }

    fn is_express(&self, _: u32) -> bool {
        false
    }
}

/// The configuration space: bytes that are checked when they arrive.
struct PciConfig;

impl<const N: usize> Codec<[u8; N]> for PciConfig {
    fn type_name(&self) -> &'static str {
        "pci config"
    }

    fn bytes(&self) -> Option<u64> {
        u64::try_from(N).ok()
    }

    fn save(&self, config: &[u8; N], out: &mut Vec<u8>) -> Result<(), DeviceError> {
        out.extend(config);
        Ok(())
    }

    fn load(&self, config: &mut [u8; N], loader: &mut Loader<'_>) -> Result<(), DeviceError> {
        let sent: [u8; N] = loader.array()?;
        if sent[..4] != config[..4] {
            return Err(loader.fault("it is another device"));
        }
        *config = sent;
        Ok(())
    }
}

/// Levels of the four interrupt pins.
struct PciIrqState;

impl Codec<[u32; 4]> for PciIrqState {
    fn type_name(&self) -> &'static str {
        "pci irq state"
    }

    fn bytes(&self) -> Option<u64> {
        Some(16)
    }

    fn save(&self, pins: &[u32; 4], out: &mut Vec<u8>) -> Result<(), DeviceError> {
        out.extend(pins.iter().flat_map(|pin| pin.to_be_bytes()));
        Ok(())
    }

    fn load(&self, pins: &mut [u32; 4], loader: &mut Loader<'_>) -> Result<(), DeviceError> {
        for pin in pins {
            *pin = u32::from_be_bytes(loader.array()?);
        }
        Ok(())
    }
}

fn floppy(num_floppies: u8) -> IsaFloppy {
    let state = Floppy {
        sra: 0,
        srb: 0,
        dor_vmstate: 0,
        tdr: 0,
        dsr: 0,
        msr: 0,
        status0: 0,
        status1: 0,
        status2: 0,
        fifo_size: 512,
        fifo: Vec::new(),
        data_pos: 0,
        data_len: 0,
        data_state: 0,
        data_dir: 0,
        eot: 0,
        timer0: 0,
        timer1: 0,
        precomp_trk: 0,
        config: 0,
        lock: 0,
        pwrd: 0,
        num_floppies,
        drives: <[Drive; 2]>::default(),
    };
    IsaFloppy { state }
}

fn host_bridge() -> HostBridge {
    let mut config = [0; 256];
    config[..4].copy_from_slice(&[0x86, 0x80, 0x37, 0x12]);
    HostBridge {
        parent_obj: PciDevice {
            version_id: 2,
            config,
            extended: Box::new([0; 4096]),
            irq_state: [0; 4],
        },
        _has_hole: true,
    }
}

#[test]
fn other_sections_load_and_save_to_the_same_bytes() {
    for name in ["pc-72", "pc-100", "running-72", "running-100"] {
        let stream = capture(name);
        let floppy = round_trip(&stream, name, "fdc", floppy(2));
        assert_eq!(floppy.state.fifo.len(), 512);
        let bus = PciBus {
            nirq: 4,
            irq_count: Vec::new(),
        };
        assert_eq!(round_trip(&stream, name, "PCIBUS", bus).irq_count.len(), 4);
        // QEMU 7.2 called one of its fields by another name.
        if name.ends_with("-100") {
            let hpet = round_trip(&stream, name, "hpet", Hpet::default());
            assert_eq!(hpet.timer.len(), 3);
        }
        let bridge = round_trip(&stream, name, "0000:00:00.0/I440FX", host_bridge());
        assert_eq!(bridge.parent_obj.version_id, 2);
    }
}
