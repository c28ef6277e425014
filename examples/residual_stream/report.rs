//! The report page.

use std::fmt::Write;

use anyhow::Result;

use crate::figures::Figure;
use crate::lab::Run;
use crate::page::{escape, start, table};
use crate::{Experiment, KickIn, gradient_ratio};

const INTRODUCTION: &str = "<p>The layers of a transformer do not replace what they read. Each one adds to a single \
 stream that runs through all of them. With zero initialisation, or gates that start at zero, the blocks begin by \
 adding nothing: the model is just the embedding and the head, and the gradient reaches the first layer exactly as it \
 left the last. Then the layers kick in. The charts show when, and what happens next.</p>\n";

/// The whole page. It loads no other files.
pub fn html(e: &Experiment, figures: &[Figure]) -> Result<String> {
    let mut page = start("throughline: the residual stream", "The residual stream, made visible");
    let f = &e.lab;
    writeln!(
        page,
        "{INTRODUCTION}<p>{} layers of width {} with {} heads; sequences of {} characters of {}, {} per step; {} steps \
         at a peak learning rate of {}, seed {}; on {}. Columns of the heat maps are {} steps apart. The readings of \
         every step are in readings.jsonl, next to this page.</p>",
        f.layers,
        f.dim,
        f.heads,
        f.context,
        escape(&f.text.file_name().unwrap_or_default().to_string_lossy()),
        f.batch,
        f.steps,
        f.lr,
        f.seed,
        escape(&e.adapter),
        e.every
    )?;
    writeln!(page, "<h2>Six ways to start</h2>")?;
    summary(&mut page, &e.runs)?;
    let (ways, blocks) = figures.split_at(figures.len() - 2);
    ways.iter().try_for_each(|f| figure(&mut page, f))?;
    writeln!(page, "<h2>The order in which layers kicked in</h2>")?;
    writeln!(
        page,
        "<p>A layer kicks in at the first step in which the RMS of what it adds exceeds {} of the RMS of the stream. \
         Layers are counted from 0.</p>\n<ul>",
        e.threshold
    )?;
    for run in &e.runs {
        writeln!(page, "<li><b>{}</b>: {}</li>", escape(&run.name), in_words(&e.kicked_in(run)))?;
    }
    writeln!(page, "</ul>\n<h2>Other blocks</h2>")?;
    writeln!(
        page,
        "<p>The first of the runs above against three other blocks, each a short file: attention and feed-forward side \
         by side (GPT-J, PaLM, arXiv 2204.02311), a second norm after each branch (CogView, arXiv 2105.13290), and \
         values mixed with those of the first layer (arXiv 2410.17897). The width of the feed-forward half makes up \
         for the parameters that a block adds or saves. This is one seed; the <code>architectures</code> example runs \
         several and gives standard errors.</p>"
    )?;
    summary(&mut page, &e.blocks)?;
    blocks.iter().try_for_each(|f| figure(&mut page, f))?;
    writeln!(page, "</html>")?;
    Ok(page)
}

fn summary(page: &mut String, runs: &[Run]) -> std::fmt::Result {
    let rows = runs.iter().map(|run| {
        let stream = run.steps.last().and_then(|s| s.stream_rms.last());
        vec![
            run.name.clone(),
            run.parameters.to_string(),
            format!("{:.3}", run.val_loss),
            format!("{:.2}", gradient_ratio(run)),
            stream.map_or(String::new(), |x| format!("{x:.2}")),
        ]
    });
    let head = [
        "",
        "parameters",
        "validation loss, nats per character",
        "gradient at the embedding / gradient at the head, before training",
        "RMS of the stream after the last layer, after training",
    ];
    table(page, &head, rows)
}

fn figure(page: &mut String, figure: &Figure) -> std::fmt::Result {
    let Figure { svg, caption, .. } = figure;
    writeln!(page, "<figure>{svg}<figcaption>{}</figcaption></figure>", escape(caption))
}

/// `layer 2 at step 5, layers 0 and 1 at step 7; never: layer 3.`
fn in_words(order: &[KickIn]) -> String {
    let parts: Vec<String> = order
        .chunk_by(|a, b| a.step == b.step)
        .map(|group| {
            let layers: Vec<usize> = group.iter().map(|k| k.layer).collect();
            match group[0].step {
                Some(0) => format!("{} from the start", name(&layers)),
                Some(step) => format!("{} at step {step}", name(&layers)),
                None => format!("{} not in this run", name(&layers)),
            }
        })
        .collect();
    format!("{}.", parts.join("; "))
}

/// `layers 0 to 3, 5 and 7`.
fn name(layers: &[usize]) -> String {
    let ranges: Vec<String> = layers
        .chunk_by(|a, b| a + 1 == *b)
        .flat_map(|range| match range {
            [first, _, .., last] => vec![format!("{first} to {last}")],
            few => few.iter().map(usize::to_string).collect(),
        })
        .collect();
    match &ranges[..] {
        [one] if layers.len() == 1 => format!("layer {one}"),
        [one] => format!("layers {one}"),
        [first @ .., last] => format!("layers {} and {last}", first.join(", ")),
        [] => "no layer".into(),
    }
}
