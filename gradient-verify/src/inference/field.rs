//! Polynomials over the integers modulo 65521, the largest prime of 16 bits.

/// The modulus.
pub(super) const PRIME: u32 = 65_521;

fn multiply(a: u32, b: u32) -> u32 {
    // Below 2^32: both factors are below 2^16.
    a * b % PRIME
}

fn subtract(a: u32, b: u32) -> u32 {
    (a + PRIME - b) % PRIME
}

/// `1 / a` for `a` from 1 on, by Fermat.
fn inverse(a: u32) -> u32 {
    let (mut result, mut base, mut exponent) = (1, a, PRIME - 2);
    while exponent > 0 {
        if exponent & 1 == 1 {
            result = multiply(result, base);
        }
        base = multiply(base, base);
        exponent >>= 1;
    }
    result
}

/// Coefficients, lowest first, of the one polynomial of degree below `points.len()` that passes through all `(x, y)`: Newton's divided
/// differences, multiplied out. All numbers are below [`PRIME`], no `x` is there twice.
pub(super) fn interpolate(points: &[(u16, u16)]) -> Vec<u16> {
    let xs: Vec<u32> = points.iter().map(|(x, _)| u32::from(*x)).collect();
    let mut differences: Vec<u32> = points.iter().map(|(_, y)| u32::from(*y)).collect();
    for order in 1..xs.len() {
        for i in (order..xs.len()).rev() {
            let rise = subtract(differences[i], differences[i - 1]);
            differences[i] = multiply(rise, inverse(subtract(xs[i], xs[i - order])));
        }
    }
    // Horner: the coefficients of what is built so far times (x - x_i), plus the next difference.
    let mut coefficients = vec![0; xs.len()];
    for (i, (&x, &difference)) in xs.iter().zip(&differences).enumerate().rev() {
        for j in (0..xs.len() - i).rev() {
            let below = if j == 0 { 0 } else { coefficients[j - 1] };
            coefficients[j] = subtract(below, multiply(coefficients[j], x));
        }
        coefficients[0] = (coefficients[0] + difference) % PRIME;
    }
    coefficients.iter().map(|&coefficient| coefficient as u16).collect()
}

/// The polynomial's value at `x`.
pub(super) fn evaluate(coefficients: &[u16], x: u16) -> u16 {
    let value = coefficients.iter().rev().fold(0, |value, &coefficient| {
        (multiply(value, u32::from(x)) + u32::from(coefficient)) % PRIME
    });
    value as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_but_zero_has_an_inverse() {
        for a in 1..PRIME {
            assert_eq!(multiply(a, inverse(a)), 1, "{a}");
        }
    }

    #[test]
    fn the_polynomial_passes_through_its_points_and_is_the_only_one() {
        for count in [1, 2, 3, 17, 128] {
            let points: Vec<(u16, u16)> = (0..count)
                .map(|i: u32| ((i * 509 % PRIME) as u16, (i * i * 31 + 65_000) as u16 % PRIME as u16))
                .collect();
            let coefficients = interpolate(&points);
            assert_eq!(coefficients.len(), points.len());
            for (x, y) in &points {
                assert_eq!(evaluate(&coefficients, *x), *y, "{count} points at {x}");
            }
            let again: Vec<(u16, u16)> = (1..=count as u16).map(|x| (x, evaluate(&coefficients, x))).collect();
            assert_eq!(interpolate(&again), coefficients, "other points of the same curve");
        }
        // 3 + 2x + x^2
        assert_eq!(interpolate(&[(0, 3), (1, 6), (2, 11)]), [3, 2, 1]);
    }
}
