//! The rows as a picture: bars of Ashlar's ratio to what each row is held against, with its bar.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::report::{Row, number};

const WIDTH: u32 = 1100;
const ROW_HEIGHT: u32 = 34;
const TOP: u32 = 70;
const LEFT: i32 = 400;
/// Pixels of a ratio of 1.
const UNIT_PIXELS: f64 = 240.0;
/// Ratios beyond this are drawn as this.
const RATIO_MAX: f64 = 2.4;

/// Draws the rows that have a ratio.
pub fn draw(rows: &[Row], subtitle: &str, path: &Path) -> Result<()> {
    let rows: Vec<&Row> = rows.iter().filter(|r| r.ratio.is_some()).collect();
    let height = TOP + ROW_HEIGHT * rows.len() as u32 + 30;
    let root = SVGBackend::new(path, (WIDTH, height)).into_drawing_area();
    let failed = |e: DrawingAreaErrorKind<_>| anyhow!("cannot draw {}: {e}", path.display());
    root.fill(&WHITE).map_err(failed)?;
    let text = |text: &str, at: (i32, i32), size: u32| {
        root.draw_text(text, &("sans-serif", size).into_text_style(&root), at)
            .map_err(failed)
    };
    text("Ashlar, 3 replicas, against one raw copy", (20, 12), 22)?;
    text(subtitle, (20, 42), 13)?;
    for (index, row) in rows.iter().enumerate() {
        let top = (TOP + ROW_HEIGHT * index as u32) as i32;
        let ratio = row.ratio.unwrap_or(0.0);
        let right = LEFT + (ratio.min(RATIO_MAX) * UNIT_PIXELS) as i32;
        let colour = if row.passes {
            RGBColor(64, 145, 108)
        } else {
            RGBColor(200, 80, 60)
        };
        root.draw(&Rectangle::new(
            [(LEFT, top + 4), (right, top + 24)],
            colour.filled(),
        ))
        .map_err(failed)?;
        text(&row.title, (20, top + 7), 14)?;
        let value = format!(
            "{ratio:.2} ({} {})  {}",
            number(row.ashlar),
            row.unit,
            row.bar
        );
        text(&value, (right.min(LEFT + 420) + 8, top + 7), 13)?;
    }
    let one = LEFT + UNIT_PIXELS as i32;
    let bottom = height as i32 - 30;
    root.draw(&PathElement::new(
        vec![(one, TOP as i32), (one, bottom)],
        BLACK.stroke_width(1),
    ))
    .map_err(failed)?;
    text(
        "1 = the reference; green: the row's bar is met; red: it falls short",
        (LEFT, bottom + 8),
        12,
    )?;
    root.present().map_err(failed)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn a_picture_has_a_bar_per_row() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.svg");
        let row = Row {
            id: "a",
            title: "a title".into(),
            unit: "µs",
            raw: None,
            qemu_nbd: Some(1.0),
            ashlar: 1.2,
            ratio: Some(1.2),
            bar: "≤ 1.5".into(),
            passes: true,
        };
        draw(&[row.clone(), row], "here", &path).unwrap();
        let svg = std::fs::read_to_string(path).unwrap();
        assert_eq!(svg.matches("a title").count(), 2);
    }
}
