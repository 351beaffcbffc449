//! Plots of losses, as SVG written by hand and as PNG rendered from it.
//!
//! Text is set in the system's fonts. A machine without any would render a plot without words, so text can also be drawn
//! as strokes ([`strokes`]); the PNG falls back to that.

mod strokes;

use std::fmt::Write as _;

use anyhow::{Context, Result};
use resvg::{tiny_skia, usvg};

/// One line of the plot.
#[derive(Clone, Debug)]
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// Points (x, loss), in the order of x.
    pub points: Vec<(f64, f64)>,
}

/// Something that happened at a round.
#[derive(Clone, Debug)]
pub struct Mark {
    /// The round.
    pub at: f64,
    /// What, in a few words.
    pub label: String,
}

/// What runs to the right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// Rounds.
    Rounds,
    /// Something else, by its name and by powers of ten; points at zero or below are left out.
    Logarithmic(&'static str),
    /// The same, where shares of a whole run upwards instead of losses.
    SharesOf(&'static str),
}

impl Axis {
    fn name(self) -> &'static str {
        match self {
            Self::Rounds => "round",
            Self::Logarithmic(name) | Self::SharesOf(name) => name,
        }
    }

    /// What runs upwards.
    fn upwards(self) -> &'static str {
        match self {
            Self::Rounds | Self::Logarithmic(_) => "loss, nats per token",
            Self::SharesOf(_) => "share of rounds at most this far apart",
        }
    }

    /// Where a value lies, and what a tick there says.
    fn place(self, value: f64) -> f64 {
        match self {
            Self::Logarithmic(_) | Self::SharesOf(_) => value.log10(),
            Self::Rounds => value,
        }
    }

    fn tick(self, place: f64) -> String {
        match self {
            Self::Logarithmic(_) | Self::SharesOf(_) => power(place),
            Self::Rounds => label(place),
        }
    }
}

/// A plot of losses.
#[derive(Clone, Debug)]
pub struct Plot {
    /// Above the plot.
    pub title: String,
    /// Below the title.
    pub subtitle: String,
    /// What runs to the right.
    pub axis: Axis,
    /// The lines.
    pub series: Vec<Series>,
    /// Vertical marks.
    pub marks: Vec<Mark>,
}

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 540.0;
const LEFT: f64 = 76.0;
const RIGHT: f64 = 28.0;
const TOP: f64 = 112.0;
const BOTTOM: f64 = 62.0;
/// Lines whose names stand in a corner of the plot; those of more stand beside it.
const IN_A_CORNER: usize = 6;
const INK: &str = "#1f2933";
const FAINT: &str = "#52606d";
const GRID: &str = "#e4e7eb";
/// Told apart by people who see few colours, too (Okabe and Ito's palette).
const COLOURS: [&str; 6] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];
const MARK: &str = "#9aa5b1";

/// How text is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Text {
    /// As `<text>`, in a font of the machine that shows it.
    Font,
    /// As lines.
    Strokes,
}

/// Where a text is held.
#[derive(Clone, Copy)]
enum Anchor {
    Start,
    Middle,
    End,
}

impl Plot {
    /// The plot as an SVG document.
    pub fn svg(&self) -> String {
        self.draw(Text::Font)
    }

    /// The plot as a PNG, at twice the SVG's size.
    ///
    /// # Errors
    /// The SVG cannot be rendered (a fault of ours), or memory is short.
    pub fn png(&self) -> Result<Vec<u8>> {
        let mut options = usvg::Options::default();
        options.fontdb_mut().load_system_fonts();
        let text = if options.fontdb.is_empty() {
            Text::Strokes
        } else {
            Text::Font
        };
        render(&self.draw(text), &options)
    }

    fn draw(&self, text: Text) -> String {
        let placed = self.placed();
        let scale = Scale::of(&placed, self.axis, self.edge());
        let mut canvas = Canvas::new(text);
        canvas.text(LEFT, 36.0, 20.0, INK, Anchor::Start, &self.title);
        canvas.text(LEFT, 58.0, 13.0, FAINT, Anchor::Start, &self.subtitle);
        self.axes(&mut canvas, &scale);
        self.marks(&mut canvas, &scale);
        for (i, series) in placed.iter().enumerate() {
            canvas.series(series, &scale, i);
        }
        match self.series.len() {
            0..=3 => self.legend(&mut canvas),
            4..=IN_A_CORNER => self.column(&mut canvas),
            _ => self.beside(&mut canvas),
        }
        canvas.finish()
    }

