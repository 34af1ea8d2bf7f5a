//! What is wrong with an image.

use std::io::{self, Write};
use std::path::Path;

use serde_json::{Map, Value, json};
use vmferry_qcow2::{CheckReport, Finding, FindingKind};

use super::count;
use super::style::Palette;
use crate::exit::one_line;

/// So many places of each kind are shown to a person.
const PLACES_MAX: usize = 5;

/// An image that was checked.
#[derive(Debug)]
pub(crate) struct Checked<'a> {
    pub(crate) image: &'a Path,
    pub(crate) found: CheckReport,
    /// After a repair.
    pub(crate) left: Option<CheckReport>,
}

impl Checked<'_> {
    fn now(&self) -> &CheckReport {
        self.left.as_ref().unwrap_or(&self.found)
    }

    /// Nothing is wrong now. An image that is only marked as not closed has right refcounts.
    pub(crate) fn is_clean(&self) -> bool {
        let now = self.now();
        total(now) == 0 && !now.marked_corrupt
    }

    /// A line for each kind of finding with the first places, and a summary.
    pub(crate) fn text(&self, palette: Palette, out: &mut impl Write) -> io::Result<()> {
        kinds(&self.found, palette, out)?;
        if let Some(left) = &self.left
            && total(&self.found) > 0
        {
            let mended = total(&self.found).saturating_sub(total(left));
            let of = count(total(&self.found), "finding");
            writeln!(out, "{}", palette.name(format!("mended {mended} of {of}")))?;
            kinds(left, palette, out)?;
        }
        let now = self.now();
        if now.guest_clusters > 0 {
            let percent = now.allocated_clusters as f64 * 100.0 / now.guest_clusters as f64;
            writeln!(
                out,
                "{} of {} allocated ({percent:.1} %), {} compressed; the file is used up to byte {}",
                now.allocated_clusters,
                count(now.guest_clusters, "cluster"),
                now.compressed_clusters,
                now.image_end
            )?;
        }
        if now.marked_dirty {
            writeln!(out, "marked as not closed: {}", self.dirty_means())?;
        }
        if now.marked_corrupt {
            writeln!(
                out,
                "marked as corrupt: it is only read until --repair all has mended it"
            )?;
        }
        writeln!(
            out,
            "{}: {}",
            one_line(&self.image.display().to_string()),
            self.verdict(palette)
        )
    }

    fn dirty_means(&self) -> &'static str {
        match self.is_clean() {
            true => "its refcounts are right all the same",
            false => "whoever opens it for writing has to mend it first",
        }
    }

    fn verdict(&self, palette: Palette) -> String {
        let now = self.now();
        let mut parts = Vec::new();
        if now.errors > 0 {
            parts.push(palette.bad(count(now.errors, "error")).to_string());
        }
        if now.flags > 0 {
            parts.push(palette.doubtful(count(now.flags, "wrong flag")).to_string());
        }
        if now.leaks > 0 {
            let leaks = count(now.leaks, "leaked cluster");
            parts.push(palette.doubtful(leaks).to_string());
        }
        match parts.is_empty() {
            true if now.marked_corrupt => palette.bad("marked as corrupt").to_string(),
            true => palette.good("clean").to_string(),
            false => parts.join(", "),
        }
    }

    /// The same as one object.
    pub(crate) fn object(&self) -> Value {
        let now = self.now();
        let findings: Vec<Value> = self.found.findings.iter().map(finding).collect();
        json!({
            "event": "checked",
            "image": self.image.to_string_lossy(),
            "clean": self.is_clean(),
            "found": counts(&self.found),
            "left": counts(now),
            "findings": findings,
            "marked-dirty": now.marked_dirty,
            "marked-corrupt": now.marked_corrupt,
            "disk-clusters": now.guest_clusters,
            "allocated-clusters": now.allocated_clusters,
            "compressed-clusters": now.compressed_clusters,
            "image-end": now.image_end,
        })
    }
}

fn total(report: &CheckReport) -> u64 {
    report.errors + report.flags + report.leaks
}

fn kinds(report: &CheckReport, palette: Palette, out: &mut impl Write) -> io::Result<()> {
    for kind in FindingKind::ALL {
        let number = report.count(kind);
        if number == 0 {
            continue;
        }
        let (singular, plural) = words(kind);
        let what = match number {
            1 => format!("1 {singular}"),
            _ => format!("{number} {plural}"),
        };
        match kind {
            FindingKind::Leak | FindingKind::Copied => writeln!(out, "{}", palette.doubtful(what))?,
            _ => writeln!(out, "{}", palette.bad(what))?,
        }
        let places = report.findings.iter().filter(|found| found.kind == kind);
        for found in places.take(PLACES_MAX) {
            writeln!(out, "  {found}")?;
        }
        let more = number.saturating_sub(PLACES_MAX as u64);
        if more > 0 {
            writeln!(out, "  {}", palette.faint(format!("and {more} more")))?;
        }
    }
    Ok(())
}

/// One of a kind, and many.
fn words(kind: FindingKind) -> (&'static str, &'static str) {
    match kind {
        FindingKind::Broken => (
            "table or entry that makes no sense",
            "tables or entries that make no sense",
        ),
        FindingKind::OutOfRange => (
            "entry that leads out of the file, or between clusters",
            "entries that lead out of the file, or between clusters",
        ),
        FindingKind::Overlap => (
            "place where metadata overlaps",
            "places where metadata overlaps",
        ),
        FindingKind::Refcount => (
            "cluster with a refcount that is too low",
            "clusters with a refcount that is too low",
        ),
        FindingKind::Copied => (
            "COPIED flag that disagrees with a refcount",
            "COPIED flags that disagree with a refcount",
        ),
        FindingKind::Leak => ("leaked cluster", "leaked clusters"),
    }
}

/// As `--json` calls it.
fn key(kind: FindingKind) -> &'static str {
    match kind {
        FindingKind::Broken => "broken",
        FindingKind::OutOfRange => "out-of-range",
        FindingKind::Overlap => "overlap",
        FindingKind::Refcount => "refcount",
        FindingKind::Copied => "copied-flag",
        FindingKind::Leak => "leak",
    }
}

fn counts(report: &CheckReport) -> Value {
    let counts: Map<String, Value> = FindingKind::ALL
        .into_iter()
        .map(|kind| (key(kind).to_owned(), report.count(kind).into()))
        .collect();
    Value::Object(counts)
}

fn finding(found: &Finding) -> Value {
    json!({"kind": key(found.kind), "offset": found.offset, "text": found.text})
}
