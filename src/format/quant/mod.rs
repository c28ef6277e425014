//! Storage formats of elements: plain floats, and ggml's blocks of quantised weights.
//!
//! Use [`dequantize`] to get the f32 values of stored bytes, and [`quantize`] to make a file smaller. Kernels that read
//! these formats directly are in [`ops::packed`](crate::ops::packed).
//!
//! A block holds [`Stored::block_len`] consecutive elements of a row in [`Stored::block_bytes`] bytes, all
//! little-endian. Below, `d` and `m` are f16 scales and `q` is the integer of an element:
//!
//! | type | elements | bytes | layout | element |
//! |---|---|---|---|---|
//! | `Q4_0` | 32 | 18 | d, 16 × two 4-bit q | d·(q − 8) |
//! | `Q4_1` | 32 | 20 | d, m, 16 × two 4-bit q | d·q + m |
//! | `Q5_0` | 32 | 22 | d, 32 fifth bits, 16 × two 4-bit q | d·(q − 16) |
//! | `Q5_1` | 32 | 24 | d, m, 32 fifth bits, 16 × two 4-bit q | d·q + m |
//! | `Q8_0` | 32 | 34 | d, 32 × i8 q | d·q |
//! | `Q4_K` | 256 | 144 | d, dmin, 8 × 6-bit (s, m), 128 × two 4-bit q | d·s·q − dmin·m |
//! | `Q5_K` | 256 | 176 | d, dmin, 8 × 6-bit (s, m), 256 fifth bits, 128 × two 4-bit q | d·s·q − dmin·m |
//! | `Q6_K` | 256 | 210 | 128 × two 4-bit q, 64 × four 2-bit tops, 16 × i8 s, d | d·s·(q − 32) |
//!
//! The low nibbles of a block of 32 are its first 16 elements, the high nibbles its last 16. The layouts are those of
//! ggml (`ggml-common.h` and `ggml-quants.c` in <https://github.com/ggml-org/ggml>). Arithmetic is in f32 in the order
//! written, without fused multiply-adds, like ggml's scalar code: kernels are tested against it.
//!
//! What [`quantize`] writes has the bits of ggml's reference quantisers (`quantize_row_*_ref`), which are what
//! llama.cpp uses without an importance matrix. ggml leaves two things to its compiler. Built with fused multiply-adds,
//! which are the default on ARM, it rounds sums otherwise and now and then picks a neighbouring integer. And where the
//! inverse of a scale overflows, below 2^-128, its integers are undefined; the scale itself is 0 in f16, and so are the
//! elements.

mod blocks;
mod decode;
mod encode;
mod k_quants;
mod stored;

pub use decode::{dequantize, dequantize_into};
pub use encode::quantize;
pub use stored::Stored;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_sizes_are_consistent() {
        for s in Stored::ALL {
            assert_eq!(Stored::from_ggml_id(s.ggml_id()), Some(s));
            assert_eq!(s.bytes_of(&[3, 512]), Some(3 * 512 / s.block_len() * s.block_bytes()));
            assert_eq!(s.bytes_of(&[usize::MAX / 2, 512]), None, "{s}");
            assert_eq!(s.bytes_of(&[]), None);
            assert_eq!(s.bytes_of(&[512, 8]).is_none(), s.is_quantized());
            let one = vec![0; s.block_bytes()];
            assert_eq!(dequantize(s, &one).unwrap().len(), s.block_len());
            let err = dequantize(s, &one[1..]).unwrap_err().to_string();
            assert!(err.contains(s.name()), "{err}");
        }
        assert_eq!(Stored::from_ggml_id(10), None);
        assert!(quantize(Stored::Q8_0, &[0.0; 31]).unwrap_err().to_string().contains("31"));
    }

    #[test]
    fn quantising_is_off_by_half_a_step_at_most() {
        let values: Vec<f32> = (0..96).map(|i| ((i * 37 % 96) as f32 - 40.0) / 24.0).collect();
        let values = [values.as_slice(), &values, &values[..64]].concat();
        // Step over the range of a block of values in [-40/24, 55/24], scale's own rounding included.
        for (stored, step) in [
            (Stored::Q4_0, 0.30),
            (Stored::Q4_1, 0.27),
            (Stored::Q5_0, 0.15),
            (Stored::Q5_1, 0.13),
            (Stored::Q8_0, 0.019),
            (Stored::Q4_K, 0.29),
            (Stored::Q5_K, 0.15),
            (Stored::Q6_K, 0.08),
        ] {
            let back = dequantize(stored, &quantize(stored, &values).unwrap()).unwrap();
            // Symmetric ones reach a step more on one side than on the other: a whole step there.
            let off = if [Stored::Q4_0, Stored::Q5_0].contains(&stored) { step } else { step / 2.0 };
            let worst = values.iter().zip(&back).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst <= off, "{stored}: {worst}");
        }
        let zeros = [0.0; 256];
        for stored in Stored::ALL {
            assert_eq!(dequantize(stored, &quantize(stored, &zeros).unwrap()).unwrap(), zeros);
        }
    }

    #[test]
    fn what_a_format_cannot_hold_is_an_error() {
        let refused = |stored: Stored, value: f32, part: &str| {
            let mut values = [1.0; 512];
            values[300] = value;
            let error = quantize(stored, &values).unwrap_err().to_string();
            assert!(error.contains(stored.name()) && error.contains(part), "{error}");
        };
        refused(Stored::F16, 65520.0, "65520 at element 300");
        refused(Stored::BF16, f32::MAX, "at element 300");
        assert_eq!(dequantize(Stored::F16, &quantize(Stored::F16, &[65519.0]).unwrap()).unwrap(), [65504.0]);
        assert_eq!(
            dequantize(Stored::BF16, &quantize(Stored::BF16, &[f32::INFINITY]).unwrap()).unwrap(),
            [f32::INFINITY]
        );
        for stored in Stored::ALL.into_iter().filter(|stored| stored.is_quantized()) {
            refused(stored, f32::NAN, "NaN at element 300");
            refused(stored, f32::NEG_INFINITY, "-inf at element 300");
            refused(stored, 1e30, "at element 300");
            refused(stored, 2.9e8, if stored.block_len() == 32 { "at element 288" } else { "at element 256" });
        }
    }

    #[test]
    fn many_values_have_the_bits_of_few() {
        let values: Vec<f32> = (0..300_032).map(|i| ((i * 37 % 977) as f32 - 400.0) / 240.0).collect();
        for stored in [Stored::F32, Stored::Q5_1, Stored::Q6_K] {
            let parts = values.chunks(1024).flat_map(|part| quantize(stored, part).unwrap());
            assert!(quantize(stored, &values).unwrap().into_iter().eq(parts), "{stored}");
        }
    }
}
