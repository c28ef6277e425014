//! Networks built from the crate's layers: names, shapes and initial values of their parameters, and that they learn.

mod common;

use std::collections::{BTreeSet, HashMap};

use common::gpu;
use throughline::graph::{ParamInit, Source};
use throughline::nn::{
    Block, Builder, Init, Linear, NormPlacement, Positions, StandardBlock, Transformer, TransformerConfig,
    TransformerEncoder, is_hidden_matrix,
};
use throughline::ops::patches::Conv;
use throughline::ops::random_array;
use throughline::probe;
use throughline::reference::{self, Array};
use throughline::rng::Rng;
use throughline::train::{GraphTrainConfig, GraphTrainOptions, GraphTrainer};
use throughline::{Graph, Result, TensorType, Value};

/// Name, shape and initialisation of all parameters.
fn params(g: &Graph) -> Vec<(String, Vec<usize>, ParamInit)> {
    let of = |p: Value| (g.name(p).to_string(), g.ty(p).shape.dims().to_vec(), g.init(p).unwrap());
    g.params().into_iter().map(of).collect()
}

fn names(g: &Graph) -> Vec<&str> {
    g.params().into_iter().map(|p| g.name(p)).collect()
}

fn expect<T: std::fmt::Debug>(result: Result<T>, parts: &[&str]) {
    let error = result.unwrap_err().to_string();
    assert!(parts.iter().all(|part| error.contains(part)), "{error}\nexpected: {parts:?}");
}

#[test]
fn layers_without_a_configuration_start_as_pytorchs() -> Result<()> {
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([5, 7, 16]))?;
    let ids = g.input("ids", TensorType::u32([5, 7]))?;
    let mut b = Builder::new(&mut g);
    let y = b.linear("a", x, 4)?;
    let y = b.linear_with("b", y, 9, Linear { bias: false, init: Some(ParamInit::he(4)), ..Linear::default() })?;
    let y = b.layernorm("n", y)?;
    let y = b.scoped("deep", |b| b.rmsnorm("n", y))?;
    let y = b.mlp("m", y, &[8, 3], |g, h| g.gelu("act", h))?;
    let rows = b.embedding("e", ids, 31, 3)?;
    let y = b.add("y", y, rows)?;
    assert_eq!(b.ty(y).shape.dims(), [5, 7, 3]);
    let [sixteen, nine, eight] = [16, 9, 8].map(ParamInit::fan_in);
    assert_eq!(sixteen, ParamInit::Uniform(0.25));
    let expected: [(&str, &[usize], ParamInit); 11] = [
        ("a.weight", &[16, 4], sixteen),
        ("a.bias", &[4], sixteen),
        ("b.weight", &[4, 9], ParamInit::he(4)),
        ("n.weight", &[9], ParamInit::ONES),
        ("n.bias", &[9], ParamInit::ZEROS),
        ("deep.n.weight", &[9], ParamInit::ONES),
        ("m.0.weight", &[9, 8], nine),
        ("m.0.bias", &[8], nine),
        ("m.1.weight", &[8, 3], eight),
        ("m.1.bias", &[3], eight),
        ("e.weight", &[31, 3], ParamInit::Normal(1.0)),
    ];
    let got = params(&g);
    assert_eq!(got.len(), expected.len());
    for (got, expected) in got.iter().zip(expected) {
        assert_eq!((&*got.0, &*got.1, got.2), expected);
    }
    Ok(())
}

#[test]
fn convolutions_and_patches_have_kernels_of_their_own() -> Result<()> {
    let mut g = Graph::new();
    let images = g.input("images", TensorType::f32([2, 12, 8, 3]))?;
    let series = g.input("series", TensorType::f32([2, 9, 5]))?;
    let mut b = Builder::new(&mut g);
    let [y, z] = [b.conv2d("two", images, 4, [3, 2], Conv::same())?, b.conv1d("one", series, 6, 3, Conv::causal())?];
    let patches = b.embed_patches("patches", images, 4, 10)?;
    assert_eq!(
        [y, z, patches].map(|v| b.ty(v).shape.dims().to_vec()),
        [vec![2, 12, 8, 4], vec![2, 9, 6], vec![2, 6, 10]]
    );
    expect(b.embed_patches("odd", images, 5, 10), &["`odd`", "5 x 5", "[2, 12, 8, 3]"]);
    expect(b.embed_patches("none", images, 0, 10), &["`none`", "0 x 0"]);
    expect(b.embed_patches("flat", series, 3, 10), &["`flat`", "[2, 9, 5]"]);
    expect(b.conv2d("flat", series, 3, [1, 1], Conv::default()), &["`flat`", "[n, height, width, channels]"]);
    let expected: [(&str, &[usize], usize); 6] = [
        ("two.weight", &[3, 2, 3, 4], 18),
        ("two.bias", &[4], 18),
        ("one.weight", &[3, 5, 6], 15),
        ("one.bias", &[6], 15),
        ("patches.weight", &[48, 10], 48),
        ("patches.bias", &[10], 48),
    ];
    for (got, (name, shape, fan_in)) in params(&g).iter().zip(expected) {
        assert_eq!((&*got.0, &*got.1, got.2), (name, shape, ParamInit::fan_in(fan_in)));
    }
    Ok(())
}