    /// Where the plot ends on the right: so many lines leave no corner free for their names.
    fn edge(&self) -> f64 {
        let longest = self.series.iter().map(|series| series.name.chars().count()).max();
        match self.series.len() {
            0..=IN_A_CORNER => WIDTH - RIGHT,
            _ => WIDTH - RIGHT - 52.0 - 6.6 * longest.unwrap_or(0) as f64,
        }
    }

    /// The lines, with their points where the axis puts them.
    fn placed(&self) -> Vec<Series> {
        let place = |series: &Series| Series {
            name: series.name.clone(),
            points: series.points.iter().map(|(x, y)| (self.axis.place(*x), *y)).collect(),
        };
        self.series.iter().map(place).collect()
    }

    fn axes(&self, canvas: &mut Canvas, scale: &Scale) {
        for tick in &scale.y_ticks {
            let y = scale.y(*tick);
            canvas.line(LEFT, y, scale.edge, y, GRID, 1.0, "");
            canvas.text(LEFT - 10.0, y + 4.5, 13.0, FAINT, Anchor::End, &label(*tick));
        }
        let floor = HEIGHT - BOTTOM;
        for tick in &scale.x_ticks {
            let x = scale.x(*tick);
            canvas.line(x, floor, x, floor + 6.0, FAINT, 1.0, "");
            canvas.text(x, floor + 22.0, 13.0, FAINT, Anchor::Middle, &self.axis.tick(*tick));
        }
        canvas.line(LEFT, floor, scale.edge, floor, FAINT, 1.2, "");
        canvas.text(
            (LEFT + scale.edge) / 2.0,
            HEIGHT - 16.0,
            13.0,
            FAINT,
            Anchor::Middle,
            self.axis.name(),
        );
        canvas.text(16.0, TOP - 14.0, 13.0, FAINT, Anchor::Start, self.axis.upwards());
    }

    fn marks(&self, canvas: &mut Canvas, scale: &Scale) {
        let mut marks: Vec<&Mark> = self.marks.iter().collect();
        marks.sort_by(|a, b| a.at.total_cmp(&b.at));
        for (i, mark) in marks.into_iter().enumerate() {
            let x = scale.x(mark.at);
            // Labels step down, so that marks close to one another can both be read.
            let y = TOP + 16.0 + 20.0 * (i % 4) as f64;
            canvas.line(x, TOP, x, HEIGHT - BOTTOM, MARK, 1.2, "5 4");
            let right = x > scale.edge - 160.0;
            let (at, anchor) = if right {
                (x - 6.0, Anchor::End)
            } else {
                (x + 6.0, Anchor::Start)
            };
            canvas.text(at, y, 12.5, FAINT, anchor, &mark.label);
        }
    }

    fn legend(&self, canvas: &mut Canvas) {
        let mut right = WIDTH - RIGHT;
        for (i, series) in self.series.iter().enumerate().rev() {
            canvas.text(right, 36.0, 13.0, INK, Anchor::End, &series.name);
            right -= 7.2 * series.name.chars().count() as f64 + 8.0;
            canvas.line(right - 24.0, 31.5, right, 31.5, colour(i), 3.0, dashes(i));
            right -= 44.0;
        }
    }

    /// The names of many lines, one below the other, where losses that fall leave room: at the upper right.
    fn column(&self, canvas: &mut Canvas) {
        // Losses fall to the right, shares rise: the other corner is free.
        let right = match self.axis {
            Axis::SharesOf(_) => LEFT + 170.0,
            Axis::Rounds | Axis::Logarithmic(_) => WIDTH - RIGHT,
        };
        for (i, series) in self.series.iter().enumerate() {
            let y = TOP + 8.0 + 17.0 * i as f64;
            canvas.text(right - 40.0, y, 12.5, INK, Anchor::End, &series.name);
            canvas.line(right - 32.0, y - 4.0, right, y - 4.0, colour(i), 3.0, dashes(i));
        }
    }

