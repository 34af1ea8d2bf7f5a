//! What comes out of real streams, and out of broken ones.

mod broken;
mod captures;
mod cores;

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use vmferry_inspect::{BlockImage, Blocks, ExtractError, MemoryImage, WalkError, walk};

/// A captured stream.
fn capture(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../stream/tests/captures");
    let packed = File::open(folder.join(format!("{name}.xz"))).unwrap();
    let mut stream = Vec::new();
    xz2::read::XzDecoder::new(packed)
        .read_to_end(&mut stream)
        .unwrap();
    stream
}

/// Names of all streams of that folder that go from a source to a destination.
fn captures() -> Vec<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../stream/tests/captures");
    let names = fs::read_dir(folder).unwrap().filter_map(|file| {
        let name = file.unwrap().file_name().into_string().unwrap();
        Some(name.strip_suffix(".xz")?.to_owned())
    });
    let mut names: Vec<_> = names.filter(|name| !name.ends_with(".rp")).collect();
    names.sort();
    names
}

/// Why memory could not be taken out of a stream.
#[derive(Debug)]
#[expect(dead_code, reason = "shown where a test fails")]
enum Failure {
    Walk(WalkError),
    Extract(ExtractError),
}

/// A RAM block of a stream.
fn ram(stream: &[u8], block: &str) -> Result<(Vec<u8>, BlockImage), Failure> {
    let file = tempfile::tempfile().unwrap();
    let mut memory = MemoryImage::new(file, Blocks::Named(block.into()));
    walk(stream, &mut memory).map_err(Failure::Walk)?;
    let (file, blocks) = memory.finish().map_err(Failure::Extract)?;
    let image = blocks.into_iter().find(|image| image.name == *block);
    Ok((bytes_of(&file), image.unwrap()))
}

fn bytes_of(file: &File) -> Vec<u8> {
    let length = usize::try_from(file.metadata().unwrap().len()).unwrap();
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}
