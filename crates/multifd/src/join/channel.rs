//! One extra connection: packets in, pages into the plain stream.

use std::sync::Arc;

use vmferry_channel::{ChannelError, Reader};

use crate::compression::{Compression, Unpacker};
use crate::error::{MultifdError, Place};
use crate::join::junction::{Junction, Pages};
use crate::packet::{HANDSHAKE_BYTES, PacketFault, PacketFormat, PacketPages};

pub(crate) struct Channel {
    junction: Arc<Junction>,
    reader: Reader,
    compression: Compression,
    unpacker: Unpacker,
    at: Place,
    blob: Vec<u8>,
    pages: Vec<u8>,
}

impl Channel {
    pub(crate) fn new(
        junction: Arc<Junction>,
        reader: Reader,
        number: u8,
        compression: Compression,
    ) -> Self {
        Self {
            junction,
            reader,
            compression,
            unpacker: Unpacker::new(compression),
            at: Place {
                channel: number,
                packet: 0,
                offset: u64::try_from(HANDSHAKE_BYTES).unwrap_or(u64::MAX),
            },
            blob: Vec::new(),
            pages: Vec::new(),
        }
    }

    /// Read packets until the connection ends. What comes after the END of ram can do no harm: broken
    /// connections are nobody's business then, but pages that come too late are missing pages.
    pub(crate) fn run(mut self) {
        let Err(error) = self.packets() else { return };
        let is_late = matches!(
            error,
            MultifdError::Packet {
                fault: PacketFault::PagesAfterEnd,
                ..
            }
        );
        if is_late || !self.junction.is_over() {
            self.junction.fail(error);
        }
    }

    fn packets(&mut self) -> Result<(), MultifdError> {
        let format = PacketFormat {
            page: self.junction.page_bits()?,
            compression: self.compression,
        };
        let mut head = vec![0; format.head_bytes()];
        let mut syncs = 0_u64;
        while self.read_head(&mut head)? {
            let packet = format.decode(&head).map_err(|fault| self.fault(fault))?;
            tracing::trace!(at = %self.at, number = packet.number, sync = packet.sync, "packet");
            self.passed(head.len());
            if let Some(pages) = &packet.pages {
                if syncs == 0 {
                    return Err(self.fault(PacketFault::PagesBeforeSync));
                }
                self.pages(format, pages)?;
            }
            self.at.packet = self.at.packet.saturating_add(1);
            if packet.sync {
                syncs = syncs.saturating_add(1);
                self.junction.synchronise(self.at.channel)?;
            }
        }
        if self.junction.may_end(self.at)? || self.junction.is_given_up() {
            return Ok(());
        }
        Err(MultifdError::ChannelEnded { at: self.at })
    }

    /// False at the end of the connection.
    fn read_head(&mut self, head: &mut [u8]) -> Result<bool, MultifdError> {
        let at = self.at;
        let lost = |error: ChannelError| MultifdError::channel(at, error);
        let wanted = head.len();
        let got = self.reader.read(head).map_err(lost)?;
        if got == 0 {
            return Ok(false);
        }
        let rest = head.get_mut(got..).unwrap_or_default();
        match self.reader.read_exact(rest) {
            Err(ChannelError::Ended {
                peer, got: more, ..
            }) => Err(lost(ChannelError::Ended {
                peer,
                got: got.saturating_add(more),
                wanted,
            })),
            other => other.map(|()| true).map_err(lost),
        }
    }

    fn pages(&mut self, format: PacketFormat, pages: &PacketPages) -> Result<(), MultifdError> {
        self.check_places(format, pages)
            .map_err(|fault| self.fault(fault))?;
        let data_bytes = usize::try_from(pages.data_bytes).unwrap_or(0);
        let page_bytes = usize::try_from(format.page.bytes()).unwrap_or(0);
        self.pages
            .resize(pages.normal.len().saturating_mul(page_bytes), 0);
        let target = match self.compression {
            Compression::None => &mut self.pages,
            _ => &mut self.blob,
        };
        target.resize(data_bytes, 0);
        let at = self.at;
        self.reader
            .read_exact(target)
            .map_err(|error| MultifdError::channel(at, error))?;
        if self.compression != Compression::None && !pages.normal.is_empty() {
            self.unpacker
                .unpack(&self.blob, &mut self.pages)
                .map_err(|why| self.fault(PacketFault::Damaged(why)))?;
        }
        let is_delivered = self.junction.deliver(&Pages {
            block: &pages.block,
            normal: &pages.normal,
            zero: &pages.zero,
            bytes: &self.pages,
            page_bytes: format.page.bytes(),
        })?;
        if !is_delivered {
            return Err(self.fault(PacketFault::PagesAfterEnd));
        }
        self.passed(data_bytes);
        Ok(())
    }

    /// Is every page in its block?
    fn check_places(&self, format: PacketFormat, pages: &PacketPages) -> Result<(), PacketFault> {
        let used_bytes = self
            .junction
            .with(|state| Ok(state.blocks.get(&pages.block).copied()))
            .unwrap_or_default()
            .ok_or_else(|| PacketFault::UnknownBlock(pages.block.clone()))?;
        let page_bytes = u64::from(format.page.bytes());
        for offset in pages.normal.iter().chain(&pages.zero) {
            let is_aligned = offset.trailing_zeros() >= format.page.bits();
            if !is_aligned
                || used_bytes
                    .checked_sub(page_bytes)
                    .is_none_or(|last| *offset > last)
            {
                return Err(PacketFault::BadOffset {
                    block: pages.block.clone(),
                    offset: *offset,
                    used_bytes,
                });
            }
        }
        Ok(())
    }

    fn passed(&mut self, bytes: usize) {
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        self.at.offset = self.at.offset.saturating_add(bytes);
    }

    fn fault(&self, fault: PacketFault) -> MultifdError {
        MultifdError::Packet { at: self.at, fault }
    }
}