    /// The names of very many lines, beside the plot.
    fn beside(&self, canvas: &mut Canvas) {
        let left = self.edge() + 20.0;
        for (i, series) in self.series.iter().enumerate() {
            let y = TOP + 8.0 + 20.0 * i as f64;
            canvas.line(left, y - 4.0, left + 24.0, y - 4.0, colour(i), 3.0, dashes(i));
            canvas.text(left + 32.0, y, 12.5, INK, Anchor::Start, &series.name);
        }
    }
}

fn colour(series: usize) -> &'static str {
    COLOURS[series % COLOURS.len()]
}

/// Lines of one colour are told apart by their dashes.
fn dashes(series: usize) -> &'static str {
    ["", "7 4", "2 3"][series / COLOURS.len() % 3]
}

/// Data to pixels.
struct Scale {
    x_range: (f64, f64),
    y_range: (f64, f64),
    x_ticks: Vec<f64>,
    y_ticks: Vec<f64>,
    /// Where the plot ends on the right.
    edge: f64,
}

impl Scale {
    fn of(series: &[Series], axis: Axis, edge: f64) -> Self {
        let finite = |value: &f64| value.is_finite();
        let xs: Vec<f64> = series
            .iter()
            .flat_map(|s| s.points.iter().map(|p| p.0))
            .filter(finite)
            .collect();
        let ys: Vec<f64> = series
            .iter()
            .flat_map(|s| s.points.iter().map(|p| p.1))
            .filter(finite)
            .collect();
        let (x0, x1) = range(&xs, (0.0, 1.0));
        let y = range(&ys, (0.0, 1.0));
        let y_ticks = ticks(y, 6);
        let step = if y_ticks.len() > 1 {
            y_ticks[1] - y_ticks[0]
        } else {
            1.0
        };
        let y_range = ((y.0 / step).floor() * step, (y.1 / step).ceil() * step);
        Self {
            x_range: (x0, x1),
            y_range,
            x_ticks: match axis {
                Axis::Logarithmic(_) | Axis::SharesOf(_) => log_ticks((x0, x1)),
                Axis::Rounds => ticks((x0, x1), 10),
            },
            y_ticks: ticks(y_range, 6),
            edge,
        }
    }

    fn x(&self, value: f64) -> f64 {
        LEFT + share(value, self.x_range) * (self.edge - LEFT)
    }

    fn y(&self, value: f64) -> f64 {
        HEIGHT - BOTTOM - share(value, self.y_range) * (HEIGHT - TOP - BOTTOM)
    }
}

fn share(value: f64, (low, high): (f64, f64)) -> f64 {
    ((value - low) / (high - low)).clamp(0.0, 1.0)
}

/// Least and largest, widened where they are one; `empty` where there is nothing.
fn range(values: &[f64], empty: (f64, f64)) -> (f64, f64) {
    let low = values.iter().copied().fold(f64::INFINITY, f64::min);
    let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    match (low.is_finite(), high > low) {
        (false, _) => empty,
        (true, false) => (low - 0.5, low + 0.5),
        (true, true) => (low, high),
    }
}

/// At most about `count` round numbers within the range: multiples of 1, 2 or 5 times a power of ten.
fn ticks((low, high): (f64, f64), count: usize) -> Vec<f64> {
    let rough = (high - low) / count as f64;
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .map(|m| m * power)
        .into_iter()
        .find(|step| *step >= rough * 0.999)
        .unwrap_or(power);
    let first = (low / step - 1e-9).ceil() as i64;
    let last = (high / step + 1e-9).floor() as i64;
    (first..=last.min(first + 1000)).map(|i| i as f64 * step).collect()
}

/// Logarithms of 1, 2 and 5 times powers of ten within the range; of the powers alone where those are many.
fn log_ticks((low, high): (f64, f64)) -> Vec<f64> {
    let steps: &[f64] = if high - low > 4.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
    (low.floor() as i64..=high.ceil() as i64)
        .flat_map(|power| steps.iter().map(move |step| power as f64 + step.log10()))
        .filter(|tick| (low - 1e-9..=high + 1e-9).contains(tick))
        .collect()
}

/// The number with this logarithm, with k, M or G.
fn power(place: f64) -> String {
    let value = 10f64.powf(place);
    if value < 0.999e-3 {
        return format!("{value:.0e}");
    }
    let (value, unit) = match value {
        v if v >= 0.999e9 => (v / 1e9, "G"),
        v if v >= 0.999e6 => (v / 1e6, "M"),
        v if v >= 0.999e3 => (v / 1e3, "k"),
        v => (v, ""),
    };
    format!("{}{unit}", label((value * 1e4).round() / 1e4))
}

