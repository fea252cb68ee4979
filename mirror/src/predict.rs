//! What a move will take, foreseen: the rounds of pre-copy played through with measured rates, by the very rule that a move follows.
//!
//! Each figure is a span, from the best that the measurement allows to the worst. Lives here: arithmetic. Never enters: measuring.

use crate::{
    Micros, PAGE_BYTES,
    pages::PageSet,
    precopy::{Decision, Precopy},
    source::FIXED_COST,
};

/// Time a move takes before its first byte: the target's process starts and makes its images.
const SETUP: Span<Micros> = Span { low: 20_000, high: 1_500_000 };
/// What a pause takes beside pages and synced records: queues drained, state saved, carried, loaded, vCPUs started.
const PAUSE: Span<Micros> = Span { low: 1_000, high: 80_000 };
/// What settling takes after the switchover.
const AFTER: Span<Micros> = Span { low: 0, high: 500_000 };
/// Records synced one after the other in the pause.
const SYNCS: u64 = 3;
/// Messages that wait for each other in the pause.
const TURNS: u64 = 4;
/// Share (of 100) of the link that a disk's copy is left with at least when the guest writes as fast as the link.
const COPY_PERCENT: u64 = 10;
/// A page's frame costs this share (of 1000) more than the page.
const FRAME_PERMILLE: u64 = 3;
/// Share (of 100) of what an image takes that is copied at least: the rest may be zeroes and tables of the format.
const CONTENT_PERCENT: u64 = 90;
/// Share (of 100) by which more may be sent than the worst that was seen would make it.
const MARGIN_PERCENT: u64 = 10;
/// Most that is tried as a downtime or a link that would do.
const ENOUGH: u64 = 1 << 40;

/// From a best to a worst case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Span<T> {
    /// The best.
    pub low: T,
    /// The worst; not less than `low`.
    pub high: T,
}

impl<T> Span<T> {
    /// The same at both ends of two spans.
    fn of(best: T, worst: T) -> Self {
        Self { low: best, high: worst }
    }
}

/// Distinct pages that turned dirty within a span of time: fewest and most seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirtyPoint {
    /// The span.
    pub within: Micros,
    /// Pages.
    pub pages: Span<u64>,
}

/// Counts distinct dirty pages over spans of 1, 2, 4, 8... windows, from one look a window: as many samples of every span as the time
/// has room for, with one set of pages for each length kept.
#[derive(Debug, Default)]
pub struct DirtySampler {
    /// For each length: a first half that waits for its second, and what was seen.
    levels: Vec<Level>,
}

#[derive(Debug, Default)]
struct Level {
    half: Option<(PageSet, Micros)>,
    /// Mean span is `time / samples`.
    time: Micros,
    samples: u64,
    pages: Option<Span<u64>>,
}

impl DirtySampler {
    /// A window of `time` has ended in which these pages turned dirty.
    pub fn window(&mut self, pages: PageSet, time: Micros) {
        let (mut pages, mut time) = (pages, time);
        for index in 0.. {
            if index == self.levels.len() {
                self.levels.push(Level::default());
            }
            let level = &mut self.levels[index];
            level.time += time;
            level.samples += 1;
            let now = Span::of(pages.len(), pages.len());
            level.pages = Some(
                level.pages.map_or(now, |seen| Span::of(seen.low.min(now.low), seen.high.max(now.high))),
            );
            let Some((first, its_time)) = level.half.take() else {
                level.half = Some((pages, time));
                return;
            };
            pages.merge(&first);
            time += its_time;
        }
    }

    /// What was seen, for each length of which there was one.
    pub fn points(&self) -> Vec<DirtyPoint> {
        let point = |level: &Level| {
            Some(DirtyPoint { within: level.time / level.samples.max(1), pages: level.pages? })
        };
        self.levels.iter().filter_map(point).collect()
    }
}

/// How many distinct pages turn dirty within a time, as it was seen over growing spans of it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DirtyCurve {
    points: Vec<DirtyPoint>,
    /// Pages of the RAM: never more turn dirty.
    pages: u64,
}

/// Which end of a span is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Case {
    Best,
    Worst,
}

impl Case {
    fn of<T>(self, span: Span<T>) -> T {
        match self {
            Self::Best => span.low,
            Self::Worst => span.high,
        }
    }
}

