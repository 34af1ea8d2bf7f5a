//! Machines with many devices on their buses.

use crate::peers::qemu::{Machine, Version};

/// A machine type and what is added to it.
pub(super) struct Equipped {
    pub(super) machine: &'static str,
    /// What a section is called, without its path, and the `-device` that it is of.
    devices: &'static [(&'static str, &'static str)],
    /// The same for what 10.0 has and 7.2 has not.
    devices_of_10_0: &'static [(&'static str, &'static str)],
}

/// Backends of the devices.
const BACKENDS: &str = "\
    -blockdev null-co,node-name=d0,size=1048576,read-zeroes=on \
    -blockdev null-co,node-name=d1,size=1048576,read-zeroes=on \
    -blockdev null-co,node-name=d2,size=1048576,read-zeroes=on \
    -netdev user,id=n0 -audiodev none,id=a0 -chardev null,id=c0 -chardev null,id=c1 \
    -object memory-backend-ram,id=m0,size=16M";

impl Equipped {
    /// The machine; `None` if this QEMU is not there.
    pub(super) fn ready(&self, version: Version) -> Option<Machine> {
        let mut machine = Machine::new(version)?.args(["-M", self.machine]);
        if self.machine != "none" {
            let memory = match self.machine {
                "q35" => "16,maxmem=256M",
                _ => "8",
            };
            machine = machine.args(["-m", memory, "-serial", "null"]);
            for argument in BACKENDS.split_whitespace() {
                machine = machine.args([argument]);
            }
        }
        if ["pc", "q35"].contains(&self.machine) {
            machine = machine.args(["-smp", "3"]);
        }
        for (_, device) in self.of(version).filter(|(_, device)| !device.is_empty()) {
            machine = machine.args(["-device", device]);
        }
        Some(machine)
    }

    /// The sections that must be there, and their devices.
    pub(super) fn of(&self, version: Version) -> impl Iterator<Item = &(&str, &str)> {
        let new = match version {
            Version::V7_2 => &[],
            Version::V10_0 => self.devices_of_10_0,
        };
        self.devices.iter().chain(new)
    }
}

pub(super) const PC: Equipped = Equipped {
    machine: "pc",
    devices: &[
        ("virtio-net", "virtio-net-pci,romfile="),
        ("virtio-blk", "virtio-blk-pci,drive=d0"),
        ("virtio-rng", "virtio-rng-pci"),
        ("virtio-balloon", "virtio-balloon-pci"),
        ("virtio-scsi", "virtio-scsi-pci"),
        ("scsi-disk", "scsi-hd,drive=d1"),
        ("virtio-console", "virtio-serial-pci"),
        ("virtio-console", "virtserialport,chardev=c0"),
        ("ide", "ide-hd,drive=d2"),
        ("e1000", "e1000,netdev=n0,romfile="),
        // Comes with the network of the user, in the old style.
        ("slirp", ""),
        ("rtl8139", "rtl8139,romfile="),
        ("vga", "VGA,romfile="),
        ("intel-hda", "intel-hda"),
        ("hda-audio", "hda-duplex,audiodev=a0"),
        ("lsiscsi", "lsi"),
        ("megasas", "megasas"),
        ("i6300esb_wdt", "i6300esb"),
        ("ac97", "AC97,audiodev=a0"),
        ("es1370", "ES1370,audiodev=a0"),
        ("sb16", "sb16,audiodev=a0"),
        ("uhci", "piix3-usb-uhci,id=u0"),
        ("usb-ptr", "usb-tablet,bus=u0.0"),
        ("pci_bridge", "pci-bridge,chassis_nr=1,id=b1"),
        ("vmgenid", "vmgenid"),
        ("apic", ""),
        ("fdc", ""),
    ],
    devices_of_10_0: &[],
};

