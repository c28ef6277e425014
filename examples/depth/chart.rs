//! Six panels, all with a logarithmic y axis.

use anyhow::{Result, anyhow};
use plotters::chart::SeriesLabelPosition::{self, LowerLeft, LowerRight, UpperRight};
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
    /// What a line is, for the legend, and where it goes.
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
    let root = SVGBackend::with_string(svg, (1290, 820)).into_drawing_area();
    root.fill(&WHITE)?;
    let areas = root.split_evenly((2, 3));
    let layers = |d: &Depth, values: &[f64]| (d.layers.to_string(), number(values));
    let by_layer = |title, placement, legend, values: fn(&Depth) -> &[f64]| {
        let plain = report.initialisation.iter().filter(|f| f.placement == placement && f.init == "plain");
        let lines = plain.flat_map(|f| &f.depths).map(|d| layers(d, values(d))).collect();
        Panel { title, x: "layer", lines, legend }
    };
    let [pre, post] = PLACEMENTS;
    let of_layers = [
        by_layer("RMS of the stream's gradient, pre-norm", pre, UpperRight, |d| &d.stream_grad_rms[..]),
        by_layer("RMS of the stream's gradient, post-norm", post, LowerRight, |d| &d.stream_grad_rms[..]),
        by_layer("RMS of the stream, pre-norm", pre, LowerRight, |d| &d.stream_rms[..]),
    ];
    let last_layer = |f: &Family| {
        let points = f.depths.iter().map(|d| (d.layers as f64, d.w2_grad_norm[d.layers - 1])).collect();
        (format!("{}, {}", name(f.placement), f.init), points)
    };
    let last = report.initialisation.iter().map(last_layer).collect();
    let by_depth = |title, lines| Panel { title, x: "layers", lines, legend: LowerLeft };
    let of_depth = [
        by_depth("Norm of the last W_2's gradient", last),
        by_depth("Largest rate that is stable", rates(&report.learning_rates, |s| s.max_stable)),
        by_depth("Largest rate that learns", rates(&report.learning_rates, |s| s.max_learning)),
    ];
    let (depths, pad) = (&report.settings.depths, 1.2);
    let (least, most) = (depths[0] as f64, depths[depths.len() - 1] as f64);
    for (area, panel) in areas.iter().zip(&of_layers) {
        panel.draw(area, 0.0..most)?;
    }
    for (area, panel) in areas[3..].iter().zip(&of_depth) {
        panel.draw(area, (least / pad..most * pad).log_scale())?;
    }
    root.present()?;
    Ok(())
}

/// Values by layer, from 0.
fn number(values: &[f64]) -> Points {
    values.iter().enumerate().map(|(layer, &v)| (layer as f64, v)).collect()
}

/// A line for each kind of run; depths without such a rate are left out.
fn rates(searches: &[Search], rate: fn(&Search) -> Option<f64>) -> Vec<(String, Points)> {
    let mut lines = vec![];
    for placement in PLACEMENTS {
        for (warm, label) in [(false, ""), (true, ", warm-up")] {
            let kind = searches.iter().filter(|s| s.placement == placement && (s.warmup > 0) == warm);
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
        // Nothing to show is shown, too: as an empty panel.
        let (low, high) = if high > 0.0 { (low / 1.3, high * 1.3) } else { (0.1, 1.0) };
        let mut chart = ChartBuilder::on(area)
            .caption(self.title, ("sans-serif", 16))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(x, (low..high).log_scale())?;
        let mut mesh = chart.configure_mesh();
        mesh.x_desc(self.x).light_line_style(TRANSPARENT).x_label_formatter(&|x| format!("{x:.0}"));
        mesh.y_label_formatter(&|y| if *y < 0.001 { format!("{y:.0e}") } else { format!("{y:.3}") }).draw()?;
        for (i, (label, points)) in self.lines.iter().enumerate() {
            let style = Palette99::pick(i).stroke_width(2);
            let shown = points.iter().copied().filter(|p| p.1 > 0.0);
            let size = if points.len() <= 12 { 3 } else { 0 };
            let line = chart.draw_series(LineSeries::new(shown, style).point_size(size))?;
            line.label(label).legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], style));
        }
        let mut labels = chart.configure_series_labels();
        labels.position(self.legend.clone()).border_style(BLACK).background_style(WHITE.mix(0.8)).draw()?;
        Ok(())
    }
}
