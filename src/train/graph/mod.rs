//! Training of any graph. [`Trainer`](super::Trainer) is built on this.

mod checkpoint;
mod config;
mod evaluate;
mod feed;
mod loss;
mod plan;
mod slices;
mod trainer;

pub use checkpoint::GraphCheckpoint;
pub use config::{GraphTrainConfig, GraphTrainOptions};
pub use feed::{Feed, Feeds};
pub use loss::{StepLoss, StepReport};
pub use plan::GraphTrainPlan;
pub use slices::{SlicedStep, StepSlices};
pub use trainer::GraphTrainer;
