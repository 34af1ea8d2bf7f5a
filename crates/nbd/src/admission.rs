//! Which requests make sense, what they cost, and what their node says to them.

use vmferry_disk::Refusal;

use crate::errno;
use crate::job::{Context, Work, is_write};
use crate::payload::Payload;
use crate::protocol::{Command, Errno, PAYLOAD_BYTES_MAX, Request, request};

/// What a request counts at least, in bytes, in every budget.
const REQUEST_COST_MIN: u64 = 512;

/// What a request of this many bytes counts in budgets.
pub(crate) fn cost(bytes: usize) -> u64 {
    (bytes as u64).max(REQUEST_COST_MIN)
}

/// Is the request one that makes sense on this disk, whatever is held?
pub(crate) fn check(request: &Request, context: &Context) -> Result<(), Errno> {
    let limits = context.node.limits();
    let allowed = match request.command {
        Command::READ if context.structured => request::DF,
        Command::READ | Command::WRITE | Command::TRIM | Command::CACHE => 0,
        Command::FLUSH => 0,
        Command::WRITE_ZEROES => request::NO_HOLE | request::FAST_ZERO,
        Command::BLOCK_STATUS => request::REQ_ONE,
        _ => return Err(Errno::EINVAL),
    };
    if request.flags & !(allowed | request::FUA) != 0 {
        return Err(Errno::EINVAL);
    }
    let payload = matches!(request.command, Command::READ | Command::WRITE);
    if payload && request.length > PAYLOAD_BYTES_MAX {
        return Err(Errno::EINVAL);
    }
    if request.command == Command::BLOCK_STATUS && (!context.allocation || request.length == 0) {
        return Err(Errno::EINVAL);
    }
    if is_write(request.command) && limits.read_only {
        return Err(Errno::EPERM);
    }
    let end = request.offset.checked_add(u64::from(request.length));
    if request.command != Command::FLUSH && end.is_none_or(|end| end > limits.length) {
        return errno::of_refusal(Refusal::PastEnd, request.command).map_or(Ok(()), Err);
    }
    Ok(())
}

/// Ask the node; the payload comes back if it says no.
pub(crate) fn permitted(
    context: &Context,
    request: &Request,
    payload: Payload,
) -> Result<Work, (Refusal, Payload)> {
    let node = &context.node;
    let (offset, length) = (request.offset, u64::from(request.length));
    let write = || node.begin_write(offset, length);
    let work: Result<Work, Refusal> = match request.command {
        Command::WRITE => {
            return match write() {
                Ok(permit) => Ok(Work::Write { permit, payload }),
                Err(refusal) => Err((refusal, payload)),
            };
        }
        Command::READ => node.begin_read(offset, length).map(|permit| Work::Read {
            permit,
            payload: context.payloads.take(request.length as usize),
            filled: 0,
        }),
        Command::WRITE_ZEROES => write().map(Work::WriteZeroes),
        Command::TRIM => write().map(Work::Trim),
        Command::BLOCK_STATUS => node.begin_read(offset, length).map(Work::Status),
        Command::CACHE => node.begin_read(offset, length).map(|_| Work::Cache),
        // A flush is never held, but a disk that has left must not pretend.
        _ if node.held().is_none() => Err(Refusal::Departed),
        _ => Ok(Work::Flush),
    };
    work.map_err(|refusal| (refusal, payload))
}
