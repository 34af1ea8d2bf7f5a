//! Streams with one bit that is wrong.

use vmferry_inspect::{DeviceState, Item, ItemKind, Report, WalkError};

use crate::captures::Capture;
use crate::memory::peak_of;
use crate::{MEMORY_MAX, long, seeded};

/// What a report says is wrong: the first place, and the words.
struct Trouble {
    offset: u64,
    text: String,
}

fn troubles(report: &Report) -> Vec<Trouble> {
    let mut troubles = Vec::new();
    if let Err(error) = &report.end {
        let offset = match error {
            WalkError::Stream(error) => error.offset,
            WalkError::TooLong { offset, .. }
            | WalkError::EndNotFound { offset, .. }
            | WalkError::Read { offset, .. } => *offset,
            WalkError::Container(_) | WalkError::Visitor(_) => 0,
        };
        let text = error.to_string();
        troubles.push(Trouble { offset, text });
    }
    for device in &report.devices {
        if let DeviceState::Broken(_, error) = report.state(device) {
            assert!(!error.field.is_empty(), "no field: {error}");
            troubles.push(Trouble {
                offset: device.offset + error.offset as u64,
                text: format!("'{}': {error}", device.section.name),
            });
        }
    }
    let problems = report.problems.iter().map(|problem| Trouble {
        offset: problem.offset,
        text: format!("'{}': {}", problem.section, problem.text),
    });
    troubles.extend(problems);
    troubles
}

/// A byte of the stream: of any item in three of four cases, so that headers, commands and devices get
/// their share among the pages.
fn some_byte(capture: &Capture, rng: &mut fastrand::Rng) -> usize {
    let items = &capture.report.items;
    let item = &items[rng.usize(..items.len())];
    match rng.u8(..4) {
        0 => rng.usize(..capture.bytes.len()),
        1 => item.offset as usize + rng.usize(..item.bytes.min(40) as usize),
        _ => item.offset as usize + rng.usize(..item.bytes as usize),
    }
}

/// Where trouble may begin if this byte is damaged. A damaged description may be at odds with any device;
/// else nothing before the damaged section is at fault.
fn earliest(capture: &Capture, at: usize) -> u64 {
    let item = capture.item_at(at);
    let damaged_description = item.kind == ItemKind::Description
        // Its length, and what says that it follows.
        || item.kind == ItemKind::Eof;
    let is_first_device = |item: &&Item| matches!(item.kind, ItemKind::Device(_));
    match capture.report.items.iter().find(is_first_device) {
        Some(device) if damaged_description => device.offset.min(item.offset),
        _ => item.offset,
    }
}

#[test]
fn one_bit_is_wrong() {
    let mut rng = seeded();
    let mut captures = Capture::all();
    let flips = if long() { 100_000 } else { 10_000 };
    let (mut noticed, mut peak_max) = (0, 0);
    for _ in 0..flips {
        let capture = rng.usize(..captures.len());
        let capture = &mut captures[capture];
        let (at, bit) = (some_byte(capture, &mut rng), rng.u8(..8));
        capture.bytes[at] ^= 1 << bit;
        let (report, peak) = peak_of(|| Report::of(&capture.bytes[..]));
        let name = format!("{}, bit {bit} of byte {at}", capture.name);
        assert!(peak <= MEMORY_MAX, "{name}: {peak} bytes held");
        let troubles = troubles(&report);
        assert_eq!(troubles.is_empty(), report.is_clean(), "{name}");
        for Trouble { offset, text } in &troubles {
            let earliest = earliest(capture, at);
            assert!(
                *offset >= earliest,
                "{name}, {earliest}: byte {offset}: {text}"
            );
        }
        noticed += u32::from(!troubles.is_empty());
        peak_max = peak_max.max(peak);
        capture.bytes[at] ^= 1 << bit;
    }
    println!(
        "{noticed} of {flips} wrong bits noticed, at most {} KiB held",
        peak_max >> 10
    );
}