/// The pixels of each patch are those of its place.
#[test]
fn patches_are_the_squares_of_an_image() -> Result<()> {
    let mut g = Graph::new();
    let image = g.input("image", TensorType::f32([1, 4, 6, 1]))?;
    let patches = Builder::new(&mut g).embed_patches("p", image, 2, 4)?;
    let identity = (0..16).map(|i| f64::from(u8::from(i % 5 == 0))).collect();
    let given = HashMap::from([
        (image, Array::new([1, 4, 6, 1], (0..24).map(f64::from).collect())),
        (g.find("p.weight").unwrap(), Array::new([4, 4], identity)),
        (g.find("p.bias").unwrap(), Array::zeros([4])),
    ]);
    let rows = reference::run(&g, &given, &[patches])?.remove(0).data;
    assert_eq!(rows[..8], [0.0, 1.0, 6.0, 7.0, 2.0, 3.0, 8.0, 9.0]);
    assert_eq!(rows[20..], [16.0, 17.0, 22.0, 23.0]);
    Ok(())
}

#[test]
fn layers_of_a_configuration_start_as_it_says() -> Result<()> {
    let config = TransformerConfig { init: Init::Gpt2 { std: 0.5 }, ..TransformerConfig::stack(7, 2, 8, 2) };
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([3, 7, 2]))?;
    let mut b = Builder::with_config(&mut g, &config)?;
    let x = b.linear("in", x, 8)?;
    b.stack(x)?;
    let init = |name: &str| g.init(g.find(name).unwrap()).unwrap();
    assert_eq!([init("in.weight"), init("h.1.attn.q.weight"), init("position.weight")], [ParamInit::Normal(0.5); 3]);
    assert_eq!([init("h.0.attn.o.weight"), init("h.1.mlp.down.weight")], [ParamInit::Normal(0.25); 2]);
    assert_eq!([init("in.bias"), init("h.0.attn.o.bias"), init("norm_f.bias")], [ParamInit::ZEROS; 3]);
    Ok(())
}

#[test]
fn parts_of_transformers_ask_for_a_configuration() {
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([3, 7, 8])).unwrap();
    let mut b = Builder::new(&mut g);
    let with_config = "`Builder::with_config`";
    expect(b.config(), &[with_config]);
    expect(b.norm("n", x), &["norm", with_config]);
    expect(b.scoped("up", |b| b.scoped("here", |b| b.attention(x))), &["`up.here`", "attention", with_config]);
    expect(b.feed_forward(x), &["feed-forward", with_config]);
    expect(b.residual("r", x, Builder::attention), &["residual", with_config]);
    expect(b.stack(x), &["stack", with_config]);
    expect(b.mlp("m", x, &[], |_, h| Ok(h)), &["`m`", "at least one width"]);
    // A scope ends, whatever comes of it.
    let y = b.linear("y", x, 1).unwrap();
    assert_eq!(b.name(y), "y");
    expect(b.linear("y", x, 1), &["`y.weight`"]);
    expect(b.linear("z", x, 0), &["`z.weight`"]);
}

#[test]
fn parameters_need_names() {
    let mut g = Graph::new();
    expect(g.input("", TensorType::f32([1])), &["``", "need one"]);
    let x = g.input("x", TensorType::f32([3, 8])).unwrap();
    let mut b = Builder::new(&mut g);
    expect(b.linear("", x, 4), &["`.weight`", "layers that have parameters"]);
    expect(b.scoped("h", |b| b.layernorm("", x)), &["`h..weight`", "need one"]);
    expect(b.mlp("", x, &[4], |_, h| Ok(h)), &["`.0.weight`", "need one"]);
    let act = b.tanh("", x).unwrap();
    assert_eq!(b.name(act), "tanh");
}

