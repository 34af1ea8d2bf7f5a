//! Compressed clusters: read, never written.
//!
//! A cluster is a raw deflate stream (window of 4 KiB) or a zstd frame that expands to exactly one
//! cluster. It lies anywhere in the file, its length is given in sectors, so what follows its end
//! is somebody else's.
#![deny(clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};

use flate2::{Decompress, FlushDecompress, Status};

use crate::error::Error;
use crate::header::Compression;
use crate::limits::ZSTD_WINDOW_BYTES_MAX;
use crate::storage::Storage;
use crate::types::{Geometry, HostOffset};

/// The first bytes of a zstd frame.
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Expands clusters and remembers the last one: small reads come in rows.
#[derive(Debug)]
pub(crate) struct Decompressor {
    compression: Compression,
    geometry: Geometry,
    last: Mutex<Option<(HostOffset, Arc<Vec<u8>>)>>,
}

impl Decompressor {
    pub(crate) fn new(compression: Compression, geometry: Geometry) -> Self {
        Self {
            compression,
            geometry,
            last: Mutex::new(None),
        }
    }

    /// Fill `buf` with what is `skip` bytes into the cluster. Fill is at most up to its end.
    pub(crate) fn read(
        &self,
        storage: &dyn Storage,
        host: HostOffset,
        bytes: u64,
        skip: u64,
        buf: &mut [u8],
    ) -> Result<(), Error> {
        let cluster = self.cluster(storage, host, bytes)?;
        let start = usize::try_from(skip).unwrap_or(usize::MAX);
        let end = start.saturating_add(buf.len());
        match cluster.get(start..end) {
            Some(part) => buf.copy_from_slice(part),
            None => buf.fill(0),
        }
        Ok(())
    }

    fn cluster(
        &self,
        storage: &dyn Storage,
        host: HostOffset,
        bytes: u64,
    ) -> Result<Arc<Vec<u8>>, Error> {
        let remembered = |last: &Option<(HostOffset, Arc<Vec<u8>>)>| {
            let (offset, cluster) = last.as_ref()?;
            (*offset == host).then(|| Arc::clone(cluster))
        };
        let last = || self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cluster) = remembered(&last()) {
            return Ok(cluster);
        }
        let length = usize::try_from(self.geometry.cluster_bytes()).unwrap_or_default();
        // At most two clusters: the entry has no more bits for it.
        let mut input = vec![0; usize::try_from(bytes).unwrap_or_default()];
        storage.read_at(&mut input, host.0).map_err(Error::storage(
            "read",
            "compressed cluster",
            host.0,
        ))?;
        let expanded = match self.compression {
            Compression::Deflate => inflate(&input, length),
            Compression::Zstd => expand_zstd(&input, length),
        };
        let cluster = expanded
            .map(Arc::new)
            .map_err(|problem| Error::corrupt("compressed cluster", host.0, problem))?;
        *last() = Some((host, Arc::clone(&cluster)));
        Ok(cluster)
    }
}

/// Exactly `length` bytes; what would come after them is left alone.
pub(crate) fn inflate(input: &[u8], length: usize) -> Result<Vec<u8>, String> {
    let mut output = vec![0; length];
    let mut stream = Decompress::new(false);
    loop {
        let done = usize::try_from(stream.total_out()).unwrap_or(usize::MAX);
        let read = usize::try_from(stream.total_in()).unwrap_or(usize::MAX);
        let rest = output.get_mut(done..).unwrap_or_default();
        if rest.is_empty() {
            return Ok(output);
        }
        let before = (stream.total_in(), stream.total_out());
        let status = stream
            .decompress(
                input.get(read..).unwrap_or_default(),
                rest,
                FlushDecompress::Finish,
            )
            .map_err(|error| error.to_string())?;
        let done = stream.total_out();
        if done == length as u64 {
            return Ok(output);
        }
        let stuck = before == (stream.total_in(), stream.total_out());
        if status == Status::StreamEnd || stuck {
            return Err(format!(
                "it ends after {done} bytes, a cluster has {length}"
            ));
        }
    }
}

/// Exactly `length` bytes of the frame; more than that is not asked for.
pub(crate) fn expand_zstd(input: &[u8], length: usize) -> Result<Vec<u8>, String> {
    let window = zstd_window(input).ok_or("it does not start with a zstd frame")?;
    if window > ZSTD_WINDOW_BYTES_MAX {
        let max = ZSTD_WINDOW_BYTES_MAX;
        return Err(format!(
            "its zstd window has {window} bytes, more than {max}"
        ));
    }
    let mut output = vec![0; length];
    let mut stream =
        ruzstd::decoding::StreamingDecoder::new(input).map_err(|error| error.to_string())?;
    stream
        .read_exact(&mut output)
        .map_err(|error| error.to_string())?;
    Ok(output)
}

/// How much memory a frame asks for (RFC 8878, 3.1.1.1): looked at before a decoder sees it.
fn zstd_window(input: &[u8]) -> Option<u64> {
    let rest = input.strip_prefix(&ZSTD_MAGIC)?;
    let (&descriptor, rest) = rest.split_first()?;
    let single_segment = descriptor & 0x20 != 0;
    if !single_segment {
        let exponent = rest.first()? >> 3;
        let mantissa = u64::from(rest.first()? & 7);
        let base = 1_u64 << (u32::from(exponent).saturating_add(10));
        return Some(base.saturating_add((base / 8).saturating_mul(mantissa)));
    }
    let dictionary = match descriptor & 3 {
        0 => 0,
        1 => 1,
        2 => 2,
        _ => 4,
    };
    let size = rest.get(dictionary..)?;
    let field = |width: usize| {
        let bytes = size.get(..width)?;
        let value = |value: u64, byte: &u8| value << 8 | u64::from(*byte);
        Some(bytes.iter().rev().fold(0, value))
    };
    match descriptor >> 6 {
        0 => field(1),
        1 => field(2).map(|value| value.saturating_add(256)),
        2 => field(4),
        _ => field(8),
    }
}
