//! From `--disk` values to open disks.

pub(crate) mod image;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::{fs, mem};

use vmferry_disk::OpenError;
use vmferry_qcow2::Error as Qcow2Error;

use crate::exit::{Exit, Failure};
use crate::flags::disk::DiskFlag;
use image::{Image, ImageError};

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
    pub(crate) image: Image,
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
        let image = match flag.create {
            Some(size) if is_new => {
                let image = Image::create(&flag.path, flag.format(), size.bytes)
                    .map_err(|error| cannot_open(flag, &error))?;
                made.add(&flag.path);
                image
            }
            _ => open_existing(flag, purpose, past)?,
        };
        disks.push(OpenDisk {
            name: flag.name.clone(),
            path: flag.path.clone(),
            image,
            is_new: is_new && flag.create.is_some(),
        });
    }
    Ok(OpenDisks { disks, made })
}

fn open_existing(flag: &DiskFlag, purpose: Purpose, past: Past) -> Result<Image, Failure> {
    let name = &flag.name;
    let image = Image::open(&flag.path, flag.format(), flag.read_only)
        .map_err(|error| cannot_open(flag, &error))?;
    let cannot_look = |error| cannot_open(flag, &error);
    let refused = |why: String| Failure::refused(format!("disk \"{name}\": {why}"));
    let (path, length) = (flag.path.display(), image.limits().length);
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
    if flag.format.is_none() && image.looks_like_qcow2().map_err(cannot_look)? {
        return Err(refused(format!(
            "{path} starts like a qcow2 image, but no format was given, which means raw"
        ))
        .hint("if it is one, say format=qcow2")
        .hint("if its content really is raw, say format=raw"));
    }
    let may_fill = flag.overwrite || matches!(past, Past::HalfFilled | Past::Arrived);
    if purpose == Purpose::Fill && !may_fill && image.holds_data().map_err(cannot_look)? {
        return Err(refused(format!(
            "{path} holds data, which a migration would overwrite"
        ))
        .hint(match flag.create {
            None => "if nobody needs that data, say overwrite=on",
            Some(_) => "if nobody needs that data, say overwrite=on, not create=on and size=",
        }));
    }
    Ok(image)
}