#[test]
fn stacks_say_what_they_take() -> Result<()> {
    let config = TransformerConfig::stack(7, 1, 8, 2);
    let mut g = Graph::new();
    let [flat, wide, long] = [vec![7, 8], vec![1, 7, 9], vec![1, 8, 8]].map(TensorType::f32);
    let mut input = |name: &str, ty| g.input(name, ty);
    let inputs = [input("flat", flat)?, input("wide", wide)?, input("long", long)?];
    let ids = input("ids", TensorType::u32([1, 7, 8]))?;
    let mut b = Builder::with_config(&mut g, &config)?;
    for (x, name, got) in
        [(inputs[0], "flat", "[7, 8]"), (inputs[1], "wide", "[1, 7, 9]"), (inputs[2], "long", "8, 8]")]
    {
        expect(b.stack(x), &[&format!("`{name}`"), got, "[batch, time, 8]", "at most 7 steps"]);
    }
    expect(b.stack(ids), &["`ids`", "u32"]);
    expect(Builder::with_config(&mut Graph::new(), &TransformerConfig { d_ff: 0, ..config.clone() }), &["`d_ff`"]);
    // Models of tokens need a vocabulary.
    expect(config.validate(), &["`vocab_size`", "0"]);
    expect(Transformer::build(&mut Graph::new(), &config, 1, 7, false), &["`vocab_size`", "0"]);
    expect(TransformerEncoder::build(&mut Graph::new(), &config, 1, 7), &["`vocab_size`", "0"]);
    Ok(())
}

/// The nodes of a graph, except those before the stream begins and after it ends.
fn stream_of(g: &Graph) -> Vec<String> {
    let text = g.to_string();
    let inside = |line: &&str| !["tokens", "embed.", "embed ", "head"].iter().any(|start| line.starts_with(start));
    text.lines().filter(inside).map(String::from).collect()
}

#[test]
fn a_stack_is_what_models_of_tokens_have_after_their_embedding() -> Result<()> {
    let gpt2 = TransformerConfig { dropout: 0.1, ..TransformerConfig::gpt2(31, 7, 2, 8, 2) };
    let post = TransformerConfig { norm_placement: NormPlacement::Post, embed_norm: true, ..gpt2.clone() };
    let llama = TransformerConfig { bidirectional: true, ..TransformerConfig::llama(31, 7, 2, 8, 2) };
    for config in [gpt2, post, llama] {
        for time in [5, 7] {
            let (mut model, mut encoder, mut stack) = (Graph::new(), Graph::new(), Graph::new());
            let m = Transformer::build(&mut model, &config, 3, time, true)?;
            let e = TransformerEncoder::build_with(&mut encoder, &config, &StandardBlock, 3, time, true)?;
            let x = stack.input("embed", TensorType::f32([3, time, 8]))?;
            let s = Builder::with_config(&mut stack, &config)?.training().stack(x)?;
            assert_eq!(stream_of(&model), stream_of(&stack));
            assert_eq!(stream_of(&encoder), stream_of(&stack));
            let dropout = config.dropout > 0.0;
            assert_eq!(
                [m.dropout_seed.is_some(), e.dropout_seed.is_some(), stack.find_step_seed().is_some()],
                [dropout; 3]
            );
            assert_eq!((s.stream.len(), e.stream.len(), m.stream.len()), (3, 3, 3));
            assert_eq!((model.name(m.hidden), encoder.name(e.hidden)), (stack.name(s.hidden), stack.name(s.hidden)));
            assert_eq!((e.params, m.params), (encoder.params(), model.params()));
        }
    }
    Ok(())
}

#[test]
fn stacks_in_scopes_have_layers_of_their_own() -> Result<()> {
    let config = TransformerConfig::stack(7, 2, 8, 2);
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([3, 7, 8]))?;
    let mut b = Builder::with_config(&mut g, &config)?;
    let a = b.scoped("a", |b| b.stack(x))?;
    let z = b.scoped("z", |b| b.stack(a.hidden))?;
    expect(b.scoped("a", |b| b.stack(x)), &["`a.position.weight`"]);
    let hidden = |p: &Value| is_hidden_matrix(g.name(*p), &g.ty(*p).shape);
    assert_eq!(g.params().iter().filter(|p| hidden(p)).count(), 2 * 2 * 6);
    let probes = probe::standard(&g, &z.stream, true);
    let layers = |name: &str| probes.iter().filter(|p| p.name == name).map(|p| p.layer).collect::<Vec<_>>();
    assert_eq!(layers("stream_rms"), [Some(0), Some(1), Some(2)]);
    assert_eq!(layers("attn_rms"), [Some(0), Some(1)]);
    assert_eq!(layers("weight_grad_rms").len(), g.params().len());
    assert_eq!(layers("weight_grad_rms").iter().filter(|layer| **layer == Some(1)).count(), 2 * 16);
    Ok(())
}

