//! Progress of a move on a terminal: a line with the phase, a bar for disks, a bar for RAM. Nothing at all in a pipe.
//!
//! Lives here: the bars, and the rule that they never run backwards although totals grow and rounds repeat. Never enters: polling.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::units;
use crate::api::types::MoveProgress;

/// How far disks and RAM are, as fractions that only grow.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Fractions {
    /// Disks, 0 to 1.
    pub disk: f64,
    /// RAM, 0 to 1.
    pub ram: f64,
    ram_bytes: u64,
}

impl Fractions {
    /// Takes a new observation in.
    ///
    /// RAM is seen as "the part of the first round's bytes that is equal on both sides": later rounds re-send what turned dirty, and
    /// their own small totals would make a bar jump.
    pub fn update(&mut self, progress: &MoveProgress) {
        if progress.disk_total_bytes > 0 {
            let now = progress.disk_done_bytes as f64 / progress.disk_total_bytes as f64;
            self.disk = self.disk.max(now.clamp(0.0, 1.0));
        }
        if progress.round > 0 && progress.ram_total_bytes > 0 {
            self.ram_bytes = self.ram_bytes.max(progress.ram_total_bytes);
            let left = progress.ram_total_bytes.saturating_sub(progress.ram_done_bytes);
            self.ram = self.ram.max(1.0 - left as f64 / self.ram_bytes as f64);
        }
        if matches!(progress.phase.as_str(), "committed" | "completed") {
            self.disk = 1.0;
            self.ram = 1.0;
        }
    }
}

/// The bars of one move.
#[derive(Debug)]
pub struct MoveBars {
    multi: MultiProgress,
    head: ProgressBar,
    disk: Option<ProgressBar>,
    ram: Option<ProgressBar>,
    fractions: Fractions,
    visible: bool,
}

impl MoveBars {
    /// Bars on standard error if it is a terminal and `wanted`; else an object that shows nothing.
    pub fn new(title: &str, wanted: bool) -> Self {
        let visible = wanted && std::io::stderr().is_terminal();
        let target = if visible { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let multi = MultiProgress::with_draw_target(target);
        let head = multi.add(ProgressBar::new_spinner());
        head.set_style(style("{spinner} {prefix}  {msg}"));
        head.set_prefix(title.to_owned());
        if visible {
            head.enable_steady_tick(Duration::from_millis(120));
        }
        Self { multi, head, disk: None, ram: None, fractions: Fractions::default(), visible }
    }

    /// Shows a new observation.
    pub fn update(&mut self, progress: &MoveProgress) {
        if !self.visible {
            return;
        }
        self.fractions.update(progress);
        self.head.set_message(headline(progress));
        if progress.disk_total_bytes > 0 {
            let bar = self.disk.get_or_insert_with(|| self.multi.add(bar("disk")));
            show(bar, self.fractions.disk, progress.disk_total_bytes, String::new());
        }
        if self.fractions.ram_bytes > 0 {
            let bar = self.ram.get_or_insert_with(|| self.multi.add(bar("RAM ")));
            let note = if progress.round > 1 { format!("round {}", progress.round) } else { String::new() };
            show(bar, self.fractions.ram, self.fractions.ram_bytes, note);
        }
    }

    /// Takes the bars off the terminal.
    pub fn finish(self) {
        self.head.finish_and_clear();
        for bar in [self.disk, self.ram].into_iter().flatten() {
            bar.finish_and_clear();
        }
        // The terminal may be gone; there is nobody left to tell.
        let _ = self.multi.clear();
    }
}

/// A spinner with a text for steps that have no measure; hidden like [`MoveBars`].
pub fn spinner(text: &str, wanted: bool) -> ProgressBar {
    if !wanted || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let spinner = ProgressBar::new_spinner();
    spinner.set_style(style("{spinner} {msg}"));
    spinner.set_message(text.to_owned());
    spinner.enable_steady_tick(Duration::from_millis(120));
    spinner
}

fn headline(progress: &MoveProgress) -> String {
    let mut words = vec![progress.phase.clone(), units::millis(progress.elapsed_ms as f64)];
    if progress.rate > 0 {
        words.push(units::rate(progress.rate));
    }
    if progress.dirty_rate > 0 {
        words.push(format!("dirtied {}", units::rate(progress.dirty_rate)));
    }
    if let Some(left) = progress.left_ms {
        words.push(format!("{} left", units::millis(left as f64)));
    }
    words.join(", ")
}

fn bar(name: &str) -> ProgressBar {
    // Hidden until it is among the others: a bar that draws for itself leaves its line behind.
    let bar = ProgressBar::with_draw_target(Some(1), ProgressDrawTarget::hidden());
    bar.set_style(style("  {prefix} [{bar:32}] {percent:>3} % of {msg}").progress_chars("=> "));
    bar.set_prefix(name.to_owned());
    bar
}

fn show(bar: &ProgressBar, fraction: f64, total: u64, note: String) {
    bar.set_length(10_000);
    bar.set_position((fraction * 10_000.0) as u64);
    let note = if note.is_empty() { note } else { format!(", {note}") };
    bar.set_message(format!("{}{note}", units::size(total)));
}

/// The templates are constants of this file; a wrong one falls back to the plain style instead of ending the program.
fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(phase: &str, disk: (u64, u64), ram: (u64, u64), round: u32) -> MoveProgress {
        MoveProgress {
            move_id: "m".into(),
            phase: phase.into(),
            elapsed_ms: 0,
            disk_total_bytes: disk.1,
            disk_done_bytes: disk.0,
            ram_total_bytes: ram.1,
            ram_done_bytes: ram.0,
            round,
            rate: 0,
            dirty_rate: 0,
            reconnects: 0,
            left_ms: None,
            report: None,
            error: None,
        }
    }

    #[test]
    fn a_growing_disk_total_does_not_push_the_bar_back() {
        let mut fractions = Fractions::default();
        fractions.update(&at("mirror", (50, 100), (0, 0), 0));
        fractions.update(&at("mirror", (55, 200), (0, 0), 0));
        assert!((fractions.disk - 0.5).abs() < 1e-9);
        fractions.update(&at("mirror", (190, 200), (0, 0), 0));
        assert!((fractions.disk - 0.95).abs() < 1e-9);
    }

    #[test]
    fn a_new_round_does_not_push_the_ram_bar_back() {
        let mut fractions = Fractions::default();
        fractions.update(&at("pre-copy", (0, 0), (1000, 1000), 1));
        assert!((fractions.ram - 1.0).abs() < 1e-9);
        fractions.update(&at("pre-copy", (0, 0), (0, 300), 2));
        assert!((fractions.ram - 1.0).abs() < 1e-9);
        let mut fractions = Fractions::default();
        fractions.update(&at("pre-copy", (0, 0), (500, 1000), 1));
        fractions.update(&at("pre-copy", (0, 0), (0, 300), 2));
        assert!((fractions.ram - 0.7).abs() < 1e-9);
    }

    #[test]
    fn completion_fills_both() {
        let mut fractions = Fractions::default();
        fractions.update(&at("completed", (0, 0), (0, 0), 3));
        assert!((fractions.ram - 1.0).abs() < 1e-9 && (fractions.disk - 1.0).abs() < 1e-9);
    }
}