impl DirtyCurve {
    /// A curve through points, in any order, of a RAM of `pages` pages. Spans of no time are left out, and neither end ever falls: in a
    /// longer time no fewer pages are written.
    pub fn new(mut points: Vec<DirtyPoint>, pages: u64) -> Self {
        points.retain(|point| point.within > 0);
        points.sort_by_key(|point| point.within);
        points.dedup_by_key(|point| point.within);
        let mut floor = Span::of(0, 0);
        for point in &mut points {
            let (low, high) = (point.pages.low.min(pages), point.pages.high.min(pages));
            floor = Span::of(floor.low.max(low), floor.high.max(high).max(low));
            point.pages = floor;
        }
        Self { points, pages }
    }

    /// Pages dirty after `time`.
    ///
    /// Between two points the line between them counts. Before the first, a guest may have written its pages evenly (best) or nearly
    /// all of them at once (worst). After the last, it has come round (best) or goes on as in the last stretch (worst).
    fn after(&self, time: Micros, case: Case) -> u64 {
        let Some(first) = self.points.first() else { return 0 };
        let at = |point: &DirtyPoint| (point.within, case.of(point.pages));
        let line = |(t0, p0): (Micros, u64), (t1, p1): (Micros, u64)| {
            let rise = u128::from(p1.saturating_sub(p0)) * u128::from(time.saturating_sub(t0));
            u128::from(p0) + rise / u128::from((t1 - t0).max(1))
        };
        let pages = if time < first.within {
            let share = time as f64 / first.within as f64;
            let share = if case == Case::Best { share } else { share.sqrt() };
            (case.of(first.pages) as f64 * share) as u128
        } else if let Some((before, next)) =
            self.points.iter().zip(&self.points[1..]).find(|(_, next)| time <= next.within)
        {
            line(at(before), at(next))
        } else {
            match (self.points.as_slice(), case) {
                ([.., before, last], Case::Worst) => line(at(before), at(last)),
                ([only], Case::Worst) => line((0, 0), at(only)),
                ([.., last], Case::Best) => u128::from(last.pages.low),
                ([], _) => 0,
            }
        };
        pages.min(u128::from(self.pages)) as u64
    }
}

/// One disk to be copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskLoad {
    /// Bytes allocated: what the copy carries.
    pub bytes: u64,
    /// Bytes that the guest writes a second: they are carried beside it.
    pub write_rate: u64,
}

/// A VM and its way, as measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Measured {
    /// RAM to be sent; none if the VM stays on its host.
    pub memory: Option<MemoryLoad>,
    /// Disks to be copied.
    pub disks: Vec<DiskLoad>,
    /// Bytes a second that memory's stream gets through.
    pub memory_link: Span<u64>,
    /// Bytes a second that all disks' streams together get through, into the target's datastore.
    pub disk_link: Span<u64>,
    /// A message there and its answer.
    pub round_trip: Micros,
    /// A record synced to the disk of the slower host.
    pub sync: Span<Micros>,
}

/// RAM, as measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryLoad {
    /// Pages with content.
    pub data_pages: u64,
    /// Pages that were touched and are zero: a flag each.
    pub zero_pages: u64,
    /// How it turns dirty.
    pub dirty: DirtyCurve,
}

/// How sure it is that pre-copy ends in a switchover.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Convergence {
    /// In the worst case, too.
    Yes,
    /// In the best case only.
    Unsure,
    /// In no case.
    No,
}

/// What is to be expected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prediction {
    /// Whether it ends with a switchover.
    pub convergence: Convergence,
    /// From the order to the end (for a move that does not converge: until it is given up).
    pub total: Span<Micros>,
    /// The pause (for one that does not converge: what a switchover at its end would take).
    pub downtime: Span<Micros>,
    /// Bytes sent for RAM and disks.
    pub bytes: Span<u64>,
    /// Pre-copy rounds.
    pub rounds: Span<u32>,
    /// The smallest aim at a downtime with which the worst case converges, if that is not certain now.
    pub downtime_needed: Option<Micros>,
    /// The slowest link, bytes a second, with which the worst case converges, if that is not certain now.
    pub link_needed: Option<u64>,
}

