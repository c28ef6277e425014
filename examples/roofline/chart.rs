//! The roofline chart: work per byte against rate, both logarithmic (Williams et al. 2009,
//! <https://doi.org/10.1145/1498765.1498785>).

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::Figure;
use crate::probes::{Roofs, Units};

/// The chart as SVG. Kernels that do no arithmetic have no place on it.
pub fn svg(adapter: &str, unit: &str, roofs: &Roofs, figures: &[Figure]) -> Result<String> {
    let mut svg = String::new();
    draw(&mut svg, adapter, unit, roofs, figures).map_err(|e| anyhow!("drawing the roofline: {e}"))?;
    Ok(svg)
}

type Drawn<T> = Result<T, Box<dyn std::error::Error>>;

fn draw(svg: &mut String, adapter: &str, unit: &str, roofs: &Roofs, figures: &[Figure]) -> Drawn<()> {
    let shown: Vec<&Figure> = figures.iter().filter(|f| f.gflops > 0.0).collect();
    let (left, right) = bounds(shown.iter().map(|f| f.flop_per_byte).chain([roofs.gflops / roofs.gbs]));
    let (low, high) = bounds(shown.iter().map(|f| f.gflops).chain([
        roofs.gflops,
        roofs.gflops_of(Units::Matrices),
        left * roofs.gbs,
    ]));
    let root = SVGBackend::with_string(svg, (1000, 620)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(adapter, ("sans-serif", 16))
        .margin(12)
        .margin_right(150)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d((left..right).log_scale(), (low..high).log_scale())?;
    let number = |x: &f64| if *x < 0.1 { format!("{x:.2}") } else { format!("{x}") };
    let mut mesh = chart.configure_mesh();
    mesh.x_desc("FLOP per byte (filled: forward, open: backward)").y_desc(format!("GFLOP per {unit}"));
    mesh.x_label_formatter(&number).y_label_formatter(&number);
    mesh.light_line_style(TRANSPARENT).draw()?;
    // Even steps on the logarithmic axis; the roof's corner among them.
    let corner = roofs.gflops / roofs.gbs;
    for gflops in [Some(roofs.gflops), roofs.gflops_matrices].into_iter().flatten() {
        let roof = [left, gflops / roofs.gbs, right].map(|x| (x, (x * roofs.gbs).min(gflops)));
        chart.draw_series(LineSeries::new(roof, BLACK.stroke_width(2)))?;
    }
    let label = |text: String, x, y| Text::new(text, (x, y), ("sans-serif", 13));
    chart.draw_series([
        label(format!("{:.1} GFLOP", roofs.gflops), corner, roofs.gflops * 1.4),
        label(format!("{:.2} GB", roofs.gbs), left * 1.1, left * roofs.gbs * 3.0),
    ])?;
    if let Some(gflops) = roofs.gflops_matrices {
        chart.draw_series([label(format!("matrices: {gflops:.1} GFLOP"), gflops / roofs.gbs, gflops * 1.4)])?;
    }
    let mut ops: Vec<&str> = shown.iter().map(|f| f.op).collect();
    ops.dedup();
    for (i, op) in ops.iter().enumerate() {
        let color = Palette99::pick(i).to_rgba();
        let points = shown.iter().filter(|f| f.op == *op).map(|f| {
            let style = if f.direction == "forward" { color.filled() } else { color.stroke_width(1) };
            Circle::new((f.flop_per_byte, f.gflops), 4, style)
        });
        chart.draw_series(points)?;
        // The legend, in the margin.
        let y = 50 + 18 * i as i32;
        root.draw(&Circle::new((866, y), 4, color.filled()))?;
        root.draw(&Text::new(op.to_string(), (878, y - 5), ("sans-serif", 12)))?;
    }
    root.present()?;
    Ok(())
}

/// Powers of ten around the values.
fn bounds(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(v), h.max(v)));
    (10f64.powf(low.log10().floor()), 10f64.powf(high.log10().ceil()))
}
