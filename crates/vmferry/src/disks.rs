//! From `--disk` values to open disks.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::{fs, mem};

use vmferry_disk::{BlockDevice, OpenError, OpenOptions, RawDisk};

use crate::exit::{Exit, Failure};
use crate::flags::disk::DiskFlag;

/// What disks are opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Guests use them.
    Serve,
    /// A migration fills them.
    Fill,
}

/// What an earlier run knew about a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Past {
    /// Nothing.
    Unknown,
    /// A migration began to fill it and did not end: there is nothing to lose.
    HalfFilled,
    /// It was filled here, or served.
    Arrived,
    /// It lives elsewhere; what is here may be all that is left if that goes wrong.
    Moved,
}

/// A disk that is ours until it is dropped.
#[derive(Debug)]
pub(crate) struct OpenDisk {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    pub(crate) disk: RawDisk,
    /// It did not exist before.
    pub(crate) is_new: bool,
}

/// Disks, and the files that were made for them.
#[derive(Debug)]
pub(crate) struct OpenDisks {
    pub(crate) disks: Vec<OpenDisk>,
    pub(crate) made: MadeFiles,
}

/// Files that this run has made; removed when dropped, the newest first, unless they are kept.
#[derive(Debug, Default)]
pub(crate) struct MadeFiles {
    paths: Vec<PathBuf>,
}

impl MadeFiles {
    /// This file did not exist before.
    pub(crate) fn add(&mut self, path: &Path) {
        self.paths.push(path.to_owned());
    }

    /// They are worth something now.
    pub(crate) fn keep(mut self) {
        self.paths = Vec::new();
    }
}

impl Drop for MadeFiles {
    fn drop(&mut self) {
        for path in mem::take(&mut self.paths).into_iter().rev() {
            if let Err(error) = fs::remove_file(&path) {
                tracing::warn!("cannot remove {}: {error}", path.display());
            }
        }
    }
}

/// Names are unique.
pub(crate) fn check(flags: &[DiskFlag]) -> Result<(), Failure> {
    let mut names = BTreeSet::new();
    match flags.iter().find(|flag| !names.insert(&flag.name)) {
        None => Ok(()),
        Some(flag) => Err(Failure::usage(format!(
            "there are two disks named \"{}\"",
            flag.name
        ))),
    }
}

/// Open (or create) all disks. When one fails, what was created goes again.
pub(crate) fn open(
    flags: &[DiskFlag],
    plan: impl Fn(&DiskFlag) -> (Purpose, Past),
) -> Result<OpenDisks, Failure> {
    let mut disks = Vec::new();
    let mut made = MadeFiles::default();
    for flag in flags {
        let (purpose, past) = plan(flag);
        // Who removes a half-filled image need not know of its record.
        let is_missing = || !flag.path.try_exists().unwrap_or(true);
        let is_new = match past {
            Past::Unknown => true,
            Past::HalfFilled | Past::Moved => purpose == Purpose::Fill && is_missing(),
            Past::Arrived => false,
        };
        let disk = match flag.create {
            Some(size) if is_new => {
                let disk = RawDisk::create(&flag.path, size.bytes, true)
                    .map_err(|error| cannot_open(&flag.name, &error))?;
                made.add(&flag.path);
                disk
            }
            _ => open_existing(flag, purpose, past)?,
        };
        disks.push(OpenDisk {
            name: flag.name.clone(),
            path: flag.path.clone(),
            disk,
            is_new: is_new && flag.create.is_some(),
        });
    }
    Ok(OpenDisks { disks, made })
}

fn open_existing(flag: &DiskFlag, purpose: Purpose, past: Past) -> Result<RawDisk, Failure> {
    let name = &flag.name;
    let options = OpenOptions {
        read_only: flag.read_only,
        lock: true,
    };
    let disk = RawDisk::open(&flag.path, options).map_err(|error| cannot_open(name, &error))?;
    let cannot_look = |error| Failure::new(Exit::Failed, format!("disk \"{name}\": {error}"));
    let refused = |why: String| Failure::refused(format!("disk \"{name}\": {why}"));
    let (path, length) = (flag.path.display(), disk.limits().length);
    if length == 0 {
        return Err(refused(format!("{path} is empty; a disk has a length")));
    }
    if let Some(size) = flag.create
        && size.bytes != length
    {
        return Err(refused(format!(
            "{path} exists and has {length} bytes, not size={}",
            size.bytes
        )));
    }
    if !flag.surely_raw && disk.starts_with_qcow2_magic().map_err(cannot_look)? {
        return Err(refused(format!(
            "{path} starts like a qcow2 image, which is not supported yet"
        ))
        .hint("if its content really is raw, say format=raw"));
    }
    let may_fill = flag.overwrite || matches!(past, Past::HalfFilled | Past::Arrived);
    if purpose == Purpose::Fill && !may_fill && disk.holds_data().map_err(cannot_look)? {
        return Err(refused(format!(
            "{path} holds data, which a migration would overwrite"
        ))
        .hint(match flag.create {
            None => "if nobody needs that data, say overwrite=on",
            Some(_) => "if nobody needs that data, say overwrite=on, not create=on and size=",
        }));
    }
    Ok(disk)
}

