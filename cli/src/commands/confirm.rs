//! Acts that only a person may decide on: the name is wanted typed.

use std::io::{BufRead, IsTerminal};

use super::CommandError;

/// Wants `name` typed before `what` is done, unless `--yes` was said.
pub fn confirm(name: &str, what: &str, yes: bool) -> Result<(), CommandError> {
    if yes {
        return Ok(());
    }
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        return Err(CommandError::Usage(format!("{what} only with --yes where nobody can be asked")));
    }
    eprint!("Type {name} to go on, so that {what}: ");
    let mut line = String::new();
    stdin.lock().read_line(&mut line)?;
    if line.trim() == name { Ok(()) } else { Err(CommandError::Cancelled("nothing was done".into())) }
}