#[test]
fn what_is_dropped_differs_from_place_to_place_and_only_in_training() -> Result<()> {
    let config = TransformerConfig { dropout: 0.1, ..TransformerConfig::stack(7, 2, 8, 2) };
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([3, 7, 8]))?;
    let mut b = Builder::with_config(&mut g, &config)?.training();
    let y = b.scoped("a", |b| b.stack(x))?.hidden;
    let y = Builder::new(&mut g).training().dropout(y, 0.5)?;
    let y = Builder::new(&mut g).dropout(y, 0.5)?;
    Builder::with_config(&mut g, &config)?.stack(y)?;
    let dropouts = g.nodes().iter().filter_map(|n| match &n.source {
        Source::Op(op) if op.name() == "dropout" => Some(format!("{op:?}")),
        _ => None,
    });
    let all: Vec<String> = dropouts.collect();
    let different: BTreeSet<&String> = all.iter().collect();
    assert_eq!((all.len(), different.len()), (5 + 1, 5 + 1));
    Ok(())
}

/// What a stack makes of data, in f64.
fn hidden(config: &TransformerConfig, change: impl FnOnce(&mut Array)) -> Vec<f64> {
    let mut g = Graph::new();
    let x = g.input("x", TensorType::f32([1, 7, 8])).unwrap();
    let stack = Builder::with_config(&mut g, config).unwrap().stack(x).unwrap();
    let values = |p: Value| g.initial_values(p, 3).unwrap().into_iter().map(f64::from).collect();
    let mut given: HashMap<Value, Array> =
        g.params().into_iter().map(|p| (p, Array::new(g.ty(p).shape.clone(), values(p)))).collect();
    let mut data = random_array(&[1, 7, 8].into(), 1);
    change(&mut data);
    given.insert(x, data);
    reference::run(&g, &given, &[stack.hidden]).unwrap().remove(0).data
}

#[test]
fn stacks_look_where_the_configuration_says() {
    let init = Init::Plain { std: 0.3 };
    let learned = TransformerConfig { init, ..TransformerConfig::stack(9, 2, 8, 2) };
    let rope = TransformerConfig { positions: TransformerConfig::llama(1, 9, 2, 8, 2).positions, ..learned.clone() };
    for both in [learned, rope] {
        let causal = TransformerConfig { bidirectional: false, ..both.clone() };
        for config in [both, causal] {
            let before = hidden(&config, |_| {});
            let differs = |after: Vec<f64>, row: usize| before[row * 8..][..8] != after[row * 8..][..8];
            let last = |x: &mut Array| x.data[6 * 8] += 1.0;
            assert!(differs(hidden(&config, last), 6));
            assert_eq!(differs(hidden(&config, last), 2), config.bidirectional);
            // Rows in another order are more than outputs in another order: places count.
            let swapped = hidden(&config, |x| (0..8).for_each(|i| x.data.swap(i, 3 * 8 + i)));
            assert_ne!(before[..8], swapped[3 * 8..][..8], "{:?}", config.positions);
        }
    }
}

/// A block that has a parameter of the graph's own methods, and passes a value on.
#[derive(Debug)]
struct Gated;

impl Block for Gated {
    fn build(&self, b: &mut Builder<'_>, layer: usize, x: Value) -> Result<Value> {
        let y = StandardBlock.build(b, layer, x)?;
        let width = b.config()?.d_model;
        let gate = b.param_with("gate", [width], ParamInit::ONES)?;
        let bias = b.param("bias", [width])?;
        let y = b.mul("gated", y, gate)?;
        let y = b.add("shifted", y, bias)?;
        let first = b.kept("first").unwrap_or(y);
        b.keep("first", first);
        b.residual_add("first_add", y, first)
    }
}

#[test]
fn encoders_take_blocks_and_list_all_that_these_add() -> Result<()> {
    let config = TransformerConfig::bert(31, 7, 2, 8, 2);
    let mut g = Graph::new();
    // What is there already belongs to something else.
    g.param("other", [3])?;
    let encoder = TransformerEncoder::build_with(&mut g, &config, &Gated, 3, 7, false)?;
    assert!(encoder.dropout_seed.is_none() && encoder.token_types.is_some());
    let listed: Vec<&str> = encoder.params.iter().map(|&p| g.name(p)).collect();
    assert_eq!(listed, names(&g)[1..]);
    assert!(listed.contains(&"h.1.gate") && listed.contains(&"h.1.bias"));
    assert_eq!(config.positions, Positions::Learned);
    Ok(())
}