fn cannot_open(name: &str, error: &OpenError) -> Failure {
    let message = format!("disk \"{name}\": {error}");
    match error {
        OpenError::Missing { .. } => {
            Failure::refused(message).hint("to make it, say create=on and size=")
        }
        OpenError::Exists { .. } => Failure::refused(message)
            .hint("to fill a disk that exists, leave create=on and size= out"),
        OpenError::Directory { .. } | OpenError::NotADisk { .. } | OpenError::TooLong { .. } => {
            Failure::refused(message)
        }
        OpenError::Lock(_) => {
            Failure::refused(message).hint("end the program that uses the image first")
        }
        OpenError::Permission { .. } | OpenError::Io { .. } => Failure::new(Exit::Failed, message),
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn file(&self, name: &str, content: &[u8]) {
            fs::write(self.path(name), content).unwrap();
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        /// `NAME=FILE,OPTIONS` with FILE in this folder.
        fn flag(&self, text: &str) -> DiskFlag {
            let (name, rest) = text.split_once('=').unwrap();
            let text = format!("{name}={}/{rest}", self.0.path().display());
            DiskFlag::try_from(OsString::from(text)).unwrap()
        }

        fn open(&self, purpose: Purpose, texts: &[&str]) -> Result<OpenDisks, (Exit, String)> {
            self.open_with_past(purpose, texts, Past::Unknown)
        }

        fn open_with_past(
            &self,
            purpose: Purpose,
            texts: &[&str],
            past: Past,
        ) -> Result<OpenDisks, (Exit, String)> {
            let flags: Vec<DiskFlag> = texts.iter().map(|text| self.flag(text)).collect();
            let outcome = check(&flags).and_then(|()| open(&flags, |_| (purpose, past)));
            outcome.map_err(|failure| {
                let text = failure.to_string();
                (
                    failure.exit,
                    text.replace(&self.0.path().display().to_string(), "."),
                )
            })
        }
    }

    fn refusal(outcome: Result<OpenDisks, (Exit, String)>) -> (Exit, String) {
        let (exit, text) = outcome.unwrap_err();
        (
            exit,
            text.lines()
                .next()
                .unwrap()
                .replacen("vmferry: error: ", "", 1),
        )
    }

    #[test]
    fn a_disk_is_opened_as_it_is() {
        let folder = Folder::new();
        folder.file("a", &[7; 1536]);
        let open = folder.open(Purpose::Serve, &["root=a"]).unwrap();
        assert_eq!(open.disks[0].name, "root");
        assert_eq!(open.disks[0].disk.limits().length, 1536);
        assert!(!open.disks[0].disk.limits().read_only);
        drop(open);
        let open = folder
            .open(Purpose::Serve, &["root=a,readonly=on"])
            .unwrap();
        assert!(open.disks[0].disk.limits().read_only);
        drop(open);
        assert_eq!(fs::read(folder.path("a")).unwrap(), [7; 1536]);
    }

    #[test]
    fn names_are_unique() {
        let folder = Folder::new();
        folder.file("a", &[7; 512]);
        assert_eq!(
            refusal(folder.open(Purpose::Serve, &["x=a", "x=b,create=on,size=1M"])),
            (Exit::Usage, "there are two disks named \"x\"".into())
        );
        assert!(!folder.path("b").exists());
    }

    #[test]
    fn a_made_file_goes_again_unless_it_is_kept() {
        let folder = Folder::new();
        let open = folder
            .open(Purpose::Fill, &["x=a,create=on,size=3M"])
            .unwrap();
        assert_eq!(fs::metadata(folder.path("a")).unwrap().len(), 3 << 20);
        drop(open);
        assert!(!folder.path("a").exists());

        let (exit, why) =
            refusal(folder.open(Purpose::Fill, &["x=a,create=on,size=3M", "y=missing"]));
        assert_eq!(
            (exit, why.as_str()),
            (Exit::Refused, "disk \"y\": ./missing: no such file")
        );
        assert!(!folder.path("a").exists());

        folder
            .open(Purpose::Fill, &["x=a,create=on,size=3M"])
            .unwrap()
            .made
            .keep();
        assert!(folder.path("a").exists());
        let (exit, why) = refusal(folder.open(Purpose::Fill, &["x=a,create=on,size=3M"]));
        assert_eq!(
            (exit, why.as_str()),
            (Exit::Refused, "disk \"x\": ./a: exists already")
        );
    }

    #[test]
    fn a_target_that_holds_data_needs_overwrite() {
        let folder = Folder::new();
        folder.file("full", &[7; 4096]);
        fs::File::create(folder.path("hole"))
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
        assert_eq!(
            refusal(folder.open(Purpose::Fill, &["x=full"])),
            (
                Exit::Refused,
                "disk \"x\": ./full holds data, which a migration would overwrite".into()
            )
        );
        assert!(folder.open(Purpose::Fill, &["x=full,overwrite=on"]).is_ok());
        assert!(folder.open(Purpose::Fill, &["x=hole"]).is_ok());
        assert!(folder.open(Purpose::Serve, &["x=full"]).is_ok());
    }

    #[test]
    fn what_looks_like_qcow2_is_raw_only_when_that_was_said() {
        let folder = Folder::new();
        let mut image = vec![0; 4096];
        image[..4].copy_from_slice(b"QFI\xfb");
        folder.file("a", &image);
        let (exit, why) = refusal(folder.open(Purpose::Serve, &["x=a"]));
        assert_eq!(exit, Exit::Refused);
        assert!(why.contains("starts like a qcow2 image"), "{why}");
        assert!(folder.open(Purpose::Serve, &["x=a,format=raw"]).is_ok());
    }

    #[test]
    fn an_empty_file_is_no_disk() {
        let folder = Folder::new();
        folder.file("a", b"");
        let (exit, why) = refusal(folder.open(Purpose::Serve, &["x=a"]));
        assert_eq!(
            (exit, why.as_str()),
            (
                Exit::Refused,
                "disk \"x\": ./a is empty; a disk has a length"
            )
        );
    }

    #[test]
    fn a_restart_goes_on_with_the_file_that_the_first_start_made() {
        let folder = Folder::new();
        folder.file("a", &[7; 1 << 20]);
        for past in [Past::HalfFilled, Past::Arrived] {
            let text = ["x=a,create=on,size=1M"];
            assert!(
                folder.open_with_past(Purpose::Fill, &text, past).is_ok(),
                "{past:?}"
            );
            let text = ["x=a,create=on,size=2M"];
            let (exit, why) = refusal(folder.open_with_past(Purpose::Fill, &text, past));
            assert_eq!(exit, Exit::Refused);
            assert_eq!(
                why,
                "disk \"x\": ./a exists and has 1048576 bytes, not size=2097152"
            );
        }
        assert!(folder.path("a").exists());
        fs::remove_file(folder.path("a")).unwrap();
        let text = ["x=a,create=on,size=1M"];
        let open = folder
            .open_with_past(Purpose::Fill, &text, Past::HalfFilled)
            .unwrap();
        assert!(open.disks[0].is_new);
        drop(open);
        assert!(
            folder
                .open_with_past(Purpose::Fill, &text, Past::Arrived)
                .is_err()
        );
    }

    #[test]
    fn a_disk_that_comes_back_is_overwritten_only_if_that_was_said() {
        let folder = Folder::new();
        folder.file("a", &[7; 1 << 20]);
        let fill = |text: &str| folder.open_with_past(Purpose::Fill, &[text], Past::Moved);
        for text in ["x=a", "x=a,create=on,size=1M"] {
            let (exit, why) = refusal(fill(text));
            assert_eq!(exit, Exit::Refused);
            assert!(why.contains("holds data"), "{why}");
        }
        assert!(fill("x=a,overwrite=on").is_ok());
    }

    #[test]
    fn what_is_taken_back_is_not_made_anew() {
        let folder = Folder::new();
        for past in [Past::HalfFilled, Past::Moved] {
            let text = ["x=missing,create=on,size=1M"];
            let (exit, why) = refusal(folder.open_with_past(Purpose::Serve, &text, past));
            assert_eq!(
                (exit, why.as_str()),
                (Exit::Refused, "disk \"x\": ./missing: no such file")
            );
        }
    }

    #[test]
    fn one_image_is_one_disk() {
        let folder = Folder::new();
        folder.file("a", &[7; 512]);
        let (exit, why) = refusal(folder.open(Purpose::Serve, &["x=a", "y=a"]));
        assert_eq!(exit, Exit::Refused);
        assert!(why.starts_with("disk \"y\": "), "{why}");
    }
}
