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
        None => output::stdout().write_all(&page(program())?)?,
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
    let closing = command.get_after_long_help().map(ToString::to_string);
    let has_commands = command.has_subcommands();
    let man = Man::new(command).manual("vmferry");
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if has_commands {
        man.render_subcommands_section(&mut page)?;
    }
    if let Some(text) = closing {
        page.extend(closing_section(&text).into_bytes());
    }
    man.render_version_section(&mut page)?;
    Ok(page)
}

/// Examples and tables are shown line by line, as in `--help`.
fn closing_section(text: &str) -> String {
    let (title, text) = match text.strip_prefix("Examples:\n") {
        Some(examples) => ("EXAMPLES", examples),
        None => ("NOTES", text),
    };
    let mut section = format!(".SH {title}\n.nf\n");
    for line in text.lines() {
        let line = line.replace('\\', "\\e").replace('-', "\\-");
        // A dot or a quote at the start would be a request.
        let guard = if line.starts_with(['.', '\'']) {
            "\\&"
        } else {
            ""
        };
        section += &format!("{guard}{line}\n");
    }
    section + ".fi\n"
}

/// `vmferry.1`, and `vmferry-COMMAND.1` for each command and each command of it.
fn pages() -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut program = program();
    program.build();
    let mut pages = vec![("vmferry.1".to_owned(), page(program.clone())?)];
    add_pages("vmferry", &program, &mut pages)?;
    Ok(pages)
}

fn add_pages(owner: &str, command: &Command, pages: &mut Vec<(String, Vec<u8>)>) -> io::Result<()> {
    for command in command.get_subcommands() {
        let name = format!("{owner}-{}", command.get_name());
        let page = page(command.clone().display_name(name.clone()))?;
        pages.push((format!("{name}.1"), page));
        add_pages(&name, command, pages)?;
    }
    Ok(())
}

fn program() -> Command {
    Cli::command().disable_help_subcommand(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_command_has_a_page_with_its_options_and_examples() {
        let pages = pages().unwrap();
        let program = Cli::command();
        let commands = with_inner("vmferry", &program);
        assert_eq!(pages.len(), 1 + commands.len());
        for (name, command) in commands {
            let name = format!("{name}.1");
            let (_, page) = pages.iter().find(|(page, _)| *page == name).unwrap();
            let page = String::from_utf8(page.clone()).unwrap().replace('\\', "");
            assert!(page.contains(".SH EXAMPLES"), "{name}");
            for option in command
                .get_arguments()
                .filter_map(|option| option.get_long())
            {
                assert!(page.contains(&format!("--{option}")), "{name} --{option}");
            }
        }
    }

    /// Every command, and every command of a command, by the name of its page.
    fn with_inner<'a>(owner: &str, command: &'a Command) -> Vec<(String, &'a Command)> {
        let inner = command.get_subcommands().map(|command| {
            let name = format!("{owner}-{}", command.get_name());
            let mut commands = with_inner(&name, command);
            commands.push((name, command));
            commands
        });
        inner.flatten().collect()
    }

    #[test]
    fn lines_stay_as_they_are() {
        assert_eq!(
            closing_section("Examples:\n  a --b \\\n.c"),
            ".SH EXAMPLES\n.nf\n  a \\-\\-b \\e\n\\&.c\n.fi\n"
        );
    }
}
