//! Keeps what nobody waits for from standing in the way of requested pages.
//!
//! A page that the guest waits for comes behind everything that is under way already. So of the rest of
//! its memory only so much may be under way as the line needs to be busy: what lies before a PING that
//! was not answered. How much that is nobody knows; it is found out by the answers.
//!
//! ```text
//!   answers come as quickly as ever  ─▶ nothing waits on the way: more
//!   answers come late                ─▶ a queue, in a buffer or before the destination's thread: less
//! ```

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// That much may always be under way. A destination places it in 50 µs, if it has memory at hand.
const WINDOW_BYTES_MIN: u64 = 64 << 10;
/// More than this is never under way: 10 Gbit/s over 25 ms.
const WINDOW_BYTES_MAX: u64 = 32 << 20;
/// A PING is sent behind so many bytes.
const PING_BYTES: u64 = 64 << 10;
/// The window grows and shrinks by this much with each answer.
const STEP_BYTES: u64 = 32 << 10;
/// Whenever the window is shut, a PING is under way whose answer opens it.
const _: () = assert!(PING_BYTES <= WINDOW_BYTES_MIN);
/// An answer that comes so quickly is never late.
const QUICK: Duration = Duration::from_micros(100);

/// Values of these PINGs: none of a precopy's, nor any that means something.
const FIRST_VALUE: u32 = 0x2000_0000;
const VALUES: u32 = 0x1000_0000;

/// How much may be under way on one connection. Bytes are those of the memory: what was sent is placed,
/// however short it was on the wire.
#[derive(Debug)]
pub(crate) struct Pace {
    window_bytes: u64,
    /// Those that were not answered, in order.
    pings: VecDeque<Ping>,
    next_value: u32,
    /// What was sent when the last PING was, and when the last answered one was.
    pinged_bytes: u64,
    answered_bytes: u64,
    quickest: Duration,
}

#[derive(Debug)]
struct Ping {
    value: u32,
    sent_at: Instant,
    /// Sent before it.
    sent_bytes: u64,
}

impl Pace {
    /// So many bytes were sent before, on whatever connection.
    pub(crate) fn new(sent_bytes: u64) -> Self {
        Self {
            window_bytes: WINDOW_BYTES_MIN,
            pings: VecDeque::new(),
            next_value: 0,
            pinged_bytes: sent_bytes,
            answered_bytes: sent_bytes,
            quickest: Duration::MAX,
        }
    }

    /// May more be sent that nobody waits for?
    pub(crate) fn is_open(&self, sent_bytes: u64) -> bool {
        sent_bytes.saturating_sub(self.answered_bytes) < self.window_bytes
    }

    /// The value of a PING that is to be sent now, if one is.
    pub(crate) fn next_ping(&mut self, sent_bytes: u64, now: Instant) -> Option<u32> {
        if sent_bytes.saturating_sub(self.pinged_bytes) < PING_BYTES {
            return None;
        }
        let value = FIRST_VALUE + self.next_value;
        self.next_value = (self.next_value + 1) % VALUES;
        self.pinged_bytes = sent_bytes;
        self.pings.push_back(Ping {
            value,
            sent_at: now,
            sent_bytes,
        });
        Some(value)
    }

    /// The destination has answered this PING, and so all before it.
    pub(crate) fn pong(&mut self, value: u32, at: Instant) {
        if !self.pings.iter().any(|ping| ping.value == value) {
            return;
        }
        while let Some(ping) = self.pings.pop_front() {
            self.answered_bytes = ping.sent_bytes;
            if ping.value == value {
                self.answered_after(at.saturating_duration_since(ping.sent_at));
                break;
            }
        }
    }

    fn answered_after(&mut self, delay: Duration) {
        self.quickest = self.quickest.min(delay);
        let window = match delay <= QUICK.max(self.quickest * 2) {
            true => self.window_bytes + STEP_BYTES,
            false => self.window_bytes.saturating_sub(STEP_BYTES),
        };
        self.window_bytes = window.clamp(WINDOW_BYTES_MIN, WINDOW_BYTES_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Send for `time` over a line with that delay there and back, behind which a destination takes so
    /// many bytes per microsecond. Gives bytes that were taken, and the most that were under way in the
    /// second half.
    fn run(delay: Duration, bytes_per_us: u64, time: Duration) -> (u64, u64) {
        let (start, part) = (Instant::now(), 32 << 10);
        let (mut pace, mut sent, mut taken, mut most) = (Pace::new(0), 0, 0, 0);
        let mut answers = VecDeque::new();
        let mut pending = VecDeque::new();
        for us in 0..time.as_micros() as u64 {
            let now = start + Duration::from_micros(us);
            while pace.is_open(sent) {
                sent += part;
                pending.extend(pace.next_ping(sent, now).map(|value| (value, sent)));
            }
            taken = sent.min(taken + bytes_per_us);
            while pending.front().is_some_and(|(_, bytes)| *bytes <= taken) {
                let (value, _) = pending.pop_front().expect("it is there");
                answers.push_back((value, now + delay));
            }
            while answers.front().is_some_and(|(_, at)| *at <= now) {
                let (value, at) = answers.pop_front().expect("it is there");
                pace.pong(value, at);
            }
            if us > time.as_micros() as u64 / 2 {
                most = most.max(sent - taken);
            }
        }
        (taken, most)
    }

    #[test]
    fn little_waits_before_a_destination_that_is_near() {
        for bytes_per_us in [100, 1000, 3000] {
            let time = Duration::from_millis(50);
            let (taken, most) = run(Duration::from_micros(30), bytes_per_us, time);
            let possible = bytes_per_us * time.as_micros() as u64;
            assert!(taken * 10 >= possible * 9, "{taken} of {possible}");
            // What it takes a quarter of a millisecond to place.
            let most_allowed = (4 * WINDOW_BYTES_MIN).max(bytes_per_us * 250);
            assert!(most <= most_allowed, "{bytes_per_us}: {most}");
        }
    }

    #[test]
    fn a_long_line_is_busy_all_the_same() {
        // 1 Gbit/s and 10 Gbit/s over 20 ms.
        for bytes_per_us in [125, 1250] {
            let time = Duration::from_secs(2);
            let (taken, most) = run(Duration::from_millis(20), bytes_per_us, time);
            let possible = bytes_per_us * time.as_micros() as u64;
            assert!(taken * 10 >= possible * 7, "{taken} of {possible}");
            assert!(
                most <= WINDOW_BYTES_MAX + PING_BYTES,
                "{bytes_per_us}: {most}"
            );
        }
    }

    #[test]
    fn foreign_answers_change_nothing() {
        let now = Instant::now();
        let mut pace = Pace::new(1000);
        assert_eq!(pace.next_ping(1000 + PING_BYTES - 1, now), None);
        let first = pace.next_ping(1000 + PING_BYTES, now).expect("it is due");
        let sent = 1000 + WINDOW_BYTES_MIN;
        assert!(pace.is_open(sent - 1));
        assert!(!pace.is_open(sent));
        for value in [0, 1, first - 1, first + 1, u32::MAX] {
            pace.pong(value, now);
        }
        assert!(!pace.is_open(sent));
        pace.pong(first, now);
        assert!(pace.is_open(sent));
        // Once is enough.
        let window = pace.window_bytes;
        pace.pong(first, now);
        assert_eq!(pace.window_bytes, window);
    }
}
