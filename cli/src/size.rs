//! Sizes as people write and read them: `10GiB`, `512MiB`, `4096`; binary units only, except that
//! `KB`, `MB`, `GB`, `TB` mean powers of 1000, as on the box of a disk.

/// Reads a size. Units: none or `B`, `K`/`KiB`, `M`/`MiB`, `G`/`GiB`, `T`/`TiB`, `P`/`PiB` (powers of
/// 1024), `KB`..`PB` (powers of 1000). Fractions are allowed (`1.5GiB`).
pub fn parse(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let split = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "ki" | "kib" => 1 << 10,
        "m" | "mi" | "mib" => 1 << 20,
        "g" | "gi" | "gib" => 1 << 30,
        "t" | "ti" | "tib" => 1 << 40,
        "p" | "pi" | "pib" => 1 << 50,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        "pb" => 1_000_000_000_000_000,
        other => {
            return Err(format!(
                "unknown unit {other:?}; write for instance 10GiB or 512MiB"
            ));
        }
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole
            .checked_mul(factor)
            .ok_or_else(|| "the size is too large".to_owned());
    }
    let fraction: f64 = number
        .parse()
        .map_err(|_| format!("{text:?} is not a size; write for instance 10GiB or 512MiB"))?;
    let bytes = fraction * factor as f64;
    if !bytes.is_finite() || bytes >= u64::MAX as f64 {
        return Err("the size is too large".to_owned());
    }
    Ok(bytes.round() as u64)
}

/// Writes a size for people: the largest binary unit with at most one decimal.
pub fn format(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if (value - value.round()).abs() < 0.05 {
        format!("{} {}", value.round(), UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_their_units() {
        assert_eq!(parse("4096"), Ok(4096));
        assert_eq!(parse("10GiB"), Ok(10 << 30));
        assert_eq!(parse("10 g"), Ok(10 << 30));
        assert_eq!(parse("1.5MiB"), Ok(3 << 19));
        assert_eq!(parse("2TB"), Ok(2_000_000_000_000));
        assert!(parse("10GX").is_err());
        assert!(parse("").is_err());
        assert!(parse("-1").is_err());
        assert!(parse("99999999999PiB").is_err());
        assert!(parse("1.2.3G").is_err());
    }

    #[test]
    fn sizes_are_written_in_the_largest_unit() {
        assert_eq!(format(0), "0 B");
        assert_eq!(format(4096), "4 KiB");
        assert_eq!(format(10 << 30), "10 GiB");
        assert_eq!(format(3 << 19), "1.5 MiB");
        assert_eq!(format((1 << 30) - 1), "1 GiB");
    }
}
