//! The training loop.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use throughline::model::{Adapter, Model};
use throughline::train::checkpoint::Checkpoint;
use throughline::train::data::{Batch, Batches};
use throughline::train::{EarlyStop, Progress, StepLoss, TrainPlan, Trainer};
use throughline::{AdapterClass, Gpu, Profile};

use crate::flags::{Flags, Job, is_gguf};

/// The most batches of a validation.
const VAL_BATCHES: usize = 64;

pub fn checkpoint_path(out: &Path) -> PathBuf {
    out.join("checkpoint.safetensors")
}

/// Says what a run takes.
pub fn dry_run(job: &Job, flags: &Flags) -> Result<()> {
    // What this machine's device would run, or any, if there is none.
    let profile = match Gpu::headless_blocking() {
        Ok(gpu) => gpu.profile().clone(),
        Err(_) => Profile::portable(AdapterClass::Gpu),
    };
    let plan = TrainPlan::new(&job.config, &job.options(flags), &profile)?;
    let steps = job.config.schedule.steps;
    eprintln!("{steps} steps of {} tokens, {:.2} epochs", job.config.tokens_per_step(), job.batches.epochs(steps));
    eprintln!("{}", memory(&plan));
    if flags.json {
        let stats = job.batches.stats();
        println!(
            "{}",
            serde_json::json!({
                "examples": stats.examples, "tokens": stats.tokens, "counted": stats.counted, "steps": steps,
                "parameters": plan.parameter_count(), "bytes": plan.bytes(), "base_bytes": plan.base_bytes(),
            })
        );
    }
    Ok(())
}

fn memory(plan: &TrainPlan) -> String {
    let (all, base) = (HumanBytes(plan.bytes() as u64), HumanBytes(plan.base_bytes() as u64));
    let parameters = plan.parameter_count();
    format!(
        "{parameters} trained parameters; {all} of device memory, of which the base has {base}\n{}",
        plan.recomputed()
    )
}

/// A run in progress.
struct Run<'a> {
    trainer: Trainer,
    batches: Batches,
    validation: Vec<Batch>,
    model: &'a Model,
    data_hash: u64,
    out: &'a Path,
    bar: ProgressBar,
    started: Instant,
    progress: Progress,
    last_loss: f32,
    early: EarlyStop,
    /// Whether the last validation was the best, or there is none.
    improved: bool,
}

/// Trains, saves and exports.
pub fn train(gpu: Gpu, job: Job, flags: &Flags) -> Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    let handler = stop.clone();
    ctrlc::set_handler(move || handler.store(true, Ordering::SeqCst)).context("setting the Ctrl-C handler")?;
    let out = flags.out.as_deref().context("--out is missing")?;
    std::fs::create_dir_all(out).with_context(|| format!("creating the folder {}", out.display()))?;
    let plan = TrainPlan::new(&job.config, &job.options(flags), gpu.profile())?;
    eprintln!("{}\n{}", gpu.describe(), memory(&plan));
    let mut trainer = gpu.run_blocking(Trainer::from_plan(&gpu, &plan))?;
    match &job.checkpoint {
        Some(checkpoint) => checkpoint.restore_blocking(&mut trainer)?,
        None if job.config.lora.is_none() => job.model.load_blocking(&gpu, trainer.params())?,
        None => {}
    }
    let steps = job.config.schedule.steps;
    let bar = ProgressBar::new(steps).with_position(trainer.step_count());
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}, {eta} left")?);
    bar.reset_eta();
    let validation = job.validation.as_ref().map_or(Ok(vec![]), |val| val.evaluation(VAL_BATCHES))?;
    let mut run = Run {
        progress: Progress::new(trainer.step_count().min(steps), steps)?,
        trainer,
        batches: job.batches,
        validation,
        model: &job.model,
        data_hash: job.data_hash,
        out,
        bar,
        started: Instant::now(),
        last_loss: f32::NAN,
        early: EarlyStop::new(flags.patience.unwrap_or(usize::MAX))?,
        improved: true,
    };
    // Of what is trained the best is saved, even if the model was better before.
    let before = if job.checkpoint.is_some() { run.evaluate()? } else { run.validate()? };
    let every = flags.eval_every.unwrap_or(steps / 10).max(1);
    let mut pending: Option<StepLoss> = None;
    while run.trainer.step_count() < steps && !stop.load(Ordering::SeqCst) {
        let step = run.trainer.step_count();
        let batches = run.batches.step(step)?;
        if let Some(loss) = pending.replace(run.trainer.step(&batches)?) {
            run.heard(loss)?;
        }
        if (step + 1).is_multiple_of(every) && step + 1 < steps {
            pending.take().map_or(Ok(()), |loss| run.heard(loss))?;
            run.evaluate()?;
            run.save()?;
            if run.early.is_over() {
                run.say("stopped: the validation loss has not become lower");
                break;
            }
        }
    }
    pending.take().map_or(Ok(()), |loss| run.heard(loss))?;
    let after = run.evaluate()?;
    run.save()?;
    run.bar.finish_and_clear();
    if run.trainer.step_count() < steps && stop.load(Ordering::SeqCst) {
        eprintln!("stopped at step {}; go on with --resume", run.trainer.step_count());
    }
    if let Some(export) = &flags.export {
        run.export(export, flags)?;
    }
    if flags.json {
        let (tokens_per_s, bytes) = (run.progress.tokens_per_second(), run.trainer.buffer_bytes());
        let best = run.early.best().map(|(_, loss)| loss);
        println!(
            "{}",
            serde_json::json!({
                "before": before, "after": after, "best": best, "train_loss": run.last_loss,
                "steps": run.trainer.step_count(), "parameters": run.trainer.parameter_count(),
                "tokens_per_s": tokens_per_s, "buffer_bytes": bytes, "adapter": gpu.describe(),
            })
        );
    }
    Ok(())
}

