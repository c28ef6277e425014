//! The one random generator of this crate, SplitMix64. Its stream is frozen: runs must resume bit for bit across
//! versions.
//!
//! Use it where results must be reproducible and depend on a key rather than on hidden state, such as initial weights
//! and batches.

/// SplitMix64 (Steele, Lea, Flood 2014, <https://doi.org/10.1145/2714064.2660195>), keyed by several numbers.
///
/// A draw can depend on (seed, step) alone, so a checkpoint needs to save nothing but those.
///
/// ```
/// use throughline::rng::Rng;
/// let (mut a, mut b) = (Rng::new(&[7, 100]), Rng::new(&[7, 100]));
/// assert_eq!(a.next_u64(), b.next_u64());
/// assert!(a.below(6) < 6);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rng(u64);

impl Rng {
    /// A generator for this key. Different keys give unrelated streams.
    pub fn new(key: &[u64]) -> Self {
        let mut rng = Rng(0x5851_f42d_4c95_7f2d);
        for &k in key {
            rng.0 ^= k;
            rng.0 = rng.next_u64();
        }
        rng
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number drawn uniformly from `[0, 1)`.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A number drawn uniformly from `0..n`. The modulo bias is below 2^-32 for the sizes used here.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next_u64() % n.max(1)
    }

    /// A number drawn from the standard normal distribution (Box-Muller).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }
}
