//! Where the pages come from: a guest that runs, or memory that is stored somewhere.

use std::sync::Arc;

use vmferry_savevm::{HandlerError, Sink};

use super::RUN_PAGES;
use super::schedule::Run;
use super::stats::RamSourceStats;
use super::throttle::{AutoConverge, Throttle};
use super::writer::PageWriter;
use crate::block::{BlockIndex, BlockLayout, PAGE_BYTES, RamBlock};
use crate::dirty_log::{DirtyLog, DirtyLogError};
use crate::guest::GuestRam;
use crate::stored::{STORED_PAGES_MAX, StoredRam};

pub(super) enum Memory {
    Live(Live),
    Stored(Stored),
}

/// The guest writes it meanwhile.
pub(super) struct Live {
    pub(super) ram: Arc<dyn GuestRam>,
    log: Box<dyn DirtyLog>,
    log_runs: bool,
    pub(super) throttle: Option<Box<dyn Throttle>>,
    pub(super) converge: AutoConverge,
}

/// Nobody writes it.
pub(super) struct Stored {
    pub(super) ram: Arc<dyn StoredRam>,
    /// What is read at once.
    pages: Box<[u8]>,
}

const _: () = assert!(RUN_PAGES <= STORED_PAGES_MAX);

impl Memory {
    /// What the blocks are, now.
    pub(super) fn layouts(&self) -> Vec<BlockLayout> {
        match self {
            Self::Live(live) => live.ram.blocks().iter().map(RamBlock::layout).collect(),
            Self::Stored(stored) => stored.ram.blocks().to_vec(),
        }
    }

    /// A block's length, now.
    pub(super) fn used_bytes(&self, block: BlockIndex) -> u64 {
        match self {
            Self::Live(live) => live.ram.blocks().get(block.0).map(RamBlock::used_bytes),
            Self::Stored(stored) => stored.ram.blocks().get(block.0).map(|it| it.used_bytes),
        }
        .unwrap_or_default()
    }

    pub(super) fn live(&mut self) -> Option<&mut Live> {
        match self {
            Self::Live(live) => Some(live),
            Self::Stored(_) => None,
        }
    }
}

impl Live {
    pub(super) fn new(
        ram: Arc<dyn GuestRam>,
        log: Box<dyn DirtyLog>,
        throttle: Option<Box<dyn Throttle>>,
        converge: AutoConverge,
    ) -> Self {
        Self {
            ram,
            log,
            log_runs: false,
            throttle,
            converge,
        }
    }

    pub(super) fn start_log(&mut self) -> Result<(), DirtyLogError> {
        self.log.start(&*self.ram)?;
        self.log_runs = true;
        Ok(())
    }

    /// What was written since the last time.
    pub(super) fn collect(
        &mut self,
        mark: &mut dyn FnMut(BlockIndex, std::ops::Range<u64>),
    ) -> Result<(), DirtyLogError> {
        self.log.collect(&*self.ram, mark)
    }

    pub(super) fn stop_log(&mut self) {
        if std::mem::take(&mut self.log_runs) {
            self.log.stop(&*self.ram);
        }
    }
}

impl Stored {
    pub(super) fn new(ram: Arc<dyn StoredRam>) -> Self {
        let bytes = usize::try_from(RUN_PAGES * PAGE_BYTES).unwrap_or_default();
        Self {
            ram,
            pages: vec![0; bytes].into(),
        }
    }

    /// Write the pages of a run. Those that were not stored are left out, or are zeroes if the
    /// destination has `emptied` its memory: it would wait for them.
    pub(super) fn send(
        &mut self,
        block: &BlockLayout,
        run: &Run,
        emptied: bool,
        writer: &mut PageWriter,
        stats: &RamSourceStats,
        sink: &mut dyn Sink,
    ) -> Result<(), HandlerError> {
        let mut first = run.pages.start;
        while first < run.pages.end {
            let count = (run.pages.end - first).min(RUN_PAGES);
            let bytes = usize::try_from(count * PAGE_BYTES)?;
            let room = self.pages.get_mut(..bytes).unwrap_or_default();
            let mut kinds = self.ram.read(run.block, first, room)?;
            if emptied {
                kinds.zero |= std::mem::take(&mut kinds.absent);
            }
            writer.stored(&block.idstr, first, room, kinds, stats, sink)?;
            first += count;
        }
        Ok(())
    }
}
