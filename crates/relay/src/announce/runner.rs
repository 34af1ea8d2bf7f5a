//! A thread that carries announcements out.

use std::fmt;
use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use super::agenda::{Agenda, Announcement, Occasion, TooMany};
use super::frame::{Frame, MacAddress, rarp_request};

/// A NIC that can announce itself.
pub trait Announcer: fmt::Debug + Send {
    /// What it is called where announcements name their NICs. Need not be unique: all of one name
    /// take part.
    fn name(&self) -> &str;

    /// Its address, which the network is to learn.
    fn mac(&self) -> MacAddress;

    /// Send a frame towards the network. Must not wait.
    ///
    /// # Errors
    /// What the host says. The next round tries again.
    fn send(&self, frame: &Frame) -> io::Result<()>;
}

/// NICs, and a thread that announces them. Dropping it ends what is under way.
#[derive(Debug)]
pub struct Announcements {
    agenda: Arc<Mutex<Agenda>>,
    /// One place is enough: who finds it full knows that the thread will look again anyway. Gone
    /// once the thread has to end.
    wake: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Announcements {
    /// Start the thread. Without NICs announcements have nothing to send, and that is no error.
    ///
    /// # Errors
    /// The host has no thread left.
    pub fn start(nics: Vec<Box<dyn Announcer>>) -> io::Result<Self> {
        let (wake, woken) = sync_channel(1);
        let agenda = Arc::<Mutex<Agenda>>::default();
        let shared = Arc::clone(&agenda);
        let nics = nics.into_iter().map(Nic::new).collect();
        let thread = std::thread::Builder::new()
            .name("announce".to_owned())
            .spawn(move || run(nics, &shared, &woken))?;
        Ok(Self {
            agenda,
            wake: Some(wake),
            thread: Some(thread),
        })
    }

    /// Begin an announcement: all its NICs send their frame now, and again as its parameters say.
    /// One with the same occasion that is under way ends.
    ///
    /// # Errors
    /// Too many others are under way.
    pub fn begin(&self, occasion: Occasion, announcement: Announcement) -> Result<(), TooMany> {
        lock(&self.agenda).begin(occasion, announcement, Instant::now())?;
        if let Some(wake) = &self.wake {
            // Full is fine, see there; closed it is only if the thread has panicked.
            let _ = wake.try_send(());
        }
        Ok(())
    }
}

impl Drop for Announcements {
    fn drop(&mut self) {
        self.wake = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn lock(agenda: &Mutex<Agenda>) -> MutexGuard<'_, Agenda> {
    agenda.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for the next round, or for somebody who has begun an announcement, until there is nobody
/// who could.
fn run(mut nics: Vec<Nic>, agenda: &Mutex<Agenda>, woken: &Receiver<()>) {
    loop {
        let now = Instant::now();
        let (rounds, next) = {
            let mut agenda = lock(agenda);
            (agenda.take_due(now), agenda.next())
        };
        for round in rounds {
            for nic in nics
                .iter_mut()
                .filter(|nic| round.includes(nic.announcer.name()))
            {
                nic.announce();
            }
        }
        let open = match next {
            Some(next) => {
                let patience = next.saturating_duration_since(Instant::now());
                woken.recv_timeout(patience) != Err(RecvTimeoutError::Disconnected)
            }
            None => woken.recv().is_ok(),
        };
        if !open {
            return;
        }
    }
}

struct Nic {
    announcer: Box<dyn Announcer>,
    frame: Frame,
    /// The last round could not be sent, which was said.
    failing: bool,
}

impl Nic {
    fn new(announcer: Box<dyn Announcer>) -> Self {
        Self {
            frame: rarp_request(announcer.mac()),
            announcer,
            failing: false,
        }
    }

    fn announce(&mut self) {
        let (nic, mac) = (self.announcer.name(), self.announcer.mac());
        match self.announcer.send(&self.frame) {
            Ok(()) => {
                self.failing = false;
                tracing::debug!(nic, %mac, "announced");
            }
            Err(error) if !self.failing => {
                self.failing = true;
                tracing::warn!(nic, %mac, %error, "the guest cannot be announced to the network");
            }
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};
    use std::time::Duration;

    use super::*;
    use crate::announce::Parameters;

    /// How long a round may take that is due at once, on a loaded machine.
    const PATIENCE: Duration = Duration::from_secs(60);

    #[derive(Debug)]
    struct Wire {
        name: &'static str,
        mac: MacAddress,
        sent: Sender<(&'static str, Frame)>,
        broken: bool,
    }

    impl Announcer for Wire {
        fn name(&self) -> &str {
            self.name
        }

        fn mac(&self) -> MacAddress {
            self.mac
        }

        fn send(&self, frame: &Frame) -> io::Result<()> {
            // The test may have seen enough.
            let _ = self.sent.send((self.name, *frame));
            match self.broken {
                false => Ok(()),
                true => Err(io::ErrorKind::NetworkDown.into()),
            }
        }
    }

    fn nics(broken: bool) -> (Announcements, Receiver<(&'static str, Frame)>) {
        let (sent, received) = channel();
        let nic = |name, mac: &str, broken| -> Box<dyn Announcer> {
            let (mac, sent) = (mac.parse().unwrap(), sent.clone());
            Box::new(Wire {
                name,
                mac,
                sent,
                broken,
            })
        };
        let nics = vec![
            nic("a", "02:00:00:00:00:0a", broken),
            nic("b", "02:00:00:00:00:0b", false),
        ];
        (Announcements::start(nics).unwrap(), received)
    }

    fn of(nic: &str, initial: u64, rounds: u64) -> Announcement {
        Announcement {
            parameters: Parameters::new(initial, 100_000, rounds, 1).unwrap(),
            nics: Some(vec![nic.to_owned()]),
        }
    }

    #[test]
    fn each_round_sends_the_frame_of_each_nic() {
        for broken in [false, true] {
            let (announcements, received) = nics(broken);
            let all = Announcement {
                nics: None,
                ..of("", 1, 3)
            };
            announcements.begin(Occasion::Arrival, all).unwrap();
            for _ in 0..3 {
                for (name, mac) in [("a", "02:00:00:00:00:0a"), ("b", "02:00:00:00:00:0b")] {
                    let frame = rarp_request(mac.parse().unwrap());
                    assert_eq!(received.recv_timeout(PATIENCE), Ok((name, frame)));
                }
            }
            drop(announcements);
            assert!(received.recv().is_err(), "more than three rounds");
        }
    }

    #[test]
    fn a_new_one_is_heard_while_the_thread_waits_for_a_late_round() {
        let (announcements, received) = nics(false);
        let name = || received.recv_timeout(PATIENCE).map(|(name, _)| name);
        let begin = |occasion: &str, announcement| {
            let occasion = Occasion::Asked(occasion.to_owned());
            announcements.begin(occasion, announcement).unwrap();
        };
        begin("", of("a", 100_000, 1000));
        assert_eq!(name(), Ok("a"));
        begin("", of("b", 100_000, 1000));
        assert_eq!(name(), Ok("b"));
        begin("other", of("a", 1, 2));
        assert_eq!((name(), name()), (Ok("a"), Ok("a")));
        // Does not wait for the rounds that are far away.
        drop(announcements);
        assert!(received.recv().is_err());
    }
}
