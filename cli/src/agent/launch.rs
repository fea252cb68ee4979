//! Starting VM processes, and following them until they end; finding those of an earlier agent.
//!
//! Lives here: the life of a process. What is done once it has ended is in settle.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use vmove_compute::process::protocol::{
    CONSOLE_SOCKET, CONTROL_SOCKET, LaunchSpec, ProcessStatus, RunState, Start,
};

use super::error::{ApiError, blocking};
use super::vmdir::VmDir;
use super::{Agent, control, process};

/// How long a VM process may take until it answers.
const READY_DEADLINE: Duration = Duration::from_secs(20);
/// How often a process that is not this agent's child is looked at.
const ADOPTED_INTERVAL: Duration = Duration::from_millis(300);
/// Directories on their way out, in the state directory.
pub const GONE_PREFIX: &str = ".gone-";
/// Reports of moves that are kept.
const KEPT_REPORTS: usize = 1000;

impl Agent {
    /// Starts the process of a VM and waits until it answers (and, for one that awaits a source, until it listens). The caller has
    /// reserved the VM and knows that no process of it lives.
    pub(super) async fn launch(
        self: &Arc<Self>,
        name: &str,
        vm: &VmDir,
        spec: &LaunchSpec,
    ) -> Result<ProcessStatus, ApiError> {
        let (dir, program, saved) = (vm.clone(), self.program.clone(), spec.clone());
        let command = blocking(move || {
            for left in [dir.error_file(), dir.path().join(CONTROL_SOCKET), dir.path().join(CONSOLE_SOCKET)] {
                match std::fs::remove_file(&left) {
                    Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                        return Err(ApiError::io("remove", &left, &e));
                    }
                    _ => {}
                }
            }
            std::fs::create_dir_all(dir.moves()).map_err(|e| ApiError::io("create", &dir.moves(), &e))?;
            dir.save_launch(&saved)?;
            process::command(&program, &dir)
        })
        .await?;
        let mut child = tokio::process::Command::from(command)
            .spawn()
            .map_err(|e| ApiError::io("start", &self.program, &e))?;
        self.registry.set_ended(name, None);
        let (ended, mut wait_ended) = tokio::sync::oneshot::channel();
        let (agent, owned) = (self.clone(), name.to_owned());
        // Dropping the child, as the end of this agent does, leaves the process alone.
        tokio::spawn(async move {
            let status = child.wait().await;
            agent.note_end(&owned, status.ok());
            // The launch below may have given up on it already.
            let _ = ended.send(());
            agent.settle(&owned).await;
        });
        let arriving = matches!(spec.start, Start::Incoming(_));
        let end = tokio::time::Instant::now() + READY_DEADLINE;
        let failed = |why: String| {
            ApiError::vm_process(format!(
                "the process of VM {name:?} {why}; its log is {}",
                vm.log().display()
            ))
        };
        loop {
            match control::status(vm.path()).await {
                Ok(status) if !arriving || status.listening.is_some() => {
                    if arriving {
                        self.follow_arrival(name);
                    }
                    return Ok(status);
                }
                _ => {}
            }
            tokio::select! {
                _ = &mut wait_ended => {
                    let text = vm.error_text().or_else(|| self.registry.ended(name));
                    let why = text.unwrap_or_else(|| "no reason given".to_owned());
                    return Err(failed(format!("ended at its start: {why}")));
                }
                () = tokio::time::sleep(Duration::from_millis(5)) => {}
            }
            if tokio::time::Instant::now() >= end {
                let dir = vm.path().to_path_buf();
                blocking(move || {
                    if let Some(pid) = process::find(&dir) {
                        process::kill_now(pid, &dir);
                    }
                    Ok(())
                })
                .await?;
                return Err(failed(format!(
                    "did not answer within {} s and was ended",
                    READY_DEADLINE.as_secs()
                )));
            }
        }
    }

    fn note_end(&self, name: &str, status: Option<ExitStatus>) {
        let how = status.and_then(|status| match (status.code(), status.signal()) {
            (Some(0), _) => None,
            (Some(code), _) => Some(format!("its process ended with code {code}")),
            (None, Some(signal)) => Some(format!("its process was ended by signal {signal}")),
            (None, None) => Some("its process ended".to_owned()),
        });
        match &how {
            Some(how) => tracing::warn!(vm = name, how, "VM process ended"),
            None => tracing::info!(vm = name, "VM process ended"),
        }
        self.registry.set_ended(name, how);
    }

    /// What an agent finds when it begins: processes of an earlier one are followed, VMs without one are settled.
    pub(super) async fn adopt(self: &Arc<Self>) -> Result<(), ApiError> {
        let agent = self.clone();
        blocking(move || {
            agent.sweep()?;
            agent.finish_renames()?;
            agent.prune_reports(KEPT_REPORTS)
        })
        .await?;
        for name in self.vms_with_checkpoints()? {
            if !self.registry.vm(&name)?.path().exists() {
                let agent = self.clone();
                blocking(move || agent.sweep_checkpoints(&name)).await?;
            }
        }
        for name in self.registry.names()? {
            let dir = self.registry.vm(&name)?.path().to_path_buf();
            let search = dir.clone();
            let pid = blocking(move || Ok(process::find(&search))).await?;
            let agent = self.clone();
            match pid {
                Some(pid) => {
                    tracing::info!(vm = name, pid, "VM process of an earlier agent found");
                    match control::status(&dir).await {
                        Ok(status) if matches!(status.state, RunState::Incoming | RunState::Undecided) => {
                            self.follow_arrival(&name);
                        }
                        Ok(status) => match status.moving {
                            Some(move_id) => self.follow_adopted_move(&name, move_id),
                            None => self.close_ends(&name),
                        },
                        Err(error) => tracing::warn!(vm = name, %error, "it does not answer"),
                    }
                    tokio::spawn(async move {
                        while process::serves(pid, &dir) {
                            if !agent.pause(ADOPTED_INTERVAL).await {
                                return;
                            }
                        }
                        agent.settle(&name).await;
                    });
                }
                None => {
                    tokio::spawn(async move { agent.settle(&name).await });
                }
            }
        }
        Ok(())
    }

    /// Removes what a crash left of directories on their way out.
    fn sweep(&self) -> Result<(), ApiError> {
        let entries = std::fs::read_dir(&self.state).map_err(|e| ApiError::io("list", &self.state, &e))?;
        for entry in entries.filter_map(Result::ok) {
            if entry.file_name().to_str().is_some_and(|name| name.starts_with(GONE_PREFIX)) {
                let path = entry.path();
                std::fs::remove_dir_all(&path).map_err(|e| ApiError::io("remove", &path, &e))?;
            }
        }
        Ok(())
    }
}
