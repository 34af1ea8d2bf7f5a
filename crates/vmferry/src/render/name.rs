//! Names out of streams.
//!
//! What QEMU calls sections, RAM blocks and disks is printable ASCII without spaces. In a damaged stream a
//! name may be longer than it was: what follows it in the stream, which can be the guest's memory or a
//! disk's content, would be printed with it.

/// The longest name that is shown whole.
const SHOWN_MAX: usize = 64;

/// A name, as far as it is one.
pub(crate) fn shown(name: &str) -> String {
    let end = name.find(|c: char| !c.is_ascii_graphic());
    let end = end.unwrap_or(name.len()).min(SHOWN_MAX);
    match name.get(..end) {
        Some(name_only) if end < name.len() => {
            format!("{name_only}… and {} bytes", name.len() - end)
        }
        _ => name.to_owned(),
    }
}

/// A message that quotes a name, whose controls are escaped already.
pub(crate) fn message(text: &str) -> String {
    let Some(start) = text.find("\\u{").or_else(|| text.find("\\n")) else {
        return text.to_owned();
    };
    let end = text.rfind('\'').filter(|end| *end > start);
    let rest = end.map_or("", |end| &text[end..]);
    format!("{}…{rest}", &text[..start])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_end_where_something_else_begins() {
        for (name, is_shown) in [
            ("0000:00:01.1/ide", "0000:00:01.1/ide"),
            ("", ""),
            ("pc.ramcorrect horse", "pc.ramcorrect… and 6 bytes"),
            ("i8259\0\0\0", "i8259… and 3 bytes"),
            ("ä", "… and 2 bytes"),
        ] {
            assert_eq!(shown(name), is_shown);
        }
        let long = "x".repeat(SHOWN_MAX + 1);
        assert_eq!(
            shown(&long),
            format!("{}… and 1 bytes", "x".repeat(SHOWN_MAX))
        );
        assert_eq!(shown(&long[1..]), long[1..]);
    }

    #[test]
    fn messages_lose_what_is_no_name() {
        for (text, is_shown) in [
            ("footer missing (byte 3)", "footer missing (byte 3)"),
            (
                "inside section 'ram\\u{0}horse' (0x1)",
                "inside section 'ram…' (0x1)",
            ),
            ("name \\u{0}horse", "name …"),
        ] {
            assert_eq!(message(text), is_shown);
        }
    }
}
