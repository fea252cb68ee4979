//! A failing seed with as few faults as still break the same promise.

use super::{Outcome, Run, faults::Fault, run};

/// Runs per seed at most.
const RUNS: usize = 200;

/// Fewer faults under which the seed still fails in the same checker, and what comes of them. None if it does not fail.
pub fn minimise(seed: u64, how: &Run) -> Option<(Vec<Fault>, Outcome)> {
    let mut outcome = run(seed, how.clone());
    let checker = outcome.violation.as_ref()?.checker;
    let mut faults = outcome.faults.clone();
    let mut runs = 0;
    let mut index = 0;
    while index < faults.len() && runs < RUNS {
        let mut fewer = faults.clone();
        fewer.remove(index);
        runs += 1;
        let again = run(seed, Run { faults: Some(fewer.clone()), ..how.clone() });
        if again.violation.as_ref().is_some_and(|violation| violation.checker == checker) {
            // Without it, others that were needed beside it may not be.
            (faults, outcome, index) = (fewer, again, 0);
        } else {
            index += 1;
        }
    }
    Some((faults, outcome))
}