pub(super) const Q35: Equipped = Equipped {
    machine: "q35",
    devices: &[
        ("virtio-net", "virtio-net-pci,netdev=n0,romfile="),
        ("slirp", ""),
        ("e1000e", "e1000e,romfile="),
        ("vmxnet3", "vmxnet3,romfile="),
        ("ich9_ahci", "ide-hd,drive=d0"),
        ("ich9_ahci", "ich9-ahci,id=sata"),
        ("ich9_ahci", "ide-cd,bus=sata.0,drive=d1"),
        ("xhci", "qemu-xhci,id=x0"),
        ("usb-kbd", "usb-kbd,bus=x0.0"),
        ("usb-ptr", "usb-tablet,bus=x0.0"),
        ("usb-storage", "usb-storage,drive=d2,bus=x0.0"),
        ("cirrus_vga", "cirrus-vga,romfile="),
        ("sdhci", "sdhci-pci"),
        ("pcie-root-port", "pcie-root-port,id=r1,slot=1"),
        ("virtio-rng", "virtio-rng-pci,bus=r1"),
        ("ehci", "ich9-usb-ehci1"),
        ("virtio-gpu", "virtio-gpu-pci"),
        ("intel-hda", "ich9-intel-hda"),
        ("hda-audio", "hda-duplex,audiodev=a0"),
        ("virtio-input", "virtio-keyboard-pci"),
        ("virtio-iommu", "virtio-iommu-pci"),
        ("vmcoreinfo", "vmcoreinfo"),
        ("mptsas", "mptsas1068"),
        ("pvscsi", "pvscsi"),
        ("tulip", "tulip,romfile="),
        ("pcnet", "pcnet,romfile="),
        ("ne2000", "ne2k_pci,romfile="),
        ("pciespscsi", "am53c974"),
        ("pci-serial", "pci-serial,chardev=c1"),
    ],
    devices_of_10_0: &[
        ("pcie-root-port", "pcie-root-port,id=r2,slot=2"),
        ("igb", "igb,bus=r2,romfile="),
        // Its variables are a queue.
        ("uefi-vars-sysbus", "uefi-vars-x64"),
        // Sent before the pages.
        ("virtio-mem-device-early", "virtio-mem-pci,memdev=m0"),
    ],
};

pub(super) const MICROVM: Equipped = Equipped {
    machine: "microvm",
    devices: &[
        ("virtio-net", "virtio-net-device,netdev=n0"),
        ("slirp", ""),
        ("virtio-blk", "virtio-blk-device,drive=d0"),
        ("virtio-rng", "virtio-rng-device"),
        ("virtio-balloon", "virtio-balloon-device"),
        ("virtio-scsi", "virtio-scsi-device"),
        ("scsi-disk", "scsi-hd,drive=d1"),
        ("virtio-console", "virtio-serial-device"),
        ("virtio-console", "virtconsole,chardev=c0"),
        ("virtio-input", "virtio-keyboard-device"),
        ("virtio-gpu", "virtio-gpu-device"),
        ("serial", ""),
        ("acpi-ged", ""),
    ],
    devices_of_10_0: &[],
};

pub(super) const ISAPC: Equipped = Equipped {
    machine: "isapc",
    devices: &[
        ("isa-ide", "ide-hd,drive=d0"),
        ("ne2000", "ne2k_isa,netdev=n0"),
        ("slirp", ""),
        ("sb16", "sb16,audiodev=a0"),
        ("cs4231a", "cs4231a,audiodev=a0"),
        ("gus", "gus,audiodev=a0"),
        ("ib700_wdt", "ib700"),
        ("fdc", "floppy"),
        ("cirrus_vga", "isa-cirrus-vga"),
        ("serial", ""),
        ("i8254", ""),
        ("mc146818rtc", ""),
        ("vmmouse", ""),
    ],
    devices_of_10_0: &[],
};

pub(super) const NONE: Equipped = Equipped {
    machine: "none",
    devices: &[("timer", ""), ("globalstate", "")],
    devices_of_10_0: &[],
};
