//! Zstandard: one stream for each channel, flushed after each packet.

use zstd_safe::zstd_sys::ZSTD_EndDirective;
use zstd_safe::{CCtx, CParameter, DCtx, DParameter, InBuffer, OutBuffer};

use crate::compression::{TOO_LONG, TOO_SHORT};
use crate::packet::PACKET_BLOB_BYTES_MAX;

/// QEMU's default.
const LEVEL: i32 = 1;

/// History that a stream may ask for, as a power of two: what QEMU's highest level (20) does.
const WINDOW_LOG_MAX: u32 = 25;

const FAILED: &str = "no zstd stream";

/// Unpacks the blobs of one channel, in their order.
pub(crate) struct Unpack(DCtx<'static>);

impl Unpack {
    pub(crate) fn new() -> Self {
        let mut context = DCtx::create();
        // Without it the library's own limit holds, which is higher.
        if context
            .set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX))
            .is_err()
        {
            tracing::warn!("the memory of zstd streams cannot be limited");
        }
        Self(context)
    }

    /// Fill `pages`, no more and no less, with what all of `blob` unpacks to.
    pub(crate) fn unpack(&mut self, blob: &[u8], pages: &mut [u8]) -> Result<(), &'static str> {
        let mut input = InBuffer::around(blob);
        let wanted = pages.len();
        let mut output = OutBuffer::around(pages);
        while output.pos() < wanted {
            let before = (input.pos(), output.pos());
            self.step(&mut output, &mut input)?;
            if (input.pos(), output.pos()) == before {
                return Err(TOO_SHORT);
            }
        }
        // The end of the flush is still to be read, and must not hold data.
        loop {
            let (before, mut more) = (input.pos(), [0]);
            let mut output = OutBuffer::around(&mut more[..]);
            self.step(&mut output, &mut input)?;
            if output.pos() > 0 {
                return Err(TOO_LONG);
            }
            if input.pos() == blob.len() {
                return Ok(());
            }
            if input.pos() == before {
                return Err("bytes behind its zstd stream");
            }
        }
    }

    fn step(
        &mut self,
        output: &mut OutBuffer<'_, [u8]>,
        input: &mut InBuffer<'_>,
    ) -> Result<(), &'static str> {
        self.0
            .decompress_stream(output, input)
            .map(drop)
            .map_err(|_| FAILED)
    }
}

/// Packs the pages of one channel, in their order.
pub(crate) struct Pack(CCtx<'static>);

impl Pack {
    pub(crate) fn new() -> Self {
        let mut context = CCtx::create();
        if context
            .set_parameter(CParameter::CompressionLevel(LEVEL))
            .is_err()
        {
            tracing::debug!("zstd has its own level");
        }
        Self(context)
    }

    /// Append to `blob` what `pages` pack to.
    pub(crate) fn pack(&mut self, pages: &[u8], blob: &mut Vec<u8>) -> Result<(), &'static str> {
        blob.reserve(usize::try_from(PACKET_BLOB_BYTES_MAX).unwrap_or(0));
        let mut input = InBuffer::around(pages);
        let mut output = OutBuffer::around(blob);
        let flush = ZSTD_EndDirective::ZSTD_e_flush;
        let left = self.0.compress_stream2(&mut output, &mut input, flush);
        match left {
            Ok(0) if input.pos() == pages.len() => Ok(()),
            Ok(_) => Err("compressed pages do not fit into a packet"),
            Err(_) => Err("zstd failed"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stream whose history is longer than is kept here.
    #[test]
    fn history_is_limited() {
        let long = |window_log: u32| {
            let mut context = CCtx::create();
            let set = context.set_parameter(CParameter::WindowLog(window_log));
            set.expect("a window");
            let pages = vec![7; 4096];
            let mut blob = Vec::with_capacity(1 << 16);
            let (mut input, mut output) =
                (InBuffer::around(&pages[..]), OutBuffer::around(&mut blob));
            let flush = ZSTD_EndDirective::ZSTD_e_flush;
            let left = context.compress_stream2(&mut output, &mut input, flush);
            assert_eq!(left, Ok(0));
            Unpack::new().unpack(&blob, &mut [0; 4096])
        };
        assert_eq!(long(WINDOW_LOG_MAX), Ok(()));
        assert_eq!(long(WINDOW_LOG_MAX + 1), Err(FAILED));
    }

    #[test]
    fn what_stands_behind_is_refused() {
        let mut blob = Vec::new();
        let packed = Pack::new().pack(&[3; 4096], &mut blob);
        assert_eq!(packed, Ok(()));
        assert_eq!(Unpack::new().unpack(&blob, &mut [0; 4096]), Ok(()));
        let whole = blob.len();
        blob.extend([0xff; 9]);
        assert!(Unpack::new().unpack(&blob, &mut [0; 4096]).is_err());
        assert_eq!(
            Unpack::new().unpack(&blob[..whole], &mut [0; 4095]),
            Err(TOO_LONG)
        );
        assert_eq!(
            Unpack::new().unpack(&blob[..whole], &mut [0; 4097]),
            Err(TOO_SHORT)
        );
    }
}
