//! Adapters out of a run and into one.

use super::trainer::Trainer;
use crate::error::{Error, Result};
use crate::model::{Adapter, Model};
use crate::nn::{Lora, rows_of_part, table_of_part};

impl Trainer {
    /// The adapter after everything submitted so far: to save it in a file that others load, or to merge it into the
    /// weights. Resolves once the device has been polled; outside of frames, use
    /// [`adapter_blocking`](Self::adapter_blocking).
    ///
    /// # Errors
    ///
    /// If the run trains all weights.
    pub async fn adapter(&self) -> Result<Adapter> {
        let (model, lora) = self.adapted()?;
        self.graph_trainer().check_whole()?;
        let values = self.params().read(self.gpu()).await?;
        let names = self.params().layout.tensors.iter().map(|(name, _)| name.clone());
        Adapter::new("adapter of a trainer", model, lora, names.zip(values))
    }

    /// [`adapter`](Self::adapter), waiting for the GPU.
    pub fn adapter_blocking(&self) -> Result<Adapter> {
        self.gpu().run_blocking(self.adapter())
    }

    /// Goes on with an adapter from a file. Moments and step count stay as they are: for a run that was interrupted
    /// there are [checkpoints](super::checkpoint). [`Adapter::lora`] has the settings to make such a trainer.
    ///
    /// # Errors
    ///
    /// If the run trains all weights, or the adapter lacks one of its tensors or has another rank: then the trainer is
    /// as it was.
    pub fn load_adapter(&mut self, adapter: &Adapter) -> Result<()> {
        let (model, lora) = self.adapted()?;
        let mut all = vec![];
        for (name, shape) in &self.params().layout.tensors {
            let (whole, _) = table_of_part(name);
            let values = adapter.values(lora, whole)?;
            let dims = model.params().iter().find(|(param, _)| param == whole).map_or(shape, |(_, dims)| dims);
            let rows = rows_of_part(name, shape, dims).filter(|_| values.len() == dims.len());
            let rows = rows.ok_or_else(|| Error::data(name, format!("{dims}"), format!("{} values", values.len())))?;
            all.push(values[rows.start * dims.cols()..rows.end * dims.cols()].to_vec());
        }
        self.params().write(self.gpu(), &all)
    }

    fn adapted(&self) -> Result<(&Model, &Lora)> {
        match (self.base(), &self.config().lora) {
            (Some(base), Some(lora)) => Ok((base, lora)),
            _ => Err(Error::config("lora", "this run trains all weights; it has no adapter")),
        }
    }
}
