//! What KVM's vCPUs write, by KVM's own log (`Documentation/virt/kvm/api.rst`, 4.8 and 4.117).

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use kvm_bindings as kvm;
use rustix::ioctl::opcode;

use super::{DirtyLog, DirtyLogError, report_bits};
use crate::block::{BlockIndex, PAGE_BYTES};
use crate::guest::GuestRam;
use crate::sys::ioctl;

const CHECK_EXTENSION: u32 = opcode::none(KVM, 0x03);
const GET_DIRTY_LOG: u32 = opcode::write::<kvm::kvm_dirty_log>(KVM, 0x42);
const SET_USER_MEMORY_REGION: u32 = opcode::write::<kvm::kvm_userspace_memory_region>(KVM, 0x46);
const ENABLE_CAP: u32 = opcode::write::<kvm::kvm_enable_cap>(KVM, 0xa3);
const CLEAR_DIRTY_LOG: u32 = opcode::read_write::<kvm::kvm_clear_dirty_log>(KVM, 0xc0);
const KVM: u8 = kvm::KVMIO as u8;

/// Guest pages that are cleared, and reported, at once: KVM's lock is free in between.
const PAGES_AT_ONCE: usize = 1 << 16;
const WORDS_AT_ONCE: usize = PAGES_AT_ONCE / 64;

/// A part of guest memory as the VMM has told KVM of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvmSlot {
    /// Number of the slot; the address space in the upper 16 bits, as KVM has it.
    pub slot: u32,
    /// The block that it lies in.
    pub block: BlockIndex,
    /// Where in the block it begins, in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// Where the guest sees it.
    pub guest_address: u64,
}

/// KVM's log of the pages that vCPUs write. What the VMM writes itself, it does not see: pair it with
/// a [`MarkedLog`](super::MarkedLog), or take a [`UserfaultLog`](super::UserfaultLog) instead.
///
/// It switches the logging of the slots on and off; the VMM must leave that alone, and keep the slots
/// as they are, while it runs.
#[derive(Debug)]
pub struct KvmLog {
    vm: OwnedFd,
    slots: Vec<KvmSlot>,
    /// Reading does not clear; clearing is a call of its own, for the pages that were read.
    clears_itself: bool,
    is_started: bool,
    words: Vec<u64>,
}

impl KvmLog {
    /// A log for a VM (the descriptor of `KVM_CREATE_VM`, duplicated here) and all of its slots that
    /// the guest can write.
    ///
    /// # Errors
    /// No descriptor left, or it is none of a VM.
    ///
    /// # Safety
    /// While the log is started, the slots are as it was told: KVM writes bitmaps of their lengths.
    pub unsafe fn new(vm: BorrowedFd<'_>, slots: Vec<KvmSlot>) -> Result<Self, DirtyLogError> {
        let vm = vm
            .try_clone_to_owned()
            .map_err(|error| DirtyLogError::new("duplicate the VM's descriptor", error))?;
        let clears_itself = !enable_manual_clear(vm.as_fd())
            .map_err(|error| DirtyLogError::new("ask what KVM can", error))?;
        Ok(Self {
            vm,
            slots,
            clears_itself,
            is_started: false,
            words: Vec::new(),
        })
    }

