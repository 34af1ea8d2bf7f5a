//! Writes of a guest: a few instructions of real mode.

use std::collections::BTreeSet;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::thread;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vmferry_ram::{BlockIndex, DirtyLog, KvmLog, KvmSlot, MarkedLog, PAGE_BYTES};

use crate::dirty_log::{Copy, collect, userfault_log};
use crate::{HUGE_BYTES, Kind, Memory, rounds, seeded};

/// Where the code lies, in the guest and in the block.
const CODE: u64 = 0x1000;
/// Writes ax + 1, ax + 2, .. to the words bx, bx + 4096, .. of the data segment, cx of them.
const PROGRAM: [u8; 16] = [
    0x40, // inc ax
    0x89, 0x07, // mov [bx], ax
    0x81, 0xc3, 0x00, 0x10, // add bx, 0x1000
    0xe2, 0xf7, // loop, to the beginning
    0xf4, // hlt
    0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4,
];
/// Pages that one run of it can reach.
const WINDOW_PAGES: u64 = 16;
const BYTES: u64 = 4 * HUGE_BYTES;
const PAGES: u64 = BYTES / PAGE_BYTES;
/// Data begins here, in pages.
const FIRST_PAGE: u64 = 16;

struct Guest {
    vcpu: Vcpu,
    vm: VmFd,
    memory: Memory,
}

impl Guest {
    /// `None`, and a line that says so, if this host has no KVM.
    fn new(kind: Kind) -> Option<Self> {
        let vm = Kvm::new().and_then(|kvm| kvm.create_vm());
        let vm = vm
            .inspect_err(|error| println!("left out: no KVM here: {error}"))
            .ok()?;
        let memory = Memory::new(kind, BYTES, BYTES)?;
        memory.block().write(CODE, &PROGRAM).unwrap();
        for slot in slots() {
            let region = kvm_userspace_memory_region {
                slot: slot.slot,
                flags: 0,
                guest_phys_addr: slot.guest_address,
                memory_size: slot.bytes,
                userspace_addr: memory.block().start().addr().get() as u64 + slot.offset,
            };
            // SAFETY: the memory lives as long as the VM.
            unsafe { vm.set_user_memory_region(region) }.unwrap();
        }
        let vcpu = vm
            .create_vcpu(0)
            .inspect_err(|error| println!("left out: no vCPU here: {error}"))
            .ok()?;
        let mut guest = Self {
            vcpu: Vcpu(vcpu),
            vm,
            memory,
        };
        match guest.vcpu.run(FIRST_PAGE, 0, 0, 1) {
            Ok(()) => Some(guest),
            Err(exit) => {
                println!("left out: the guest does not run here: {exit}");
                None
            }
        }
    }

    fn log(&self) -> KvmLog {
        // SAFETY: the VM is there as long as the guest.
        let vm = unsafe { BorrowedFd::borrow_raw(self.vm.as_raw_fd()) };
        // SAFETY: the slots stay as they are.
        unsafe { KvmLog::new(vm, slots()) }.unwrap()
    }
}

struct Vcpu(VcpuFd);

impl Vcpu {
    /// Write `ax + 1` and so on to `count` pages, around in the 16 from `page` on.
    fn run(&mut self, page: u64, bx: u64, ax: u64, count: u64) -> Result<(), String> {
        let mut sregs = self.0.get_sregs().map_err(|error| error.to_string())?;
        sregs.cs.base = 0;
        sregs.cs.selector = 0;
        sregs.ds.base = page * PAGE_BYTES;
        self.0
            .set_sregs(&sregs)
            .map_err(|error| error.to_string())?;
        let mut regs = self.0.get_regs().map_err(|error| error.to_string())?;
        (regs.rip, regs.rflags) = (CODE, 2);
        (regs.rax, regs.rbx, regs.rcx) = (ax, bx, count);
        self.0.set_regs(&regs).map_err(|error| error.to_string())?;
        match self.0.run() {
            Ok(VcpuExit::Hlt) => Ok(()),
            Ok(exit) => Err(format!("{exit:?}")),
            Err(error) => Err(error.to_string()),
        }
    }
}

/// Two, so that the second begins inside the block and is no multiple of 64 pages.
fn slots() -> Vec<KvmSlot> {
    let split = 1100 * PAGE_BYTES;
    let slot = |slot, offset, bytes| KvmSlot {
        slot,
        block: BlockIndex(0),
        offset,
        bytes,
        guest_address: offset,
    };
    vec![slot(0, 0, split), slot(5, split, BYTES - split)]
}

/// The logs that see a guest of KVM.
fn logs(guest: &Guest) -> Vec<(&'static str, Box<dyn DirtyLog>)> {
    let mut logs: Vec<(_, Box<dyn DirtyLog>)> = vec![("KVM", Box::new(guest.log()))];
    if let Some(log) = userfault_log() {
        logs.push(("userfaultfd", Box::new(log)));
    }
    logs
}

