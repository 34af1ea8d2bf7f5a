//! Real streams, whole.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use vmferry_inspect::{Item, ItemKind, Report};
use vmferry_stream::SectionKind;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../stream/tests/captures")
}

/// A stream that is whole, and what is in it.
pub(crate) struct Capture {
    pub(crate) name: String,
    pub(crate) bytes: Vec<u8>,
    pub(crate) report: Report,
}

impl Capture {
    pub(crate) fn named(name: &str) -> Self {
        let packed = fs::File::open(folder().join(format!("{name}.xz"))).unwrap();
        let mut bytes = Vec::new();
        xz2::read::XzDecoder::new(packed)
            .read_to_end(&mut bytes)
            .unwrap();
        let report = Report::of(&bytes[..]);
        assert!(report.is_clean(), "{name}: {:?}", report.end);
        Self {
            name: name.to_owned(),
            bytes,
            report,
        }
    }

    /// All that are streams of migrations.
    pub(crate) fn all() -> Vec<Self> {
        let mut names: Vec<_> = fs::read_dir(folder())
            .unwrap()
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .filter_map(|name| Some(name.strip_suffix(".xz")?.to_owned()))
            .filter(|name| {
                ![".rp", "conn1", "conn2", "qcow2"]
                    .iter()
                    .any(|other| name.contains(other))
            })
            .collect();
        names.sort();
        names.iter().map(|name| Self::named(name)).collect()
    }

    /// The innermost item that holds this byte; of PARTs that take turns, any.
    pub(crate) fn item_at(&self, offset: usize) -> &Item {
        let offset = offset as u64;
        let items = &self.report.items;
        let holds = |item: &&Item| (item.offset..item.offset + item.bytes).contains(&offset);
        let found = items.iter().rev().find(holds);
        let in_turn = || {
            items
                .iter()
                .find(|item| item.count > 1 && item.offset <= offset)
        };
        found
            .or_else(in_turn)
            .unwrap_or_else(|| panic!("{}: byte {offset} belongs to nothing", self.name))
    }

    /// A section as messages show it, and bytes of its header: type, id, and for START and FULL name,
    /// instance, version.
    pub(crate) fn section_of(&self, item: &Item) -> Option<(String, u64)> {
        let section = match &item.kind {
            ItemKind::Section(section) => section,
            ItemKind::Device(place) => &self.report.devices[*place].section,
            _ => return None,
        };
        let header = match section.kind {
            SectionKind::Start | SectionKind::Full => 14 + section.name.as_str().len() as u64,
            SectionKind::Part | SectionKind::End => 5,
        };
        let shown = format!("section '{}' ({})", section.name, section.id);
        Some((shown, header))
    }
}
