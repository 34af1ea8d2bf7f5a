//! DISK: `NAME=PATH[,format=raw|qcow2][,readonly=on][,size=S][,create=on][,overwrite=on]`, where
//! `,,` is a comma of the name or the path.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use super::size::{Size, SizeError};
use crate::disks::image::Format;

/// Longest name of a disk in bytes: its length is one byte in the `block` section.
pub(crate) const LONGEST_NAME_BYTES: usize = 255;

/// One `--disk` of a daemon or a receiver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DiskFlag {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    /// As it was said. The content never says it: a guest writes that.
    pub(crate) format: Option<Format>,
    pub(crate) read_only: bool,
    /// `create=on`: the length of the file to create.
    pub(crate) create: Option<Size>,
    pub(crate) overwrite: bool,
}

/// Why a disk was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DiskFlagError {
    #[error("a disk is NAME=PATH, with options after commas")]
    NoPath,
    #[error(transparent)]
    Name(#[from] NameError),
    #[error("disk \"{0}\" has an empty path")]
    EmptyPath(String),
    #[error(
        "unknown option \"{0}\": a disk takes format, readonly, size, create and overwrite (a comma in a path is written \",,\")"
    )]
    UnknownOption(String),
    #[error("{0} was given twice")]
    Twice(&'static str),
    #[error("{option} is on or off, not \"{value}\"")]
    NotASwitch { option: &'static str, value: String },
    #[error("unknown format \"{0}\"; format is raw or qcow2")]
    UnknownFormat(String),
    #[error("size: {0}")]
    Size(#[from] SizeError),
    #[error("a disk of size 0 cannot be migrated")]
    ZeroSize,
    #[error("create=on needs size=, for a migration stream does not say how long a disk is")]
    CreateWithoutSize,
    #[error("size= is only for create=on: a file that exists has its size")]
    SizeWithoutCreate,
    #[error("readonly=on and {0}=on contradict each other")]
    ReadOnlyAnd(&'static str),
    #[error("create=on makes a new file, so overwrite=on does not go with it")]
    CreateAndOverwrite,
}

/// Why a name cannot be that of a disk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NameError {
    #[error("a disk needs a name: NAME=PATH")]
    Empty,
    #[error("a disk's name has at most {LONGEST_NAME_BYTES} bytes, this one has {0}")]
    TooLong(usize),
    #[error("a disk's name is UTF-8 text without control characters")]
    NotText,
}

/// The name of a disk: 1 to [`LONGEST_NAME_BYTES`] bytes of text.
pub(crate) fn disk_name(name: &OsStr) -> Result<String, NameError> {
    match (name.len(), name.to_str()) {
        (0, _) => Err(NameError::Empty),
        (length, _) if length > LONGEST_NAME_BYTES => Err(NameError::TooLong(length)),
        (_, Some(name)) if !name.contains(char::is_control) => Ok(name.to_owned()),
        _ => Err(NameError::NotText),
    }
}

impl DiskFlag {
    /// As it was said, or raw.
    pub(crate) fn format(&self) -> Format {
        self.format.unwrap_or(Format::Raw)
    }
}

impl TryFrom<OsString> for DiskFlag {
    type Error = DiskFlagError;

    fn try_from(text: OsString) -> Result<Self, DiskFlagError> {
        let mut parts = split_at_commas(text.as_bytes()).into_iter();
        let head = parts.next().unwrap_or_default();
        let equals = head
            .iter()
            .position(|byte| *byte == b'=')
            .ok_or(DiskFlagError::NoPath)?;
        let name = disk_name(OsStr::from_bytes(&head[..equals]))?;
        let path = OsString::from_vec(head[equals + 1..].to_vec());
        if path.is_empty() {
            return Err(DiskFlagError::EmptyPath(name));
        }
        let options = Options::read(parts)?;
        options.into_flag(name, path.into())
    }
}

/// The options as they were said, each at most once.
#[derive(Default)]
struct Options {
    format: Option<Format>,
    read_only: Option<bool>,
    size: Option<Size>,
    create: Option<bool>,
    overwrite: Option<bool>,
}

impl Options {
    fn read(parts: impl Iterator<Item = Vec<u8>>) -> Result<Self, DiskFlagError> {
        let mut options = Self::default();
        for part in parts {
            let text = String::from_utf8_lossy(&part).into_owned();
            let (option, value) = text.split_once('=').unwrap_or((&text, ""));
            match option {
                "format" => once(&mut options.format, "format", format(value)?)?,
                "readonly" => once(
                    &mut options.read_only,
                    "readonly",
                    switch("readonly", value)?,
                )?,
                "size" => once(&mut options.size, "size", value.parse()?)?,
                "create" => once(&mut options.create, "create", switch("create", value)?)?,
                "overwrite" => once(
                    &mut options.overwrite,
                    "overwrite",
                    switch("overwrite", value)?,
                )?,
                _ => return Err(DiskFlagError::UnknownOption(option.to_owned())),
            }
        }
        Ok(options)
    }

    fn into_flag(self, name: String, path: PathBuf) -> Result<DiskFlag, DiskFlagError> {
        let on = |switch: Option<bool>| switch == Some(true);
        let create = match (on(self.create), self.size) {
            (true, None) => return Err(DiskFlagError::CreateWithoutSize),
            (true, Some(Size { bytes: 0 })) => return Err(DiskFlagError::ZeroSize),
            (true, size) => size,
            (false, Some(_)) => return Err(DiskFlagError::SizeWithoutCreate),
            (false, None) => None,
        };
        if create.is_some() && on(self.overwrite) {
            return Err(DiskFlagError::CreateAndOverwrite);
        }
        if on(self.read_only) {
            if create.is_some() {
                return Err(DiskFlagError::ReadOnlyAnd("create"));
            }
            if on(self.overwrite) {
                return Err(DiskFlagError::ReadOnlyAnd("overwrite"));
            }
        }
        Ok(DiskFlag {
            name,
            path,
            format: self.format,
            read_only: on(self.read_only),
            create,
            overwrite: on(self.overwrite),
        })
    }
}

fn format(value: &str) -> Result<Format, DiskFlagError> {
    match value {
        "raw" => Ok(Format::Raw),
        "qcow2" => Ok(Format::Qcow2),
        _ => Err(DiskFlagError::UnknownFormat(value.to_owned())),
    }
}

fn switch(option: &'static str, value: &str) -> Result<bool, DiskFlagError> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(DiskFlagError::NotASwitch {
            option,
            value: value.to_owned(),
        }),
    }
}

