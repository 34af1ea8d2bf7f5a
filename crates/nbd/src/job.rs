//! One request on its way through the disk.

use std::sync::Arc;

use vmferry_disk::{DiskError, Node, ReadPermit, Unmap, WritePermit};

use crate::errno;
use crate::line::{Line, Ticket};
use crate::payload::{Payload, Payloads};
use crate::protocol::{Command, EXTENTS_MAX, Request, request};
use crate::reply::{self, Head, Reply};

/// Most bytes that one `CACHE` request reads ahead; the rest of a longer one is left alone.
const CACHE_BYTES_MAX: u32 = 32 << 20;
const CACHE_STEP_BYTES: u32 = 1 << 20;

/// A request with everything that it needs to run anywhere.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) request: Request,
    pub(crate) work: Work,
    pub(crate) context: Arc<Context>,
    pub(crate) ticket: Ticket,
}

/// What the requests of one connection have in common.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) line: Arc<Line>,
    pub(crate) node: Arc<Node>,
    pub(crate) structured: bool,
    pub(crate) allocation: bool,
    pub(crate) payloads: Arc<Payloads>,
}

/// What there is to do, with the permission to do it.
#[derive(Debug)]
pub(crate) enum Work {
    /// The first bytes may be there already.
    Read {
        permit: ReadPermit,
        payload: Payload,
        filled: usize,
    },
    Write {
        permit: WritePermit,
        payload: Payload,
    },
    WriteZeroes(WritePermit),
    Trim(WritePermit),
    Status(ReadPermit),
    Cache,
    Flush,
}

impl Job {
    pub(crate) fn line(&self) -> Arc<Line> {
        Arc::clone(&self.context.line)
    }

    /// Do it and answer.
    pub(crate) fn run(self) {
        let Self {
            request,
            work,
            context,
            ticket,
        } = self;
        let reply = match perform(&request, work, &context) {
            Ok(Answer::Done) => Reply::new(Head::of_success(&request), Payload::EMPTY, ticket),
            Ok(Answer::Data(data)) => {
                Reply::new(Head::of_read(&request, context.structured), data, ticket)
            }
            Ok(Answer::Extents(extents)) => {
                let bytes = reply::block_status(&request, &extents);
                Reply::ready(Payload::Owned(bytes), ticket)
            }
            Err(error) => {
                let bytes = disk_failure(&request, &context, &error);
                Reply::ready(Payload::Owned(bytes), ticket)
            }
        };
        context.line.reply(reply);
    }
}

/// The bytes of the reply that reports this error; the log hears of it, too.
pub(crate) fn disk_failure(request: &Request, context: &Context, error: &DiskError) -> Vec<u8> {
    let errno = errno::of_disk_error(error);
    tracing::debug!(
        disk = context.node.name(),
        command = %request.command,
        %error,
        "request failed"
    );
    reply::failure(request, context.structured, errno, &error.to_string())
}

enum Answer {
    Done,
    Data(Payload),
    Extents(Vec<(u32, u32)>),
}

fn perform(request: &Request, work: Work, context: &Context) -> Result<Answer, DiskError> {
    match work {
        Work::Read {
            permit,
            mut payload,
            filled,
        } => {
            let rest = payload.bytes_mut().get_mut(filled..).unwrap_or(&mut []);
            permit.read_rest(filled as u64, rest)?;
            return Ok(Answer::Data(payload));
        }
        Work::Write { permit, payload } => permit.write(payload.bytes())?,
        Work::WriteZeroes(permit) => {
            let unmap = if request.has(request::NO_HOLE) {
                Unmap::Never
            } else {
                Unmap::May
            };
            permit.write_zeroes(unmap, request.has(request::FAST_ZERO))?;
        }
        Work::Trim(permit) => match permit.discard() {
            // A hint that the backend cannot use.
            Err(error) if error.source.kind() == std::io::ErrorKind::Unsupported => {}
            result => result?,
        },
        Work::Status(permit) => return block_status(request, &permit).map(Answer::Extents),
        Work::Cache => read_ahead(request, context)?,
        Work::Flush => context.node.flush()?,
    }
    if request.has(request::FUA) && is_write(request.command) {
        context.node.flush()?;
    }
    Ok(Answer::Done)
}

/// Does the command change the disk?
pub(crate) fn is_write(command: Command) -> bool {
    matches!(
        command,
        Command::WRITE | Command::WRITE_ZEROES | Command::TRIM
    )
}

fn block_status(request: &Request, permit: &ReadPermit) -> Result<Vec<(u32, u32)>, DiskError> {
    let mut extents: Vec<(u32, u32)> = Vec::new();
    let mut done = 0u32;
    while let Some(left) = request.length.checked_sub(done).filter(|left| *left > 0) {
        let extent = permit.status(u64::from(done), u64::from(left))?;
        let length = u32::try_from(extent.length).unwrap_or(left).clamp(1, left);
        let flags = reply::allocation_flags(extent);
        let full = request.has(request::REQ_ONE) || extents.len() == EXTENTS_MAX;
        match extents.last_mut() {
            Some((last, same)) if *same == flags => *last = last.saturating_add(length),
            Some(_) if full => break,
            _ => extents.push((length, flags)),
        }
        done = done.saturating_add(length);
    }
    Ok(extents)
}

/// Read a range for the sake of the page cache. A hold that comes in between ends it: it is a hint.
fn read_ahead(request: &Request, context: &Context) -> Result<(), DiskError> {
    let wanted = request.length.min(CACHE_BYTES_MAX);
    let mut done = 0u32;
    while let Some(left) = wanted.checked_sub(done).filter(|left| *left > 0) {
        let step = left.min(CACHE_STEP_BYTES);
        let offset = request.offset.saturating_add(u64::from(done));
        let Ok(permit) = context.node.begin_read(offset, u64::from(step)) else {
            return Ok(());
        };
        let mut scratch = context.payloads.take(step as usize);
        permit.read(scratch.bytes_mut())?;
        done = done.saturating_add(step);
    }
    Ok(())
}