/// Sequences of a few letters, and whether the first letter comes again.
fn comes_again(seed: u64, batch: usize, time: usize) -> (Vec<u32>, Vec<u32>) {
    let mut rng = Rng::new(&[seed]);
    let mut text = || (0..time).map(|_| rng.below(6) as u32).collect::<Vec<u32>>();
    let texts: Vec<Vec<u32>> = (0..batch).map(|_| text()).collect();
    let answers = texts.iter().map(|text| u32::from(text[1..].contains(&text[0]))).collect();
    (texts.concat(), answers)
}

#[test]
fn an_encoder_with_a_head_learns_to_classify_texts() -> Result<()> {
    const BATCH: usize = 64;
    const TIME: usize = 5;
    let config = TransformerConfig { vocab_size: 6, dropout: 0.05, ..TransformerConfig::stack(TIME, 1, 32, 4) };
    let mut g = gpu().graph();
    let encoder = TransformerEncoder::build_with(&mut g, &config, &StandardBlock, BATCH, TIME, true)?;
    let first = g.slice("first", encoder.hidden, 1, 0, 1)?;
    let logits = Builder::new(&mut g).linear("answer", first, 2)?;
    let answers = g.input("answers", TensorType::u32([BATCH, 1]))?;
    let loss = g.cross_entropy("loss", logits, answers)?;
    let (config, options) =
        (GraphTrainConfig::adamw(3e-3), GraphTrainOptions { outputs: vec![logits], ..Default::default() });
    let mut trainer = GraphTrainer::with_options_blocking(gpu(), g, loss, config, &options)?;
    for step in 0..200 {
        let (texts, right) = comes_again(step, BATCH, TIME);
        trainer.step(&[encoder.tokens.with(&texts), answers.with(&right)])?;
    }
    // A step on texts that it never saw, and what it said to them before it learned from them.
    let (texts, right) = comes_again(1000, BATCH, TIME);
    trainer.step(&[encoder.tokens.with(&texts), answers.with(&right)])?;
    let said = trainer.read_blocking::<f32>(logits)?;
    let correct = said.chunks(2).zip(&right).filter(|(l, right)| u32::from(l[1] > l[0]) == **right).count();
    assert!(correct >= BATCH * 9 / 10, "{correct} of {BATCH}");
    Ok(())
}

/// Waves of random frequency and phase, `[batch, time + 1]`.
fn waves(seed: u64, batch: usize, time: usize) -> Vec<Vec<f32>> {
    let mut rng = Rng::new(&[seed]);
    let mut wave = || {
        let (speed, phase) = (0.3 + 0.6 * rng.uniform(), 7.0 * rng.uniform());
        (0..=time).map(|t| (speed * t as f64 + phase).sin() as f32).collect()
    };
    (0..batch).map(|_| wave()).collect()
}

#[test]
fn a_stack_learns_to_continue_a_series() -> Result<()> {
    const BATCH: usize = 16;
    const TIME: usize = 24;
    let config = TransformerConfig { bidirectional: false, ..TransformerConfig::stack(TIME, 2, 32, 2) };
    let mut g = gpu().graph();
    let series = g.input("series", TensorType::f32([BATCH, TIME, 1]))?;
    let next = g.input("next", TensorType::f32([BATCH, TIME, 1]))?;
    let mut b = Builder::with_config(&mut g, &config)?;
    let x = b.linear("in", series, 32)?;
    let hidden = b.stack(x)?.hidden;
    let y = b.linear("out", hidden, 1)?;
    let loss = b.mse("loss", y, next)?;
    let mut trainer = GraphTrainer::new_blocking(gpu(), g, loss, GraphTrainConfig::adamw(3e-3))?;
    let mut losses = vec![];
    for step in 0..200 {
        let waves = waves(step, BATCH, TIME);
        let part =
            |range: std::ops::Range<usize>| waves.iter().flat_map(|w| w[range.clone()].to_vec()).collect::<Vec<f32>>();
        losses.push(trainer.step(&[series.with(&part(0..TIME)), next.with(&part(1..TIME + 1))])?);
    }
    let (last, first) = (losses.pop().unwrap().wait_blocking()?, losses.swap_remove(0).wait_blocking()?);
    assert!(last < 0.05 && first > 0.3, "{first} {last}");
    Ok(())
}
