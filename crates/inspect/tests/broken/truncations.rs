//! Streams that end too early.

use vmferry_inspect::{Found, Item, ItemKind, Report, WalkError};
use vmferry_stream::Fault;

use crate::captures::Capture;
use crate::memory::peak_of;
use crate::{MEMORY_MAX, long, seeded};

/// Where a stream may be said to end if it ends before byte `cut`, in the words of the message; `None`
/// if it is whole there.
fn places(capture: &Capture, cut: usize) -> Option<Vec<String>> {
    let list = || "the list of sections".to_owned();
    let item = capture.item_at(cut);
    let into = cut as u64 - item.offset;
    let mut places = match &item.kind {
        ItemKind::Header => vec!["the header".into()],
        ItemKind::Configuration => vec!["the configuration".into()],
        ItemKind::Command { .. } => vec![list(), "a command".into()],
        ItemKind::Package | ItemKind::Eof => vec![list()],
        ItemKind::Description if into == 0 => return None,
        ItemKind::Description => vec!["the description".into()],
        ItemKind::Section(_) | ItemKind::Device(_) => {
            let (section, header) = capture.section_of(item).unwrap();
            match (item.count, into < header) {
                (1, true) => vec![list()],
                (1, false) => vec![section],
                // PARTs are one item, sections that take turns a few: the cut may be in any.
                _ => {
                    let items = capture.report.items.iter().filter(|item| item.count > 1);
                    let in_turn = items.filter_map(|item| capture.section_of(item));
                    in_turn.map(|(name, _)| name).chain([list()]).collect()
                }
            }
        }
    };
    // What follows the header may be a configuration, and what follows that may belong to it.
    let behind_configuration = || capture.item_at(cut - 1).kind == ItemKind::Configuration;
    if item.offset == 8 || (into == 0 && cut > 8 && behind_configuration()) {
        places.push("the configuration".into());
    }
    if capture.report.footers == Some(false) {
        // Where one section ends is only clear from the header of the next, which is not whole.
        let before = |item: &Item| capture.item_at(item.offset.saturating_sub(1) as usize);
        let last = match before(item) {
            eof if eof.kind == ItemKind::Eof => before(eof),
            last => last,
        };
        if let Some((section, _)) = capture.section_of(last) {
            places.push(section);
        }
    }
    Some(places)
}

/// Report the first `cut` bytes; the memory that took.
fn cut_is_found(capture: &Capture, cut: usize) -> usize {
    let (report, peak) = peak_of(|| Report::of(&capture.bytes[..cut]));
    let name = &capture.name;
    assert!(peak <= MEMORY_MAX, "{name} cut at {cut}: {peak} bytes held");
    let Some(places) = places(capture, cut) else {
        assert!(report.end.is_ok(), "{name} cut at {cut}: {:?}", report.end);
        return peak;
    };
    let error = match &report.end {
        Err(WalkError::Stream(error)) => error,
        // Without footers a last byte that is zero looks like the end of the stream.
        Ok(_) if report.footers == Some(false) && capture.bytes[cut - 1] == 0 => return peak,
        end => panic!("{name} cut at {cut} in {places:?}: {end:?}"),
    };
    let Fault::Truncated(place) = &error.fault else {
        panic!("{name} cut at {cut} in {places:?}: {error}");
    };
    assert!(
        places.contains(place),
        "{name} cut at {cut} in {places:?}: {error}"
    );
    assert_eq!(error.offset, cut as u64, "{name}: {error}");
    assert!(!error.field.is_empty() && error.to_string().contains("truncated"));
    everything_before_is_there(capture, &report, cut);
    peak
}

/// What is whole before the cut is in the report as it is in that of the whole stream.
fn everything_before_is_there(capture: &Capture, report: &Report, cut: usize) {
    let is_whole = |offset: u64, bytes: u64| offset + bytes <= cut as u64;
    let (whole, name) = (&capture.report, &capture.name);
    // Without footers bodies end where a header seems to follow.
    if whole.footers != Some(false) {
        let before = whole.devices.iter();
        let before = before.take_while(|device| is_whole(device.offset, device.bytes + 5));
        let there = report
            .devices
            .iter()
            .filter(|device| device.found != Found::Cut);
        let there = there.map(|device| &device.section.name);
        assert!(
            there.eq(before.map(|device| &device.section.name)),
            "{name} cut at {cut}: devices are missing"
        );
    }
    let live = whole.items.iter().filter(|item| {
        matches!(item.kind, ItemKind::Section(_))
            && item.count == 1
            && is_whole(item.offset, item.bytes)
    });
    for item in live {
        let same = |other: &&Item| (other.offset, other.count) == (item.offset, item.count);
        assert!(
            report.items.iter().any(|other| same(&other)),
            "{name} cut at {cut}: {item:?} is missing"
        );
    }
}

fn cut_everywhere(name: &str) {
    let capture = Capture::named(name);
    let step = if long() { 1 } else { 7 };
    let cuts = (0..capture.bytes.len()).step_by(step);
    let (count, peak) = (
        cuts.len(),
        cuts.map(|cut| cut_is_found(&capture, cut)).max(),
    );
    println!(
        "{name}: {count} cuts, at most {} KiB held",
        peak.unwrap() >> 10
    );
}

#[test]
fn a_pc_cut_everywhere() {
    cut_everywhere("pc-100");
}

#[test]
fn a_q35_cut_everywhere() {
    cut_everywhere("q35-72");
}

#[test]
fn a_stream_without_footers_and_description_cut_everywhere() {
    cut_everywhere("pc-2.2-72");
}

/// The package of a postcopy stream, with the bytes before and behind it.
#[test]
fn a_package_cut_everywhere() {
    for name in ["postcopy-72.fwd", "postcopy-100.fwd"] {
        let capture = Capture::named(name);
        let mut items = capture.report.items.iter();
        let package = items.find(|item| item.kind == ItemKind::Package).unwrap();
        let (start, end) = (
            package.offset as usize,
            (package.offset + package.bytes) as usize,
        );
        let step = if long() { 1 } else { 3 };
        for cut in (start.saturating_sub(50)..end + 50).step_by(step) {
            cut_is_found(&capture, cut);
        }
        println!("{name}: package at {start}..{end}");
    }
}

#[test]
fn every_kind_of_stream_cut_somewhere() {
    let mut rng = seeded();
    let mut peak = 0;
    for capture in Capture::all() {
        let cuts = if long() { 2000 } else { 60 };
        for _ in 0..cuts {
            let cut = rng.usize(..capture.bytes.len());
            peak = peak.max(cut_is_found(&capture, cut));
        }
    }
    println!("at most {} KiB held", peak >> 10);
}