/// One course of a move.
struct Course {
    converges: bool,
    total: Micros,
    downtime: Micros,
    bytes: u64,
    rounds: u32,
}

/// Foresees a move whose pause shall not be longer than `max_downtime`.
pub fn predict(measured: &Measured, max_downtime: Micros) -> Prediction {
    let best = course(measured, max_downtime, Case::Best);
    let worst = course(measured, max_downtime, Case::Worst);
    let convergence = match (best.converges, worst.converges) {
        (_, true) => Convergence::Yes,
        (true, false) => Convergence::Unsure,
        (false, false) => Convergence::No,
    };
    let certain = convergence == Convergence::Yes;
    // Both are monotonous in what is sought: more time or a faster link never makes a move that converges fail.
    let downtime_needed =
        least(max_downtime.max(1), |aim| course(measured, aim, Case::Worst).converges).filter(|_| !certain);
    let link = measured.memory_link.low.max(1);
    let link_needed = least(link, |rate| {
        let faster = Measured { memory_link: Span::of(rate, rate), ..measured.clone() };
        course(&faster, max_downtime, Case::Worst).converges
    })
    .filter(|_| !certain);
    // A longer course may be the better one: rounds that end early leave more for the pause.
    let span = |a: u64, b: u64| Span::of(a.min(b), a.max(b));
    Prediction {
        convergence,
        total: span(best.total, worst.total),
        downtime: span(best.downtime, worst.downtime),
        bytes: span(best.bytes, worst.bytes),
        rounds: Span::of(best.rounds.min(worst.rounds), best.rounds.max(worst.rounds)),
        downtime_needed,
        link_needed,
    }
}

/// The least value from `from` on that will do, to within an eighth of it.
fn least(from: u64, does: impl Fn(u64) -> bool) -> Option<u64> {
    let mut high = from;
    while !does(high) {
        if high >= ENOUGH {
            return None;
        }
        high = high.saturating_mul(2);
    }
    let mut low = (high / 2).max(from);
    while high - low > high / 8 {
        let middle = low + (high - low) / 2;
        if does(middle) { high = middle } else { low = middle }
    }
    Some(high)
}

/// Time that bytes take at a rate.
fn time_for(bytes: u64, rate: u64) -> Micros {
    (u128::from(bytes) * 1_000_000 / u128::from(rate.max(1))).min(u64::MAX.into()) as u64
}

fn framed(pages: u64) -> u64 {
    let bytes = pages * PAGE_BYTES;
    bytes + bytes / 1000 * FRAME_PERMILLE
}

fn course(measured: &Measured, max_downtime: Micros, case: Case) -> Course {
    // The best case has the fastest link.
    let link = |span: Span<u64>| if case == Case::Best { span.high } else { span.low }.max(1);
    let mut total = case.of(SETUP);
    let mut bytes = 0;
    let written: u64 = measured.disks.iter().map(|disk| disk.write_rate).sum();
    let allocated: u64 = measured.disks.iter().map(|disk| disk.bytes).sum();
    let to_copy = if case == Case::Best { allocated / 100 * CONTENT_PERCENT } else { allocated };
    if !measured.disks.is_empty() {
        let rate = link(measured.disk_link);
        // A guest's write waits for the mirror, so a guest that writes faster than the link is slowed, and the copy goes on.
        let spare = rate.saturating_sub(written).max(rate / 100 * COPY_PERCENT).max(1);
        let time = time_for(to_copy, spare);
        total = time.saturating_add(total);
        bytes = mirrored(written.min(rate), time).saturating_add(to_copy);
    }
    let mut rounds = 0;
    let mut converges = true;
    let pauses = case.of(PAUSE)
        + case.of(measured.sync).saturating_mul(SYNCS)
        + if measured.memory.is_some() { TURNS * measured.round_trip } else { 0 };
    let mut downtime = pauses;
    if let Some(memory) = &measured.memory {
        let rate = link(measured.memory_link);
        let mut precopy = Precopy::new(max_downtime, FIXED_COST);
        let mut sending = framed(memory.data_pages) + memory.zero_pages;
        let before = total;
        loop {
            precopy.begin_round();
            let time = time_for(sending, rate).max(1);
            total = time.saturating_add(total);
            bytes = sending.saturating_add(bytes);
            let dirty = memory.dirty.after(time, case);
            match precopy.after_round(sending, time, dirty) {
                Decision::Again => sending = framed(dirty),
                end => {
                    converges = end == Decision::Switch;
                    // What turned dirty before the pause is sent in it.
                    bytes = framed(dirty).saturating_add(bytes);
                    // Rounds end by chance a little earlier or later: less may be left than at the end of this one, or more.
                    let last = time_for(framed(dirty), rate);
                    let last = if case == Case::Best { last / 2 } else { last.saturating_add(last / 2) };
                    downtime = last.saturating_add(downtime);
                    break;
                }
            }
        }
        rounds = precopy.round() + 1;
        bytes = mirrored(written.min(rate), total - before).saturating_add(bytes);
    }
    if case == Case::Worst {
        // What was seen for some seconds is no promise.
        bytes = bytes.saturating_add(bytes / 100 * MARGIN_PERCENT);
    }
    total = total.saturating_add(downtime).saturating_add(case.of(AFTER));
    Course { converges, total, downtime, bytes, rounds }
}

