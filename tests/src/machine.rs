//! Machines as a newcomer has them: each with a host name, processes, a network and the usual directories of its own, and a shell to
//! type into.
//!
//! What is the machine's own is in namespaces on top of a host's network ([`crate::netns`]): `/etc`, `/run`, `/srv` and `/var/lib` are
//! empty directories at first. `vmove` is the program under test; `systemctl` starts it as systemd would. Never enters: what is typed.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use crate::cluster::Answer;
use crate::netns::Namespace;

/// Directories that are the machine's own.
const OWN: [&str; 4] = ["run", "srv", "var/lib", "etc"];
/// Stands for systemd: `enable --now` starts the agent in the background, with its log in `/run`, and waits for its socket.
const SYSTEMCTL: &str = "#!/bin/sh\nset -e\n[ \"$*\" = 'enable --now vmove' ]\nsetsid vmove agent </dev/null >>/run/vmove.log 2>&1 &\n\
     while ! [ -S /run/vmove/agent.sock ]; do kill -0 $! || { cat /run/vmove.log; exit 1; }; sleep 0.05; done\n";

/// A machine with a shell. Dropping it ends everything that runs on it.
#[derive(Debug)]
pub struct Machine {
    /// Where its own directories really are.
    pub dir: PathBuf,
    shell: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    typed: usize,
}

impl Machine {
    /// A machine called `name` on a host of a network, with its files in `dir` (made). Fails with the reason, as people see it.
    pub fn boot(host: &Namespace, name: &str, dir: &Path, program: &Path) -> Result<Self, String> {
        let io = |e: std::io::Error| e.to_string();
        for own in OWN.iter().chain(&["bin", "root"]) {
            fs::create_dir_all(dir.join(own)).map_err(io)?;
        }
        std::os::unix::fs::symlink(program, dir.join("bin/vmove")).map_err(io)?;
        fs::write(dir.join("bin/systemctl"), SYSTEMCTL).map_err(io)?;
        fs::set_permissions(dir.join("bin/systemctl"), fs::Permissions::from_mode(0o755)).map_err(io)?;
        let shown = dir.display();
        let mounts = OWN.map(|own| format!("mount --bind '{shown}/{own}' '/{own}'; ")).concat();
        let script = format!(
            "set -e; hostname {name}; {mounts} cd '{shown}/root'; export HOME=$PWD TMPDIR=$PWD PATH='{shown}/bin':$PATH; exec bash 2>&1"
        );
        let mut command = host.command("unshare");
        command.args(["-m", "-u", "-p", "-f", "--kill-child", "--mount-proc", "bash", "-c", &script]);
        for variable in ["VMOVE_AGENT", "VMOVE_STATE", "VMOVE_CONTEXT", "VMOVE_TOKEN", "XDG_CONFIG_HOME"] {
            command.env_remove(variable);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut shell = command.spawn().map_err(io)?;
        let (to, from) = (shell.stdin.take().unwrap(), BufReader::new(shell.stdout.take().unwrap()));
        let mut machine = Self { dir: dir.to_path_buf(), shell, to, from, typed: 0 };
        match machine.say("true") {
            Some(_) => Ok(machine),
            None => {
                let mut said = String::new();
                if let Some(mut stderr) = machine.shell.stderr.take() {
                    let _ = std::io::Read::read_to_string(&mut stderr, &mut said);
                }
                Err(said.trim().to_owned())
            }
        }
    }

    /// Types a line and waits until it has been carried out; what it printed, on either output, is in both of the answer.
    pub fn types(&mut self, line: &str) -> Answer {
        self.say(line).unwrap_or_else(|| panic!("the shell ended at: {line}"))
    }

    fn say(&mut self, line: &str) -> Option<Answer> {
        self.typed += 1;
        let end = format!("--- end of line {}, ", self.typed);
        // A shell that has ended is noticed when it is read.
        let _ = self.to.write_all(format!("{line}\necho \"{end}$?\"\n").as_bytes());
        let mut said = String::new();
        loop {
            let mut next = String::new();
            if self.from.read_line(&mut next).ok()? == 0 {
                return None;
            }
            if let Some((before, code)) = next.split_once(&end) {
                said += before;
                let code = code.trim().parse().ok()?;
                return Some(Answer { code, stdout: said.clone(), stderr: said });
            }
            said += &next;
        }
    }

    /// Every file and directory below one of the machine's own directories.
    pub fn files(&self, below: &str) -> Vec<String> {
        let mut files = crate::images::files_below(&self.dir.join(below));
        files.sort_unstable();
        files
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = fs::read_to_string(self.dir.join("run/vmove.log")).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(40).collect();
            eprintln!(
                "--- {}\n{}",
                self.dir.display(),
                tail.into_iter().rev().collect::<Vec<_>>().join("\n")
            );
        }
        // With the first process of its namespace, which ends with this one, all others end.
        let _ = self.shell.kill();
        let _ = self.shell.wait();
    }
}
