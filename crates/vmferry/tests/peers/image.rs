//! Images of either format, as `qemu-img` makes and judges them.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::disk;
use super::nbd::{run_tool, try_tool};

/// Which format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Raw,
    Qcow2,
}

impl Format {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

fn utf8(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// Creates an image of a disk of `size` bytes with random data at the given offsets and lengths. `None` if `qemu-img` is
/// not there.
pub(crate) fn create(
    path: &Path,
    format: Format,
    size: u64,
    data: &[(u64, u64)],
    rng: &mut fastrand::Rng,
) -> Option<()> {
    if format == Format::Raw {
        disk::sparse(path, size, data, rng);
        return Some(());
    }
    let raw = path.with_extension("content");
    disk::sparse(&raw, size, data, rng);
    let convert = ["convert", "-f", "raw", "-O", "qcow2"];
    run_tool(
        "qemu-img",
        convert.into_iter().chain([utf8(&raw), utf8(path)]),
    )?;
    std::fs::remove_file(raw).expect("a file can be removed");
    Some(())
}

/// Creates an empty qcow2 on top of another image. `None` if `qemu-img` is not there.
pub(crate) fn overlay(path: &Path, base: &Path, format: Format) -> Option<()> {
    let base_name = base.file_name().and_then(|name| name.to_str());
    let base_name = base_name.expect("test paths are UTF-8");
    let create = ["create", "-q", "-f", "qcow2", "-b", base_name];
    let rest = ["-F", format.name(), utf8(path)];
    run_tool("qemu-img", create.into_iter().chain(rest))?;
    Some(())
}

/// The content of an image, in a raw file beside it; of the whole chain, if there is one. A qcow2 is checked first.
pub(crate) fn content(path: &Path, format: Format) -> Option<PathBuf> {
    if format == Format::Raw {
        return Some(path.to_owned());
    }
    assert_clean(path)?;
    content_now(path, format)
}

/// The content of an image as it is in its file, although a daemon has it open.
pub(crate) fn content_now(path: &Path, format: Format) -> Option<PathBuf> {
    let raw = path.with_extension("raw-content");
    let convert = ["convert", "-U", "-f", format.name(), "-O", "raw"];
    let files = [utf8(path), utf8(&raw)];
    run_tool("qemu-img", convert.into_iter().chain(files))?;
    Some(raw)
}

/// Fails unless `qemu-img` finds nothing wrong with a qcow2, not even leaks.
pub(crate) fn assert_clean(path: &Path) -> Option<()> {
    run_tool("qemu-img", ["check", "-f", "qcow2", utf8(path)])?;
    Some(())
}

/// What `qemu-img` finds in a qcow2: (errors, leaks).
pub(crate) fn verdict(path: &Path) -> Option<(u64, u64)> {
    let check = ["check", "-f", "qcow2", "--output=json", utf8(path)];
    let (Ok(said) | Err(said)) = try_tool("qemu-img", check)?;
    let report = said.find('{').map_or("", |start| &said[start..]);
    let report: Value = serde_json::from_str(report)
        .unwrap_or_else(|error| panic!("the report of qemu-img ({error}): {said}"));
    let number = |name: &str| report[name].as_u64().unwrap_or(0);
    Some((number("corruptions"), number("leaks")))
}

/// How many bytes of the disk have a place in a qcow2 itself.
pub(crate) fn allocated(path: &Path) -> Option<u64> {
    let map = ["map", "-f", "qcow2", "--output=json", utf8(path)];
    let map: Value = serde_json::from_str(&run_tool("qemu-img", map)?).expect("JSON");
    let extents = map.as_array().expect("a map is a list");
    let own = |extent: &&Value| extent["depth"] == 0 && extent["offset"].is_u64();
    let lengths = extents
        .iter()
        .filter(own)
        .map(|extent| extent["length"].as_u64());
    Some(lengths.flatten().sum())
}
