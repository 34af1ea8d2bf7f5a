//! Watching a parked machine leave.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use serde_json::json;
use vmferry_channel::Stop;
use vmferry_migration::{Published, RunningSource, Status};

use super::outcome::{End, Figures, Guest, Outcome, micros};
use super::vm::{Said, Vm};
use super::{SendFlags, json_out};
use crate::render::{self, Progress, Sample};
use crate::signals::{Signal, Signals};

/// How often progress is shown, in the long run.
const INTERVAL: Duration = Duration::from_millis(250);
/// How soon at first.
const FIRST_INTERVAL: Duration = Duration::from_millis(5);

/// Whoever watches.
pub(super) struct Watch<'a> {
    flags: &'a SendFlags,
    signals: &'a Signals,
    vm: Option<Vm>,
    begun: Instant,
    published: Published,
    /// Triggered when the source's part is over.
    over: Stop,
    asked_to_stop: bool,
    told_running: bool,
}

impl<'a> Watch<'a> {
    /// `begun` is when the connection was about to be made.
    pub(super) fn new(
        flags: &'a SendFlags,
        signals: &'a Signals,
        vm: Option<Vm>,
        begun: Instant,
    ) -> io::Result<Self> {
        let over = Stop::new()?;
        let trigger = over.clone();
        let published = Published::new(move |status: &Status| {
            if End::of(status).is_some() {
                trigger.trigger();
            }
        });
        Ok(Self {
            flags,
            signals,
            vm,
            begun,
            published,
            over,
            asked_to_stop: false,
            told_running: false,
        })
    }

    /// What the source tells.
    pub(super) fn published(&self) -> Published {
        self.published.clone()
    }

    /// Show it until the source can do nothing more.
    pub(super) fn until_over(&mut self, source: &RunningSource) -> io::Result<End> {
        let mut progress = Progress::new(json_out(self.flags));
        loop {
            let status = self.published.get();
            let end = End::of(&status);
            let (sample, now) = (Sample::from(&status), self.begun.elapsed());
            match &end {
                Some(End::Completed) => progress.completed(&sample, now)?,
                _ => progress.show(&sample, now)?,
            }
            if let Some(end) = end {
                return Ok(end);
            }
            match self.wait()? {
                // Without a terminal it goes on: a guest may need it.
                None | Some(Signal::Hangup) => {}
                Some(Signal::Stop) if self.asked_to_stop => {
                    // Its connection breaks when the source is dropped.
                    return Ok(End::Interrupted("stopped by a second Ctrl-C".to_owned()));
                }
                Some(Signal::Stop) => self.stop(source, &progress),
            }
        }
    }

    /// For a while, or until something happens.
    fn wait(&mut self) -> io::Result<Option<Signal>> {
        let interval = (self.begun.elapsed() / 16).clamp(FIRST_INTERVAL, INTERVAL);
        let Some(vm) = self.vm.as_mut().filter(|vm| vm.is_awaited()) else {
            return self
                .signals
                .wait_beside(&[self.over.as_fd()], Some(interval));
        };
        vm.look(interval);
        self.tell_running()?;
        self.signals.wait(Some(Duration::ZERO))
    }

    /// The guest was seen to run.
    fn tell_running(&mut self) -> io::Result<()> {
        let Some(after) = self.runs_after().filter(|_| !self.told_running) else {
            return Ok(());
        };
        self.told_running = true;
        if self.flags.json {
            let object = json!({"event": "running", "after-us": micros(after)});
            render::write_json(&mut self.flags.out(), &object)?;
        }
        Ok(())
    }

    fn runs_after(&self) -> Option<Duration> {
        let since = self.vm.as_ref()?.runs_since()?;
        Some(since.saturating_duration_since(self.begun))
    }

    /// Ctrl-C.
    fn stop(&mut self, source: &RunningSource, progress: &Progress) {
        match source.cancel() {
            Ok(()) => progress.note("cancelling"),
            Err(why) => {
                self.asked_to_stop = true;
                progress.note(&format!(
                    "{why}, and needs the rest; again Ctrl-C leaves it waiting"
                ));
            }
        }
    }

    /// What the destination itself says, if it can be asked; and how soon its guest ran.
    pub(super) fn ask_destination(&mut self, end: End) -> (Outcome, Option<Duration>) {
        let outcome = self.outcome(end);
        (outcome, self.runs_after())
    }

    fn outcome(&mut self, end: End) -> Outcome {
        let Some(vm) = &mut self.vm else {
            return match end {
                End::Completed => Outcome::Completed(Guest::Unknown),
                End::Cancelled => Outcome::Cancelled,
                End::Failed(why) => Outcome::Failed(why),
                End::Undecided(why) => Outcome::Undecided(why),
                End::Interrupted(why) => Outcome::Interrupted(why),
            };
        };
        match end {
            End::Completed => match vm.arrived() {
                Said::Arrived { runs: true } => Outcome::Completed(Guest::Runs),
                Said::Arrived { runs: false } => Outcome::Completed(Guest::StandsStill),
                Said::Failed(why) => Outcome::Failed(why),
                Said::Nothing => Outcome::Completed(Guest::Unknown),
            },
            End::Undecided(why) => match vm.arrived() {
                Said::Arrived { runs: true } => Outcome::Completed(Guest::Runs),
                Said::Arrived { runs: false } => Outcome::Completed(Guest::StandsStill),
                Said::Failed(why) => Outcome::Failed(why),
                Said::Nothing => Outcome::Undecided(why),
            },
            End::Failed(why) => match vm.failed() {
                Said::Failed(reason) => Outcome::Failed(format!("{why}; {reason}")),
                _ => Outcome::Failed(why),
            },
            End::Cancelled => Outcome::Cancelled,
            End::Interrupted(why) if vm.is_gone() => Outcome::Lost(why),
            End::Interrupted(why) => Outcome::Interrupted(why),
        }
    }

    /// What is told of it.
    pub(super) fn figures(&self) -> Figures {
        let status = self.published.get();
        let ram = status.ram.unwrap_or_default();
        Figures {
            total_bytes: status.total_bytes.saturating_add(ram.total_bytes),
            sent_bytes: status.wire_bytes,
            elapsed: self.begun.elapsed(),
            durable: status.durable.filter(|_| !self.flags.one_way),
            ram,
            ..Figures::default()
        }
    }
}
