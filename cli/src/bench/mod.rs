//! Placeholder header, replaced as the module is written.
