//! A small vector alphabet: each glyph is a few polylines on a grid 4 wide and 6 high, capitals only.

/// Grid units from one glyph to the next.
const ADVANCE: f64 = 5.6;
/// Grid units of a capital's height.
const HEIGHT: f64 = 6.0;

/// Polylines of a glyph: points `xy` in single digits (y from the top), lines apart by a space.
fn glyph(letter: char) -> &'static str {
    match letter.to_ascii_uppercase() {
        'A' => "062046 1434",
        'B' => "00063645443303 0030413233",
        'C' => "4130100105163645",
        'D' => "00062645412000",
        'E' => "40000646 0333",
        'F' => "400006 0333",
        'G' => "4130100105163645 4523",
        'H' => "0006 4046 0343",
        'I' => "1030 2026 1636",
        'J' => "4045361605",
        'K' => "0006 4003 0346",
        'L' => "000646",
        'M' => "0600234046",
        'N' => "06004640",
        'O' => "1030414536160501 0110",
        'P' => "060030414233 3303",
        'Q' => "1030414536160501 0110 3346",
        'R' => "060030414233 3303 2346",
        'S' => "41301001123243453616 1605",
        'T' => "0040 2026",
        'U' => "000516364540",
        'V' => "002640",
        'W' => "0016234640",
        'X' => "0046 4006",
        'Y' => "002340 2326",
        'Z' => "00400646",
        '0' => "1030414536160501 0110 3115",
        '1' => "112026 1636",
        '2' => "01103041420646",
        '3' => "0040224344453616 1605",
        '4' => "30044400 4404 3036",
        '5' => "4000023243453616 1605",
        '6' => "4030100105163645443303",
        '7' => "004016",
        '8' => "1030414233130201 0110 1304051636454433",
        '9' => "4313020110304145361606",
        '.' => "2526",
        ',' => "2516",
        ':' => "2122 2526",
        '-' => "1333",
        '+' => "2224 1333",
        '=' => "0242 0444",
        '/' => "0640",
        '(' => "30111536",
        ')' => "10313516",
        '%' => "0640 0001 4546",
        '\'' => "2021",
        '>' => "014305",
        '<' => "410345",
        _ => "",
    }
}

/// The width of a text, in the units of `size`.
pub fn width(text: &str, size: f64) -> f64 {
    text.chars().count() as f64 * ADVANCE * unit(size)
}

/// SVG path data of a text whose baseline starts at (x, y).
pub fn path(text: &str, x: f64, y: f64, size: f64) -> String {
    let unit = unit(size);
    let mut data = String::new();
    for (i, letter) in text.chars().enumerate() {
        let left = x + i as f64 * ADVANCE * unit;
        for line in glyph(letter).split(' ').filter(|line| !line.is_empty()) {
            for (n, point) in line.as_bytes().chunks_exact(2).enumerate() {
                let (px, py) = (f64::from(point[0] - b'0'), f64::from(point[1] - b'0'));
                let command = if n == 0 { 'M' } else { 'L' };
                data.push_str(&format!(
                    "{command}{:.2} {:.2}",
                    left + px * unit,
                    y - (HEIGHT - py) * unit
                ));
            }
        }
    }
    data
}

/// Pixels per grid unit: capitals are about 0.7 of the size, as in common fonts.
fn unit(size: f64) -> f64 {
    0.7 * size / HEIGHT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_glyph_is_whole_pairs_within_its_grid() {
        for letter in ('!'..='z').filter(|letter| !glyph(*letter).is_empty()) {
            for line in glyph(letter).split(' ') {
                assert!(line.len() >= 4 && line.len().is_multiple_of(2), "{letter}: {line}");
                let inside = line
                    .as_bytes()
                    .chunks_exact(2)
                    .all(|p| (b'0'..=b'4').contains(&p[0]) && (b'0'..=b'6').contains(&p[1]));
                assert!(inside, "{letter}: {line}");
            }
        }
    }

    #[test]
    fn letters_and_digits_all_have_a_shape() {
        assert!(('a'..='z').chain('0'..='9').all(|letter| !glyph(letter).is_empty()));
    }
}
