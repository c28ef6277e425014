//! Heat maps and line charts, as SVG.

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::element::DashedPathElement;
use plotters::prelude::*;

type Drawn = Result<(), Box<dyn std::error::Error>>;

/// Colours that stay apart for colour-blind readers (Okabe and Ito 2008).
const COLORS: [RGBColor; 8] = [
    RGBColor(0, 0, 0),
    RGBColor(213, 94, 0),
    RGBColor(0, 114, 178),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(120, 120, 120),
    RGBColor(86, 180, 233),
];

/// Number of shades in a heat map. Neighbours of the same shade are drawn as one rectangle, which keeps files small.
const SHADES: f64 = 48.0;

/// Maps numbers to colours.
pub struct Scale {
    pub label: &'static str,
    pub low: f64,
    pub high: f64,
    pub kind: Kind,
}

#[derive(Clone, Copy, PartialEq)]
pub enum Kind {
    /// From dark to bright, logarithmically.
    Logarithmic,
    /// From one colour through white to another.
    Diverging,
}

impl Scale {
    /// The position on the scale, from 0 to 1; values outside are clamped.
    fn place(&self, value: f64) -> f64 {
        let place = match self.kind {
            Kind::Logarithmic => (value / self.low).ln() / (self.high / self.low).ln(),
            Kind::Diverging => (value - self.low) / (self.high - self.low),
        };
        place.clamp(0.0, 1.0)
    }

    /// The number at a position.
    fn value(&self, place: f64) -> f64 {
        match self.kind {
            Kind::Logarithmic => self.low * (self.high / self.low).powf(place),
            Kind::Diverging => self.low + place * (self.high - self.low),
        }
    }

    fn color(&self, place: f64) -> RGBColor {
        match self.kind {
            Kind::Logarithmic => ViridisRGB.get_color(place),
            Kind::Diverging => DerivedColorMap::new(&[COLORS[1], WHITE, COLORS[2]]).get_color(place),
        }
    }
}

/// A heat map: layers upwards, steps to the right.
pub struct Panel {
    pub title: String,
    /// Where each column starts, and where the last one ends.
    pub edges: Vec<f64>,
    /// By layer, then by column.
    pub rows: Vec<Vec<f64>>,
}

/// Heat maps in rows of `columns`, with one colour bar.
pub fn heat_maps(panels: &[Panel], columns: usize, scale: &Scale) -> Result<String> {
    let mut svg = String::new();
    draw_heat_maps(&mut svg, panels, columns, scale).map_err(|e| anyhow!("drawing heat maps: {e}"))?;
    Ok(svg)
}

fn draw_heat_maps(svg: &mut String, panels: &[Panel], columns: usize, scale: &Scale) -> Drawn {
    let layers = panels.iter().map(|p| p.rows.len()).max().unwrap_or(1);
    let lines = panels.len().div_ceil(columns);
    let height = 80 + (layers * 16).clamp(96, 400);
    let (width, bar_width) = (290 * columns, 110);
    let root = SVGBackend::with_string(svg, ((width + bar_width) as u32, (height * lines) as u32)).into_drawing_area();
    root.fill(&WHITE)?;
    let (maps, bar) = root.split_horizontally(width as i32);
    for (area, panel) in maps.split_evenly((lines, columns)).iter().zip(panels) {
        let (left, right) = (panel.edges[0], panel.edges[panel.edges.len() - 1]);
        let mut chart = ChartBuilder::on(area)
            .caption(&panel.title, ("sans-serif", 14))
            .margin(6)
            .x_label_area_size(36)
            .y_label_area_size(42)
            .build_cartesian_2d(left..right, -0.5..layers as f64 - 0.5)?;
        chart.draw_series(cells(panel, scale))?;
        let mut mesh = chart.configure_mesh();
        mesh.disable_mesh().x_desc("step").y_desc("layer").x_labels(5).y_labels(layers.min(10));
        mesh.x_label_formatter(&whole).y_label_formatter(&whole).draw()?;
    }
    draw_bar(&bar, scale)?;
    root.present()?;
    Ok(())
}

