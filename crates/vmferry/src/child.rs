//! Processes that we have started.

use std::process::Child;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use crate::signals::timespec;

/// Wait at most `patience` for the process to end. It still has to be waited for.
pub(crate) fn ends_within(child: &Child, patience: Duration) -> bool {
    let Some(Ok(end)) = pid(child).map(|pid| pidfd_open(pid, PidfdFlags::empty())) else {
        return true;
    };
    let deadline = Instant::now() + patience;
    loop {
        let left = timespec(deadline.saturating_duration_since(Instant::now()));
        match poll(&mut [PollFd::new(&end, PollFlags::IN)], Some(&left)) {
            Ok(ended) => return ended > 0,
            Err(Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

/// Send it SIGTERM.
pub(crate) fn tell_to_end(child: &Child) {
    if let Some(pid) = pid(child) {
        // It may have ended just now, which is as well.
        let _ = kill_process(pid, Signal::TERM);
    }
}

fn pid(child: &Child) -> Option<Pid> {
    i32::try_from(child.id()).ok().and_then(Pid::from_raw)
}
