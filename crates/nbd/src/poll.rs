//! Waiting, always together with the event of the connection's [`Line`].

use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno as Os;
use vmferry_channel::Stop;

use crate::line::Line;

/// Wait for the socket, the line's event, the stop event or the deadline. What the socket is
/// ready for.
pub(crate) fn wait(
    line: &Line,
    events: PollFlags,
    stop: Option<&Stop>,
    deadline: Option<Instant>,
) -> rustix::io::Result<PollFlags> {
    let wake = PollFd::from_borrowed_fd(line.wake_event(), PollFlags::IN);
    let socket = PollFd::from_borrowed_fd(line.socket(), events);
    let fds = match stop {
        Some(stop) => &mut [socket, wake, PollFd::new(stop, PollFlags::IN)][..],
        None => &mut [socket, wake][..],
    };
    poll_until(fds, deadline)?;
    let ready = |index: usize| fds.get(index).map_or(PollFlags::empty(), PollFd::revents);
    if ready(1).contains(PollFlags::IN) {
        line.empty_event();
    }
    Ok(ready(0))
}

/// The same without the socket, which is closed.
pub(crate) fn wait_for_event(line: &Line, deadline: Option<Instant>) -> rustix::io::Result<()> {
    let mut fds = [PollFd::from_borrowed_fd(line.wake_event(), PollFlags::IN)];
    poll_until(&mut fds, deadline)?;
    line.empty_event();
    Ok(())
}

/// `poll` with a deadline; being interrupted counts as being woken.
pub(crate) fn poll_until(
    fds: &mut [PollFd<'_>],
    deadline: Option<Instant>,
) -> rustix::io::Result<()> {
    let timeout = deadline
        .map(|deadline| deadline.saturating_duration_since(Instant::now()))
        .and_then(|patience| Timespec::try_from(patience).ok());
    match poll(fds, timeout.as_ref()) {
        Ok(_) | Err(Os::INTR) => Ok(()),
        Err(error) => Err(error),
    }
}
