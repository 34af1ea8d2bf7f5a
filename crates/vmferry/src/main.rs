//! The `vmferry` program: live migration for virtual machines and their disks.

#![forbid(unsafe_code)]

mod activation;
mod child;
mod commands;
mod disks;
mod exit;
mod flags;
mod output;
mod records;
mod render;
mod signals;

use std::io::{self, IsTerminal};
use std::process::ExitCode;

use clap::Parser;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::EnvFilter;

use exit::{Exit, Failure};
use flags::{Cli, Command, LogFlags};

fn main() -> ExitCode {
    let cli = Cli::parse();
    log_to_stderr(cli.log, &cli.command);
    let json_out = cli.command.json_out();
    match run(cli) {
        Ok(exit) => exit.into(),
        Err(failure) => {
            if let (Some(mut out), Some(object)) = (json_out, failure.object()) {
                // The exit status says it, too.
                let _ = render::write_json(&mut out, &object);
            }
            failure.report(&mut output::stderr());
            failure.exit.into()
        }
    }
}

fn run(cli: Cli) -> Result<Exit, Failure> {
    match cli.command {
        Command::Serve(flags) => commands::serve::run(&flags),
        Command::Migrate(flags) => commands::migrate::run(&flags),
        Command::Status(flags) => commands::status::run(&flags),
        Command::Cancel(flags) => commands::cancel::run(&flags),
        Command::Set(flags) => commands::set::run(&flags),
        Command::Resolve(flags) => commands::resolve::run(&flags),
        Command::Receive(flags) => commands::receive::run(&flags),
        Command::Send(flags) => commands::send::run(&flags),
        Command::Convert(flags) => commands::convert::run(&flags),
        Command::Extract(flags) => commands::extract::run(&flags),
        Command::Inspect(flags) => commands::inspect::run(&flags),
        Command::Schema(flags) => commands::schema::run(&flags),
        Command::Diff(flags) => commands::diff::run(&flags),
        Command::Check(flags) => commands::check::run(&flags),
        Command::Snapshot(flags) => commands::snapshot::run(&flags),
        Command::Demo(flags) => commands::demo::run(&flags, cli.log),
        Command::Completions { shell } => commands::completions::run(shell),
        Command::Man { dir } => commands::man::run(dir.as_deref()),
    }
}

/// What a command that carries a machine itself says in its own words.
const SAID_OTHERWISE: &str = "vmferry_migration::postcopy=error,vmferry_relay::park=error";

fn filter(flags: LogFlags, command: &Command) -> EnvFilter {
    let level = flags.filter();
    match command {
        Command::Send(_) | Command::Receive(_) if level == LevelFilter::WARN => {
            EnvFilter::new(format!("{level},{SAID_OTHERWISE}"))
        }
        _ => EnvFilter::new(level.to_string()),
    }
}

/// The journal and a person at a terminal know what time it is; a file does not.
fn log_to_stderr(flags: LogFlags, command: &Command) {
    let to_terminal = io::stderr().is_terminal();
    let timed = !to_terminal && std::env::var_os("JOURNAL_STREAM").is_none();
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter(flags, command))
        .with_writer(io::stderr)
        .with_ansi(to_terminal)
        .with_target(false);
    if timed {
        log.init();
    } else {
        log.without_time().init();
    }
}
