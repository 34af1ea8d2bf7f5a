//! Snapshots as a table, and as JSON.

use std::io::{self, Write};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::{Value, json};
use vmferry_qcow2::Snapshot;
use vmferry_snapshot::Listing;
use vmferry_stream::Shown;

use super::style::Palette;

/// Those that all disks have, then those that cannot be applied together. Of a `single` disk ids are
/// shown: elsewhere they differ.
pub(crate) fn table(
    listing: &Listing,
    single: bool,
    palette: Palette,
    out: &mut impl Write,
) -> io::Result<()> {
    if listing.whole.is_empty() {
        writeln!(out, "There is no snapshot that could be applied.")?;
    } else {
        rows(&listing.whole, single, palette, out)?;
    }
    for partial in &listing.partial {
        let disk = Shown(&partial.disk);
        writeln!(
            out,
            "\nOn {disk} and not on all, so they cannot be applied:"
        )?;
        rows(&partial.snapshots, true, palette, out)?;
    }
    Ok(())
}

fn rows(
    snapshots: &[Snapshot],
    with_ids: bool,
    palette: Palette,
    out: &mut impl Write,
) -> io::Result<()> {
    writeln!(
        out,
        "{:<6} {:<20} {:>9} {:>19} {:>15}",
        "ID", "NAME", "VM STATE", "DATE", "VM CLOCK"
    )?;
    for snapshot in snapshots {
        let id = if with_ids { &snapshot.id } else { "--" };
        let name = palette.name(format!("{:<20}", Shown(&snapshot.name)));
        writeln!(
            out,
            "{:<6} {name} {:>9} {:>19} {:>15}",
            Shown(id),
            super::bytes(snapshot.vm_state_bytes),
            date(snapshot),
            clock(snapshot.guest_nanoseconds),
        )?;
    }
    Ok(())
}

/// Local time.
fn date(snapshot: &Snapshot) -> String {
    let seconds = i64::from(snapshot.date.0);
    match Timestamp::from_second(seconds) {
        Ok(time) => {
            let local = time.to_zoned(TimeZone::system());
            local.strftime("%Y-%m-%d %H:%M:%S").to_string()
        }
        Err(_) => seconds.to_string(),
    }
}

/// Hours, minutes, seconds and milliseconds that the guest had run.
fn clock(nanoseconds: u64) -> String {
    let ms = nanoseconds / 1_000_000;
    let (seconds, ms) = (ms / 1000, ms % 1000);
    let (minutes, seconds) = (seconds / 60, seconds % 60);
    let (hours, minutes) = (minutes / 60, minutes % 60);
    format!("{hours:04}:{minutes:02}:{seconds:02}.{ms:03}")
}

/// All of it as one object.
pub(crate) fn object(listing: &Listing) -> Value {
    let objects = |snapshots: &[Snapshot]| snapshots.iter().map(snapshot_object).collect::<Value>();
    let partial = listing
        .partial
        .iter()
        .map(|partial| json!({ "disk": partial.disk, "snapshots": objects(&partial.snapshots) }));
    json!({ "whole": objects(&listing.whole), "partial": partial.collect::<Value>() })
}

fn snapshot_object(snapshot: &Snapshot) -> Value {
    json!({
        "id": snapshot.id,
        "name": snapshot.name,
        "date-sec": snapshot.date.0,
        "date-nsec": snapshot.date.1,
        "vm-clock-ns": snapshot.guest_nanoseconds,
        "vm-state-size": snapshot.vm_state_bytes,
        "disk-size": snapshot.disk_bytes,
        "icount": snapshot.icount,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_clock_as_qemu_shows_it() {
        assert_eq!(clock(0), "0000:00:00.000");
        assert_eq!(clock(533_999_999), "0000:00:00.533");
        assert_eq!(clock(360_061_001_000_000), "0100:01:01.001");
    }
}
