//! `vmferry man`: manual pages, made from the options.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use anyhow::Context;
use clap::{Command, CommandFactory};
use clap_mangen::Man;

use crate::exit::{Exit, Failure};
use crate::flags::Cli;
use crate::output;

pub(crate) fn run(dir: Option<&Path>) -> Result<Exit, Failure> {
    match dir {
        None => output::stdout().write_all(&page(Cli::command())?)?,
        Some(dir) => {
            for (name, page) in pages()? {
                let path = dir.join(name);
                fs::write(&path, page).with_context(|| format!("write {}", path.display()))?;
            }
        }
    }
    Ok(Exit::Whole)
}

fn page(command: Command) -> io::Result<Vec<u8>> {
    let mut page = Vec::new();
    Man::new(command).manual("vmferry").render(&mut page)?;
    Ok(page)
}

/// `vmferry.1`, and `vmferry-COMMAND.1` for each command.
fn pages() -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut program = Cli::command();
    program.build();
    let mut pages = vec![("vmferry.1".to_owned(), page(Cli::command())?)];
    for command in program
        .get_subcommands()
        .filter(|command| command.get_name() != "help")
    {
        let name = format!("vmferry-{}", command.get_name());
        let command = command
            .clone()
            .display_name(name.clone())
            .disable_help_subcommand(true);
        pages.push((format!("{name}.1"), page(command)?));
    }
    Ok(pages)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_command_has_a_page_with_its_options_and_examples() {
        let pages = pages().unwrap();
        let program = Cli::command();
        assert_eq!(pages.len(), 1 + program.get_subcommands().count());
        for command in program.get_subcommands() {
            let name = format!("vmferry-{}.1", command.get_name());
            let (_, page) = pages.iter().find(|(page, _)| *page == name).unwrap();
            let page = String::from_utf8(page.clone()).unwrap().replace('\\', "");
            assert!(page.contains("Examples:"), "{name}");
            for option in command
                .get_arguments()
                .filter_map(|option| option.get_long())
            {
                assert!(page.contains(&format!("--{option}")), "{name} --{option}");
            }
        }
    }
}
