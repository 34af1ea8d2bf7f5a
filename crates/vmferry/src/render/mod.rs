//! What a person, or a program, sees of a migration.

mod bar;
pub(crate) mod check;
pub(crate) mod diff;
pub(crate) mod inspect;
pub(crate) mod inspect_json;
pub(crate) mod name;
mod outcome;
pub(crate) mod schema;
pub(crate) mod snapshot;
mod status;
pub(crate) mod style;
mod track;
mod units;
mod value;

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};
use vmferry_channel::Uri;

use crate::output;
pub(crate) use outcome::{Outcome, Summary};
pub(crate) use status::status;
pub(crate) use track::{Phase, Sample};
use track::{Track, View};
pub(crate) use units::{bytes, count, rate, time};

/// Without a terminal a line is printed this often, and whenever the phase changes.
const LINE_INTERVAL: Duration = Duration::from_secs(5);
/// With `--json` an object is printed this often, and whenever the phase changes.
const JSON_INTERVAL: Duration = Duration::from_secs(1);

/// Shows the progress of one migration.
pub(crate) struct Progress {
    track: Track,
    style: Style,
    shown: Option<(Duration, Phase)>,
}

enum Style {
    Bar(bar::Bar),
    Lines(Box<dyn Write>),
    Json(Box<dyn Write>),
}

impl Progress {
    /// A bar on standard error, or lines when it is no terminal; with `json` given, objects there.
    pub(crate) fn new(json: Option<Box<dyn Write>>) -> Self {
        let style = match json {
            Some(out) => Style::Json(out),
            None if io::stderr().is_terminal() => Style::Bar(bar::Bar::new()),
            None => Style::Lines(Box::new(output::stderr())),
        };
        Self {
            track: Track::default(),
            style,
            shown: None,
        }
    }

    /// Take a status in that was seen `now` (since the start), and show it if it is time to.
    pub(crate) fn show(&mut self, sample: &Sample, now: Duration) -> io::Result<()> {
        let view = self.track.view(sample);
        self.present(&view, now)
    }

    /// The migration completed; `sample` is its last status.
    pub(crate) fn completed(&mut self, sample: &Sample, now: Duration) -> io::Result<()> {
        let view = self.track.completed(sample);
        self.present(&view, now)
    }

    /// Say something beside the progress.
    pub(crate) fn note(&self, text: &str) {
        match &self.style {
            Style::Bar(bar) => bar.note(text),
            Style::Lines(_) | Style::Json(_) => output::say(text),
        }
    }

    fn present(&mut self, view: &View, now: Duration) -> io::Result<()> {
        let interval = match &self.style {
            Style::Bar(_) => Duration::ZERO,
            Style::Lines(_) => LINE_INTERVAL,
            Style::Json(_) => JSON_INTERVAL,
        };
        let due = self
            .shown
            .is_none_or(|(at, phase)| phase != view.phase || now.saturating_sub(at) >= interval);
        if !due {
            return Ok(());
        }
        self.shown = Some((now, view.phase));
        match &mut self.style {
            Style::Bar(bar) => bar.draw(view),
            Style::Lines(_) | Style::Json(_) if view.phase.is_end() => {}
            Style::Lines(out) => writeln!(
                out,
                "vmferry: {}: {} % ({})",
                view.phase.name(),
                view.permille / 10,
                view.details()
            )?,
            Style::Json(out) => write_json(out, &progress_object(view))?,
        }
        Ok(())
    }
}

/// One object, one line, at once.
pub(crate) fn write_json(
    out: &mut (impl Write + ?Sized),
    object: &impl Serialize,
) -> io::Result<()> {
    let mut out = io::BufWriter::new(out);
    serde_json::to_writer(&mut out, object)?;
    writeln!(out)?;
    out.flush()
}

/// The object that tells where to connect to; `what` is `nbd`, `qmp` or `incoming`.
pub(crate) fn listening(what: &str, address: &Uri) -> Value {
    json!({"event": "listening", "what": what, "address": address.to_string()})
}

fn progress_object(view: &View) -> Value {
    let mut object = json!({
        "event": "progress",
        "phase": view.phase.name(),
        "done-bytes": view.done_bytes,
        "total-bytes": view.total_bytes,
        "bytes-per-second": view.bytes_per_second,
        "dirty-bytes-per-second": view.dirty_bytes_per_second,
        "pass": view.pass,
        "stall": view.stall,
    });
    if let Some(downtime) = view.expected_downtime {
        object["expected-downtime-ms"] = json!(downtime.as_millis() as u64);
    }
    if let Some(eta) = view.eta {
        object["eta-ms"] = json!(eta.as_millis() as u64);
    }
    object
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Paper(Arc<Mutex<Vec<u8>>>);

    impl Write for Paper {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Paper {
        fn lines(&self) -> Vec<String> {
            let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
            text.lines().map(str::to_owned).collect()
        }
    }

    /// A migration of 1 GiB, as seen four times a second.
    fn play(style: Style) {
        let mut progress = Progress {
            track: Track::default(),
            style,
            shown: None,
        };
        let mut now = Duration::ZERO;
        let mut see = |phase, remaining_mib: u64| {
            let sample = Sample {
                phase,
                total_bytes: 1 << 30,
                remaining_bytes: remaining_mib << 20,
                bytes_per_second: 64 << 20,
                pass: if remaining_mib > 512 { 1 } else { 2 },
                ..Sample::default()
            };
            progress.show(&sample, now).unwrap();
            now += Duration::from_millis(250);
        };
        see(Phase::Setup, 1024);
        for remaining in (0..40).map(|step| 1024 - step * 16) {
            see(Phase::Bulk, remaining);
        }
        see(Phase::Dirty, 512);
        see(Phase::SwitchOver, 0);
        progress
            .completed(
                &Sample {
                    total_bytes: 1 << 30,
                    ..Sample::default()
                },
                now,
            )
            .unwrap();
    }

    #[test]
    fn without_a_terminal_there_is_a_line_every_five_seconds_and_for_each_phase() {
        let paper = Paper::default();
        play(Style::Lines(Box::new(paper.clone())));
        assert_eq!(
            paper.lines(),
            [
                "vmferry: setting up: 0 % (0 B of 1.00 GiB, 64.0 MiB/s)",
                "vmferry: copying: 0 % (0 B of 1.00 GiB, 64.0 MiB/s, ETA 16.0 s)",
                "vmferry: copying: 30 % (320 MiB of 1.00 GiB, 64.0 MiB/s, ETA 11.0 s)",
                "vmferry: catching up: 60 % (624 MiB of 1.00 GiB, 64.0 MiB/s, pass 2, ETA 8.0 s)",
                "vmferry: switching over: 99 % (1.00 GiB of 1.00 GiB, 64.0 MiB/s, pass 2)",
            ]
        );
    }

    #[test]
    fn json_is_one_object_a_second_and_for_each_phase() {
        let paper = Paper::default();
        play(Style::Json(Box::new(paper.clone())));
        let lines = paper.lines();
        assert_eq!(lines.len(), 1 + 10 + 2);
        let objects: Vec<Value> = lines
            .iter()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert!(objects.iter().all(|object| object["event"] == "progress"));
        assert_eq!(objects[1]["phase"], "copying");
        assert_eq!(objects[1]["eta-ms"], 16_000);
        assert_eq!(objects[12]["phase"], "switching over");
        assert_eq!(objects[12]["done-bytes"], 1 << 30);
        let done: Vec<u64> = objects
            .iter()
            .map(|object| object["done-bytes"].as_u64().unwrap())
            .collect();
        assert!(done.is_sorted(), "{done:?}");
    }
}