fn mirrored(rate: u64, time: Micros) -> u64 {
    (u128::from(rate) * u128::from(time) / 1_000_000).min(u64::MAX.into()) as u64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    /// A guest that writes `rate` pages a second, round and round within `set` pages.
    fn curve(rate: u64, set: u64, pages: u64) -> DirtyCurve {
        let point = |within: Micros| {
            let dirty = (rate * within / 1_000_000).min(set);
            DirtyPoint { within, pages: Span::of(dirty, dirty) }
        };
        DirtyCurve::new((0..8).map(|n| point(25_000 << n)).collect(), pages)
    }

    fn measured(ram_mib: u64, dirty: DirtyCurve, link: u64) -> Measured {
        Measured {
            memory: Some(MemoryLoad { data_pages: ram_mib * MIB / PAGE_BYTES, zero_pages: 0, dirty }),
            disks: Vec::new(),
            memory_link: Span::of(link, link),
            disk_link: Span::of(link, link),
            round_trip: 200,
            sync: Span::of(500, 2_000),
        }
    }

    #[test]
    fn an_idle_guest_takes_as_long_as_its_memory() {
        let foreseen = predict(&measured(1024, curve(0, 0, 1 << 18), 1024 * MIB), 100_000);
        assert_eq!(foreseen.convergence, Convergence::Yes);
        assert_eq!((foreseen.downtime_needed, foreseen.link_needed), (None, None));
        assert!(foreseen.total.low >= 1_000_000 && foreseen.total.high < 4_000_000, "{foreseen:?}");
        assert!(foreseen.bytes.low >= 1024 * MIB && foreseen.bytes.high < 1150 * MIB, "{foreseen:?}");
        assert!(foreseen.downtime.high < 120_000, "{foreseen:?}");
    }

    #[test]
    fn a_small_working_set_converges_however_fast_it_is_written() {
        // 8 MiB again and again: 8 ms of a link of 1 GiB/s.
        let foreseen = predict(&measured(1024, curve(1 << 30, 2048, 1 << 18), 1024 * MIB), 100_000);
        assert_eq!(foreseen.convergence, Convergence::Yes, "{foreseen:?}");
    }

    #[test]
    fn one_that_writes_faster_than_the_link_does_not_and_is_told_what_would_help() {
        let slow = measured(1024, curve(100_000, 1 << 18, 1 << 18), 50 * MIB);
        let foreseen = predict(&slow, 100_000);
        assert_eq!(foreseen.convergence, Convergence::No);
        let (aim, link) = (foreseen.downtime_needed.unwrap(), foreseen.link_needed.unwrap());
        assert_eq!(predict(&slow, aim).convergence, Convergence::Yes);
        let faster = Measured { memory_link: Span::of(link, link), ..slow };
        assert_eq!(predict(&faster, 100_000).convergence, Convergence::Yes);
        assert!(link > 300 * MIB, "{link}");
    }

    #[test]
    fn what_was_seen_differently_makes_a_span() {
        let point = |within, low, high| DirtyPoint { within, pages: Span::of(low, high) };
        // Between 1,000 and 26,000 pages a second, at a link of some 13,000.
        let points = vec![point(100_000, 100, 2_600), point(1_000_000, 1_000, 26_000)];
        let foreseen = predict(&measured(512, DirtyCurve::new(points, 1 << 17), 50 * MIB), 100_000);
        assert_eq!(foreseen.convergence, Convergence::Unsure);
        assert!(foreseen.bytes.low < foreseen.bytes.high);
    }

    #[test]
    fn disks_are_copied_beside_what_the_guest_writes() {
        let disks = vec![DiskLoad { bytes: 1000 * MIB, write_rate: 50 * MIB }];
        let stays = Measured { memory: None, disks, ..measured(0, DirtyCurve::default(), 100 * MIB) };
        let foreseen = predict(&stays, 100_000);
        assert_eq!((foreseen.convergence, foreseen.rounds), (Convergence::Yes, Span::of(0, 0)));
        assert!(foreseen.total.low > 18_000_000 && foreseen.total.high < 24_000_000, "{foreseen:?}");
        assert!(foreseen.bytes.low >= 1790 * MIB && foreseen.bytes.high < 2210 * MIB, "{foreseen:?}");
    }

    #[test]
    fn a_sampler_counts_over_all_spans() {
        let set = |pages: &[u64]| {
            let mut set = PageSet::empty(64);
            for page in pages {
                set.insert(crate::pages::PageRange { first: *page, count: 1 });
            }
            set
        };
        let mut sampler = DirtySampler::default();
        for (pages, time) in [(&[1, 2][..], 90), (&[2, 3], 110), (&[1], 100), (&[], 100), (&[9], 100)] {
            sampler.window(set(pages), time);
        }
        let seen: Vec<_> = sampler.points().iter().map(|p| (p.within, p.pages.low, p.pages.high)).collect();
        assert_eq!(seen, [(100, 0, 2), (200, 1, 3), (400, 3, 3)]);
    }

    #[test]
    fn a_curve_never_falls_and_knows_its_ends() {
        let point = |within, low, high| DirtyPoint { within, pages: Span::of(low, high) };
        let curve = DirtyCurve::new(vec![point(200, 5, 9), point(0, 7, 7), point(100, 8, 6)], 20);
        assert_eq!((curve.after(100, Case::Best), curve.after(100, Case::Worst)), (8, 8));
        assert_eq!((curve.after(200, Case::Best), curve.after(200, Case::Worst)), (8, 9));
        assert_eq!((curve.after(0, Case::Worst), curve.after(50, Case::Best)), (0, 4));
        assert_eq!((curve.after(10_000, Case::Best), curve.after(10_000, Case::Worst)), (8, 20));
        assert_eq!(DirtyCurve::default().after(5, Case::Worst), 0);
    }

    proptest! {
        /// Whatever was measured, it ends, in spans that are none, and what is said to help does.
        #[test]
        fn any_measurement_gives_an_answer(
            points in prop::collection::vec((0u64..10_000_000, 0u64..1 << 30, 0u64..1 << 30), 0..10),
            pages in 0u64..1 << 30, data in 0u64..1 << 30, link in 0u64..1 << 36, faster in 0u64..1 << 36,
            bytes in 0u64..1 << 50, write_rate in 0u64..1 << 40, aim in 0u64..10_000_000,
        ) {
            let points = points.into_iter().map(|(within, a, b)| DirtyPoint { within, pages: Span::of(a.min(b), a.max(b)) });
            let link = Span::of(link, link + faster);
            let all = Measured {
                memory: Some(MemoryLoad { data_pages: data, zero_pages: 1, dirty: DirtyCurve::new(points.collect(), pages) }),
                disks: vec![DiskLoad { bytes, write_rate }],
                memory_link: link,
                disk_link: link,
                round_trip: 1,
                sync: Span::of(1, 2),
            };
            let foreseen = predict(&all, aim);
            prop_assert!(foreseen.total.low <= foreseen.total.high && foreseen.bytes.low <= foreseen.bytes.high);
            prop_assert!(foreseen.downtime.low <= foreseen.downtime.high && foreseen.rounds.low <= foreseen.rounds.high);
            if let Some(aim) = foreseen.downtime_needed {
                prop_assert_eq!(predict(&all, aim).convergence, Convergence::Yes);
            }
        }
    }
}
