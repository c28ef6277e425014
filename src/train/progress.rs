//! What a training program shows while it runs, and when it stops: arithmetic on numbers that the caller has. Nothing here
//! prints or looks at a clock.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use crate::error::{Error, Result};

/// The share of the smoothed loss that a step keeps.
const KEPT: f64 = 0.9;

/// Steps that the speed is taken over.
const WINDOW: usize = 32;

/// How far a run is, how fast it goes and when it will be done. Print it, or show its numbers in a bar or window.
///
/// ```
/// use std::time::Duration;
/// use throughline::train::Progress;
/// let mut progress = Progress::new(0, 60)?;
/// for step in 1..=20 {
///     let since_start = Duration::from_millis(1500) * step; // `Instant::elapsed` in a program
///     progress.step(since_start, 256, 2.5);
/// }
/// assert_eq!(progress.to_string(), "step 20/60, loss 2.5000, 171 tokens/s, 1:00 left");
/// progress.set_bytes(540_000_000);
/// assert!(progress.to_string().ends_with("1:00 left, 540 MB"));
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Progress {
    done: u64,
    steps: u64,
    /// Mean of the losses, recent ones weighing more, and the weight that they have together.
    loss: Option<(f64, f64)>,
    /// When the last steps ended, and their tokens; first the beginning of all.
    ends: VecDeque<(Duration, usize)>,
    bytes: Option<u64>,
}

impl Progress {
    /// A run to step `steps` of which `done` were made before: a resumed one does not begin at 0.
    ///
    /// # Errors
    ///
    /// If `done` is more than `steps`.
    pub fn new(done: u64, steps: u64) -> Result<Self> {
        Error::unless(done <= steps, "done", &format!("at most {steps}, the steps of the run"), done)?;
        Ok(Progress { done, steps, loss: None, ends: [(Duration::ZERO, 0)].into(), bytes: None })
    }

    /// Counts a step that is over: the time since the run, or this part of it, began, the tokens of the step and its loss.
    pub fn step(&mut self, since_start: Duration, tokens: usize, loss: f32) {
        self.done = self.done.saturating_add(1);
        let (mean, weight) = self.loss.unwrap_or((0.0, 0.0));
        let total = KEPT * weight + 1.0;
        self.loss = Some(((KEPT * weight * mean + f64::from(loss)) / total, total));
        self.ends.push_back((since_start, tokens));
        if self.ends.len() > WINDOW + 1 {
            self.ends.pop_front();
        }
    }

    /// Says how many bytes the run takes, such as [`Trainer::buffer_bytes`](super::Trainer::buffer_bytes).
    pub fn set_bytes(&mut self, bytes: u64) {
        self.bytes = Some(bytes);
    }

    /// Steps that are done.
    pub fn done(&self) -> u64 {
        self.done
    }

    /// Steps of the whole run.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Mean loss of the last ten steps or so, in nats per token; recent ones weigh more. `None` before the first.
    pub fn loss(&self) -> Option<f32> {
        self.loss.map(|(mean, _)| mean as f32)
    }

    /// Time and tokens of the last steps, and how many they are.
    fn recent(&self) -> Option<(f64, usize, usize)> {
        let (first, last) = (self.ends.front()?.0, self.ends.back()?.0);
        let time = last.saturating_sub(first).as_secs_f64();
        let tokens = self.ends.iter().skip(1).map(|(_, tokens)| tokens).sum();
        (time > 0.0).then_some((time, tokens, self.ends.len() - 1))
    }

    /// Tokens per second over the last 32 steps. `None` before the first.
    pub fn tokens_per_second(&self) -> Option<f64> {
        self.recent().map(|(time, tokens, _)| tokens as f64 / time)
    }

