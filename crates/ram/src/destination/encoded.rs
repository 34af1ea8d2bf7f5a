//! Pages that come compressed.

use flate2::{Decompress, FlushDecompress, Status};

use super::error::CompressedFault;

/// Bytes of a compressed page, whatever the stream says: above what zlib makes of 4096 bytes at worst
/// (4109).
pub(super) const COMPRESSED_BYTES_MAX: u32 = 4096 + 256;

/// Unpacks one page at a time.
pub(super) struct Inflate(Decompress);

impl Inflate {
    pub(super) fn new() -> Self {
        Self(Decompress::new(true))
    }

    /// Fill `page` with what `packed`, a whole zlib stream, unpacks to; exactly that many bytes.
    pub(super) fn page(&mut self, packed: &[u8], page: &mut [u8]) -> Result<(), CompressedFault> {
        self.0.reset(true);
        let status = self.0.decompress(packed, page, FlushDecompress::Finish);
        let unpacked = self.0.total_out();
        let is_full = u64::try_from(page.len()).is_ok_and(|bytes| bytes == unpacked);
        match status {
            Err(_) => return Err(CompressedFault::Damaged),
            Ok(Status::StreamEnd) if !is_full => {
                return Err(CompressedFault::Short { bytes: unpacked });
            }
            Ok(Status::StreamEnd) => {}
            Ok(_) if is_full && !self.ends(packed) => return Err(CompressedFault::Long),
            Ok(_) if !is_full => {
                return Err(CompressedFault::Cut {
                    bytes: packed.len(),
                });
            }
            Ok(_) => {}
        }
        let used = self.0.total_in();
        let trailing = u64::try_from(packed.len())
            .unwrap_or(u64::MAX)
            .saturating_sub(used);
        if trailing > 0 {
            return Err(CompressedFault::Trailing { bytes: trailing });
        }
        Ok(())
    }

    /// The page is full: is that all, or is there more? The end of the stream may still wait to be
    /// read.
    fn ends(&mut self, packed: &[u8]) -> bool {
        let used = usize::try_from(self.0.total_in()).unwrap_or(usize::MAX);
        let rest = packed.get(used..).unwrap_or_default();
        let unpacked = self.0.total_out();
        let status = self.0.decompress(rest, &mut [0], FlushDecompress::Finish);
        matches!(status, Ok(Status::StreamEnd)) && self.0.total_out() == unpacked
    }
}
