//! The report of a training run: one self-contained HTML page.

use std::fmt::Write;

use anyhow::{Result, anyhow};
use indicatif::HumanBytes;
use plotters::chart::SeriesLabelPosition::UpperRight;
use plotters::prelude::*;
use throughline::Plan;

use crate::page::{escape, start, table};
use crate::training::{Outcome, TrainFlags};

/// Colours that remain distinct for colour-blind readers (Okabe and Ito 2008).
const TRAINING: RGBColor = RGBColor(86, 180, 233);
const VALIDATION: RGBColor = RGBColor(213, 94, 0);

/// The font of all labels in charts.
const FONT: (&str, u32) = ("sans-serif", 15);

/// The page: curves, settings, memory table, sample.
pub fn html(flags: &TrainFlags, outcome: &Outcome) -> Result<String> {
    let s = &outcome.summary;
    let config = outcome.trainer.config();
    let text = flags.text_path();
    let heading = format!("A GPT learns {}", text.file_name().unwrap_or_default().to_string_lossy());
    let mut page = start("throughline: a training run", &heading);
    write!(
        page,
        "<p>{} parameters, {} steps of {} tokens on {}: validation loss <b>{:.3}</b> nats per character, \
         {:.0} tokens/s.</p>\n{}\n<h2>Settings</h2>\n",
        s.parameters,
        s.steps,
        config.tokens_per_step(),
        escape(&s.adapter),
        s.val_loss,
        s.tokens_per_s,
        loss_chart(outcome)?
    )?;
    // By way of text, which prints an f32 as 1e-5; converting it to f64 would print all of its digits.
    let settings: serde_json::Value = serde_json::from_str(&serde_json::to_string(config)?)?;
    let mut rows = vec![];
    flatten("", &settings, &mut rows);
    rows.push(("first step, seconds".into(), format!("{:.2}", s.first_step_s)));
    table(&mut page, &["setting", "value"], rows.into_iter().map(|(k, v)| vec![k, v]))?;
    memory(&mut page, outcome)?;
    write!(page, "<h2>A sample</h2>\n<pre>{}</pre>\n</html>\n", escape(&outcome.sample))?;
    Ok(page)
}

fn loss_chart(outcome: &Outcome) -> Result<String> {
    let mut svg = String::new();
    let err = |e: &dyn std::fmt::Display| anyhow!("drawing the loss chart: {e}");
    {
        let root = SVGBackend::with_string(&mut svg, (900, 400)).into_drawing_area();
        root.fill(&WHITE).map_err(|e| err(&e))?;
        let train = smooth(&outcome.losses);
        let points = || outcome.history.iter().map(|p| (p.step as f64, f64::from(p.val_loss)));
        let all = || train.iter().copied().chain(points()).filter(|p| p.1.is_finite());
        let (low, high) = all().fold((f64::MAX, f64::MIN), |(l, h), p| (l.min(p.1), h.max(p.1)));
        let last = all().fold(1.0, |m, p| p.0.max(m));
        let mut chart = ChartBuilder::on(&root)
            .margin(10)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(0.0..last, (low - 0.1)..(high + 0.1))
            .map_err(|e| err(&e))?;
        let mut mesh = chart.configure_mesh();
        mesh.x_desc("step").y_desc("nats per character").x_label_formatter(&|x| format!("{x:.0}"));
        mesh.label_style(FONT).axis_desc_style(FONT);
        mesh.light_line_style(TRANSPARENT).draw().map_err(|e| err(&e))?;
        let training = chart.draw_series(LineSeries::new(train.iter().copied(), TRAINING)).map_err(|e| err(&e))?;
        training.label("training, mean of 20 steps").legend(|(x, y)| PathElement::new([(x, y), (x + 20, y)], TRAINING));
        let validation = chart.draw_series(LineSeries::new(points(), VALIDATION.stroke_width(2)).point_size(3));
        let validation = validation.map_err(|e| err(&e))?;
        validation
            .label("validation")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 20, y)], VALIDATION.stroke_width(2)));
        let mut legend = chart.configure_series_labels();
        legend.position(UpperRight).label_font(FONT).border_style(BLACK).background_style(WHITE);
        legend.draw().map_err(|e| err(&e))?;
        root.present().map_err(|e| err(&e))?;
    }
    Ok(svg)
}

/// Means of 20 steps: single losses are too noisy to read.
fn smooth(losses: &[(u64, f32)]) -> Vec<(f64, f64)> {
    let mean = |chunk: &[(u64, f32)]| {
        let n = chunk.len() as f64;
        let sums = chunk.iter().fold((0.0, 0.0), |s, l| (s.0 + l.0 as f64, s.1 + f64::from(l.1)));
        (sums.0 / n, sums.1 / n)
    };
    losses.chunks(20).map(mean).collect()
}

fn memory(page: &mut String, outcome: &Outcome) -> Result<()> {
    let plan: &Plan = outcome.trainer.plan();
    let bytes = |n: usize| HumanBytes(n as u64).to_string();
    write!(
        page,
        "<h2>Memory</h2>\n<p>The plan for forward and backward has {} nodes, {} dispatches and {:.1} MFLOP. It uses \
         {} in {} buffers, which {} values share. With parameters, gradients, both moments and the rest, the total \
         is {}.</p>\n",
        plan.steps().len(),
        plan.dispatches(),
        plan.flops() as f64 / 1e6,
        bytes(plan.buffer_bytes()),
        plan.buffers().len(),
        plan.buffers().iter().map(|b| b.values.len()).sum::<usize>(),
        bytes(outcome.summary.peak_buffer_bytes)
    )?;
    let rows = plan
        .buffers()
        .iter()
        .enumerate()
        .map(|(i, b)| vec![format!("b{i}"), bytes(b.bytes), b.values.len().to_string(), shorten(&b.values)]);
    table(page, &["buffer", "size", "values", "values it holds, in order"], rows)?;
    writeln!(page, "<details><summary>The whole plan</summary><pre>{}</pre></details>", escape(&plan.to_string()))?;
    Ok(())
}

fn shorten(names: &[String]) -> String {
    match names {
        [first, second, third, .., last] if names.len() > 6 => format!("{first}, {second}, {third}, ... {last}"),
        _ => names.join(", "),
    }
}

/// `{a: {b: 1}}` as rows `a.b`, `1`.
fn flatten(prefix: &str, value: &serde_json::Value, rows: &mut Vec<(String, String)>) {
    match value {
        serde_json::Value::Object(fields) => {
            for (key, value) in fields {
                let name = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                flatten(&name, value, rows);
            }
        }
        serde_json::Value::String(s) => rows.push((prefix.to_string(), s.clone())),
        other => rows.push((prefix.to_string(), other.to_string())),
    }
}
