use coordinatorless::types::PeerId;
use tch::Device;

use super::work::{Numbers, factor, first_row};
use super::*;

const PEER: PeerId = PeerId([1; 32]);

fn start(x: &[f32], b: &[f32], side: usize, m: u32, precision: Precision) -> Result<trainer::products::Chain, String> {
    trainer::products::Chain::new(x, b, side, m, precision, Device::Cpu).map_err(|error| error.to_string())
}

fn specs(precision: Precision) -> Vec<ChainSpec> {
    let spec = |side, products, depth: usize| ChainSpec {
        side,
        products,
        depth: depth.min(deepest(precision)),
    };
    vec![spec(64, 24, 2), spec(128, 6, 1), spec(96, 3, 3)]
}

fn challenge(precision: Precision) -> Challenge {
    Challenge::new(PEER, &[7; 32], precision, &specs(precision)).unwrap()
}

/// The numbers at the end of every link, block by block, as the definition has them; `change` may tamper with a link's start.
fn all_blocks(challenge: &Challenge, change: &mut dyn FnMut(&mut [i16])) -> Vec<Vec<i16>> {
    let numbers = Numbers::of(challenge.precision());
    let mut blocks = Vec::new();
    for (number, spec) in challenge.chains().iter().enumerate() {
        let factor = factor(challenge, number);
        let mut rows: Vec<Vec<i16>> = (0..spec.side).map(|row| first_row(challenge, number, row)).collect();
        for _ in 0..spec.links() {
            for row in &mut rows {
                for _ in 0..spec.depth {
                    change(row);
                    *row = numbers.times(row, &factor);
                }
            }
            blocks.extend(rows.chunks(ROWS).map(<[Vec<i16>]>::concat));
        }
    }
    blocks
}

/// A commitment to these blocks, and the opening of what `seed` draws.
fn present(challenge: &Challenge, blocks: &[Vec<i16>], seed: &[u8; 32], samples: usize) -> (Hash, Vec<u8>) {
    let leaves = blocks
        .iter()
        .enumerate()
        .map(|(index, block)| leaf(index, block))
        .collect();
    let answer = Answer::of_leaves(challenge, leaves);
    let draws = challenge.draws(&answer.root(), seed, samples);
    let block = |chain, link, block| blocks[challenge.leaf_index(chain, link, block)].clone();
    (answer.root(), answer.opening(&draws, &block))
}

#[test]
fn an_answer_holds_and_is_the_one_that_the_definition_gives() {
    for precision in [Precision::Fp32, Precision::Bf16] {
        let challenge = challenge(precision);
        let answer = answer(&challenge, &start).unwrap();
        let blocks = all_blocks(&challenge, &mut |_| ());
        for seed in [[1; 32], [2; 32]] {
            let opening = answer.open(&seed, 40, &start).unwrap();
            assert_eq!(
                (answer.root(), opening.clone()),
                present(&challenge, &blocks, &seed, 40),
                "{precision:?}"
            );
            let flops = verify(&challenge, &answer.root(), &seed, 40, &opening).unwrap();
            assert_eq!(
                flops,
                2 * (24 * 64_u128.pow(3) + 6 * 128_u128.pow(3) + 3 * 96_u128.pow(3))
            );
        }
    }
}

#[test]
fn skipped_rows_are_found_as_often_as_is_said() {
    for precision in [Precision::Fp32, Precision::Bf16] {
        let challenge = challenge(precision);
        let honest = all_blocks(&challenge, &mut |_| ());
        // A tenth of the rows, spread over everything, were not computed but are made up when they are committed to.
        let mut blocks = honest.clone();
        let mut count = 0;
        for (number, block) in blocks.iter_mut().enumerate() {
            let side = block.len() / ROWS;
            for (place, row) in block.chunks_mut(side).enumerate() {
                if blake3::hash(&[(number % 256) as u8, (number / 256) as u8, place as u8]).as_bytes()[0] < 26 {
                    row.rotate_left(1);
                    count += 1;
                }
            }
        }
        let share = f64::from(count) / (honest.len() * ROWS) as f64;
        assert!((share - 0.1).abs() < 0.03, "{share}");
        let samples = 8;
        let tries = 400_u32;
        let caught = |seed: u32| {
            let mut later = [0; 32];
            later[..4].copy_from_slice(&seed.to_le_bytes());
            let (root, opening) = present(&challenge, &blocks, &later, samples);
            verify(&challenge, &root, &later, samples, &opening).is_err()
        };
        let found = f64::from((0..tries).filter(|&seed| caught(seed)).count() as u32) / f64::from(tries);
        // A made-up row is found as the end of a link and as the beginning of the next; in fp32 also beside the drawn one.
        let least = 1.0 - missed(share, samples);
        println!(
            "{precision:?}: {:.1}% of the rows made up, found in {:.1}% of {tries} draws of {samples}; at least {:.1}% expected",
            100.0 * share,
            100.0 * found,
            100.0 * least
        );
        let error = (least * (1.0 - least) / f64::from(tries)).sqrt();
        assert!(found >= least - 3.0 * error, "{precision:?}: {found} {least}");
        let usual = |seed: u32| {
            let later = [seed as u8; 32];
            let (root, opening) = present(&challenge, &blocks, &later, SAMPLES);
            verify(&challenge, &root, &later, SAMPLES, &opening).is_err()
        };
        assert!(
            (0..100).all(usual),
            "{SAMPLES} samples miss a tenth once in {:.0} times",
            1.0 / missed(0.1, SAMPLES)
        );
    }
    assert!((missed(0.1, SAMPLES) - 0.00118).abs() < 1e-4);
}

