//! `vmove bench`: how near the memory stream of a move comes to what this machine's loopback TCP can do.
//!
//! - `warm`: touching and freeing host memory, so that cold host pages are not measured
//! - `limit`: the loopback TCP copy and the memcpy a move is compared with
//! - `moves`: a filled, idle VM moved there and back, with and without TLS
//!
//! The measurements take turns and ratios are taken within a turn, because the machine's speed drifts. Never enters: tuning.

mod limit;
mod moves;
mod warm;

use serde::Serialize;

use crate::commands::CommandError;
use crate::demo::{DemoError, with_rig};
use crate::render::table::{Align, Table};
use crate::render::{self, units};

use limit::Source;
use moves::Subject;

/// Arguments of `vmove bench`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct BenchArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// How often everything is measured
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub repetitions: u32,
    /// Memory that is sent, MiB
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u64).range(64..=65536))]
    pub size_mib: u64,
}

/// One turn of all measurements, bytes per second.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Turn {
    limit_bytes_per_s: f64,
    memcpy_bytes_per_s: f64,
    move_bytes_per_s: f64,
    move_tls_bytes_per_s: f64,
}

/// The result: medians over all turns.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Summary {
    /// Move without TLS to limit, median of the ratios of each turn.
    memory_stream_ratio: f64,
    /// Move with TLS to limit, the same way.
    memory_stream_ratio_tls: f64,
    limit_bytes_per_s: f64,
    memcpy_bytes_per_s: f64,
    move_bytes_per_s: f64,
    move_tls_bytes_per_s: f64,
    repetitions: usize,
    turns: Vec<Turn>,
}

impl BenchArgs {
    /// Measures and prints.
    pub async fn run(&self) -> Result<(), CommandError> {
        let (bytes, repetitions) = (self.size_mib << 20, self.repetitions);
        let turns = with_rig("vmove-bench-", async |rig| {
            let mut subject = Subject::start(rig, self.size_mib).await?;
            let source = blocking(move || Source::fill(bytes)).await?;
            let mut turns = Vec::new();
            for _ in 0..repetitions {
                let source = source.clone();
                let (limit_bytes_per_s, memcpy_bytes_per_s) = blocking(move || {
                    warm::host_memory(bytes)?;
                    let limit = source.over_loopback()?;
                    warm::host_memory(bytes)?;
                    Ok((limit, source.memcpy()?))
                })
                .await?;
                let move_bytes_per_s = subject.stream(true).await?;
                let move_tls_bytes_per_s = subject.stream(false).await?;
                turns.push(Turn {
                    limit_bytes_per_s,
                    memcpy_bytes_per_s,
                    move_bytes_per_s,
                    move_tls_bytes_per_s,
                });
            }
            Ok(turns)
        })
        .await?;
        print(&summarise(turns), self.json)
    }
}

/// Runs a measurement that computes on a thread that may be busy.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, DemoError> {
    let done = tokio::task::spawn_blocking(work).await.map_err(std::io::Error::other);
    done.and_then(|result| result).map_err(DemoError::io("measuring this machine's memory and loopback"))
}

fn summarise(turns: Vec<Turn>) -> Summary {
    let of = |value: &dyn Fn(&Turn) -> f64| median(turns.iter().map(value).collect());
    Summary {
        memory_stream_ratio: of(&|turn| turn.move_bytes_per_s / turn.limit_bytes_per_s),
        memory_stream_ratio_tls: of(&|turn| turn.move_tls_bytes_per_s / turn.limit_bytes_per_s),
        limit_bytes_per_s: of(&|turn| turn.limit_bytes_per_s),
        memcpy_bytes_per_s: of(&|turn| turn.memcpy_bytes_per_s),
        move_bytes_per_s: of(&|turn| turn.move_bytes_per_s),
        move_tls_bytes_per_s: of(&|turn| turn.move_tls_bytes_per_s),
        repetitions: turns.len(),
        turns,
    }
}

/// Middle value, for an even number the mean of the two in the middle; 0 of nothing.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

fn print(summary: &Summary, json: bool) -> Result<(), CommandError> {
    if json {
        return Ok(render::print_json(summary)?);
    }
    let mut table =
        Table::new(&[("WHAT", Align::Left), ("MEDIAN", Align::Right), ("TO LIMIT", Align::Right)]);
    let mut row = |what: &str, value: f64, ratio: Option<f64>| {
        let ratio = ratio.map(|ratio| format!("{ratio:.2}")).unwrap_or_default();
        table.row([what.to_owned(), units::rate(value as u64), ratio]);
    };
    row("loopback TCP, one stream (the limit)", summary.limit_bytes_per_s, Some(1.0));
    row("move, plain", summary.move_bytes_per_s, Some(summary.memory_stream_ratio));
    row("move, TLS", summary.move_tls_bytes_per_s, Some(summary.memory_stream_ratio_tls));
    row("memcpy", summary.memcpy_bytes_per_s, None);
    render::print(&format!("{}{} repetitions\n", table.render(), summary.repetitions))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert!((median(vec![3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median(vec![4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
        assert!(median(Vec::new()).abs() < 1e-9);
    }

    #[test]
    fn ratios_are_taken_within_a_turn() {
        let turn = |limit: f64, plain: f64| Turn {
            limit_bytes_per_s: limit,
            memcpy_bytes_per_s: 1.0,
            move_bytes_per_s: plain,
            move_tls_bytes_per_s: plain / 2.0,
        };
        let summary = summarise(vec![turn(10.0, 9.0), turn(100.0, 80.0), turn(20.0, 20.0)]);
        assert!((summary.memory_stream_ratio - 0.9).abs() < 1e-9);
        assert!((summary.memory_stream_ratio_tls - 0.45).abs() < 1e-9);
    }
}
