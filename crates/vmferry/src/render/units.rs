//! Numbers as a person reads them.

use std::time::Duration;

/// `1.5 GiB`: three digits are enough.
pub(crate) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = UNITS[0];
    for next in &UNITS[1..] {
        if value < 999.5 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    let decimals = if value < 9.95 {
        2
    } else if value < 99.5 {
        1
    } else {
        0
    };
    format!("{value:.decimals$} {unit}")
}

/// `812 MiB/s`.
pub(crate) fn rate(bytes_per_second: u64) -> String {
    format!("{}/s", bytes(bytes_per_second))
}

/// `35 ms`, `3.2 s`, `4:07`, `1:00:09`.
pub(crate) fn time(time: Duration) -> String {
    let ms = time.as_millis();
    let seconds = time.as_secs();
    match ms {
        0..=999 => format!("{ms} ms"),
        1000..=59_949 => format!("{:.1} s", time.as_secs_f64()),
        _ if seconds < 3600 => format!("{}:{:02}", seconds / 60, seconds % 60),
        _ => format!(
            "{}:{:02}:{:02}",
            seconds / 3600,
            seconds / 60 % 60,
            seconds % 60
        ),
    }
}

/// `1 disk`, `2 disks`, `2 passes`.
pub(crate) fn count(count: u64, noun: &str) -> String {
    let ending = match (count, noun.ends_with('s')) {
        (1, _) => "",
        (_, true) => "es",
        (_, false) => "s",
    };
    format!("{count} {noun}{ending}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits_and_a_unit() {
        for (number, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (1 << 20, "1.00 MiB"),
            (1_023_488, "0.98 MiB"),
            (3 << 29, "1.50 GiB"),
            (99 << 30, "99.0 GiB"),
            (500 << 40, "500 TiB"),
            (u64::MAX, "16384 PiB"),
        ] {
            assert_eq!(bytes(number), text);
        }
        assert_eq!(rate(812 << 20), "812 MiB/s");
    }

    #[test]
    fn times_grow_their_units() {
        for (ms, text) in [
            (0, "0 ms"),
            (999, "999 ms"),
            (3_249, "3.2 s"),
            (59_949, "59.9 s"),
            (247_000, "4:07"),
            (3_609_000, "1:00:09"),
        ] {
            assert_eq!(time(Duration::from_millis(ms)), text);
        }
    }

    #[test]
    fn one_is_singular() {
        assert_eq!(count(1, "disk"), "1 disk");
        assert_eq!(count(0, "disk"), "0 disks");
        assert_eq!(count(2, "pass"), "2 passes");
    }
}
