//! The tasks on Meganeura, which has a training graph of SmolLM2-135M of its own: gradients and plain SGD.

use meganeura::models::smollm2::{SmolLM2Config, build_training_graph};
use shapes::{Task, arguments, measure, not_offered, numbers, smollm2_batch};

const LIBRARY: &str = "meganeura 0.3.0";

fn main() {
    let (name, task, time) = arguments();
    let Task::SmolLm2(tokens) = task else { not_offered(LIBRARY, &name) };
    let config = SmolLM2Config::smollm2_135m();
    let vocab = config.vocab_size as usize;
    let mut session = meganeura::build_session(&build_training_graph(&config, tokens));
    for (i, (param, buffer)) in session.plan().param_buffers.clone().into_iter().enumerate() {
        let len = session.plan().buffers[buffer.0 as usize] / 4;
        let values: Vec<f32> = numbers(i as u64, len).iter().map(|v| v * 0.035).collect();
        session.set_parameter(&param, &values);
    }
    let (ids, targets) = smollm2_batch(tokens);
    let mut one_hot = vec![0.0; tokens * vocab];
    for (row, target) in one_hot.chunks_mut(vocab).zip(targets) {
        row[target as usize] = 1.0;
    }
    session.set_learning_rate(1e-5);
    session.set_input_u32("token_ids", &ids);
    session.set_input("labels", &one_hot);
    let run = || {
        session.step();
        session.wait();
        session.read_loss()
    };
    measure(LIBRARY, &name, time, run, f64::from);
}
