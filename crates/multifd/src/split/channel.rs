//! One extra connection: packets out.

use std::io::IoSlice;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vmferry_channel::Writer;

use crate::compression::Packer;
use crate::error::{MultifdError, Place};
use crate::packet::{HANDSHAKE_BYTES, Handshake, Packet, PacketFault, PacketFormat, PacketPages};
use crate::split::lanes::{Batch, Job, Lanes};

pub(crate) struct Channel {
    lanes: Arc<Lanes>,
    writer: Writer,
    format: PacketFormat,
    packer: Packer,
    /// Over all channels.
    numbers: Arc<AtomicU64>,
    at: Place,
    head: Vec<u8>,
    blob: Vec<u8>,
}

impl Channel {
    /// A channel over a connection on which nothing was sent.
    pub(crate) fn open(
        lanes: Arc<Lanes>,
        mut writer: Writer,
        handshake: Handshake,
        format: PacketFormat,
        numbers: Arc<AtomicU64>,
    ) -> Result<Self, MultifdError> {
        let at = Place {
            channel: handshake.channel,
            packet: 0,
            offset: u64::try_from(HANDSHAKE_BYTES).unwrap_or(u64::MAX),
        };
        writer
            .write_all(&handshake.encode())
            .map_err(|error| MultifdError::channel(at, error))?;
        Ok(Self {
            lanes,
            writer,
            format,
            packer: Packer::new(format.compression),
            numbers,
            at,
            head: Vec::new(),
            blob: Vec::new(),
        })
    }

    /// Send packets until nothing more will come.
    pub(crate) fn run(mut self) {
        if let Err(error) = self.packets() {
            self.lanes.fail(error);
        }
    }

    fn packets(&mut self) -> Result<(), MultifdError> {
        while let Some(job) = self.lanes.next(self.at.channel)? {
            match job {
                Job::Sync => self.send(true, None)?,
                Job::Pages(batch) => {
                    self.pages(&batch)?;
                    self.lanes.give_back(batch);
                }
            }
        }
        Ok(())
    }

    fn pages(&mut self, batch: &Batch) -> Result<(), MultifdError> {
        let at = self.at;
        let packed = self.packer.pack(&batch.bytes, &mut self.blob);
        let is_packed = packed.map_err(|why| MultifdError::Packet {
            at,
            fault: PacketFault::Damaged(why),
        })?;
        if !is_packed {
            return self.send(false, Some((batch, &batch.bytes)));
        }
        let blob = std::mem::take(&mut self.blob);
        self.send(false, Some((batch, &blob)))?;
        self.blob = blob;
        Ok(())
    }

    fn send(&mut self, sync: bool, pages: Option<(&Batch, &[u8])>) -> Result<(), MultifdError> {
        let data = pages.map_or(&[][..], |(_, data)| data);
        let packet = Packet {
            number: self.numbers.fetch_add(1, Ordering::Relaxed),
            sync,
            pages: pages.map(|(batch, data)| PacketPages {
                block: batch.block.clone(),
                normal: batch.offsets.clone(),
                zero: Vec::new(),
                data_bytes: u32::try_from(data.len()).unwrap_or(u32::MAX),
            }),
        };
        self.head.clear();
        self.format.encode(&packet, &mut self.head);
        let at = self.at;
        self.writer
            .write_vectored_all(&[IoSlice::new(&self.head), IoSlice::new(data)])
            .map_err(|error| MultifdError::channel(at, error))?;
        let sent = self.head.len().saturating_add(data.len());
        let sent = u64::try_from(sent).unwrap_or(u64::MAX);
        self.at.offset = self.at.offset.saturating_add(sent);
        self.at.packet = self.at.packet.saturating_add(1);
        Ok(())
    }
}
