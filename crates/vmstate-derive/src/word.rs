//! The words that name a type on the wire, and guesses at what was meant.

/// Types with a codec: our word, and its name in `vmferry_vmstate::wire`.
const CODECS: [(&str, &str); 17] = [
    ("bool", "Bool"),
    ("int8", "Int8"),
    ("int16", "Int16"),
    ("int32", "Int32"),
    ("int64", "Int64"),
    ("uint8", "Uint8"),
    ("uint16", "Uint16"),
    ("uint32", "Uint32"),
    ("uint64", "Uint64"),
    ("uint8_equal", "Uint8Equal"),
    ("uint16_equal", "Uint16Equal"),
    ("uint32_equal", "Uint32Equal"),
    ("int32_equal", "Int32Equal"),
    ("int64_equal", "Int64Equal"),
    ("int32_le", "Int32Le"),
    ("timer", "Timer"),
    ("cpu_double", "CpuDouble"),
];

/// Types of other shapes, and the words that stand in the place of a type.
const OTHERS: [&str; 12] = [
    "buffer",
    "bitmap",
    "struct",
    "vstruct",
    "tmp",
    "qtailq",
    "qlist",
    "gtree",
    "custom",
    "unused",
    "subsection",
    "skip",
];

/// Words that say more about a field.
pub(crate) const OPTIONS: [&str; 12] = [
    "name",
    "since",
    "condition",
    "count",
    "length",
    "max",
    "nullable",
    "as",
    "with",
    "at",
    "key",
    "needed",
];

/// The codec of a type word.
pub(crate) fn codec(word: &str) -> Option<&'static str> {
    let found = CODECS.iter().find(|(name, _)| *name == word);
    found.map(|(_, codec)| *codec)
}

/// Is it a word for a type?
pub(crate) fn is_type(word: &str) -> bool {
    codec(word).is_some() || OTHERS.contains(&word)
}

/// What was probably meant by an unknown word of a field.
pub(crate) fn unknown(word: &str) -> String {
    if let Some(meant) = of_rust_type(word) {
        return format!("unknown word `{word}`: types are named as on the wire, write `{meant}`");
    }
    let words = CODECS.iter().map(|(name, _)| *name).chain(OTHERS);
    let close = closest(word, words.chain(OPTIONS));
    if close.is_empty() {
        let types: Vec<_> = CODECS.iter().map(|(name, _)| *name).chain(OTHERS).collect();
        return format!(
            "unknown word `{word}`; types are: {}; options are: {}",
            types.join(", "),
            OPTIONS.join(", ")
        );
    }
    format!("unknown word `{word}`; did you mean {}?", quoted(&close))
}

/// What was probably meant by an unknown word, of those that are `known`.
pub(crate) fn unknown_of(word: &str, known: &[&'static str]) -> String {
    let close = closest(word, known.iter().copied());
    if close.is_empty() {
        format!("unknown word `{word}`; known are: {}", known.join(", "))
    } else {
        format!("unknown word `{word}`; did you mean {}?", quoted(&close))
    }
}

/// The word that usually fits a Rust type.
pub(crate) fn of_rust_type(rust: &str) -> Option<&'static str> {
    Some(match rust {
        "bool" => "bool",
        "u8" => "uint8",
        "u16" => "uint16",
        "u32" => "uint32",
        "u64" => "uint64",
        "i8" => "int8",
        "i16" => "int16",
        "i32" => "int32",
        "i64" => "int64",
        "f64" => "cpu_double",
        _ => return None,
    })
}

fn quoted(words: &[&str]) -> String {
    let words: Vec<_> = words.iter().map(|word| format!("`{word}`")).collect();
    words.join(", ")
}

/// The nearest of `known`: those with the fewest letters different, if at most two are.
fn closest(word: &str, known: impl Iterator<Item = &'static str>) -> Vec<&'static str> {
    let distances: Vec<_> = known.map(|name| (distance(word, name), name)).collect();
    let least = distances.iter().map(|(distance, _)| *distance).min();
    let least = least.filter(|least| *least <= 2 && *least < word.chars().count());
    let near = distances
        .into_iter()
        .filter(|(distance, _)| Some(*distance) == least);
    near.map(|(_, name)| name).collect()
}

/// Letters to insert, remove, change or swap with the next to make one word of the other.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut table = vec![vec![0; b.len() + 1]; a.len() + 1];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            table[i][j] = if i == 0 || j == 0 {
                i + j
            } else {
                let changed = usize::from(a[i - 1] != b[j - 1]);
                let swapped = i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1];
                let swap = swapped.then(|| table[i - 2][j - 2] + 1);
                (table[i - 1][j - 1] + changed)
                    .min(table[i - 1][j] + 1)
                    .min(table[i][j - 1] + 1)
                    .min(swap.unwrap_or(usize::MAX))
            };
        }
    }
    table[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_was_meant() {
        assert_eq!(distance("uint32", "uint32"), 0);
        assert_eq!(distance("unit32", "uint32"), 1);
        assert_eq!(distance("uint", "int32"), 3);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(
            closest("uint3", ["uint32", "uint8", "x"].into_iter()),
            ["uint32", "uint8"]
        );
        assert!(closest("pci", ["bool", "timer"].into_iter()).is_empty());
        assert!(unknown("u32").contains("write `uint32`"));
    }
}
