//! Any bytes give an `Err`, or a header that the `safetensors` crate reads in the same way, unless it has a tensor of a
//! type that the crate does not know.
#![no_main]

use libfuzzer_sys::fuzz_target;
use safetensors::SafeTensors;
use throughline::format::{Weights, safetensors_header};

fuzz_target!(|file: &[u8]| {
    let Ok(header) = safetensors_header("fuzz", file) else { return };
    let Ok(theirs) = SafeTensors::deserialize(file) else {
        return assert!(header.unread.iter().any(|(_, ty)| ty.contains("unknown type")));
    };
    assert_eq!(theirs.len(), header.tensors.len() + header.unread.len());
    for tensor in &header.tensors {
        assert_eq!(theirs.tensor(&tensor.name).unwrap().data(), &file[tensor.range.clone()]);
    }
    // `Weights` wants the object to start at once, as the specification does.
    let Ok(weights) = Weights::from_bytes("fuzz", file.to_vec()) else { return assert_ne!(file[8], b'{') };
    for tensor in weights.iter() {
        assert_eq!(tensor.values().unwrap().len(), tensor.shape().len());
        let _ = tensor.check_finite();
    }
});
