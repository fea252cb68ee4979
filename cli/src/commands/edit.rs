//! `vmove edit|rename|clone`: stopped VMs changed.

use std::path::Path;
use std::process::Command;

use super::CommandError;
use super::vms::VmArgs;
use crate::api::definitions::{EditVm, NewName};
use crate::client::Client;
use crate::definition;
use crate::render;

/// Arguments of `vmove rename` and `vmove clone`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct NewNameArgs {
    /// The VM; it must be stopped
    #[arg(value_name = "VM")]
    pub vm: String,
    /// The new name
    #[arg(value_name = "NEW")]
    pub new: String,
}

impl NewNameArgs {
    /// `vmove rename`.
    pub async fn rename(&self, client: &Client) -> Result<(), CommandError> {
        client.rename(&self.vm, &NewName { name: self.new.clone() }).await?;
        Ok(())
    }

    /// `vmove clone`.
    pub async fn clone_vm(&self, client: &Client) -> Result<(), CommandError> {
        let vm = client.clone_vm(&self.vm, &NewName { name: self.new.clone() }).await?;
        Ok(render::print(&format!("{} made of {} on {}\n", vm.name, self.vm, vm.host))?)
    }
}

/// `vmove edit`: the definition in the user's editor until it is right, or given up. What was typed is kept when it is not taken.
pub async fn edit(args: &VmArgs, client: &Client) -> Result<(), CommandError> {
    let vm = client.vm(&args.vm).await?;
    let before = format!(
        "# {}. Add kernel = or initrd = (paths on its host) to replace them. Taken when the VM is stopped.\n{}",
        args.vm,
        definition::render(&vm.definition)
    );
    let file = tempfile::Builder::new().prefix("vmove-").suffix(".toml").tempfile()?;
    std::fs::write(file.path(), &before)?;
    run_editor(file.path())?;
    let text = std::fs::read_to_string(file.path())?;
    if text == before {
        return Ok(render::print("nothing changed\n")?);
    }
    let keep = |why: &dyn std::fmt::Display| match file.keep() {
        Ok((_, path)) => CommandError::failed(format!("{why}\nwhat was typed is in {}", path.display())),
        Err(error) => CommandError::failed(format!("{why}\nwhat was typed is lost: {error}")),
    };
    let written = match definition::parse(&text) {
        Ok(written) if !written.images.is_empty() || written.cloud_init.is_some() => {
            return Err(keep(&"images and cloud_init are for new VMs ('vmove create -f')"));
        }
        Ok(written) => written,
        Err(error) => return Err(keep(&error)),
    };
    let edit = EditVm { definition: written.definition, kernel: written.kernel, initrd: written.initrd };
    match client.edit(&args.vm, &edit).await {
        Ok(_) => Ok(()),
        Err(error) => {
            let mut why = error.to_string();
            if let crate::client::ClientError::Api { detail, .. } = &error {
                for blocker in &detail.blockers {
                    why = format!("{why}\n  - {blocker}");
                }
            }
            Err(keep(&why))
        }
    }
}

fn run_editor(path: &Path) -> Result<(), CommandError> {
    let set = |name: &str| std::env::var(name).ok().filter(|editor| !editor.trim().is_empty());
    let editor = set("VISUAL").or_else(|| set("EDITOR")).unwrap_or_else(|| "editor".to_owned());
    // By the shell, as others do: an editor may have words of its own.
    let status = Command::new("sh").args(["-c", &format!("{editor} \"$1\""), "sh"]).arg(path).status()?;
    if status.success() {
        return Ok(());
    }
    Err(CommandError::failed(format!("the editor '{editor}' ended with {status}; nothing was changed")))
}
