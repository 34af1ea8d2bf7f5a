//! Writes to any memory of this process, by userfaultfd and the page map.
//!
//! All pages are write-protected when the log starts; the first write to one lifts the protection, in
//! the kernel, without anybody waiting (`UFFD_FEATURE_WP_ASYNC`). `PAGEMAP_SCAN` finds the pages that
//! are not protected any more and protects them again, each in one step.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;

use linux_raw_sys::general as sys;
use rustix::ioctl::opcode;

use super::{DirtyLog, DirtyLogError};
use crate::block::{BlockIndex, PAGE_BYTES, RamBlock};
use crate::guest::GuestRam;
use crate::sys::ioctl;
use crate::userfault::{Userfault, UserfaultError};

/// Runs of pages that one call of the kernel reports at most.
const RUNS: usize = 4096;

/// How much is protected at once. In between, whoever wants to change the memory map gets his turn; a
/// multiple of all huge pages.
const PROTECT_BYTES: usize = 1 << 30;

const PAGEMAP: &str = "/proc/self/pagemap";
const PAGEMAP_SCAN: u32 = opcode::read_write::<sys::pm_scan_arg>(b'f', 16);
/// Protect what is reported; fail if the memory is not registered as it must be.
const FLAGS: u64 = (sys::PM_SCAN_WP_MATCHING | sys::PM_SCAN_CHECK_WPASYNC) as u64;
const WRITTEN: u64 = sys::PAGE_IS_WRITTEN as u64;

/// A log of writes to any memory that this process has mapped, whoever in it writes: vCPUs, threads,
/// system calls. Needs Linux 6.7, and no permission.
///
/// The blocks must not be registered with another [`Userfault`] meanwhile. Each page's first write
/// after a report costs a fault, as with KVM's log; memory that was never touched gets page tables,
/// which take a 512th of it. Under transparent huge pages, the parts that are written are split.
#[derive(Debug)]
pub struct UserfaultLog {
    pagemap: File,
    /// Dropping it ends everything; `None` while stopped.
    userfault: Option<Userfault>,
    runs: Vec<sys::page_region>,
}

impl UserfaultLog {
    /// A log that was not started; tries whether it can be.
    ///
    /// # Errors
    /// A kernel before Linux 6.7, a sandbox that forbids userfaultfd, no `/proc`.
    pub fn new() -> Result<Self, DirtyLogError> {
        Userfault::open_write_protect_async().map_err(because("open"))?;
        let nothing = sys::page_region {
            start: 0,
            end: 0,
            categories: 0,
        };
        Ok(Self {
            pagemap: File::open(PAGEMAP)
                .map_err(|error| DirtyLogError::new(format!("open {PAGEMAP}"), error))?,
            userfault: None,
            runs: vec![nothing; RUNS],
        })
    }

    /// Report and protect the written pages from `addresses.start` on; gives where the kernel stopped.
    fn scan(
        &mut self,
        addresses: Range<u64>,
        report: &mut dyn FnMut(Range<u64>),
    ) -> io::Result<u64> {
        let mut argument = sys::pm_scan_arg {
            size: size_of::<sys::pm_scan_arg>() as u64,
            flags: FLAGS,
            start: addresses.start,
            end: addresses.end,
            walk_end: 0,
            vec: self.runs.as_mut_ptr().addr() as u64,
            vec_len: self.runs.len() as u64,
            max_pages: 0,
            category_inverted: 0,
            category_mask: WRITTEN,
            category_anyof_mask: 0,
            return_mask: WRITTEN,
        };
        // SAFETY: takes a `pm_scan_arg`. Writes at most `vec_len` regions to `vec`, and changes no
        // bytes of the memory that it scans.
        let found = unsafe { ioctl(self.pagemap.as_fd(), PAGEMAP_SCAN, &mut argument) }?;
        for run in self.runs.iter().take(found) {
            report(run.start..run.end);
        }
        Ok(argument.walk_end)
    }

    fn collect_block(
        &mut self,
        block: &RamBlock,
        dirty: &mut dyn FnMut(Range<u64>),
    ) -> io::Result<()> {
        let first = block.start().addr().get() as u64;
        let used_bytes = block.used_bytes();
        let end = first + used_bytes.next_multiple_of(block.page_bytes());
        let mut report = |addresses: Range<u64>| {
            let bytes = addresses.start - first..(addresses.end - first).min(used_bytes);
            if !bytes.is_empty() {
                dirty(bytes.start / PAGE_BYTES..bytes.end.div_ceil(PAGE_BYTES));
            }
        };
        let mut next = first;
        while next < end {
            let walked = self.scan(next..end, &mut report)?;
            if walked <= next {
                return Err(io::Error::other("the scan does not get on"));
            }
            next = walked;
        }
        Ok(())
    }
}

fn because(what: &'static str) -> impl FnOnce(UserfaultError) -> DirtyLogError {
    move |error| DirtyLogError::new(what, io::Error::other(error))
}

impl DirtyLog for UserfaultLog {
    fn start(&mut self, ram: &dyn GuestRam) -> Result<(), DirtyLogError> {
        self.stop(ram);
        let userfault = Userfault::open_write_protect_async().map_err(because("open"))?;
        for block in ram.blocks() {
            userfault.register(block).map_err(because("start"))?;
            for offset in (0..block.max_bytes()).step_by(PROTECT_BYTES) {
                let bytes = (block.max_bytes() - offset).min(PROTECT_BYTES as u64);
                userfault
                    .protect(block, offset, bytes)
                    .map_err(because("start"))?;
            }
        }
        self.userfault = Some(userfault);
        Ok(())
    }

    fn collect(
        &mut self,
        ram: &dyn GuestRam,
        dirty: &mut dyn FnMut(BlockIndex, Range<u64>),
    ) -> Result<(), DirtyLogError> {
        for (index, block) in ram.blocks().iter().enumerate() {
            self.collect_block(block, &mut |pages| dirty(BlockIndex(index), pages))
                .map_err(|error| {
                    let what = format!("scan RAM block '{}'", block.idstr());
                    DirtyLogError::new(what, explain_scan(error))
                })?;
        }
        Ok(())
    }

    fn stop(&mut self, _ram: &dyn GuestRam) {
        self.userfault = None;
    }
}

fn explain_scan(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::ENOTTY) => io::Error::new(
            io::ErrorKind::Unsupported,
            "the kernel lacks PAGEMAP_SCAN (Linux 6.7)",
        ),
        Some(libc::EPERM) => io::Error::new(error.kind(), "the log was not started"),
        _ => error,
    }
}
