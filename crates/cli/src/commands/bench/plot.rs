//! Plots as inline SVG. Colours are CSS variables of the page, so that they follow light and dark.

use std::fmt::Write;

use crate::human;

/// Width of every plot, in SVG units.
const WIDTH: f64 = 860.0;
/// Room for names on the left.
const LEFT: f64 = 190.0;
/// Room on the right, for the last label.
const RIGHT: f64 = 30.0;

/// Text that may stand in HTML and SVG.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            c if c.is_control() => escaped.push(' '),
            c => escaped.push(c),
        }
    }
    escaped
}

/// One row of [`strips`].
#[derive(Debug)]
pub(super) struct Strip<'a> {
    pub(super) name: &'a str,
    pub(super) sample: &'a [f64],
    pub(super) p50: f64,
    pub(super) p99: f64,
}

/// Every value of every stage as a dot on a logarithmic axis of milliseconds, with median and p99.
pub(super) fn strips(strips: &[Strip<'_>]) -> String {
    const ROW: f64 = 34.0;
    let all = strips.iter().flat_map(|strip| strip.sample).copied();
    let axis = Log::over(all);
    let height = ROW * strips.len() as f64 + 44.0;
    let mut svg = open(height, "Latency of every stage");
    for tick in axis.ticks() {
        let x = axis.x(tick);
        grid(&mut svg, x, 8.0, height - 30.0);
        text(
            &mut svg,
            x,
            height - 12.0,
            "middle",
            "tick",
            &human::ms(tick).replace(".00", ""),
        );
    }
    for (row, strip) in strips.iter().enumerate() {
        let y = 25.0 + ROW * row as f64;
        text(&mut svg, LEFT - 16.0, y + 4.0, "end", "name", strip.name);
        for (at, value) in strip.sample.iter().enumerate() {
            // Spread over the row by a fixed pattern, so that equal values stay visible.
            let shift = ((at * 7) % 11) as f64 - 5.0;
            let (x, y) = (axis.x(*value), y + shift);
            let _ = write!(
                svg,
                "<circle class=\"dot\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\"/>"
            );
        }
        for (class, value) in [("p99", strip.p99), ("p50", strip.p50)] {
            let x = axis.x(value);
            let (top, bottom) = (y - 11.0, y + 11.0);
            let _ = write!(
                svg,
                "<line class=\"{class}\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{top:.1}\" y2=\"{bottom:.1}\">\
                 <title>{} {class} {}</title></line>",
                escape(strip.name),
                human::ms(value)
            );
        }
    }
    close(svg)
}

/// How many sandboxes had come so far after how many milliseconds, one curve per class.
pub(super) fn arrivals(curves: &[(&str, &[f64])]) -> String {
    const HEIGHT: f64 = 260.0;
    const BOTTOM: f64 = 36.0;
    let end = curves
        .iter()
        .flat_map(|(_, sample)| *sample)
        .copied()
        .fold(0.0, f64::max);
    let count = curves
        .iter()
        .map(|(_, sample)| sample.len())
        .max()
        .unwrap_or(0);
    let axis = Linear::to(end);
    let floor = HEIGHT - BOTTOM;
    let level = |n: usize| floor - (floor - 14.0) * n as f64 / count.max(1) as f64;
    let mut svg = open(HEIGHT, "Sandboxes over time");
    for tick in axis.ticks() {
        let x = axis.x(tick);
        grid(&mut svg, x, 8.0, floor);
        text(
            &mut svg,
            x,
            HEIGHT - 14.0,
            "middle",
            "tick",
            &format!("{tick:.0} ms"),
        );
    }
    for part in [0, count.div_ceil(2), count] {
        text(
            &mut svg,
            LEFT - 16.0,
            level(part) + 4.0,
            "end",
            "tick",
            &part.to_string(),
        );
    }
    for (class, sample) in curves {
        let mut sorted = sample.to_vec();
        sorted.sort_by(f64::total_cmp);
        let mut path = format!("M{LEFT:.1} {floor:.1}");
        for (at, value) in sorted.iter().enumerate() {
            let _ = write!(path, "H{:.1}V{:.1}", axis.x(*value), level(at + 1));
        }
        let _ = write!(path, "H{:.1}", WIDTH - RIGHT);
        let _ = write!(svg, "<path class=\"{}\" d=\"{path}\"/>", escape(class));
    }
    close(svg)
}

/// One bar of [`bars`]: its name, its class, its length, where its whisker ends, both in KiB.
pub(super) type Bar<'a> = (&'a str, &'a str, f64, f64);

/// Horizontal bars of memory with a whisker to the maximum.
pub(super) fn bars(bars: &[Bar<'_>]) -> String {
    const ROW: f64 = 38.0;
    let axis = Linear::to(bars.iter().map(|(.., max)| *max).fold(0.0, f64::max) * 1.12);
    let height = ROW * bars.len() as f64 + 16.0;
    let mut svg = open(height, "Memory");
    for (row, (name, class, value, max)) in bars.iter().enumerate() {
        let y = 10.0 + ROW * row as f64;
        let (end, whisker) = (axis.x(*value), axis.x(*max));
        text(&mut svg, LEFT - 16.0, y + 17.0, "end", "name", name);
        let width = (end - LEFT).max(1.0);
        let _ = write!(
            svg,
            "<rect class=\"{}\" x=\"{LEFT:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"24\" rx=\"3\"/>",
            escape(class)
        );
        let middle = y + 12.0;
        let _ = write!(
            svg,
            "<line class=\"whisker\" x1=\"{end:.1}\" x2=\"{whisker:.1}\" y1=\"{middle:.1}\" y2=\"{middle:.1}\"/>"
        );
        text(
            &mut svg,
            whisker + 8.0,
            y + 17.0,
            "start",
            "value",
            &human::kib(*value as u64),
        );
    }
    close(svg)
}

fn open(height: f64, title: &str) -> String {
    format!(
        "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{0}\"><title>{0}</title>",
        escape(title)
    )
}

fn close(mut svg: String) -> String {
    svg.push_str("</svg>");
    svg
}

fn grid(svg: &mut String, x: f64, top: f64, bottom: f64) {
    let _ = write!(
        svg,
        "<line class=\"grid\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{top:.1}\" y2=\"{bottom:.1}\"/>"
    );
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, class: &str, content: &str) {
    let _ = write!(
        svg,
        "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>",
        escape(content)
    );
}

/// A logarithmic axis over whole decades.
#[derive(Debug)]
struct Log {
    low: i32,
    high: i32,
}

impl Log {
    fn over(values: impl Iterator<Item = f64>) -> Self {
        // Below a microsecond nothing is measured; zero has no logarithm.
        let decades = values.map(|value| value.max(0.001).log10());
        let (low, high) = decades.fold((f64::MAX, f64::MIN), |(l, h), d| (l.min(d), h.max(d)));
        if low > high {
            return Self { low: 0, high: 1 };
        }
        let (low, high) = (low.floor() as i32, high.ceil() as i32);
        Self {
            low,
            high: high.max(low + 1),
        }
    }

    fn x(&self, value: f64) -> f64 {
        let part =
            (value.max(0.001).log10() - f64::from(self.low)) / f64::from(self.high - self.low);
        LEFT + part * (WIDTH - LEFT - RIGHT)
    }

    fn ticks(&self) -> Vec<f64> {
        (self.low..=self.high)
            .map(|decade| 10f64.powi(decade))
            .collect()
    }
}

/// A linear axis from zero.
#[derive(Debug)]
struct Linear {
    end: f64,
}

impl Linear {
    fn to(end: f64) -> Self {
        Self {
            end: if end > 0.0 { end } else { 1.0 },
        }
    }

    fn x(&self, value: f64) -> f64 {
        LEFT + value / self.end * (WIDTH - LEFT - RIGHT)
    }

    /// Round numbers, at most eight of them.
    fn ticks(&self) -> Vec<f64> {
        let rough = self.end / 8.0;
        let decade = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0]
            .map(|m| m * decade)
            .into_iter()
            .find(|s| *s >= rough);
        let step = step.unwrap_or(self.end);
        (0..=8)
            .map(|at| f64::from(at) * step)
            .filter(|tick| *tick <= self.end)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_stay_within_the_plot() {
        let log = Log::over([0.0, 3.0, 1500.0].into_iter());
        for value in [0.0, 0.001, 3.0, 1500.0] {
            let x = log.x(value);
            assert!(
                (LEFT - 0.1..=WIDTH - RIGHT + 0.1).contains(&x),
                "{value} at {x}"
            );
        }
        let linear = Linear::to(730.0);
        assert!(
            linear.ticks().len() >= 4 && linear.ticks().len() <= 9,
            "{:?}",
            linear.ticks()
        );
        assert!(Linear::to(0.0).x(0.0).is_finite());
        assert_eq!(Log::over(std::iter::empty()).ticks(), [1.0, 10.0]);
    }

    #[test]
    fn text_cannot_leave_its_element() {
        assert_eq!(escape("<b a=\"1\">&"), "&lt;b a=&quot;1&quot;&gt;&amp;");
    }
}
