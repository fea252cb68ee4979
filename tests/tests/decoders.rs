//! Every decoder of bytes from outside against its seeds, its kept corpus (`fixtures/fuzz/<target>/`), and thousands of changes to
//! them: none panics, and none takes memory out of proportion. The fuzz targets in `fuzz/` call the same functions without end.

use std::path::{Path, PathBuf};
use std::time::Instant;

use peak_alloc::PeakAlloc;
use vmove_tests::decoders::{ALL, Decoder};
use vmove_tests::seeds;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Changed inputs of each decoder.
const CHANGED: usize = 4000;
/// Most memory that an input of a few KiB may take, bytes. The largest frame has a head of 16 MiB.
const MEMORY_CAP: usize = 32 << 20;
/// Longest changed input, bytes.
const LONGEST: usize = 64 << 10;

fn corpora() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/fuzz")
}

/// Valid bytes of a decoder first, then what is kept of it.
fn corpus(decoder: &Decoder) -> Vec<Vec<u8>> {
    let seeds = seeds::all().into_iter().filter(|seed| seed.decoder == decoder.name);
    let mut corpus: Vec<Vec<u8>> = seeds.map(|seed| seed.bytes).collect();
    let dir = corpora().join(decoder.name);
    let mut paths: Vec<_> = std::fs::read_dir(&dir)
        .unwrap_or_else(|error| panic!("{}: {error}", dir.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    corpus.extend(paths.iter().map(|path| std::fs::read(path).unwrap()));
    corpus
}

/// Runs a decoder on bytes; fails if it takes too much memory. A panic fails with the bytes printed.
fn run(decoder: &Decoder, bytes: &[u8]) -> bool {
    struct Tell<'a>(&'a Decoder, &'a [u8]);
    impl Drop for Tell<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("decoder {} on {:02x?}", self.0.name, self.1);
            }
        }
    }
    let _tell = Tell(decoder, bytes);
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    let accepted = (decoder.accepts)(bytes);
    let taken = MEMORY.peak_usage().saturating_sub(before);
    assert!(taken <= MEMORY_CAP, "{} bytes made it take {taken} bytes of memory", bytes.len());
    accepted
}

/// A generator of numbers, the same ones each time (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        if limit == 0 { 0 } else { (self.next() % limit as u64) as usize }
    }
}

/// Changes bytes in one to four places, in ways that find what length fields and loops believe.
fn change(numbers: &mut Numbers, mut bytes: Vec<u8>, other: &[u8]) -> Vec<u8> {
    for _ in 0..=numbers.below(4) {
        let at = numbers.below(bytes.len());
        match numbers.below(8) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, numbers.next() as u8),
            2 => {
                let end = (at + 1 + numbers.below(16)).min(bytes.len());
                let part = bytes[at..end].to_vec();
                bytes.splice(at..at, part);
            }
            3 => {
                let from = numbers.below(other.len());
                bytes.truncate(at);
                bytes.extend(&other[from..]);
            }
            4 if !bytes.is_empty() => bytes[at] ^= 1 << numbers.below(8),
            5 if !bytes.is_empty() => bytes[at] = [0, 1, 0x7f, 0x80, 0xfe, 0xff][numbers.below(6)],
            6 => {
                let end = (at + 4 + 4 * numbers.below(2)).min(bytes.len());
                bytes[at..end].fill([0, 0xff][numbers.below(2)]);
            }
            _ if !bytes.is_empty() => drop(bytes.remove(at)),
            _ => {}
        }
    }
    bytes.truncate(LONGEST);
    bytes
}

#[test]
fn no_decoder_panics_or_takes_much_memory() {
    for decoder in ALL {
        let began = Instant::now();
        let corpus = corpus(decoder);
        let kept = corpus.iter().filter(|bytes| run(decoder, bytes)).count();
        let mut numbers = Numbers(decoder.name.bytes().map(u64::from).sum());
        let mut accepted = 0;
        for _ in 0..CHANGED {
            let (one, other) = (numbers.below(corpus.len()), numbers.below(corpus.len()));
            let bytes = change(&mut numbers, corpus[one].clone(), &corpus[other]);
            accepted += usize::from(run(decoder, &bytes));
        }
        println!(
            "{}: {kept} of {} kept accepted, {accepted} of {CHANGED} changed, {:.1} s",
            decoder.name,
            corpus.len(),
            began.elapsed().as_secs_f64()
        );
    }
}

#[test]
fn every_decoder_accepts_its_seeds() {
    for decoder in ALL {
        let seeds: Vec<_> = seeds::all().into_iter().filter(|seed| seed.decoder == decoder.name).collect();
        assert!(!seeds.is_empty(), "{} has no seed", decoder.name);
        for seed in seeds {
            assert!((decoder.accepts)(&seed.bytes), "{} refuses its seed {}", decoder.name, seed.name);
        }
    }
}

#[test]
fn every_decoder_has_a_fuzz_target_and_no_corpus_is_without_one() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz");
    let manifest = std::fs::read_to_string(fuzz.join("Cargo.toml")).unwrap();
    for Decoder { name, .. } in ALL {
        assert!(fuzz.join(format!("fuzz_targets/{name}.rs")).exists(), "{name}");
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name}");
    }
    for entry in std::fs::read_dir(corpora()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(
            vmove_tests::decoders::named(&name).is_some(),
            "fixtures/fuzz/{name} is the corpus of no decoder"
        );
    }
}
