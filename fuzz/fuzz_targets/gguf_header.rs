//! Any bytes give an `Err`, or a header whose tensors lie within the file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use throughline::format::{Weights, gguf_header};

fuzz_target!(|file: &[u8]| {
    let Ok(header) = gguf_header("fuzz", file) else { return };
    let mut ranges: Vec<_> = header.tensors.iter().map(|t| t.range.clone()).collect();
    ranges.sort_by_key(|r| r.start);
    assert!(ranges.iter().all(|r| r.start < r.end && r.end <= file.len()));
    assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start));
    for (key, value) in header.metadata.iter() {
        assert_eq!(header.metadata.get(key).map(|v| v.summary()), Some(value.summary()));
    }
    let weights = Weights::from_bytes("fuzz", file.to_vec()).unwrap();
    for tensor in weights.iter() {
        assert_eq!(tensor.values().unwrap().len(), tensor.shape().len());
        let _ = tensor.check_finite();
    }
});
