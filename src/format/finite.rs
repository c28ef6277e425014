//! Whether stored elements are finite, by the bits that decide it.
//!
//! A plain float is NaN or infinite if all bits of its exponent are set. A quantised block has such elements if, and
//! only if, one of its scales is such a number: whole numbers times finite scales are finite in f32.

use std::num::NonZero;
use std::thread;

use super::quant::Stored;

/// Parts of fewer bytes are not worth a thread.
const LEAST_BYTES: usize = 4 << 20;

/// The first block that has an element which is NaN or infinite. `bytes` are whole blocks.
pub(super) fn first_bad_block(stored: Stored, bytes: &[u8]) -> Option<usize> {
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(bytes.len() / LEAST_BYTES).max(1);
    let blocks = (bytes.len() / stored.block_bytes()).div_ceil(threads).max(1);
    let mut parts = bytes.chunks(blocks * stored.block_bytes());
    let first = parts.next()?;
    thread::scope(|scope| {
        let others: Vec<_> = parts
            .map(|part| {
                let there = thread::Builder::new().spawn_scoped(scope, move || first_in(stored, part));
                // Without another thread, this one does it.
                there.map_err(|_| part)
            })
            .collect();
        let mut found = first_in(stored, first);
        for (i, other) in others.into_iter().enumerate() {
            let bad = match other {
                Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                Err(part) => first_in(stored, part),
            };
            found = found.or(bad.map(|block| (i + 1) * blocks + block));
        }
        found
    })
}

fn first_in(stored: Stored, bytes: &[u8]) -> Option<usize> {
    match stored {
        Stored::F32 => find(bytes, |b: &[u8; 4]| all_set(b, 2, 0x7f80)),
        Stored::BF16 => find(bytes, |b: &[u8; 2]| all_set(b, 0, 0x7f80)),
        Stored::F16 => find(bytes, |b: &[u8; 2]| all_set(b, 0, HALF)),
        Stored::Q4_0 => find_scaled::<18>(stored, bytes),
        Stored::Q4_1 => find_scaled::<20>(stored, bytes),
        Stored::Q5_0 => find_scaled::<22>(stored, bytes),
        Stored::Q5_1 => find_scaled::<24>(stored, bytes),
        Stored::Q8_0 => find_scaled::<34>(stored, bytes),
        Stored::Q4_K => find_scaled::<144>(stored, bytes),
        Stored::Q5_K => find_scaled::<176>(stored, bytes),
        Stored::Q6_K => find_scaled::<210>(stored, bytes),
    }
}

/// The exponent of an f16.
const HALF: u16 = 0x7c00;

fn all_set<const B: usize>(block: &[u8; B], at: usize, exponent: u16) -> bool {
    u16::from_le_bytes([block[at], block[at + 1]]) & exponent == exponent
}

fn find_scaled<const B: usize>(stored: Stored, bytes: &[u8]) -> Option<usize> {
    find(bytes, |b: &[u8; B]| stored.scales().iter().any(|&at| all_set(b, at, HALF)))
}

/// Looks at many blocks without a branch before it asks which of them it was.
fn find<const B: usize>(bytes: &[u8], bad: impl Fn(&[u8; B]) -> bool) -> Option<usize> {
    const MANY: usize = 1024;
    let blocks = bytes.as_chunks::<B>().0;
    let (i, part) = blocks.chunks(MANY).enumerate().find(|(_, part)| part.iter().fold(false, |any, b| any | bad(b)))?;
    part.iter().position(bad).map(|j| i * MANY + j)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::quant::dequantize;

    #[test]
    fn the_first_block_of_each_type_is_found() {
        for stored in Stored::ALL {
            let len = stored.block_bytes();
            let blocks = (3 * LEAST_BYTES / len).next_multiple_of(7);
            // All bits of the fields but those of the scales may be set.
            let fine: Vec<u8> = match stored.is_quantized() {
                true => {
                    (0..len).map(|i| if stored.scales().iter().any(|&at| i == at + 1) { 0x7b } else { 0xff }).collect()
                }
                false => vec![0x7b; len],
            };
            let mut bytes = fine.repeat(blocks);
            assert!(dequantize(stored, &fine).unwrap().iter().all(|v| v.is_finite()), "{stored}");
            assert_eq!(first_bad_block(stored, &bytes), None, "{stored}");
            let fields = if stored.is_quantized() { stored.scales() } else { &[len - 2] };
            for (&at, block) in fields.iter().zip([blocks - 1, blocks / 2, 5]) {
                bytes[block * len + at..][..2].copy_from_slice(&0xff80u16.to_le_bytes());
                let values = dequantize(stored, &bytes[block * len..][..len]).unwrap();
                assert!(values.iter().any(|v| !v.is_finite()), "{stored}");
                assert_eq!(first_bad_block(stored, &bytes), Some(block), "{stored}");
            }
        }
        assert_eq!(first_bad_block(Stored::F32, &[]), None);
    }
}
