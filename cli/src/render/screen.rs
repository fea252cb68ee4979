//! All moves of the cluster: a table for a pipe, a full screen for a terminal.
//!
//! Lives here: columns and drawing. Never enters: asking agents, when to draw.

use std::fmt::Write as _;
use std::io;
use std::time::Duration;

use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Paragraph, Row, Table};

use super::progress::Fractions;
use super::table::Align;
use super::units;
use crate::api::watch::{MoveList, WatchedMove};

const HEAD: [&str; 9] = ["VM", "WAY", "PHASE", "DISKS", "MEMORY", "RATE", "DIRTY", "TIME", "LEFT"];
/// Cells of a bar.
const BAR: usize = 10;

/// The terminal, taken over until this is dropped.
#[derive(Debug)]
pub struct Screen {
    terminal: ratatui::DefaultTerminal,
}

impl Screen {
    /// Takes the terminal over.
    pub fn open() -> Self {
        Self { terminal: ratatui::init() }
    }

    /// Draws what was seen, or why nothing was.
    pub fn draw(&mut self, seen: Result<&MoveList, String>) -> io::Result<()> {
        self.terminal.draw(|frame| draw(frame, &seen)).map(|_| ())
    }

    /// Whether a key was pressed that means so: q, Escape or Ctrl-C.
    pub fn asked_to_leave() -> io::Result<bool> {
        while event::poll(Duration::ZERO)? {
            if let Event::Key(key) = event::read()?
                && (matches!(key.code, KeyCode::Char('q') | KeyCode::Esc)
                    || (key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL)))
            {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

fn draw(frame: &mut Frame<'_>, seen: &Result<&MoveList, String>) {
    let [body, foot] = Layout::vertical([Constraint::Min(3), Constraint::Length(1)]).areas(frame.area());
    let block = Block::bordered().title(" vmove: moves ");
    match seen {
        Ok(list) if list.moves.is_empty() => {
            frame.render_widget(Paragraph::new("no moves").block(block), body);
        }
        Ok(list) => {
            let rows = list.moves.iter().map(|seen| Row::new(cells(seen)).style(style(seen)));
            let widths = [
                Constraint::Fill(2),
                Constraint::Fill(2),
                Constraint::Length(12),
                Constraint::Length(15),
                Constraint::Length(18),
                Constraint::Length(12),
                Constraint::Length(12),
                Constraint::Length(9),
                Constraint::Length(9),
            ];
            frame.render_widget(Table::new(rows, widths).header(Row::new(HEAD).bold()).block(block), body);
        }
        Err(why) => {
            frame.render_widget(
                Paragraph::new(format!("the agent does not answer: {why}")).red().block(block),
                body,
            );
        }
    }
    let mut line = vec![Span::from("q: leave")];
    if let Ok(list) = seen
        && !list.unreachable.is_empty()
    {
        line.push(Span::from(format!("   not reached: {}", list.unreachable.join(", "))).yellow());
    }
    frame.render_widget(Line::from(line), foot);
}

fn style(seen: &WatchedMove) -> Style {
    match seen.progress.phase.as_str() {
        "completed" => Style::new().fg(Color::Green),
        "aborted" | "cancelled" => Style::new().fg(Color::Red),
        "reconnecting" => Style::new().fg(Color::Yellow),
        _ => Style::new(),
    }
}

/// The columns of [`HEAD`].
fn cells(seen: &WatchedMove) -> [String; 9] {
    let WatchedMove { vm, from_host, to_host, progress } = seen;
    let mut done = Fractions::default();
    done.update(progress);
    let way = if from_host == to_host { from_host.clone() } else { format!("{from_host} > {to_host}") };
    let memory =
        if progress.round > 0 { format!("{} r{}", bar(done.ram), progress.round) } else { bar(done.ram) };
    [
        vm.clone(),
        way,
        progress.phase.clone(),
        bar(done.disk),
        memory,
        units::rate(progress.rate),
        units::rate(progress.dirty_rate),
        units::millis(progress.elapsed_ms as f64),
        progress.left_ms.map_or_else(|| "-".to_owned(), |left| units::millis(left as f64)),
    ]
}

fn bar(fraction: f64) -> String {
    let full = ((fraction * BAR as f64) as usize).min(BAR);
    format!("{}{} {:>3.0}%", "#".repeat(full), ".".repeat(BAR - full), fraction * 100.0)
}

/// The same as lines of text.
pub fn table(list: &MoveList) -> String {
    let mut table = super::table::Table::new(&HEAD.map(|name| (name, Align::Left)));
    for seen in &list.moves {
        table.row(cells(seen));
    }
    let mut text = if list.moves.is_empty() { "no moves\n".to_owned() } else { table.render() };
    for host in &list.unreachable {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "host {host} was not reached: moves that it leads are missing");
    }
    text
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;
    use crate::api::types::MoveProgress;

    fn seen() -> WatchedMove {
        let progress: MoveProgress = serde_json::from_value(serde_json::json!({
            "move_id": "m", "phase": "pre-copy", "elapsed_ms": 4200, "disk_total_bytes": 1000, "disk_done_bytes": 1000,
            "ram_total_bytes": 1000, "ram_done_bytes": 400, "round": 2, "rate": 1 << 30, "dirty_rate": 1 << 20, "left_ms": 1500,
            "report": null, "error": null,
        }))
        .unwrap();
        WatchedMove { vm: "web".into(), from_host: "left".into(), to_host: "right".into(), progress }
    }

    fn drawn(seen: &Result<&MoveList, String>) -> String {
        let mut terminal = Terminal::new(TestBackend::new(130, 6)).unwrap();
        terminal.draw(|frame| draw(frame, seen)).unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn a_move_is_shown_with_phase_rates_and_what_is_left() {
        let list = MoveList { moves: vec![seen()], unreachable: vec!["far".into()] };
        for text in [drawn(&Ok(&list)), table(&list)] {
            for word in [
                "web",
                "left > right",
                "pre-copy",
                "########## 100%",
                "####......  40% r2",
                "1.0 GiB/s",
                "1.0 MiB/s",
                "1.5 s",
                "far",
            ] {
                assert!(text.contains(word), "{word:?} is not in\n{text}");
            }
        }
    }

    #[test]
    fn nothing_to_show_is_said_and_so_is_an_agent_that_is_away() {
        let none = MoveList { moves: vec![], unreachable: vec![] };
        assert!(drawn(&Ok(&none)).contains("no moves") && table(&none).contains("no moves"));
        assert!(drawn(&Err("gone".into())).contains("does not answer: gone"));
    }
}
