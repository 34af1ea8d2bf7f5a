//! How much to say on standard error while a command works.

use clap::{ArgAction, Args, ValueEnum};
use tracing::level_filters::LevelFilter;

/// Options that every command takes.
#[derive(Args, Clone, Copy, Debug, Default)]
#[command(next_help_heading = "Logging")]
pub(crate) struct LogFlags {
    /// Log what is at least this important (default: warn)
    #[arg(long, value_name = "LEVEL", global = true, conflicts_with_all = ["verbose", "quiet"])]
    pub(crate) log_level: Option<LogLevel>,
    /// Log more: -v tells what happens, -vv in detail, -vvv everything
    #[arg(short, long, global = true, action = ArgAction::Count, conflicts_with = "quiet")]
    pub(crate) verbose: u8,
    /// Log errors only
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
}

/// How important a line of the log must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogLevel {
    Off,
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl LogFlags {
    pub(crate) fn filter(self) -> LevelFilter {
        match (self.log_level, self.quiet, self.verbose) {
            (Some(LogLevel::Off), ..) => LevelFilter::OFF,
            (Some(LogLevel::Error), ..) | (None, true, _) => LevelFilter::ERROR,
            (Some(LogLevel::Warn), ..) | (None, _, 0) => LevelFilter::WARN,
            (Some(LogLevel::Info), ..) | (None, _, 1) => LevelFilter::INFO,
            (Some(LogLevel::Debug), ..) | (None, _, 2) => LevelFilter::DEBUG,
            (Some(LogLevel::Trace), ..) | (None, ..) => LevelFilter::TRACE,
        }
    }

    /// The options that make another process of this program as talkative as this one.
    pub(crate) fn passed_on(self) -> String {
        format!("--log-level={}", self.filter())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_unless_told_otherwise() {
        let of = |verbose, quiet, log_level| {
            LogFlags {
                log_level,
                verbose,
                quiet,
            }
            .filter()
        };
        assert_eq!(of(0, false, None), LevelFilter::WARN);
        assert_eq!(of(0, true, None), LevelFilter::ERROR);
        assert_eq!(of(1, false, None), LevelFilter::INFO);
        assert_eq!(of(2, false, None), LevelFilter::DEBUG);
        assert_eq!(of(9, false, None), LevelFilter::TRACE);
        assert_eq!(of(0, false, Some(LogLevel::Off)), LevelFilter::OFF);
    }

    #[test]
    fn what_is_passed_on_is_understood() {
        for level in LogLevel::value_variants() {
            let flags = LogFlags {
                log_level: Some(*level),
                ..LogFlags::default()
            };
            let text = flags.passed_on();
            let value = text.strip_prefix("--log-level=").unwrap();
            assert_eq!(LogLevel::from_str(value, false), Ok(*level));
        }
    }
}