/// A tick's number without needless digits.
fn label(value: f64) -> String {
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// The SVG as it grows.
struct Canvas {
    out: String,
    text: Text,
}

impl Canvas {
    fn new(text: Text) -> Self {
        let out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" \
             font-family=\"'Inter', 'DejaVu Sans', 'Liberation Sans', 'Noto Sans', Arial, sans-serif\">\n\
             <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#ffffff\"/>\n"
        );
        Self { out, text }
    }

    #[allow(clippy::too_many_arguments)] // two points and a pen
    fn line(&mut self, x1: f64, y1: f64, x2: f64, y2: f64, colour: &str, width: f64, dashes: &str) {
        let _ = writeln!(
            self.out,
            "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{colour}\" stroke-width=\"{width}\" \
             stroke-dasharray=\"{}\"/>",
            if dashes.is_empty() { "none" } else { dashes }
        );
    }

    fn text(&mut self, x: f64, y: f64, size: f64, colour: &str, anchor: Anchor, text: &str) {
        if self.text == Text::Strokes {
            let width = strokes::width(text, size);
            let x = match anchor {
                Anchor::Start => x,
                Anchor::Middle => x - width / 2.0,
                Anchor::End => x - width,
            };
            let path = strokes::path(text, x, y, size);
            let pen = size / 10.0;
            let _ = writeln!(
                self.out,
                "<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"{pen:.2}\" stroke-linecap=\"round\" stroke-linejoin=\"round\"/>"
            );
            return;
        }
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let text = escape(text);
        let _ = writeln!(
            self.out,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size}\" fill=\"{colour}\" text-anchor=\"{anchor}\" \
             stroke=\"#ffffff\" stroke-width=\"4\" stroke-linejoin=\"round\" paint-order=\"stroke\">{text}</text>"
        );
    }

    fn series(&mut self, series: &Series, scale: &Scale, number: usize) {
        let (colour, dashes) = (colour(number), dashes(number));
        let points: Vec<(f64, f64)> = series
            .points
            .iter()
            .filter(|p| p.0.is_finite() && p.1.is_finite())
            .map(|p| (scale.x(p.0), scale.y(p.1)))
            .collect();
        let path: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let _ = writeln!(
            self.out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2.4\" stroke-linejoin=\"round\" stroke-linecap=\"round\" stroke-dasharray=\"{}\"/>",
            path.join(" "),
            if dashes.is_empty() { "none" } else { dashes }
        );
        // Few points are shown as such: a line of one point would be invisible.
        if points.len() <= 60 {
            for (x, y) in points {
                let _ = writeln!(
                    self.out,
                    "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>"
                );
            }
        }
    }

    fn finish(mut self) -> String {
        self.out.push_str("</svg>\n");
        self.out
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// Renders an SVG at twice its size.
fn render(svg: &str, options: &usvg::Options<'_>) -> Result<Vec<u8>> {
    let tree = usvg::Tree::from_str(svg, options).context("the plot is not valid SVG")?;
    let (width, height) = (2 * WIDTH as u32, 2 * HEIGHT as u32);
    let mut pixels = tiny_skia::Pixmap::new(width, height).context("no memory for the plot")?;
    resvg::render(&tree, tiny_skia::Transform::from_scale(2.0, 2.0), &mut pixels.as_mut());
    pixels.encode_png().context("the plot cannot be encoded as PNG")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot() -> Plot {
        let points = (1..=30)
            .map(|r| (f64::from(r), 1.6 + 3.9 * (-f64::from(r) / 6.0).exp()))
            .collect();
        let held_out = [5.0, 10.0, 15.0, 20.0, 25.0, 30.0]
            .map(|r: f64| (r, 1.8 + 3.5 * (-r / 6.0).exp()))
            .to_vec();
        Plot {
            title: "murmur demo: 5 peers, <no> master".into(),
            subtitle: "30 rounds, 1,843,200 tokens".into(),
            axis: Axis::Rounds,
            series: vec![
                Series {
                    name: "training".into(),
                    points,
                },
                Series {
                    name: "held out".into(),
                    points: held_out,
                },
            ],
            marks: vec![
                Mark {
                    at: 10.0,
                    label: "a1b2c3 killed".into(),
                },
                Mark {
                    at: 15.0,
                    label: "a1b2c3 back".into(),
                },
                Mark {
                    at: 15.0,
                    label: "d4e5f6 joins".into(),
                },
            ],
        }
    }

    #[test]
    fn the_names_of_very_many_lines_stand_beside_them() {
        let one = |name: usize| Series {
            name: format!("arm {name}"),
            points: vec![(1.0, 2.0), (30.0, 1.0)],
        };
        let plot = Plot {
            series: (0..15).map(one).collect(),
            marks: Vec::new(),
            ..plot()
        };
        let scale = Scale::of(&plot.placed(), plot.axis, plot.edge());
        assert!(scale.x(30.0) < WIDTH - RIGHT - 80.0, "{}", scale.x(30.0));
        let svg = plot.svg();
        let name = svg.split("<text ").find(|text| text.contains(">arm 14<")).unwrap();
        let x: f64 = name
            .split("x=\"")
            .nth(1)
            .unwrap()
            .split('"')
            .next()
            .unwrap()
            .parse()
            .unwrap();
        assert!(x > scale.x(30.0), "{name}");
    }

    /// Pixels that are not white.
    fn ink(png: &[u8]) -> usize {
        let image = tiny_skia::Pixmap::decode_png(png).unwrap();
        image.pixels().iter().filter(|p| p.red() < 200).count()
    }

    #[test]
    fn the_plot_shows_every_series_mark_and_tick() {
        let svg = plot().svg();
        assert_eq!(svg.matches("<polyline").count(), 2);
        for word in [
            "&lt;no&gt; master",
            "a1b2c3 killed",
            "d4e5f6 joins",
            ">30<",
            "held out",
            ">round<",
        ] {
            assert!(svg.contains(word), "{word} is missing");
        }
    }

    #[test]
    fn a_machine_without_fonts_still_shows_words() {
        let plot = plot();
        let bare = usvg::Options::default();
        assert!(bare.fontdb.is_empty());
        let words = ink(&render(&plot.draw(Text::Strokes), &bare).unwrap());
        let none = ink(&render(&plot.draw(Text::Font), &bare).unwrap());
        assert!(words > none + 4000, "{words} dark pixels with words, {none} without");
    }

    #[test]
    fn a_plot_of_one_point_or_none_or_not_a_number_is_still_a_plot() {
        for points in [vec![], vec![(1.0, 2.0)], vec![(1.0, f64::NAN), (2.0, 3.0)]] {
            let plot = Plot {
                series: vec![Series {
                    name: "s".into(),
                    points,
                }],
                marks: vec![],
                ..plot()
            };
            assert!(!plot.svg().contains("NaN"));
            assert!(plot.png().unwrap().starts_with(b"\x89PNG"));
        }
    }

    #[test]
    fn many_lines_over_powers_of_ten_are_all_named_and_told_apart() {
        let series = |i: i32| Series {
            name: format!("arm {i}"),
            points: (0..5)
                .map(|p| (10f64.powi(p + 2), f64::from(9 - p) + 0.1 * f64::from(i)))
                .collect(),
        };
        let plot = Plot {
            axis: Axis::Logarithmic("bytes sent"),
            series: (0..12).map(series).collect(),
            marks: vec![],
            ..plot()
        };
        let svg = plot.svg();
        for word in [">100<", ">1k<", ">1M<", ">bytes sent<", ">arm 0<", ">arm 11<"] {
            assert!(svg.contains(word), "{word} is missing");
        }
        assert_eq!(svg.matches("<polyline").count(), 12);
        assert!(svg.contains("stroke-dasharray=\"7 4\""));
        assert!(plot.png().unwrap().starts_with(b"\x89PNG"));
    }

    #[test]
    fn ticks_are_round_numbers_within_the_range() {
        assert_eq!(ticks((1.0, 30.0), 10), [5.0, 10.0, 15.0, 20.0, 25.0, 30.0]);
        let labels: Vec<String> = ticks((1.5, 5.6), 6).into_iter().map(label).collect();
        assert_eq!(labels, ["2", "3", "4", "5"]);
    }
}
