//! Which announcements are under way.

use std::time::Instant;

use super::schedule::{Parameters, Schedule};

/// Most announcements that may be under way at the same time.
pub const ANNOUNCEMENTS_MAX: usize = 16;

/// Why there is an announcement. One that begins while another with the same occasion is under way
/// takes its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Occasion {
    /// A guest has arrived.
    Arrival,
    /// Somebody has asked for it, under this name. None given is the empty name.
    Asked(String),
}

/// Which NICs, and when.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Announcement {
    /// When.
    pub parameters: Parameters,
    /// Only the NICs of these names: others, and none at all, are no error. `None` is all NICs.
    pub nics: Option<Vec<String>>,
}

/// No further announcement can begin before one ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{ANNOUNCEMENTS_MAX} announcements are under way, and no more are possible")]
pub struct TooMany;

/// The announcements that are under way, on somebody else's clock.
#[derive(Debug, Default)]
pub struct Agenda {
    running: Vec<Running>,
}

#[derive(Debug)]
struct Running {
    occasion: Occasion,
    nics: Option<Vec<String>>,
    schedule: Schedule,
}

impl Agenda {
    /// Begin an announcement, whose first round is due now. One with the same occasion ends, also if
    /// the new one has no rounds at all.
    ///
    /// # Errors
    /// [`ANNOUNCEMENTS_MAX`] others are under way.
    pub fn begin(
        &mut self,
        occasion: Occasion,
        announcement: Announcement,
        now: Instant,
    ) -> Result<(), TooMany> {
        self.running.retain(|running| running.occasion != occasion);
        let schedule = Schedule::new(announcement.parameters, now);
        if schedule.next().is_none() {
            return Ok(());
        }
        if self.running.len() >= ANNOUNCEMENTS_MAX {
            return Err(TooMany);
        }
        self.running.push(Running {
            occasion,
            nics: announcement.nics,
            schedule,
        });
        Ok(())
    }

    /// When somebody has to look again; `None` if nothing is under way.
    #[must_use]
    pub fn next(&self) -> Option<Instant> {
        let schedules = self.running.iter().map(|running| &running.schedule);
        schedules.filter_map(Schedule::next).min()
    }

    /// The rounds that are due now, each as the question whether a NIC of this name takes part.
    pub fn take_due(&mut self, now: Instant) -> Vec<Round> {
        let mut rounds = Vec::new();
        for running in &mut self.running {
            if running.schedule.take(now) {
                rounds.push(Round(running.nics.clone()));
            }
        }
        self.running
            .retain(|running| running.schedule.next().is_some());
        rounds
    }
}

/// One round of an announcement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Round(Option<Vec<String>>);

impl Round {
    /// Whether the NIC of this name announces itself.
    #[must_use]
    pub fn includes(&self, nic: &str) -> bool {
        self.0
            .as_ref()
            .is_none_or(|names| names.iter().any(|name| name == nic))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn asked(name: &str) -> Occasion {
        Occasion::Asked(name.to_owned())
    }

    fn of(nics: &[&str]) -> Announcement {
        Announcement {
            nics: Some(nics.iter().map(|&nic| nic.to_owned()).collect()),
            ..Announcement::default()
        }
    }

    /// A clock, and an agenda on it.
    struct Driver {
        start: Instant,
        agenda: Agenda,
    }

    impl Driver {
        fn new() -> Self {
            Self {
                start: Instant::now(),
                agenda: Agenda::default(),
            }
        }

        fn begin(&mut self, at_ms: u64, occasion: Occasion, announcement: Announcement) {
            let now = self.start + Duration::from_millis(at_ms);
            self.agenda.begin(occasion, announcement, now).unwrap();
        }

        /// Who announces itself, and when, up to a moment.
        fn run(&mut self, until_ms: u128) -> Vec<(u128, String)> {
            let mut sent = Vec::new();
            while let Some(next) = self.agenda.next() {
                let at_ms = (next - self.start).as_millis();
                if at_ms > until_ms {
                    break;
                }
                for round in self.agenda.take_due(next) {
                    let nics = ["a", "b"].into_iter().filter(|nic| round.includes(nic));
                    sent.push((at_ms, nics.collect()));
                }
            }
            sent
        }
    }

    fn sent(rounds: &[(u128, &str)]) -> Vec<(u128, String)> {
        let rounds = rounds.iter();
        rounds.map(|&(at, nics)| (at, nics.to_owned())).collect()
    }

    const END: u128 = 100_000;

    #[test]
    fn all_nics_take_part_unless_some_are_named() {
        for (announcement, nics) in [
            (Announcement::default(), "ab"),
            (of(&["b"]), "b"),
            (of(&["b", "none", "a"]), "ab"),
            (of(&["none"]), ""),
            (of(&[]), ""),
        ] {
            let mut driver = Driver::new();
            driver.begin(0, Occasion::Arrival, announcement);
            let times = [0, 50, 200, 450, 800];
            assert_eq!(driver.run(END), sent(&times.map(|at| (at, nics))));
            assert_eq!(driver.agenda.next(), None);
        }
    }

    #[test]
    fn another_with_the_same_name_takes_the_place_of_the_first() {
        let mut driver = Driver::new();
        driver.begin(0, asked(""), of(&["a"]));
        assert_eq!(driver.run(100), sent(&[(0, "a"), (50, "a")]));
        driver.begin(100, asked(""), of(&["b"]));
        let times = [100, 150, 300, 550, 900];
        assert_eq!(driver.run(END), sent(&times.map(|at| (at, "b"))));
    }

    #[test]
    fn others_go_on_beside_it() {
        let mut driver = Driver::new();
        driver.begin(0, asked("x"), of(&["a"]));
        driver.begin(60, asked("y"), of(&["b"]));
        driver.begin(70, Occasion::Arrival, of(&["a", "b"]));
        let at = |nics: &str, rounds: &[(u128, String)]| -> Vec<u128> {
            let rounds = rounds.iter().filter(|(_, sent)| sent == nics);
            rounds.map(|&(at, _)| at).collect()
        };
        let rounds = driver.run(END);
        // The second round of the first came late: it waited for nobody else.
        assert_eq!(at("a", &rounds), [0, 50, 200, 450, 800]);
        assert_eq!(at("b", &rounds), [60, 110, 260, 510, 860]);
        assert_eq!(at("ab", &rounds), [70, 120, 270, 520, 870]);
    }

    #[test]
    fn no_rounds_end_what_was_under_way() {
        let none = Announcement {
            parameters: Parameters::new(50, 550, 0, 100).unwrap(),
            nics: None,
        };
        let mut driver = Driver::new();
        driver.begin(0, asked(""), of(&["a"]));
        driver.begin(0, asked("other"), of(&["b"]));
        assert_eq!(driver.run(0), sent(&[(0, "a"), (0, "b")]));
        driver.begin(1, asked(""), none);
        assert_eq!(driver.run(50), sent(&[(50, "b")]));
    }

    #[test]
    fn so_many_and_no_more_at_the_same_time() {
        let mut driver = Driver::new();
        for number in 0..ANNOUNCEMENTS_MAX {
            driver.begin(0, asked(&number.to_string()), of(&["a"]));
        }
        let now = driver.start;
        let more = driver
            .agenda
            .begin(asked("one more"), Announcement::default(), now);
        assert_eq!(more, Err(TooMany));
        // Who takes another's place needs none.
        driver.begin(0, asked("3"), of(&["b"]));
        assert_eq!(driver.run(END).len(), 5 * ANNOUNCEMENTS_MAX);
        driver.begin(0, asked("one more"), of(&["b"]));
    }
}