/// The colour bar.
fn draw_bar(area: &DrawingArea<SVGBackend<'_>, Shift>, scale: &Scale) -> Drawn {
    let area = area.margin(22, 42, 0, 12);
    let mut chart = ChartBuilder::on(&area).y_label_area_size(60).build_cartesian_2d(0.0..1.0, 0.0..1.0)?;
    let shade = |i: usize| {
        let (low, high) = (i as f64 / SHADES, (i + 1) as f64 / SHADES);
        Rectangle::new([(0.0, low), (1.0, high)], scale.color((low + high) / 2.0).filled())
    };
    chart.draw_series((0..SHADES as usize).map(shade))?;
    let number = |place: &f64| format!("{:.2}", scale.value(*place));
    let mut mesh = chart.configure_mesh();
    mesh.disable_mesh().disable_x_axis().y_desc(scale.label).y_labels(5).y_label_formatter(&number);
    // The default font size follows that of the chart, which is narrow.
    mesh.y_label_style(("sans-serif", 12)).axis_desc_style(("sans-serif", 12)).draw()?;
    Ok(())
}

/// Labels for axes of whole numbers.
fn whole(x: &f64) -> String {
    if x.fract().abs() < 1e-6 { format!("{x:.0}") } else { String::new() }
}

/// One rectangle for each stretch of one shade.
fn cells(panel: &Panel, scale: &Scale) -> Vec<Rectangle<(f64, f64)>> {
    let mut cells = vec![];
    for (layer, row) in panel.rows.iter().enumerate() {
        let shades: Vec<f64> = row.iter().map(|&v| (scale.place(v) * (SHADES - 1.0)).round()).collect();
        let mut column = 0;
        for stretch in shades.chunk_by(|a, b| a == b) {
            let (from, to) = (panel.edges[column], panel.edges[column + stretch.len()]);
            let color = scale.color(stretch[0] / (SHADES - 1.0));
            let y = layer as f64;
            cells.push(Rectangle::new([(from, y - 0.5), (to, y + 0.5)], color.filled()));
            column += stretch.len();
        }
    }
    cells
}

/// A line with its name.
pub struct Line {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

/// A line chart with a logarithmic or linear y axis.
pub fn lines(lines: &[Line], (x, y): (&str, &str), logarithmic: bool) -> Result<String> {
    let mut svg = String::new();
    draw_lines(&mut svg, lines, (x, y), logarithmic).map_err(|e| anyhow!("drawing lines: {e}"))?;
    Ok(svg)
}

fn draw_lines(svg: &mut String, lines: &[Line], (x, y): (&str, &str), logarithmic: bool) -> Drawn {
    // A logarithmic axis is a linear axis of logarithms, labelled with the numbers themselves.
    let shown = |y: f64| if logarithmic { y.max(f64::MIN_POSITIVE).log10() } else { y };
    let all = || lines.iter().flat_map(|l| &l.points);
    let right = all().fold(1.0, |m: f64, p| m.max(p.0));
    let (low, high) = all().fold((f64::MAX, f64::MIN), |(l, h), p| (l.min(shown(p.1)), h.max(shown(p.1))));
    // A logarithmic axis spans at least a factor of 3, so that nearly equal numbers look nearly equal.
    let least = if logarithmic { 3f64.log10() } else { 0.1 };
    let room = 0.05 * (high - low) + 0.5 * (least - (high - low)).max(0.0);
    let root = SVGBackend::with_string(svg, (900, 380)).into_drawing_area();
    root.fill(&WHITE)?;
    let (area, legend) = root.split_horizontally(720);
    let mut chart = ChartBuilder::on(&area)
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..right, low - room..high + room)?;
    let number = |y: &f64| if logarithmic { format!("{:.2e}", 10f64.powf(*y)) } else { format!("{y:.2}") };
    let mut mesh = chart.configure_mesh();
    mesh.x_desc(x).y_desc(y).y_label_formatter(&number).x_label_formatter(&whole);
    mesh.light_line_style(TRANSPARENT).draw()?;
    for (i, line) in lines.iter().enumerate() {
        let style = COLORS[i % COLORS.len()].stroke_width(2);
        let points = line.points.iter().map(|&(x, y)| (x, shown(y)));
        let y = 24 + 20 * i as i32;
        // Every third line is dashed, so that a line beneath it remains visible.
        if i % 3 == 2 {
            chart.draw_series(DashedLineSeries::new(points, 6, 6, style))?;
            legend.draw(&DashedPathElement::new([(4, y), (26, y)], 6, 6, style))?;
        } else {
            chart.draw_series(LineSeries::new(points, style))?;
            legend.draw(&PathElement::new([(4, y), (26, y)], style))?;
        }
        legend.draw(&Text::new(line.name.clone(), (32, y - 6), ("sans-serif", 13)))?;
    }
    root.present()?;
    Ok(())
}