    /// Time until the last step is done, if the rest is as fast as the last 32 steps. `None` before the first.
    pub fn time_left(&self) -> Option<Duration> {
        let (time, _, steps) = self.recent()?;
        let left = time / steps as f64 * self.steps.saturating_sub(self.done) as f64;
        Duration::try_from_secs_f64(left).ok()
    }
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {}/{}", self.done, self.steps)?;
        if let Some(loss) = self.loss() {
            write!(f, ", loss {loss:.4}")?;
        }
        if let Some(speed) = self.tokens_per_second() {
            write!(f, ", {speed:.0} tokens/s")?;
        }
        if let Some(left) = self.time_left() {
            let seconds = (left.as_secs_f64().round()) as u64;
            let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
            match hours {
                0 => write!(f, ", {minutes}:{seconds:02} left")?,
                _ => write!(f, ", {hours}:{minutes:02}:{seconds:02} left")?,
            }
        }
        match self.bytes {
            Some(bytes) => write!(f, ", {:.0} MB", bytes as f64 / 1e6),
            None => Ok(()),
        }
    }
}

/// Tells when training longer makes a model worse: when its loss on validation data has not improved several times.
///
/// ```
/// use throughline::train::EarlyStop;
/// let mut early = EarlyStop::new(2)?;
/// assert!(early.improves(100, 1.9)); // a program saves the model here
/// assert!(!early.improves(200, 2.0) && !early.is_over());
/// assert!(!early.improves(300, 1.95) && early.is_over());
/// assert_eq!(early.best(), Some((100, 1.9)));
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct EarlyStop {
    patience: usize,
    /// The smallest loss and the step that it was measured after.
    best: Option<(u64, f32)>,
    /// Losses since then.
    since: usize,
}

impl EarlyStop {
    /// Stops after `patience` losses in a row that are not better than the best one.
    ///
    /// # Errors
    ///
    /// If `patience` is zero.
    pub fn new(patience: usize) -> Result<Self> {
        Error::unless(patience > 0, "patience", "at least 1", patience)?;
        Ok(EarlyStop { patience, best: None, since: 0 })
    }

    /// Takes a loss on validation data, measured after `step`. Returns whether it is the best so far. NaN never is.
    pub fn improves(&mut self, step: u64, loss: f32) -> bool {
        let improves = loss < self.best.map_or(f32::INFINITY, |(_, best)| best);
        if improves {
            (self.best, self.since) = (Some((step, loss)), 0);
        } else {
            self.since += 1;
        }
        improves
    }

    /// Whether it is time to stop.
    pub fn is_over(&self) -> bool {
        self.since >= self.patience
    }

    /// The step with the smallest loss, and that loss.
    pub fn best(&self) -> Option<(u64, f32)> {
        self.best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_that_of_the_last_steps() {
        let mut progress = Progress::new(10, 1000).unwrap();
        assert_eq!(progress.to_string(), "step 10/1000");
        assert_eq!((progress.loss(), progress.tokens_per_second(), progress.time_left()), (None, None, None));
        // The first step compiles kernels.
        let ends = (0..40).map(|i| Duration::from_secs(if i == 0 { 100 } else { 100 + 10 * i }));
        for (i, end) in ends.enumerate() {
            progress.step(end, 50, if i < 20 { 8.0 } else { 1.0 });
        }
        assert_eq!((progress.done(), progress.tokens_per_second()), (50, Some(5.0)));
        assert_eq!(progress.time_left(), Some(Duration::from_secs(9500)));
        let mean = (7.0 * (0.9_f64.powi(20) - 0.9_f64.powi(40)) + (1.0 - 0.9_f64.powi(40))) / (1.0 - 0.9_f64.powi(40));
        assert!((f64::from(progress.loss().unwrap()) - mean).abs() < 1e-6, "{progress:?} {mean}");
        assert!(progress.to_string().ends_with("5 tokens/s, 2:38:20 left"), "{progress}");
        // A run that goes on past its end has no time left.
        let mut late = Progress::new(1, 1).unwrap();
        late.step(Duration::from_secs(1), 1, 1.0);
        assert_eq!(late.time_left(), Some(Duration::ZERO));
        assert!(Progress::new(2, 1).unwrap_err().to_string().contains("at most 1, the steps of the run, but is 2"));
    }

    #[test]
    fn nan_is_no_improvement() {
        let mut early = EarlyStop::new(1).unwrap();
        assert!(!early.improves(1, f32::NAN) && early.is_over() && early.best().is_none());
        assert!(early.improves(2, 3.0) && !early.is_over());
        assert!(EarlyStop::new(0).is_err());
    }
}
