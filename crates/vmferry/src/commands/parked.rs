//! Parked machines, as the commands that read them open them.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmferry_image::{FileStorage, Image, ImageError, IndexPlace, SnapshotStorage, Storage};

use crate::exit::Failure;
use crate::flags::convert::ImageFlags;
use crate::render::{Phase, Progress, Sample};

/// What takes less than this is not worth a line.
const PATIENCE: Duration = Duration::from_millis(500);

/// Open it: its index is found, or made, which reads all of it once.
pub(super) fn open(
    flags: &ImageFlags,
    json: Option<Box<dyn Write>>,
) -> Result<Arc<Image>, Failure> {
    let storage: Arc<dyn Storage> = match &flags.snapshot {
        None => Arc::new(FileStorage::open(&flags.file, 0).map_err(refused)?),
        Some(name) => Arc::new(SnapshotStorage::open(&flags.file, name).map_err(refused)?),
    };
    check_index(flags.index.as_deref(), &[&flags.file])?;
    let place = place(flags.index.as_deref());
    let mut course = Course::new(Phase::Indexing, json);
    let image = Image::open(storage, &place, &mut |progress| {
        course.show(progress.done_bytes, progress.total_bytes);
    });
    let image = image.map_err(refused)?;
    course.finish()?;
    Ok(Arc::new(image))
}

/// Read all of it, and compare it with its index.
pub(super) fn verify(image: &Image, json: Option<Box<dyn Write>>) -> Result<(), Failure> {
    let mut course = Course::new(Phase::Verifying, json);
    let verified = image.verify(&mut |progress| {
        course.show(progress.done_bytes, progress.total_bytes);
    });
    verified.map_err(refused)?;
    course.finish()?;
    Ok(())
}

/// An index must not be any of the files that a command reads or writes.
pub(super) fn check_index(index: Option<&Path>, others: &[&Path]) -> Result<(), Failure> {
    let Some(index) = index else {
        return Ok(());
    };
    match others.iter().any(|other| is_same_place(index, other)) {
        false => Ok(()),
        true => Err(Failure::usage(format!(
            "--index {}: that is no place for an index, but one of the files themselves",
            index.display()
        ))),
    }
}

/// Do these lead to one file, or would they, if it was made?
fn is_same_place(left: &Path, right: &Path) -> bool {
    let identity = |path: &Path| fs::metadata(path).map(|it| (it.dev(), it.ino()));
    if let (Ok(left), Ok(right)) = (identity(left), identity(right)) {
        return left == right;
    }
    let folder = |path: &Path| match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => fs::canonicalize(folder),
        _ => fs::canonicalize("."),
    };
    let same_folder =
        matches!((folder(left), folder(right)), (Ok(left), Ok(right)) if left == right);
    same_folder && left.file_name() == right.file_name()
}

/// Where the index of a parked machine is.
pub(super) fn place(index: Option<&Path>) -> IndexPlace {
    match index {
        Some(path) => IndexPlace::At(path.to_owned()),
        None => IndexPlace::Beside,
    }
}

/// Nothing was sent, and nothing has changed.
pub(super) fn refused(error: ImageError) -> Failure {
    let is_broken = matches!(
        error,
        ImageError::Stream { .. } | ImageError::Incomplete { .. } | ImageError::BrokenRam { .. }
    );
    let failure = Failure::refused(error);
    match is_broken {
        true => failure.hint("vmferry inspect says what is in it, and where it breaks"),
        false => failure,
    }
}

/// The course of something that reads a parked machine from its beginning to its end.
pub(super) struct Course {
    phase: Phase,
    begun: Instant,
    json: Option<Box<dyn Write>>,
    progress: Option<Progress>,
    told: io::Result<()>,
}

impl Course {
    pub(super) fn new(phase: Phase, json: Option<Box<dyn Write>>) -> Self {
        Self {
            phase,
            begun: Instant::now(),
            json,
            progress: None,
            told: Ok(()),
        }
    }

    /// So much is done.
    pub(super) fn show(&mut self, done_bytes: u64, total_bytes: u64) {
        let elapsed = self.begun.elapsed();
        if elapsed < PATIENCE || self.told.is_err() {
            return;
        }
        let json = &mut self.json;
        let progress = self
            .progress
            .get_or_insert_with(|| Progress::new(json.take()));
        let millis = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
        let sample = Sample {
            phase: self.phase,
            total_bytes,
            remaining_bytes: total_bytes.saturating_sub(done_bytes),
            bytes_per_second: done_bytes.saturating_mul(1000) / millis.max(1),
            ..Sample::default()
        };
        self.told = progress.show(&sample, elapsed);
    }

    /// It could be told.
    pub(super) fn finish(self) -> io::Result<()> {
        self.told
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Exit;

    fn flags(file: &std::path::Path) -> ImageFlags {
        ImageFlags {
            file: file.to_owned(),
            snapshot: None,
            index: None,
        }
    }

    #[test]
    fn what_is_no_parked_machine_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        let failure = |flags: &ImageFlags| open(flags, None).map(drop).unwrap_err();
        let missing = failure(&flags(&file));
        assert_eq!(missing.exit, Exit::Refused);
        assert!(missing.message().contains(file.to_str().unwrap()));

        std::fs::write(&file, [0x5a; 8192]).unwrap();
        let garbage = failure(&flags(&file));
        assert_eq!(garbage.exit, Exit::Refused);
        assert!(garbage.message().contains(file.to_str().unwrap()));

        let snapshot = ImageFlags {
            snapshot: Some("one".to_owned()),
            ..flags(&file)
        };
        assert_eq!(failure(&snapshot).exit, Exit::Refused);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