fn cannot_open(flag: &DiskFlag, error: &ImageError) -> Failure {
    let name = &flag.name;
    let message = match error {
        ImageError::Qcow2(error) => {
            format!("disk \"{name}\": {}: {error}", flag.path.display())
        }
        ImageError::Open(_) | ImageError::Disk(_) => format!("disk \"{name}\": {error}"),
    };
    match error {
        ImageError::Open(OpenError::Missing { .. }) => {
            Failure::refused(message).hint("to make it, say create=on and size=")
        }
        ImageError::Open(OpenError::Exists { .. }) => Failure::refused(message)
            .hint("to fill a disk that exists, leave create=on and size= out"),
        ImageError::Open(
            OpenError::Directory { .. } | OpenError::NotADisk { .. } | OpenError::TooLong { .. },
        ) => Failure::refused(message),
        ImageError::Open(OpenError::Lock(_)) => {
            Failure::refused(message).hint("end the program that uses the image first")
        }
        ImageError::Qcow2(Qcow2Error::MarkedCorrupt | Qcow2Error::Corrupt { .. }) => {
            Failure::refused(message).hint("see vmferry help check")
        }
        ImageError::Qcow2(Qcow2Error::NotQcow2) => {
            Failure::refused(message).hint("if it is a raw image, say format=raw")
        }
        ImageError::Open(OpenError::Permission { .. } | OpenError::Io { .. })
        | ImageError::Disk(_)
        | ImageError::Qcow2(Qcow2Error::Storage { .. } | Qcow2Error::BackingIo(_)) => {
            Failure::new(Exit::Failed, message)
        }
        ImageError::Qcow2(_) => Failure::refused(message),
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;
    use crate::disks::image::Format;

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
        assert_eq!(open.disks[0].image.limits().length, 1536);
        assert!(!open.disks[0].image.limits().read_only);
        drop(open);
        let open = folder
            .open(Purpose::Serve, &["root=a,readonly=on"])
            .unwrap();
        assert!(open.disks[0].image.limits().read_only);
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
    fn a_qcow2_is_made_and_opened_when_that_was_said() {
        let folder = Folder::new();
        let made = "x=a,format=qcow2,create=on,size=3M";
        let open = folder.open(Purpose::Serve, &[made]).unwrap();
        let limits = open.disks[0].image.limits();
        assert_eq!(
            (limits.length, limits.cluster_bytes),
            (3 << 20, Some(65536))
        );
        assert_eq!(open.disks[0].image.format(), Format::Qcow2);
        drop(open);
        assert!(!folder.path("a").exists());
        folder.open(Purpose::Serve, &[made]).unwrap().made.keep();
        let image = fs::read(folder.path("a")).unwrap();
        assert_eq!(image[..8], *b"QFI\xfb\0\0\0\x03");

        assert!(folder.open(Purpose::Serve, &["x=a,format=qcow2"]).is_ok());
        let (exit, why) = refusal(folder.open(Purpose::Serve, &["x=a"]));
        assert_eq!(exit, Exit::Refused);
        assert!(why.contains("no format was given"), "{why}");
        let (exit, why) = refusal(folder.open(Purpose::Serve, &[made]));
        assert_eq!(exit, Exit::Refused);
        assert_eq!(why, "disk \"x\": ./a: exists already");
        let (exit, why) = refusal(folder.open_with_past(
            Purpose::Fill,
            &["x=a,format=qcow2,create=on,size=4M"],
            Past::HalfFilled,
        ));
        assert_eq!(exit, Exit::Refused);
        assert_eq!(
            why,
            "disk \"x\": ./a exists and has 3145728 bytes, not size=4194304"
        );
        let (exit, why) =
            refusal(folder.open(Purpose::Serve, &["x=b,format=qcow2,create=on,size=300TiB"]));
        assert_eq!(exit, Exit::Refused);
        assert!(why.contains("disk size is 329853488332800"), "{why}");
        assert!(!folder.path("b").exists());
    }

    #[test]
    fn what_is_no_qcow2_is_not_opened_as_one() {
        let folder = Folder::new();
        folder.file("raw", &[7; 4096]);
        folder.file("short", b"QFI\xfb");
        let (exit, why) = refusal(folder.open(Purpose::Serve, &["x=raw,format=qcow2"]));
        assert_eq!(exit, Exit::Refused);
        assert_eq!(
            why,
            "disk \"x\": ./raw: not a qcow2 image: it does not start with the qcow2 magic"
        );
        let (exit, why) = refusal(folder.open(Purpose::Serve, &["x=short,format=qcow2"]));
        assert_eq!(exit, Exit::Refused);
        assert!(why.starts_with("disk \"x\": ./short: header"), "{why}");
    }

    #[test]
    fn a_qcow2_with_clusters_needs_overwrite() {
        let folder = Folder::new();
        let made = "x=a,format=qcow2,create=on,size=1M";
        let open = folder.open(Purpose::Serve, &[made]).unwrap();
        assert!(!open.disks[0].image.holds_data().unwrap());
        let OpenDisks { disks, made } = open;
        made.keep();
        for disk in disks {
            let device = disk.image.into_device();
            device.write_at(&[7; 512], (1 << 20) - 512).unwrap();
            // Dropped: that is how it is closed.
        }
        let text = "x=a,format=qcow2";
        let (exit, why) = refusal(folder.open(Purpose::Fill, &[text]));
        assert_eq!(exit, Exit::Refused);
        assert!(why.contains("holds data"), "{why}");
        assert!(folder.open(Purpose::Serve, &[text]).is_ok());
        let text = "x=a,format=qcow2,overwrite=on";
        let open = folder.open(Purpose::Fill, &[text]).unwrap();
        let device = open.disks.into_iter().next().unwrap().image.into_device();
        device
            .write_zeroes(0, 1 << 20, vmferry_disk::Unmap::May, false)
            .unwrap();
        drop(device);
        // What reads as zeroes without a cluster is nothing.
        assert!(folder.open(Purpose::Fill, &["x=a,format=qcow2"]).is_ok());
    }

    #[test]
    fn a_base_is_shared_by_overlays_and_written_by_nobody() {
        use vmferry_qcow2::header::BackingFormat;
        let folder = Folder::new();
        folder.file("base", &[7; 1 << 20]);
        for name in ["one", "two"] {
            let storage = vmferry_qcow2::FileStorage::create(folder.path(name), false).unwrap();
            let options = vmferry_qcow2::CreateOptions {
                backing: Some(("base".into(), BackingFormat::Raw)),
                ..vmferry_qcow2::CreateOptions::new(1 << 20)
            };
            vmferry_qcow2::create(&storage, &options).unwrap();
        }
        let overlays = ["x=one,format=qcow2", "y=two,format=qcow2"];
        // Nothing of their own: they may be filled.
        let open = folder.open(Purpose::Fill, &overlays).unwrap();
        let device = open.disks.into_iter().next().unwrap().image.into_device();
        let mut found = [0; 512];
        device.read_at(&mut found, 4096).unwrap();
        assert_eq!(found, [7; 512]);
        let (exit, why) = refusal(folder.open(Purpose::Serve, &["b=base"]));
        assert_eq!(exit, Exit::Refused);
        assert!(why.contains("failed to get \"write\" lock on"), "{why}");
        assert!(folder.open(Purpose::Serve, &["b=base,readonly=on"]).is_ok());
        drop(device);
        let base = folder.open(Purpose::Serve, &["b=base"]).unwrap();
        let (exit, why) = refusal(folder.open(Purpose::Serve, &overlays));
        assert_eq!(exit, Exit::Refused);
        assert!(why.contains("base: is another process"), "{why}");
        drop(base);
        // Zeroes that hide what is below are content.
        let open = folder.open(Purpose::Serve, &overlays[..1]).unwrap();
        let device = open.disks.into_iter().next().unwrap().image.into_device();
        device
            .write_zeroes(0, 65536, vmferry_disk::Unmap::May, false)
            .unwrap();
        drop(device);
        assert!(folder.open(Purpose::Fill, &overlays).is_err());
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
