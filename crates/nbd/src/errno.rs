//! What went wrong on the disk, in NBD's words.

use std::io;

use rustix::io::Errno as Os;
use vmferry_disk::{DiskError, Refusal};

use crate::protocol::{Command, Errno};

/// The error number that tells a client about a failed disk operation.
#[must_use]
pub fn of_disk_error(error: &DiskError) -> Errno {
    if error.source.kind() == io::ErrorKind::Unsupported {
        return Errno::ENOTSUP;
    }
    match Os::from_io_error(&error.source) {
        Some(Os::NOSPC | Os::DQUOT | Os::FBIG) => Errno::ENOSPC,
        Some(Os::PERM | Os::ACCESS | Os::ROFS) => Errno::EPERM,
        Some(Os::OPNOTSUPP) => Errno::ENOTSUP,
        Some(Os::INVAL) => Errno::EINVAL,
        Some(Os::NOMEM) => Errno::ENOMEM,
        Some(Os::OVERFLOW) => Errno::EOVERFLOW,
        Some(Os::SHUTDOWN) => Errno::ESHUTDOWN,
        _ => Errno::EIO,
    }
}

/// The error number for a request that a node refuses for good; `None` if it is not to be
/// answered: it waits (`Held`) or its connection ends (`Departed`).
#[must_use]
pub fn of_refusal(refusal: Refusal, command: Command) -> Option<Errno> {
    match refusal {
        Refusal::Held | Refusal::Departed => None,
        Refusal::ReadOnly => Some(Errno::EPERM),
        Refusal::PastEnd => Some(match command {
            Command::WRITE | Command::WRITE_ZEROES => Errno::ENOSPC,
            _ => Errno::EINVAL,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk_error(source: io::Error) -> DiskError {
        DiskError {
            operation: "write",
            offset: 0,
            length: 1,
            source,
        }
    }

    #[test]
    fn disk_errors_keep_their_meaning() {
        for (os, errno) in [
            (Os::NOSPC, Errno::ENOSPC),
            (Os::DQUOT, Errno::ENOSPC),
            (Os::ROFS, Errno::EPERM),
            (Os::OPNOTSUPP, Errno::ENOTSUP),
            (Os::OVERFLOW, Errno::EOVERFLOW),
            (Os::IO, Errno::EIO),
            (Os::NODEV, Errno::EIO),
        ] {
            assert_eq!(of_disk_error(&disk_error(os.into())), errno, "{os:?}");
        }
        let unsupported = disk_error(io::ErrorKind::Unsupported.into());
        assert_eq!(of_disk_error(&unsupported), Errno::ENOTSUP);
        let short = disk_error(io::ErrorKind::UnexpectedEof.into());
        assert_eq!(of_disk_error(&short), Errno::EIO);
    }

    #[test]
    fn only_final_refusals_are_answered() {
        assert_eq!(of_refusal(Refusal::Held, Command::WRITE), None);
        assert_eq!(of_refusal(Refusal::Departed, Command::WRITE), None);
        assert_eq!(
            of_refusal(Refusal::PastEnd, Command::WRITE),
            Some(Errno::ENOSPC)
        );
        assert_eq!(
            of_refusal(Refusal::PastEnd, Command::READ),
            Some(Errno::EINVAL)
        );
        assert_eq!(
            of_refusal(Refusal::ReadOnly, Command::TRIM),
            Some(Errno::EPERM)
        );
    }
}
