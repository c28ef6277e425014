//! The charts of the report, each with a caption.

use anyhow::Result;

use crate::Experiment;
use crate::chart::{self, Kind, Line, Panel, Scale};
use crate::lab::{Run, Step};

/// Steps averaged into one point of a loss curve: single losses are too noisy to read.
const SMOOTH: usize = 10;

/// The second chart shows every step of this fraction of the run, but at least this many.
const EARLY: (u64, u64) = (8, 30);

/// A chart.
pub struct Figure {
    /// File name, without the extension.
    pub name: &'static str,
    pub svg: String,
    pub caption: String,
}

/// All charts, in the order of the page.
pub fn all(e: &Experiment) -> Result<Vec<Figure>> {
    let (added, gained) = (contribution_scale(), gain_scale(e));
    let early = (e.lab.steps / EARLY.0).max(EARLY.1).min(e.lab.steps);
    let all_along = |s: &Step| s.lens.is_some();
    Ok(vec![
        Figure {
            name: "contribution",
            svg: chart::heat_maps(&panels(e, &e.runs, all_along, added_by), 3, &added)?,
            caption:
                "What each layer adds to the stream during training: its RMS divided by the RMS of the stream it is \
                      added to (attention and feed-forward half as the root of their sum of squares). Dark is nothing."
                    .into(),
        },
        Figure {
            name: "kick_in",
            svg: chart::heat_maps(&panels(e, &e.runs, |s| s.step < early, added_by), 3, &added)?,
            caption: format!("The same in each of the first {early} steps, when layers kick in."),
        },
        Figure {
            name: "lens",
            svg: chart::heat_maps(&panels(e, &e.runs, all_along, gain), 3, &gained)?,
            caption: "How much each layer lowers the loss of the logit lens, which applies the final norm and head to \
                      the stream after every layer. Blue helps, orange hurts, white does nothing."
                .into(),
        },
        Figure {
            name: "gradient",
            svg: chart::lines(&gradients(e), ("layers before this point of the stream", "RMS of gradient"), true)?,
            caption:
                "RMS of the gradient of the loss with respect to the stream at each depth, before the first step, from \
                      the embedding on the left to the head on the right. With plain init, weights are not scaled down \
                      with depth."
                    .into(),
        },
        Figure {
            name: "loss",
            svg: chart::lines(&losses(&e.runs), ("step", "nats per character"), false)?,
            caption: format!("Training loss. Each point is the mean of up to {SMOOTH} steps."),
        },
        Figure {
            name: "blocks_loss",
            svg: chart::lines(&losses(&e.blocks), ("step", "nats per character"), false)?,
            caption: format!(
                "Training loss of four blocks with the same number of parameters, all pre-norm with GPT-2's \
                 initialisation. Each point is the mean of up to {SMOOTH} steps."
            ),
        },
        Figure {
            name: "blocks_contribution",
            svg: chart::heat_maps(&panels(e, &e.blocks, all_along, added_by), 2, &added)?,
            caption: "What each layer of the four blocks adds to the stream, measured as in the first chart.".into(),
        },
    ])
}

fn contribution_scale() -> Scale {
    Scale { label: "added / stream", low: 0.01, high: 1.0, kind: Kind::Logarithmic }
}

/// Covers 98% of the gains: scaling to the largest few would leave the rest white.
fn gain_scale(e: &Experiment) -> Scale {
    let mut sizes: Vec<f64> = e.runs.iter().flat_map(|r| &r.steps).flat_map(gain).map(f64::abs).collect();
    sizes.sort_by(f64::total_cmp);
    let most = sizes.get(sizes.len() * 98 / 100).map_or(0.0, |x| x.max(0.01));
    Scale { label: "nats per character", low: -most, high: most, kind: Kind::Diverging }
}

/// For each layer, the loss of the lens before it minus the loss after it.
fn gain(step: &Step) -> Vec<f64> {
    step.lens.as_ref().map_or(vec![], |losses| losses.windows(2).map(|w| w[0] - w[1]).collect())
}

fn added_by(step: &Step) -> Vec<f64> {
    step.contribution.clone()
}

/// A heat map for each run, with a column for each step that `shown` accepts.
fn panels(
    e: &Experiment,
    runs: &[Run],
    shown: impl Fn(&Step) -> bool,
    value: impl Fn(&Step) -> Vec<f64>,
) -> Vec<Panel> {
    let panel = |run: &Run| {
        let seen: Vec<&Step> = run.steps.iter().filter(|s| shown(s)).collect();
        let columns: Vec<Vec<f64>> = seen.iter().map(|s| value(s)).collect();
        let first: Vec<u64> = seen.iter().map(|s| s.step).collect();
        let width = first.get(1).map_or(1, |second| second - first[0]);
        let end = (first[first.len() - 1] + width).min(e.lab.steps);
        let edges = first.into_iter().chain([end]).map(|step| step as f64).collect();
        let rows = (0..e.lab.layers).map(|l| columns.iter().map(|c| c[l]).collect()).collect();
        Panel { title: run.name.clone(), edges, rows }
    };
    runs.iter().map(panel).collect()
}

fn gradients(e: &Experiment) -> Vec<Line> {
    let points = |r: &Run| r.steps[0].stream_grad_rms.iter().enumerate().map(|(l, &g)| (l as f64, g)).collect();
    e.runs.iter().chain(&e.plain).map(|r| Line { name: r.name.clone(), points: points(r) }).collect()
}

fn losses(runs: &[Run]) -> Vec<Line> {
    let mean = |steps: &[Step]| {
        let n = steps.len() as f64;
        let sums = steps.iter().fold((0.0, 0.0), |(x, y), s| (x + s.step as f64, y + f64::from(s.loss)));
        (sums.0 / n, sums.1 / n)
    };
    runs.iter().map(|r| Line { name: r.name.clone(), points: r.steps.chunks(SMOOTH).map(mean).collect() }).collect()
}
