//! The bar on a terminal.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::track::View;
use crate::output;

/// Draws itself over on standard error; what is drawn last stays.
pub(crate) struct Bar {
    bar: ProgressBar,
}

impl Bar {
    pub(crate) fn new() -> Self {
        let bar = ProgressBar::with_draw_target(Some(1000), ProgressDrawTarget::stderr());
        let style =
            ProgressStyle::with_template("{prefix:>14} [{bar:24}] {percent:>3} %  {wide_msg}")
                .map_or_else(
                    |_| ProgressStyle::default_bar(),
                    |style| style.progress_chars("=> "),
                );
        bar.set_style(style);
        Self { bar }
    }

    pub(crate) fn draw(&mut self, view: &View) {
        self.bar.set_prefix(view.phase.name());
        self.bar.set_message(view.details());
        self.bar.set_position(view.permille.into());
        self.bar.tick();
    }

    /// Print a line above the bar.
    pub(crate) fn note(&self, text: &str) {
        self.bar.suspend(|| output::say(text));
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.abandon();
    }
}
