//! The watch for two runners of one VM, the thing that must never be.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmove_compute::process::protocol::{CONTROL_SOCKET, ProcessStatus, Reply, Request, RunState};

use crate::cluster::Cluster;

/// How long a process may take to answer before it counts as not answering: held and dying ones are asked too.
const PATIENCE: Duration = Duration::from_secs(5);

/// Asks a VM process; none if it does not answer.
pub fn ask(vm_dir: &Path, request: &Request) -> Option<Reply> {
    let mut socket = UnixStream::connect(vm_dir.join(CONTROL_SOCKET)).ok()?;
    socket.set_read_timeout(Some(PATIENCE)).ok()?;
    let mut line = serde_json::to_vec(request).ok()?;
    line.push(b'\n');
    socket.write_all(&line).ok()?;
    let mut answer = String::new();
    BufReader::new(socket).read_line(&mut answer).ok()?;
    serde_json::from_str(&answer).ok()
}

/// State of a VM process; none if there is none that answers.
pub fn status(vm_dir: &Path) -> Option<ProcessStatus> {
    match ask(vm_dir, &Request::Status)? {
        Reply::Status(status) => Some(status),
        _ => None,
    }
}

/// Whether a process there runs the guest, by its own word. A source that has committed a move does not, though it lives on.
fn runs(vm_dir: &Path) -> bool {
    if status(vm_dir).is_none_or(|status| status.state != RunState::Running) {
        return false;
    }
    match ask(vm_dir, &Request::MoveStatus) {
        Some(Reply::MoveStatus(Some(progress))) => {
            let left = progress.phase == "committed"
                || progress.report.is_some_and(|r| r.outcome == "completed" && r.from.host != r.to.host);
            // A process that a VM came to has moves of its own to tell of, never the one it came by.
            !left
        }
        Some(_) => true,
        None => false,
    }
}

/// Asks all processes of a VM over and over, until [`Watch::finish`].
#[derive(Debug)]
pub struct Watch {
    enough: Arc<AtomicBool>,
    watcher: Option<JoinHandle<u64>>,
}

impl Watch {
    /// Watches a VM on all hosts of a cluster.
    pub fn start(cluster: &Cluster, vm: &str) -> Self {
        Self::over(cluster.hosts.iter().map(|host| host.vm_dir(vm)).collect())
    }

    fn over(dirs: Vec<PathBuf>) -> Self {
        let enough = Arc::new(AtomicBool::new(false));
        let end = Arc::clone(&enough);
        let watcher = thread::spawn(move || {
            let mut looks = 0;
            while !end.load(Ordering::SeqCst) {
                let first: Vec<&PathBuf> = dirs.iter().filter(|dir| runs(dir)).collect();
                if first.len() > 1 {
                    // They were asked one after the other. Who also runs now has run all the while, the others' turn included.
                    let again = first.iter().filter(|dir| runs(dir)).count();
                    assert!(
                        again < first.len(),
                        "{} runs in several processes: {first:?}",
                        dirs[0].display()
                    );
                }
                looks += 1;
                thread::sleep(Duration::from_millis(5));
            }
            looks
        });
        Self { enough, watcher: Some(watcher) }
    }

    /// Ends the watch; asserts that there were never two runners.
    pub fn finish(mut self) {
        self.enough.store(true, Ordering::SeqCst);
        let looks = self.watcher.take().unwrap().join().expect("two processes ran the VM");
        assert!(looks > 0);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.enough.store(true, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::wait::until;

    /// A process in `dir` that says of itself that it runs the guest. Gives the number of questions it has answered.
    fn runner(dir: &Path) -> Arc<std::sync::atomic::AtomicU64> {
        let listener = UnixListener::bind(dir.join(CONTROL_SOCKET)).unwrap();
        let answered: Arc<std::sync::atomic::AtomicU64> = Arc::default();
        let count = Arc::clone(&answered);
        let status = serde_json::json!({"status": {
            "state": "running", "pid": 1, "generation": 1, "disks": [], "listening": null, "incoming": null, "moving": null,
            "vm": {"name": "vm", "memory_mib": 1},
        }});
        thread::spawn(move || {
            for mut socket in listener.incoming().map_while(Result::ok) {
                let mut question = String::new();
                BufReader::new(&socket).read_line(&mut question).unwrap();
                let answer = if question.contains("move_status") {
                    serde_json::json!({"move_status": null})
                } else {
                    status.clone()
                };
                // Who asks may be gone.
                let _ = writeln!(socket, "{answer}");
                count.fetch_add(1, Ordering::SeqCst);
            }
        });
        answered
    }

    #[test]
    fn two_runners_are_noticed_and_one_is_not() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let dirs = vec![one.path().to_owned(), other.path().to_owned()];
        let answered = runner(one.path());
        let watch = Watch::over(dirs.clone());
        until("some looks", || (answered.load(Ordering::SeqCst) > 6).then_some(()));
        watch.finish();
        runner(other.path());
        let watch = Watch::over(dirs);
        until("the watch crying out", || watch.watcher.as_ref().unwrap().is_finished().then_some(()));
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| watch.finish())).is_err());
    }
}
