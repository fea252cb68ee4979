//! Writes the seeds of the fuzz targets to `fixtures/fuzz/<target>/`, where `cargo fuzz run` finds them.

use std::path::Path;

fn main() -> std::io::Result<()> {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/fuzz");
    for seed in vmove_tests::seeds::all() {
        let dir = corpora.join(seed.decoder);
        std::fs::create_dir_all(&dir)?;
        std::fs::write(dir.join(seed.name), seed.bytes)?;
    }
    Ok(())
}