    fn set_logging(&self, ram: &dyn GuestRam, slot: &KvmSlot, is_on: bool) -> io::Result<()> {
        let block = (ram.blocks().get(slot.block.0)).filter(|block| {
            let end = slot.offset.checked_add(slot.bytes);
            end.is_some_and(|end| end <= block.max_bytes())
        });
        let block = block.ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, "it does not lie in a block")
        })?;
        let mut argument = kvm::kvm_userspace_memory_region {
            slot: slot.slot,
            flags: if is_on {
                kvm::KVM_MEM_LOG_DIRTY_PAGES
            } else {
                0
            },
            guest_phys_addr: slot.guest_address,
            memory_size: slot.bytes,
            userspace_addr: block.start().addr().get() as u64 + slot.offset,
        };
        // SAFETY: takes a `kvm_userspace_memory_region`. KVM lets only the flags of a slot change, so
        // the guest gets no other memory than it had; were there no such slot, what it gets lies in
        // the block, to whose memory nobody has a reference.
        unsafe { ioctl(self.vm.as_fd(), SET_USER_MEMORY_REGION, &mut argument) }.map(drop)
    }

    /// Read the bitmap of a slot into `self.words`.
    fn read_bits(&mut self, slot: &KvmSlot) -> io::Result<()> {
        let pages = slot.bytes / PAGE_BYTES;
        let words = usize::try_from(pages.div_ceil(64)).map_err(io::Error::other)?;
        self.words.clear();
        self.words.resize(words, 0);
        let mut argument = kvm::kvm_dirty_log {
            slot: slot.slot,
            ..Default::default()
        };
        argument.__bindgen_anon_1.dirty_bitmap = self.words.as_mut_ptr().cast();
        // SAFETY: takes a `kvm_dirty_log`, and writes one bit for each page of the slot to where it
        // points, rounded up to 64. The slot is as long as `start` told KVM, which refuses another
        // length, and has stayed so (promised to `new`).
        unsafe { ioctl(self.vm.as_fd(), GET_DIRTY_LOG, &mut argument) }.map(drop)
    }

    /// Forget the pages that `words` has, which begin with page `first` of the slot.
    fn clear_bits(&self, slot: &KvmSlot, first: u64, words: &[u64]) -> io::Result<()> {
        let pages = slot.bytes / PAGE_BYTES;
        let count = (pages - first).min(words.len() as u64 * 64);
        let mut argument = kvm::kvm_clear_dirty_log {
            slot: slot.slot,
            num_pages: u32::try_from(count).map_err(io::Error::other)?,
            first_page: first,
            ..Default::default()
        };
        argument.__bindgen_anon_1.dirty_bitmap = words.as_ptr().cast_mut().cast();
        // SAFETY: takes a `kvm_clear_dirty_log`, and reads a bit for each of `num_pages` from where it
        // points.
        unsafe { ioctl(self.vm.as_fd(), CLEAR_DIRTY_LOG, &mut argument) }.map(drop)
    }

    fn collect_slot(
        &mut self,
        ram: &dyn GuestRam,
        slot: &KvmSlot,
        dirty: &mut dyn FnMut(BlockIndex, Range<u64>),
    ) -> io::Result<()> {
        let Some(block) = ram.blocks().get(slot.block.0) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        self.read_bits(slot)?;
        for (words, first) in
            (self.words.chunks(WORDS_AT_ONCE)).zip((0u64..).step_by(PAGES_AT_ONCE))
        {
            if words.iter().all(|word| *word == 0) {
                continue;
            }
            if !self.clears_itself {
                // Before they are reported: what is written from now on is reported again.
                self.clear_bits(slot, first, words)?;
            }
            let first_byte = slot.offset + first * PAGE_BYTES;
            report_bits(block, first_byte, PAGE_BYTES, words, &mut |pages| {
                dirty(slot.block, pages);
            });
        }
        Ok(())
    }
}

/// Let reading the log clear nothing. False if this KVM cannot (Linux before 5.0).
fn enable_manual_clear(vm: BorrowedFd<'_>) -> io::Result<bool> {
    let capability = kvm::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
    // SAFETY: takes a number, and changes nothing.
    let can = unsafe {
        libc::ioctl(
            vm.as_raw_fd(),
            libc::Ioctl::from(CHECK_EXTENSION),
            libc::c_ulong::from(capability),
        )
    };
    if can < 0 {
        return Err(io::Error::last_os_error());
    }
    if can == 0 {
        return Ok(false);
    }
    // Without INITIALLY_SET: nothing was written when logging begins.
    let mut argument = kvm::kvm_enable_cap {
        cap: capability,
        ..Default::default()
    };
    argument.args[0] = kvm::KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE.into();
    // SAFETY: takes a `kvm_enable_cap`.
    unsafe { ioctl(vm, ENABLE_CAP, &mut argument) }?;
    Ok(true)
}

impl DirtyLog for KvmLog {
    fn start(&mut self, ram: &dyn GuestRam) -> Result<(), DirtyLogError> {
        let started = self.slots.iter().try_for_each(|slot| {
            self.set_logging(ram, slot, true).map_err(|error| {
                DirtyLogError::new(format!("log writes to KVM's slot {}", slot.slot), error)
            })
        });
        started.inspect_err(|_| self.stop(ram))?;
        self.is_started = true;
        Ok(())
    }

    fn collect(
        &mut self,
        ram: &dyn GuestRam,
        dirty: &mut dyn FnMut(BlockIndex, Range<u64>),
    ) -> Result<(), DirtyLogError> {
        if !self.is_started {
            let error = io::Error::from(io::ErrorKind::InvalidInput);
            return Err(DirtyLogError::new("it was not started", error));
        }
        for slot in self.slots.clone() {
            self.collect_slot(ram, &slot, dirty).map_err(|error| {
                DirtyLogError::new(format!("read the log of KVM's slot {}", slot.slot), error)
            })?;
        }
        Ok(())
    }

    fn stop(&mut self, ram: &dyn GuestRam) {
        self.is_started = false;
        for slot in &self.slots {
            // It can only fail if the slot is gone, and its log with it.
            let _ = self.set_logging(ram, slot, false);
        }
    }
}
