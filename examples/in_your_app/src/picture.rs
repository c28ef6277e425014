//! Pictures, built in or from PNG files.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

/// Colours from 0 to 1, in rows from the top.
#[derive(Clone, Debug, PartialEq)]
pub struct Picture {
    pub width: usize,
    pub height: usize,
    /// Red, green, blue, pixel after pixel.
    pub rgb: Vec<f32>,
}

impl Picture {
    /// A sky over hills, with a sun and a striped kite: soft gradients and sharp edges.
    pub fn shapes(size: usize) -> Picture {
        let color = |i: usize| {
            let (x, y) = ((i % size) as f32 + 0.5, (i / size) as f32 + 0.5);
            shapes_at(x / size as f32, y / size as f32)
        };
        Picture { width: size, height: size, rgb: (0..size * size).flat_map(color).collect() }
    }

    /// Reads a PNG file, and scales it down if its longer side has more than `size` pixels.
    pub fn open(path: &Path, size: usize) -> Result<Picture> {
        let whole = Self::decode(path).with_context(|| format!("reading the picture {}", path.display()))?;
        Ok(whole.sampled(size))
    }

    fn decode(path: &Path) -> Result<Picture> {
        let mut decoder = png::Decoder::new(std::io::BufReader::new(std::fs::File::open(path)?));
        decoder.set_transformations(png::Transformations::normalize_to_color8());
        let mut reader = decoder.read_info()?;
        let mut bytes = vec![0; reader.output_buffer_size().context("the picture is too large for this machine")?];
        let info = reader.next_frame(&mut bytes)?;
        let channels = info.color_type.samples();
        let pixel = |p: &[u8]| match channels {
            1 | 2 => [p[0]; 3],
            _ => [p[0], p[1], p[2]],
        };
        let rgb = bytes[..info.buffer_size()].chunks_exact(channels).flat_map(pixel);
        let rgb = rgb.map(|byte| f32::from(byte) / 255.0).collect();
        Ok(Picture { width: info.width as usize, height: info.height as usize, rgb })
    }

    /// Drops pixels evenly until the longer side has at most `size`.
    fn sampled(self, size: usize) -> Picture {
        let longer = self.width.max(self.height);
        if longer <= size {
            return self;
        }
        let [width, height] = [self.width, self.height].map(|n| (n * size / longer).max(1));
        let pixel = |i: usize| {
            let (x, y) = (i % width * self.width / width, i / width * self.height / height);
            let at = 3 * (y * self.width + x);
            [self.rgb[at], self.rgb[at + 1], self.rgb[at + 2]]
        };
        Picture { width, height, rgb: (0..width * height).flat_map(pixel).collect() }
    }

    /// Writes RGBA bytes to a PNG file.
    pub fn write_png(path: &Path, width: u32, height: u32, rgba: &[u8]) -> Result<()> {
        let write = || -> Result<()> {
            let file = std::io::BufWriter::new(std::fs::File::create(path)?);
            let mut encoder = png::Encoder::new(file, width, height);
            encoder.set_color(png::ColorType::Rgba);
            encoder.set_depth(png::BitDepth::Eight);
            encoder.write_header()?.write_image_data(rgba)?;
            Ok(())
        };
        write().with_context(|| format!("writing {}", path.display()))
    }

    /// Checks that the side of a picture may have `size` pixels.
    pub fn check_size(size: usize) -> Result<()> {
        ensure!(size >= 8, "--size {size}: a picture needs at least 8 pixels per side");
        if size > 1024 {
            bail!("--size {size}: every training step covers the whole picture, so the limit is 1024 pixels per side");
        }
        Ok(())
    }
}

/// The colour at a position, with both coordinates from 0 to 1.
fn shapes_at(x: f32, y: f32) -> [f32; 3] {
    let (from_sun, from_kite) = ((x - 0.28).hypot(y - 0.27), (x - 0.68).abs() + (y - 0.35).abs());
    if from_kite < 0.2 {
        let stripe = ((x + y) * 14.0).rem_euclid(2.0) < 1.0;
        return if stripe { [0.85, 0.16, 0.25] } else { [0.98, 0.95, 0.88] };
    }
    if y > 0.72 + 0.08 * (7.0 * x).sin() {
        return [0.1 + 0.2 * x, 0.55 - 0.4 * (y - 0.6), 0.25];
    }
    if from_sun < 0.14 {
        return [1.0, 0.85 - 2.0 * from_sun, 0.2];
    }
    [0.25 + 0.5 * y, 0.45 + 0.4 * y, 0.9 - 0.1 * x]
}