impl Run<'_> {
    /// Takes the loss of a step.
    fn heard(&mut self, loss: StepLoss) -> Result<()> {
        let step = loss.step;
        self.last_loss = loss.wait_blocking()?;
        ensure!(
            self.last_loss.is_finite(),
            "the loss is {} at step {step}; try a lower --lr. The last checkpoint in {} is untouched",
            self.last_loss,
            self.out.display()
        );
        self.progress.step(self.started.elapsed(), self.trainer.config().tokens_per_step(), self.last_loss);
        self.bar.set_position(step + 1);
        let rate = self.progress.tokens_per_second().unwrap_or_default();
        let bytes = HumanBytes(self.trainer.buffer_bytes() as u64);
        self.bar.set_message(format!("loss {:.3}, {rate:.0} tokens/s, {bytes}", self.last_loss));
        Ok(())
    }

    /// Validates, and says whether this is the best so far.
    fn evaluate(&mut self) -> Result<Option<f32>> {
        let loss = self.validate()?;
        let step = self.trainer.step_count();
        self.improved = loss.is_none_or(|loss| self.early.improves(step, loss));
        Ok(loss)
    }

    fn validate(&mut self) -> Result<Option<f32>> {
        let mut said = format!("step {}", self.trainer.step_count());
        if self.last_loss.is_finite() {
            said += &format!(", training loss {:.4}", self.last_loss);
        }
        if self.validation.is_empty() {
            self.say(&said);
            return Ok(None);
        }
        let loss = self.trainer.evaluate_blocking(&self.validation)?;
        self.say(&format!("{said}, validation loss {loss:.4}"));
        Ok(Some(loss))
    }

    /// Saves the checkpoint, and the adapter if it is the best so far.
    fn save(&self) -> Result<()> {
        Checkpoint::save_trainer_blocking(&self.trainer, "", self.data_hash, &checkpoint_path(self.out))?;
        if !self.improved {
            return Ok(());
        }
        match self.trainer.base() {
            Some(_) => {
                let base = Path::new(self.model.weights().path());
                let base = std::path::absolute(base).unwrap_or(base.to_path_buf());
                Ok(self.trainer.adapter_blocking()?.save_peft(self.out, &base.display().to_string())?)
            }
            None => Ok(self.model.save_blocking(self.out, self.trainer.gpu(), self.trainer.params())?),
        }
    }

    /// Writes a whole model with the best adapter merged into it.
    fn export(&self, path: &Path, flags: &Flags) -> Result<()> {
        let source = match self.trainer.base() {
            Some(_) => None,
            None => Some(Model::open(self.out)?),
        };
        let adapter = match self.trainer.base() {
            Some(_) => Some(Adapter::open(self.out, self.model)?),
            None => None,
        };
        let mut values = |name: &str| match (&adapter, &source) {
            (Some(adapter), _) => adapter.merged(self.model, name),
            (None, Some(trained)) => trained.values(name).map(Some),
            (None, None) => Ok(None),
        };
        match is_gguf(path) {
            true => self.model.save_gguf(path, flags.export_types()?, &mut values)?,
            false => self.model.save_merged(path, &mut values)?,
        }
        eprintln!("exported to {}", path.display());
        Ok(())
    }

    /// Prints a line above the bar, or to stderr where there is no terminal.
    fn say(&self, line: &str) {
        match self.bar.is_hidden() {
            true => eprintln!("{line}"),
            false => self.bar.println(line),
        }
    }
}
