//! Line charts of training curves, as SVG files.

use std::path::Path;

use plotters::prelude::*;

use crate::{Error, Result};

/// Width and height of a chart, in pixels.
const SIZE: (u32, u32) = (960, 540);

/// How a curve is drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Stroke {
    /// A thin, pale line: noisy measurements.
    Faint,
    /// A thick line: the trend to look at.
    #[default]
    Bold,
}

/// One curve.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// Its points by ascending step. A point that is not finite leaves a gap.
    pub points: Vec<(f64, f64)>,
    /// How it is drawn.
    pub stroke: Stroke,
}

impl Series {
    /// The values of steps 1, 2, 3, ... and their mean over the last `window` steps: two curves for one chart.
    pub fn with_moving_average(name: &str, values: &[f64], window: usize) -> [Self; 2] {
        let points =
            |values: &[f64]| values.iter().enumerate().map(|(at, y)| ((at + 1) as f64, *y)).collect();
        [
            Self { name: name.to_owned(), points: points(values), stroke: Stroke::Faint },
            Self {
                name: format!("mean of {window}"),
                points: points(&moving_average(values, window)),
                stroke: Stroke::Bold,
            },
        ]
    }
}

/// For each value the mean of it and up to `window - 1` before it; values that are not finite are left out.
///
/// A window of 0 counts as 1. Where a window holds nothing finite the mean is NaN.
fn moving_average(values: &[f64], window: usize) -> Vec<f64> {
    let window = window.max(1);
    (0..values.len())
        .map(|end| {
            let part = &values[(end + 1).saturating_sub(window)..=end];
            let finite = || part.iter().filter(|value| value.is_finite());
            finite().sum::<f64>() / finite().count() as f64
        })
        .collect()
}

/// Draws `series` over training steps into the SVG file `path`, replacing it.
///
/// # Errors
/// [`Error::Plot`] when the chart cannot be drawn, [`Error::Io`] when the file cannot be written.
pub fn line_chart(path: &Path, title: &str, y_label: &str, series: &[Series]) -> Result<()> {
    let svg = draw(title, y_label, series)
        .map_err(|error| Error::Plot { path: path.to_owned(), what: error.to_string() })?;
    std::fs::write(path, svg).map_err(|source| Error::Io { path: path.to_owned(), source })
}

/// The finite points of a curve, as runs without a gap.
fn runs(points: &[(f64, f64)]) -> impl Iterator<Item = &[(f64, f64)]> {
    points.split(|(x, y)| !(x.is_finite() && y.is_finite())).filter(|run| !run.is_empty())
}

fn draw(title: &str, y_label: &str, series: &[Series]) -> Result<String, Box<dyn std::error::Error>> {
    let finite = || series.iter().flat_map(|series| runs(&series.points)).flatten();
    let (x_min, x_max) = span(finite().map(|(x, _)| *x), 0.0);
    let (y_min, y_max) = span(finite().map(|(_, y)| *y), 0.05);

    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption(title, ("sans-serif", 22))
            .margin(12)
            .x_label_area_size(42)
            .y_label_area_size(64)
            .build_cartesian_2d(x_min..x_max, y_min..y_max)?;
        chart
            .configure_mesh()
            .max_light_lines(4)
            .x_desc("step")
            .y_desc(y_label)
            .light_line_style(BLACK.mix(0.04))
            .draw()?;
        for (at, series) in series.iter().enumerate() {
            let color = Palette99::pick(at / 2);
            let style = match series.stroke {
                Stroke::Faint => color.mix(0.35).stroke_width(1),
                Stroke::Bold => color.mix(1.0).stroke_width(3),
            };
            // Each run is a line of its own; the name goes to the legend once.
            for (nth, run) in runs(&series.points).enumerate() {
                let line = chart.draw_series(LineSeries::new(run.iter().copied(), style))?;
                if nth == 0 {
                    line.label(&series.name)
                        .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
                }
            }
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.2))
            .draw()?;
        root.present()?;
    }
    Ok(svg)
}

/// The range of `values`, wider by `margin` of its length on both sides; never empty.
fn span(values: impl Iterator<Item = f64>, margin: f64) -> (f64, f64) {
    let (min, max) =
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(min, max), x| (min.min(x), max.max(x)));
    if min > max {
        return (0.0, 1.0);
    }
    let length = max - min;
    if length <= f64::EPSILON * max.abs().max(1.0) {
        return (min - 0.5 * min.abs().max(1.0), max + 0.5 * max.abs().max(1.0));
    }
    (min - margin * length, max + margin * length)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn svg(series: &[Series]) -> String {
        draw("reward < 1 & rising", "reward", series).unwrap()
    }

    #[test]
    fn a_chart_names_its_axes_title_and_curves() {
        let values: Vec<f64> = (0..50).map(|step| f64::from(step).sqrt()).collect();
        let drawn = svg(&Series::with_moving_average("raw", &values, 10));
        for text in ["<svg", "step", "reward", "raw", "mean of 10", "</svg>"] {
            assert!(drawn.contains(text), "{text} is missing");
        }
        assert!(!drawn.contains("reward < 1 & rising"), "markup in a title is escaped");
        let thick = drawn.matches("stroke-width=\"3\"").count();
        assert_eq!(thick, 2, "the mean and its key in the legend");
    }

    #[test]
    fn nothing_one_point_and_nan_are_drawn_without_an_error() {
        let series = |points: &[(f64, f64)]| Series {
            name: "curve".into(),
            points: points.to_vec(),
            stroke: Stroke::Bold,
        };
        for points in
            [&[][..], &[(1.0, 2.0)], &[(1.0, f64::NAN)], &[(1.0, 1.0), (2.0, f64::INFINITY), (3.0, 1.0)]]
        {
            let drawn = svg(&[series(points)]);
            assert!(!drawn.contains("NaN") && !drawn.contains("inf"), "{points:?}");
        }
        assert!(svg(&[]).contains("</svg>"));
    }

    #[test]
    fn a_moving_average_looks_back_and_skips_what_is_not_finite() {
        assert_eq!(moving_average(&[1.0, 3.0, 5.0, f64::NAN, 7.0], 2), [1.0, 2.0, 4.0, 5.0, 7.0]);
        assert_eq!(moving_average(&[2.0, 4.0], 0), [2.0, 4.0]);
    }

    #[test]
    fn a_directory_that_does_not_exist_is_an_error_with_its_path() {
        let error = line_chart(Path::new("no/such/directory/x.svg"), "t", "y", &[]).unwrap_err();
        assert!(error.to_string().contains("no/such/directory/x.svg"));
    }
}
