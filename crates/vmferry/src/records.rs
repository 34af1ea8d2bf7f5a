//! Records of where disks live, as the commands that open disks use them.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use vmferry_migration::{Record, RecordFile, Residence};

use crate::exit::{Exit, Failure};
use crate::flags::disk::DiskFlag;

/// The folder for records exists.
pub(crate) fn check_folder(state_dir: Option<&Path>) -> Result<(), Failure> {
    match state_dir {
        Some(dir) if !dir.is_dir() => Err(Failure::usage(format!(
            "--state-dir {}: no such folder",
            dir.display()
        ))),
        _ => Ok(()),
    }
}

/// The record of a disk that can move, and what it says.
pub(crate) fn of_disk(
    flag: &DiskFlag,
    state_dir: Option<&Path>,
) -> Result<(RecordFile, Option<Record>), Failure> {
    // A record beside a block device would be gone after a reboot.
    let is_device = fs::metadata(&flag.path).is_ok_and(|file| file.file_type().is_block_device());
    if is_device && state_dir.is_none() {
        return Err(Failure::usage(format!(
            "disk \"{}\": {} is a block device, so --state-dir is needed",
            flag.name,
            flag.path.display()
        ))
        .hint("it is written there where the disk lives; a file in /dev would not last"));
    }
    let file = RecordFile::new(&flag.name, &flag.path, state_dir);
    if state_dir.is_some() {
        check_beside(flag, &file)?;
    }
    let record = read(&file)?;
    Ok((file, record))
}

/// An earlier run without `--state-dir` left its record beside the image.
fn check_beside(flag: &DiskFlag, file: &RecordFile) -> Result<(), Failure> {
    let beside = RecordFile::new(&flag.name, &flag.path, None);
    if beside.path() == file.path() {
        return Ok(());
    }
    match read(&beside)? {
        Some(record) if record.residence != Residence::Arrived => Err(Failure::refused(format!(
            "disk \"{}\": the record beside its image, {}, says that it is {} (other side: {})",
            flag.name,
            beside.path().display(),
            record.residence,
            record.peer
        ))
        .hint("leave --state-dir out, or move that record there")),
        _ => Ok(()),
    }
}

/// A record that was read before its image was locked says the same now: nobody else has used the
/// disk in between.
pub(crate) fn check_unchanged(
    disk: &str,
    file: &RecordFile,
    seen: Option<&Record>,
) -> Result<(), Failure> {
    let now = read(file)?;
    if now.as_ref() == seen {
        return Ok(());
    }
    let now = now.map_or("gone".to_owned(), |record| record.residence.to_string());
    Err(Failure::refused(format!(
        "disk \"{disk}\": its record has changed while it was opened (now: {now})"
    ))
    .hint("another program used the disk; start again"))
}

fn read(file: &RecordFile) -> Result<Option<Record>, Failure> {
    file.read()
        .map_err(|error| Failure::new(Exit::Failed, error))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;

    fn flag(folder: &Path) -> DiskFlag {
        let text = format!("a={}/a", folder.display());
        DiskFlag::try_from(OsString::from(text)).unwrap()
    }

    #[test]
    fn a_record_beside_the_image_is_not_overlooked() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("state");
        fs::create_dir(&state).unwrap();
        let flag = flag(folder.path());
        let beside = RecordFile::new("a", &flag.path, None);
        for (residence, fine) in [
            (Residence::Incoming, false),
            (Residence::Arrived, true),
            (Residence::Leaving, false),
            (Residence::Moved, false),
        ] {
            beside.write(residence, "there").unwrap();
            let outcome = of_disk(&flag, Some(&state)).map(|_| ());
            assert_eq!(outcome.is_ok(), fine, "{residence}");
            if let Err(failure) = outcome {
                assert_eq!(failure.exit, Exit::Refused);
                assert!(failure.message().contains("a.vmferry, says"), "{failure}");
            }
        }
    }

    #[test]
    fn a_record_that_changes_while_the_disk_is_opened_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let flag = flag(folder.path());
        let (file, seen) = of_disk(&flag, None).unwrap();
        assert!(check_unchanged("a", &file, seen.as_ref()).is_ok());
        file.write(Residence::Moved, "there").unwrap();
        let failure = check_unchanged("a", &file, seen.as_ref()).unwrap_err();
        assert_eq!(failure.exit, Exit::Refused);
        assert!(failure.message().ends_with("(now: moved)"), "{failure}");
        let (file, seen) = of_disk(&flag, None).unwrap();
        assert!(check_unchanged("a", &file, seen.as_ref()).is_ok());
        file.clear().unwrap();
        assert!(check_unchanged("a", &file, seen.as_ref()).is_err());
    }
}