#[test]
fn lower_precision_is_found() {
    for precision in [Precision::Fp32, Precision::Bf16] {
        let challenge = challenge(precision);
        // The numbers of fp32 as bf16 has them, with eight bits; those of bf16 in a byte.
        let shorter = |x: i16| match precision {
            Precision::Fp32 => f32::from_bits(f32::from(x).to_bits() & 0xffff_0000) as i16,
            _ => x.clamp(-128, 127),
        };
        let blocks = all_blocks(&challenge, &mut |row| row.iter_mut().for_each(|x| *x = shorter(*x)));
        let (root, opening) = present(&challenge, &blocks, &[3; 32], 4);
        let told = verify(&challenge, &root, &[3; 32], 4, &opening).unwrap_err();
        assert!(matches!(told, FlopsError::Product { .. }), "{told}");
    }
}

#[test]
fn results_of_another_peer_or_another_round_are_found() {
    let own = challenge(Precision::Fp32);
    let answer = answer(&own, &start).unwrap();
    let other = PeerId([2; 32]);
    for theirs in [
        Challenge::new(other, &[7; 32], Precision::Fp32, &specs(Precision::Fp32)).unwrap(),
        Challenge::new(PEER, &[8; 32], Precision::Fp32, &specs(Precision::Fp32)).unwrap(),
    ] {
        // As good as it gets: the draws of the other challenge, answered from this one's numbers.
        let blocks = all_blocks(&own, &mut |_| ());
        let (root, opening) = present(&theirs, &blocks, &[4; 32], 4);
        assert_eq!(root, answer.root());
        let told = verify(&theirs, &root, &[4; 32], 4, &opening).unwrap_err();
        assert!(matches!(told, FlopsError::Product { .. }), "{told}");
    }
}

#[test]
fn an_opening_that_was_changed_anywhere_is_refused() {
    let challenge = challenge(Precision::Fp32);
    let answer = answer(&challenge, &start).unwrap();
    let seed = [5; 32];
    let opening = answer.open(&seed, 2, &start).unwrap();
    let check = |bytes: &[u8]| verify(&challenge, &answer.root(), &seed, 2, bytes);
    assert!(check(&opening).is_ok());
    for at in (0..opening.len()).step_by(7) {
        let mut changed = opening.clone();
        changed[at] ^= 1;
        assert!(check(&changed).is_err(), "byte {at}");
    }
    for length in [0, 1, opening.len() - 1] {
        assert!(matches!(
            check(&opening[..length]),
            Err(FlopsError::Opening(OpeningError::Length { .. }))
        ));
    }
    let mut changed = opening.clone();
    changed[..2].copy_from_slice(&5000_i16.to_le_bytes());
    assert!(matches!(
        check(&changed),
        Err(FlopsError::Opening(OpeningError::Number { found: 5000, .. }))
    ));
    // What was asked for by another seed, or of another commitment.
    assert!(verify(&challenge, &answer.root(), &[6; 32], 2, &opening).is_err());
    assert!(verify(&challenge, &Hash([9; 32]), &seed, 2, &opening).is_err());
}

#[test]
fn a_challenge_out_of_bounds_is_refused_in_words() {
    let told = |spec: ChainSpec| {
        Challenge::new(PEER, &[0; 32], Precision::Bf16, &[spec])
            .unwrap_err()
            .to_string()
    };
    let good = ChainSpec {
        side: 64,
        products: 4,
        depth: 2,
    };
    assert!(told(ChainSpec { side: 8192, ..good }).contains("side is 8192, expected 64 to 4096"));
    assert!(told(ChainSpec { side: 65, ..good }).contains("multiple of 4"));
    assert!(told(ChainSpec { depth: 0, ..good }).contains("depth is 0"));
    assert!(
        told(ChainSpec {
            depth: 65,
            products: 65,
            ..good
        })
        .contains("depth is 65")
    );
    assert!(told(ChainSpec { products: 3, ..good }).contains("a multiple of 2"));
    assert!(told(ChainSpec { products: 0, ..good }).contains("number of products is 0"));
    let large = ChainSpec {
        side: 4096,
        products: 1 << 20,
        depth: 1,
    };
    assert!(told(large).contains("number of leaves"));
    let new = |precision, chains: &[ChainSpec]| Challenge::new(PEER, &[0; 32], precision, chains);
    assert!(new(Precision::Fp32, &[]).is_err() && new(Precision::Fp32, &[good; 17]).is_err());
    assert!(new(Precision::Tf32, &[good]).unwrap_err().to_string().contains("tf32"));
    assert!(new(Precision::Bf16, &[good; 16]).is_ok());
    let powers = new(Precision::Fp32, &[good]).unwrap_err().to_string();
    assert!(powers.contains("depth is 2, expected 1 to 1"), "{powers}");
}
