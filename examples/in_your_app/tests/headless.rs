//! Without a window: the frames show what the network's tensor holds, and that comes closer to the picture.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use in_your_app::headless::Screen;
use in_your_app::{Options, Picture};

const SIZE: usize = 64;

/// Mean squared difference of the frame's two halves: the picture and what was learnt of it.
fn difference(frame: &Path) -> f64 {
    let frame = Picture::open(frame, 2 * SIZE).unwrap();
    assert_eq!([frame.width, frame.height], [2 * SIZE, SIZE]);
    let wanted = Picture::shapes(SIZE);
    let mut sum = 0.0;
    for (row, want) in frame.rgb.chunks(6 * SIZE).zip(wanted.rgb.chunks(3 * SIZE)) {
        let (left, right) = row.split_at(3 * SIZE);
        // The left half is the picture itself.
        assert!(left.iter().zip(want).all(|(a, b)| (a - b).abs() < 0.6 / 255.0));
        sum += right.iter().zip(want).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
    }
    sum / wanted.rgb.len() as f64
}

#[test]
fn the_program_writes_frames_that_come_closer_to_the_picture_and_figures() {
    let out = tempfile::tempdir().unwrap();
    let ran = Command::new(env!("CARGO_BIN_EXE_in_your_app"))
        .args(["--headless", "--frames", "81", "--every", "40", "--size", "64", "--budget-us", "1000000", "--out"])
        .arg(out.path())
        .output()
        .unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let [first, middle, last] =
        ["00000", "00040", "00080"].map(|i| difference(&out.path().join(format!("frame-{i}.png"))));
    assert!(middle < 0.5 * first && last < 0.1 * first, "{first} {middle} {last}");

    let text = String::from_utf8(ran.stdout).unwrap();
    let json: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    let number = |path: &str| json.pointer(path).and_then(serde_json::Value::as_f64).unwrap_or(f64::NAN);
    for which in ["training", "drawing"] {
        let [p50, p99, max] = ["p50", "p99", "max"].map(|p| number(&format!("/frame_ms/{which}/{p}")));
        assert!(p50 > 0.0 && p50 <= p99 && p99 <= max && max.is_finite(), "{which}: {p50} {p99} {max}");
    }
    assert_eq!([number("/steps"), number("/files")], [81.0, 3.0]); // all of a step is within the budget
    // The last loss is that of the last frame, neither clamped nor rounded.
    assert!((number("/loss/last") / last - 1.0).abs() < 0.2, "{} {last}", number("/loss/last"));
    assert!(number("/psnr_db/last") > number("/psnr_db/first") + 10.0);
}

#[test]
fn frames_show_the_networks_tensor_in_the_middle_of_steps_too() {
    let options = Options { picture: Picture::shapes(SIZE), budget: Duration::from_micros(1) };
    let mut screen = Screen::open(&options).unwrap();
    let slices = screen.app.learner.slices().count();
    assert!(slices > 10, "{slices}");
    let mut pictures: Vec<Vec<f32>> = vec![];
    let mut frames = 0;
    while screen.app.learner.steps() < 2 {
        screen.timed_frame(true).unwrap();
        let tensor: Vec<f32> = screen.app.output.read_blocking(screen.app.learner.gpu()).unwrap();
        let pixels = screen.pixels().unwrap();
        let right = pixels.chunks(8 * SIZE).flat_map(|row| row[4 * SIZE..].chunks(4));
        for (pixel, rgb) in right.zip(tensor.chunks(3)) {
            let off = pixel.iter().zip(rgb).map(|(&p, &x)| (f32::from(p) - 255.0 * x.clamp(0.0, 1.0)).abs());
            assert!(off.fold(0.0, f32::max) <= 0.51, "frame {frames}: {pixel:?} for {rgb:?}");
        }
        pictures.push(tensor);
        frames += 1;
    }
    assert!(frames > slices, "{frames}");
    // Whole in every frame: that of the first weights, and once the second step is past its forward half, the next.
    pictures.dedup();
    assert_eq!(pictures.len(), 2);
}

#[test]
fn a_network_in_slices_learns_the_same_bits_as_one_in_whole_steps() {
    let run = |budget, steps| {
        let mut screen = Screen::open(&Options { picture: Picture::shapes(SIZE), budget }).unwrap();
        while screen.app.learner.steps() < steps {
            screen.timed_frame(true).unwrap();
        }
        screen.app.output.read_blocking::<f32>(screen.app.learner.gpu()).unwrap()
    };
    assert!(run(Duration::from_micros(300), 3) == run(Duration::from_secs(9), 3));
}
