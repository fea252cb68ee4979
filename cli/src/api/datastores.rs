//! Requests about datastores.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Make a directory of the agent's host one of its datastores.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AddDatastore {
    /// Its name on the host: letters, digits, `.`, `_`, `-`.
    pub name: String,
    /// The directory; it must be there, and be writable.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// Disks that name no datastore go there from now on.
    #[serde(default)]
    pub default: bool,
}