#[test]
fn reports_what_the_guest_writes() {
    let mut rng = seeded();
    for kind in [Kind::Private, Kind::Shared, Kind::Huge] {
        let Some(mut guest) = Guest::new(kind) else {
            continue;
        };
        for (name, mut log) in logs(&guest) {
            log.start(&guest.memory.ram).unwrap();
            assert_eq!(
                collect(&mut *log, &guest.memory),
                BTreeSet::new(),
                "{name}, {kind:?}"
            );
            for _ in 0..rounds(20) {
                let page = rng.u64(FIRST_PAGE..PAGES - WINDOW_PAGES);
                let count = rng.u64(1..=WINDOW_PAGES);
                guest
                    .vcpu
                    .run(page, rng.u64(0..2048) * 2, rng.u64(..) & 0xfff, count)
                    .unwrap();
                let reported = collect(&mut *log, &guest.memory);
                let written: BTreeSet<_> = (page..page + count).collect();
                // KVM may log what it touched for the guest besides, as accessed bits.
                assert!(
                    reported.is_superset(&written),
                    "{name}, {kind:?}: {written:?}, {reported:?}"
                );
                if kind == Kind::Private {
                    assert!(reported.len() <= written.len() + 2, "{name}: {reported:?}");
                }
            }
            log.stop(&guest.memory.ram);
        }
    }
}

#[test]
fn loses_no_write_of_a_guest_nor_of_its_vmm() {
    let mut rng = seeded();
    for kind in [Kind::Private, Kind::Transparent, Kind::Shared, Kind::Huge] {
        let Some(mut guest) = Guest::new(kind) else {
            continue;
        };
        let marked = MarkedLog::new(&guest.memory.ram);
        let marker = marked.marker();
        let mut logs = logs(&guest);
        let kvm = logs.remove(0).1;
        logs.push(("KVM and marks", Box::new((kvm, marked))));
        for (name, mut log) in logs {
            let seed = rng.u64(..);
            let marker = marker.clone();
            let (vcpu, memory) = (&mut guest.vcpu, &guest.memory);
            log.start(&memory.ram).unwrap();
            let mut copy = Copy::of(memory);
            thread::scope(|scope| {
                let guest = scope.spawn(move || run_at_random(vcpu, seed));
                let vmm = scope.spawn(move || {
                    let mut rng = fastrand::Rng::with_seed(seed);
                    for value in 0..rounds(1000) {
                        // Where the guest does not write.
                        let offset = rng.u64(FIRST_PAGE..PAGES) * PAGE_BYTES + 4088;
                        memory.set_word(offset, value);
                        marker.mark(BlockIndex(0), offset, 8);
                    }
                });
                while !(guest.is_finished() && vmm.is_finished()) {
                    let dirty = collect(&mut *log, memory);
                    copy.update(memory, &dirty);
                }
            });
            let dirty = collect(&mut *log, memory);
            copy.update(memory, &dirty);
            assert_eq!(copy.first_difference(memory), None, "{name}, {kind:?}");
            log.stop(&guest.memory.ram);
        }
    }
}

/// The guest writes for a while.
fn run_at_random(vcpu: &mut Vcpu, seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    for _ in 0..rounds(30) {
        let page = rng.u64(FIRST_PAGE..PAGES - WINDOW_PAGES);
        let (bx, ax) = (rng.u64(0..2000) * 2, rng.u64(..) & 0xffff);
        vcpu.run(page, bx, ax, rng.u64(1..1000)).unwrap();
    }
}

#[test]
fn a_log_of_another_slot_than_the_vm_has_does_not_start() {
    let Some(guest) = Guest::new(Kind::Private) else {
        return;
    };
    // SAFETY: the VM is there as long as the guest.
    let vm = unsafe { BorrowedFd::borrow_raw(guest.vm.as_raw_fd()) };
    for wrong in [
        KvmSlot {
            bytes: PAGE_BYTES,
            ..slots()[0]
        },
        KvmSlot {
            offset: BYTES,
            ..slots()[0]
        },
        KvmSlot {
            offset: u64::MAX,
            ..slots()[0]
        },
        KvmSlot {
            block: BlockIndex(1),
            ..slots()[0]
        },
    ] {
        // SAFETY: it is refused.
        let mut log = unsafe { KvmLog::new(vm, vec![slots()[1], wrong]) }.unwrap();
        let error = log.start(&guest.memory.ram).unwrap_err().to_string();
        assert!(
            error.starts_with("dirty log: log writes to KVM's slot 0: "),
            "{error}"
        );
        assert!(log.collect(&guest.memory.ram, &mut |_, _| ()).is_err());
    }
    let mut log = guest.log();
    log.start(&guest.memory.ram).unwrap();
    assert_eq!(collect(&mut log, &guest.memory), BTreeSet::new());
}
