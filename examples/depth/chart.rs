//! Eight panels, all with a logarithmic y axis.

use anyhow::{Result, anyhow};
use plotters::chart::SeriesLabelPosition::{self, LowerRight, MiddleRight, UpperRight};
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;

use crate::init::{Depth, Family};
use crate::rates::Search;
use crate::{PLACEMENTS, Report, name};

type Drawn<T> = Result<T, Box<dyn std::error::Error>>;
type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Points = Vec<(f64, f64)>;

/// A chart of lines.
struct Panel {
    title: &'static str,
    x: &'static str,
    /// Label and points of each line.
    lines: Vec<(String, Points)>,
    legend: SeriesLabelPosition,
}

/// The panels as SVG.
pub fn svg(report: &Report) -> Result<String> {
    let mut svg = String::new();
    draw(&mut svg, report).map_err(|e| anyhow!("drawing the panels: {e}"))?;
    Ok(svg)
}

fn draw(svg: &mut String, report: &Report) -> Drawn<()> {
    let root = SVGBackend::with_string(svg, (1640, 800)).into_drawing_area();
    root.fill(&WHITE)?;
    let areas = root.split_evenly((2, 4));
    let layers = |d: &Depth, values: &[f64]| (d.layers.to_string(), number(values));
    let by_layer = |title, placement, legend, values: fn(&Depth) -> &[f64]| {
        let plain = report.initialisation.iter().filter(|f| f.placement == placement && f.init == "plain");
        let lines = plain.flat_map(|f| &f.depths).map(|d| layers(d, values(d))).collect();
        Panel { title, x: "layer", lines, legend }
    };
    let [pre, post] = PLACEMENTS;
    let of_layers = [
        by_layer("RMS of the stream's gradient, pre-norm", pre, UpperRight, |d| &d.stream_grad_rms[..]),
        by_layer("RMS of the stream's gradient, post-norm", post, UpperRight, |d| &d.stream_grad_rms[..]),
        by_layer("RMS of the stream, pre-norm", pre, LowerRight, |d| &d.stream_rms[..]),
    ];
    let last_layer = |f: &Family| {
        let points = f.depths.iter().filter_map(|d| Some((d.layers as f64, *d.w2_grad_norm.last()?))).collect();
        (format!("{}, {}", name(f.placement), f.init), points)
    };
    let last = report.initialisation.iter().map(last_layer).collect();
    let searches = &report.learning_rates;
    let by_depth = |title, lines| Panel { title, x: "layers", lines, legend: MiddleRight };
    let of_depth = [
        by_depth("Norm of the last W_2's gradient", last),
        by_depth("Largest stable rate, plain init", rates(searches, "plain", |s| s.max_stable)),
        by_depth("Largest rate that learns, plain init", rates(searches, "plain", |s| s.max_learning)),
        by_depth("Largest stable rate, GPT-2's init", rates(searches, "gpt2", |s| s.max_stable)),
        by_depth("Largest rate that learns, GPT-2's init", rates(searches, "gpt2", |s| s.max_learning)),
    ];
    let depths: Vec<f64> = report.settings.depths.iter().map(|&n| n as f64).collect();
    let (least, most) = depths.iter().fold((f64::MAX, 1.0f64), |(l, m), &n| (l.min(n), m.max(n)));
    for (area, panel) in areas.iter().zip(&of_layers) {
        panel.draw(area, 0.0..most)?;
    }
    for (area, panel) in areas[3..].iter().zip(&of_depth) {
        // Leaves room for the legend on the right.
        let range = (least / 1.2..most * (1.2 * most / least).powf(0.7).max(2.0)).log_scale();
        panel.draw(area, range.with_key_points(depths.clone()))?;
    }
    root.present()?;
    Ok(())
}

/// Values by layer, from 0.
fn number(values: &[f64]) -> Points {
    values.iter().enumerate().map(|(layer, &v)| (layer as f64, v)).collect()
}

/// A line for each kind of run; depths without such a rate are omitted.
fn rates(searches: &[Search], init: &str, rate: fn(&Search) -> Option<f64>) -> Vec<(String, Points)> {
    let mut lines = vec![];
    for placement in PLACEMENTS {
        for (warm, label) in [(false, ""), (true, ", warm-up")] {
            let is = |s: &&Search| (&s.init[..], s.placement, s.warmup > 0) == (init, placement, warm);
            let kind = searches.iter().filter(is);
            let points = kind.filter_map(|s| Some((s.layers as f64, rate(s)?))).collect();
            lines.push((format!("{}{label}", name(placement)), points));
        }
    }
    lines
}

impl Panel {
    fn draw<X>(&self, area: &Area<'_>, x: X) -> Drawn<()>
    where
        X: AsRangedCoord<Value = f64>,
        X::CoordDescType: ValueFormatter<f64>,
    {
        let values = self.lines.iter().flat_map(|(_, points)| points.iter().map(|p| p.1)).filter(|y| *y > 0.0);
        let (low, high) = values.fold((f64::MAX, 0.0f64), |(l, h), y| (l.min(y), h.max(y)));
        let power = |round: fn(f64) -> f64, y: f64| 10f64.powf(round(y.log10()));
        // Powers of ten, at least two decades. Without data the panel is drawn empty.
        let (low, high) = if high > 0.0 { (power(f64::floor, low), power(f64::ceil, high)) } else { (1.0, 1.0) };
        let low = low.min(high / 100.0) * 0.99;
        let mut chart = ChartBuilder::on(area)
            .caption(self.title, ("sans-serif", 16))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(x, (low..high).log_scale())?;
        let number = |y: &f64| if *y < 0.001 { format!("{y:.0e}") } else { format!("{y}") };
        let mut mesh = chart.configure_mesh();
        mesh.x_desc(self.x).light_line_style(TRANSPARENT).x_label_formatter(&|x| format!("{x}"));
        mesh.y_label_formatter(&number).draw()?;
        // Draws the deepest model first and each further line thinner, so that overlapping lines remain visible.
        let few = self.lines.iter().all(|(_, points)| points.len() <= 12);
        for (i, (label, points)) in self.lines.iter().enumerate().rev() {
            let (width, size) = if few { (i as u32 + 1, 3) } else { (2, 0) };
            let style = Palette99::pick(i).stroke_width(width);
            let shown = points.iter().copied().filter(|p| p.1 > 0.0);
            let line = chart.draw_series(LineSeries::new(shown, style).point_size(size))?;
            line.label(label).legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], style));
        }
        let mut labels = chart.configure_series_labels();
        labels.position(self.legend.clone()).border_style(BLACK).background_style(WHITE.mix(0.8)).draw()?;
        Ok(())
    }
}