fn once<T>(slot: &mut Option<T>, option: &'static str, value: T) -> Result<(), DiskFlagError> {
    if slot.replace(value).is_some() {
        return Err(DiskFlagError::Twice(option));
    }
    Ok(())
}

/// Split at single commas; two in a row are one comma of the text.
fn split_at_commas(text: &[u8]) -> Vec<Vec<u8>> {
    let mut parts = vec![Vec::new()];
    let mut bytes = text.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        if byte == b',' && bytes.next_if_eq(&b',').is_none() {
            parts.push(Vec::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(byte);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(text: &str) -> Result<DiskFlag, DiskFlagError> {
        DiskFlag::try_from(OsString::from(text))
    }

    fn plain(name: &str, path: &str) -> DiskFlag {
        DiskFlag {
            name: name.into(),
            path: path.into(),
            format: None,
            read_only: false,
            create: None,
            overwrite: false,
        }
    }

    #[test]
    fn a_name_and_a_path_are_enough() {
        assert_eq!(disk("root=/vm/root.img"), Ok(plain("root", "/vm/root.img")));
        assert_eq!(disk("a=b=c"), Ok(plain("a", "b=c")));
    }

    #[test]
    fn every_option_lands_in_its_place() {
        assert_eq!(
            disk("a=p,format=raw,readonly=on"),
            Ok(DiskFlag {
                format: Some(Format::Raw),
                read_only: true,
                ..plain("a", "p")
            })
        );
        assert_eq!(
            disk("a=p,format=qcow2,size=20GiB,create=on"),
            Ok(DiskFlag {
                format: Some(Format::Qcow2),
                create: Some(Size { bytes: 20 << 30 }),
                ..plain("a", "p")
            })
        );
        assert_eq!(
            disk("a=p,overwrite=on"),
            Ok(DiskFlag {
                overwrite: true,
                ..plain("a", "p")
            })
        );
        assert_eq!(
            disk("a=p,readonly=off,create=off,overwrite=off"),
            Ok(plain("a", "p"))
        );
    }

    #[test]
    fn two_commas_are_one_comma_of_the_text() {
        assert_eq!(disk("a,,b=/x,,y"), Ok(plain("a,b", "/x,y")));
        assert_eq!(
            disk("a=/x,,,readonly=on"),
            Ok(DiskFlag {
                read_only: true,
                ..plain("a", "/x,")
            })
        );
        assert_eq!(disk("a=/x,,,,"), Ok(plain("a", "/x,,")));
        assert_eq!(
            disk("a=/x,"),
            Err(DiskFlagError::UnknownOption(String::new()))
        );
    }

    #[test]
    fn a_path_may_be_any_bytes_a_name_must_be_text() {
        let path = OsString::from_vec(b"a=\xff\xfe".to_vec());
        assert_eq!(
            DiskFlag::try_from(path)
                .unwrap()
                .path
                .as_os_str()
                .as_bytes(),
            b"\xff\xfe"
        );
        let name = OsString::from_vec(b"\xff=a".to_vec());
        assert_eq!(DiskFlag::try_from(name), Err(NameError::NotText.into()));
        assert_eq!(disk("a\nb=p"), Err(NameError::NotText.into()));
    }

    #[test]
    fn a_name_has_1_to_255_bytes() {
        let longest = "n".repeat(LONGEST_NAME_BYTES);
        assert_eq!(disk(&format!("{longest}=p")), Ok(plain(&longest, "p")));
        assert_eq!(
            disk(&format!("{longest}n=p")),
            Err(NameError::TooLong(256).into())
        );
        assert_eq!(disk("=p"), Err(NameError::Empty.into()));
        assert_eq!(disk("/vm/root.img"), Err(DiskFlagError::NoPath));
        assert_eq!(disk("a="), Err(DiskFlagError::EmptyPath("a".into())));
    }

    #[test]
    fn wrong_options_are_named() {
        use DiskFlagError as E;
        for (text, error) in [
            ("a=p,format=vmdk", E::UnknownFormat("vmdk".into())),
            ("a=p,cache=none", E::UnknownOption("cache".into())),
            (
                "a=p,readonly",
                E::NotASwitch {
                    option: "readonly",
                    value: String::new(),
                },
            ),
            (
                "a=p,create=yes",
                E::NotASwitch {
                    option: "create",
                    value: "yes".into(),
                },
            ),
            (
                "a=p,size=1MB,create=on",
                E::Size(SizeError::DecimalUnit("MB".into())),
            ),
            ("a=p,readonly=on,readonly=on", E::Twice("readonly")),
            ("a=p,format=raw,format=qcow2", E::Twice("format")),
        ] {
            assert_eq!(disk(text), Err(error), "{text}");
        }
    }

    #[test]
    fn options_that_contradict_each_other_are_refused() {
        use DiskFlagError as E;
        for (text, error) in [
            ("a=p,create=on", E::CreateWithoutSize),
            ("a=p,create=on,size=0", E::ZeroSize),
            ("a=p,size=1M", E::SizeWithoutCreate),
            ("a=p,size=1M,create=on,overwrite=on", E::CreateAndOverwrite),
            (
                "a=p,readonly=on,create=on,size=1M",
                E::ReadOnlyAnd("create"),
            ),
            ("a=p,readonly=on,overwrite=on", E::ReadOnlyAnd("overwrite")),
        ] {
            assert_eq!(disk(text), Err(error), "{text}");
        }
    }
}
