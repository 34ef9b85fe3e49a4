//! Bars on standard error, only on a terminal.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;

/// A bar over bytes; invisible when standard error is no terminal.
pub(crate) fn bytes(verb: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(0), target());
    let template = "{msg:16} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    bar.set_style(ProgressStyle::with_template(template).expect("the template is right"));
    bar.set_message(verb.to_owned());
    bar
}

/// A spinner with a message; invisible when standard error is no terminal.
pub(crate) fn spinner(message: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, target());
    bar.set_message(message.to_owned());
    bar.enable_steady_tick(std::time::Duration::from_millis(120));
    bar
}

fn target() -> ProgressDrawTarget {
    if std::io::stderr().is_terminal() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    }
}
