//! How far a postcopy is at the destination.
//!
//! ```text
//!   None ── ADVISE ─▶ Advised ── DISCARD ─▶ Discarding ── LISTEN ─▶ Listening ── RUN ─▶ Running ── EOF ─▶ Ended
//!                        └───────────── LISTEN ─────────────▲
//!                        └── EOF (a precopy after all) ─▶ Ended
//! ```
//!
//! LISTEN and RUN come in a package: after LISTEN the connection belongs to whoever loads pages, so
//! that nothing else on it could be read any more.
//!
//! Rules: `postcopy.md` §3 of the wire format notes.

use vmferry_stream::{Command, PageSizes};

/// How far a postcopy is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PostcopyState {
    /// There was no word of one.
    #[default]
    None,
    /// One may follow. It is still a precopy.
    Advised,
    /// Pages that were received are discarded.
    Discarding,
    /// Devices are being loaded; pages may be missing.
    Listening,
    /// The guest runs.
    Running,
    /// The stream is over.
    Ended,
}

/// What of postcopy is accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Incoming {
    /// Nothing; says why.
    Refused(&'static str),
    /// Postcopy of dirty bitmaps only: an ADVISE without page sizes.
    Bitmaps,
    /// Postcopy of RAM, which is made of pages of these sizes here.
    Ram(PageSizes),
}

impl PostcopyState {
    /// The state after a command; unchanged by those that are not about postcopy.
    pub(crate) fn after(
        self,
        command: &Command,
        accepted: Incoming,
        in_package: bool,
    ) -> Result<Self, String> {
        match (command, self) {
            (Command::PostcopyAdvise(sizes), Self::None) => {
                check_advise(*sizes, accepted)?;
                Ok(Self::Advised)
            }
            (Command::PostcopyListen | Command::PostcopyRun, _) if !in_package => {
                Err("it must come in a package".into())
            }
            (Command::PostcopyRamDiscard { .. }, Self::Advised | Self::Discarding) => {
                Ok(Self::Discarding)
            }
            (Command::Packaged { .. }, _) if in_package => Err("it came in a package".into()),
            (Command::Packaged { bytes: 0 }, _) => Err("it is empty".into()),
            (Command::Packaged { .. }, Self::Advised | Self::Discarding) => Ok(self),
            (Command::PostcopyListen, Self::Advised | Self::Discarding) => Ok(Self::Listening),
            (Command::PostcopyRun, Self::Listening) => Ok(Self::Running),
            (
                Command::PostcopyAdvise(_)
                | Command::PostcopyRamDiscard { .. }
                | Command::Packaged { .. }
                | Command::PostcopyListen
                | Command::PostcopyRun,
                state,
            ) => Err(format!("it must not come {}", state.when())),
            _ => Ok(self),
        }
    }

    /// In words, after "it must not come".
    fn when(self) -> &'static str {
        match self {
            Self::None => "without POSTCOPY_ADVISE before it",
            Self::Advised => "after POSTCOPY_ADVISE",
            Self::Discarding => "after POSTCOPY_RAM_DISCARD",
            Self::Listening => "after POSTCOPY_LISTEN",
            Self::Running => "after POSTCOPY_RUN",
            Self::Ended => "after the end",
        }
    }
}

fn check_advise(sizes: Option<PageSizes>, accepted: Incoming) -> Result<(), String> {
    match (sizes, accepted) {
        (_, Incoming::Refused(reason)) => Err(reason.into()),
        (None, Incoming::Bitmaps) => Ok(()),
        (None, Incoming::Ram(_)) => Err("it has no page sizes, but postcopy-ram is on here".into()),
        (Some(_), Incoming::Bitmaps) => {
            Err("it has page sizes, but postcopy-ram is off here".into())
        }
        (Some(received), Incoming::Ram(local)) => {
            let pairs = [
                ("page sizes", received.all_bytes, local.all_bytes),
                ("guest page size", received.target_bytes, local.target_bytes),
            ];
            for (what, received, local) in pairs {
                if received != local {
                    return Err(format!("{what} {received:#x}, here {local:#x}"));
                }
            }
            Ok(())
        }
    }
}
