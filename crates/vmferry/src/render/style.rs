//! Colours, where a person looks at a terminal.

use std::fmt::{self, Display};
use std::io;

use anstream::{AutoStream, ColorChoice};
use anstyle::{AnsiColor, Style};

/// What stands out, and how.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Palette {
    /// Names of sections, devices, blocks.
    name: Style,
    /// What is beside the point.
    faint: Style,
    good: Style,
    doubtful: Style,
    bad: Style,
}

/// Text that is shown in a style.
pub(crate) struct Styled<T>(T, Style);

impl Palette {
    /// Colours if standard output is a terminal that wants them (`NO_COLOR`, `CLICOLOR`, `TERM` say so).
    pub(crate) fn for_stdout() -> Self {
        match AutoStream::choice(&io::stdout()) {
            ColorChoice::Never => Self::default(),
            _ => Self::colours(),
        }
    }

    fn colours() -> Self {
        Self {
            name: Style::new().bold(),
            faint: Style::new().dimmed(),
            good: AnsiColor::Green.on_default(),
            doubtful: AnsiColor::Yellow.on_default(),
            bad: AnsiColor::Red.on_default().bold(),
        }
    }

    pub(crate) fn name<T: Display>(&self, text: T) -> Styled<T> {
        Styled(text, self.name)
    }

    pub(crate) fn faint<T: Display>(&self, text: T) -> Styled<T> {
        Styled(text, self.faint)
    }

    pub(crate) fn good<T: Display>(&self, text: T) -> Styled<T> {
        Styled(text, self.good)
    }

    pub(crate) fn doubtful<T: Display>(&self, text: T) -> Styled<T> {
        Styled(text, self.doubtful)
    }

    pub(crate) fn bad<T: Display>(&self, text: T) -> Styled<T> {
        Styled(text, self.bad)
    }
}

impl<T: Display> Display for Styled<T> {
    /// Width and precision are the text's; the colours take no room.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.1.render())?;
        self.0.fmt(f)?;
        write!(f, "{}", self.1.render_reset())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_take_no_room_and_can_be_left_out() {
        assert_eq!(format!("[{:<4}]", Palette::default().bad("a")), "[a   ]");
        let coloured = format!("[{:<4}]", Palette::colours().bad("a"));
        assert!(
            coloured.contains("\x1b[") && coloured.contains("a   "),
            "{coloured:?}"
        );
    }
}
