//! Where one JSON value ends and the next begins in a stream of bytes.
//!
//! ```text
//!            { or [             bracket closes the first one
//!   Between ───────▶ Inside ──────────────────────────────────▶ Frame::Text
//!      │  "          │  ▲ "
//!      ├──────────▶ String ─── \ ──▶ Escape
//!      │ other bytes
//!      ├──────────▶ Scalar ── space ──▶ Frame::Text
//!      │ stray byte, too long, too deep
//!      └──────────▶ Skipping ── newline ──▶ Between
//! ```
//!
//! Like QEMU, strings in single quotes are taken too; they leave here in double quotes.

/// How deep objects and arrays may be nested.
pub const DEPTH_MAX: u32 = 64;

/// Cuts a stream of bytes into JSON texts. Holds at most `bytes_max` bytes.
#[derive(Debug)]
pub(crate) struct Framer {
    text: Vec<u8>,
    bytes_max: usize,
    depth: u32,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Between,
    Inside,
    String { quote: u8 },
    Escape { quote: u8 },
    Scalar,
    Skipping,
}

/// What the bytes so far amount to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    /// No whole value yet; all bytes were used.
    NeedMore,
    /// The text of one value, well bracketed, not yet parsed.
    Text(Vec<u8>),
    /// No value can come of this; everything up to the next newline is dropped.
    Broken(Broken),
}

/// Why no value can come of the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Broken {
    #[error("JSON parse error, stray '\\u{{{byte:02x}}}' at byte {offset} of the message")]
    Stray { byte: u8, offset: usize },
    #[error("JSON parse error, a string does not end on its line, at byte {offset} of the message")]
    OpenString { offset: usize },
    #[error("JSON message longer than {bytes_max} bytes")]
    TooLong { bytes_max: usize },
    #[error("JSON nesting deeper than {DEPTH_MAX} levels")]
    TooDeep,
}

impl Framer {
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self {
            text: Vec::new(),
            bytes_max,
            depth: 0,
            state: State::Between,
        }
    }

    /// Take bytes from the front of `input` until a frame is complete: how many were used, and
    /// the frame.
    pub(crate) fn advance(&mut self, input: &[u8]) -> (usize, Frame) {
        for (used, &byte) in (1..).zip(input) {
            match self.take(byte) {
                Ok(false) => {}
                Ok(true) => {
                    self.depth = 0;
                    return (used, Frame::Text(std::mem::take(&mut self.text)));
                }
                Err(broken) => {
                    self.text = Vec::new();
                    self.depth = 0;
                    self.state = match byte {
                        b'\n' => State::Between,
                        _ => State::Skipping,
                    };
                    return (used, Frame::Broken(broken));
                }
            }
        }
        (input.len(), Frame::NeedMore)
    }

    /// Take one byte; true when it completes a value.
    fn take(&mut self, byte: u8) -> Result<bool, Broken> {
        match self.state {
            State::Skipping => {
                if byte == b'\n' {
                    self.state = State::Between;
                }
                Ok(false)
            }
            State::Between => match byte {
                b' ' | b'\t' | b'\r' | b'\n' => Ok(false),
                0..b' ' | b'}' | b']' | b',' | b':' => Err(self.stray(byte)),
                b'{' | b'[' | b'"' | b'\'' => {
                    self.state = State::Inside;
                    self.take_inside(byte)
                }
                _ => {
                    self.state = State::Scalar;
                    self.keep(byte)?;
                    Ok(false)
                }
            },
            State::Inside => self.take_inside(byte),
            State::String { quote } => self.take_in_string(byte, quote),
            State::Escape { quote } => {
                if byte == b'\n' {
                    return Err(self.open_string());
                }
                // JSON knows no escaped apostrophe: it needs no escape.
                if byte != b'\'' {
                    self.keep(b'\\')?;
                }
                self.keep(byte)?;
                self.state = State::String { quote };
                Ok(false)
            }
            State::Scalar => match byte {
                b' ' | b'\t' | b'\r' | b'\n' => {
                    self.state = State::Between;
                    Ok(true)
                }
                0..b' ' | b'{' | b'}' | b'[' | b']' | b'"' | b'\'' | b',' | b':' => {
                    Err(self.stray(byte))
                }
                _ => self.keep(byte).map(|()| false),
            },
        }
    }

    fn take_inside(&mut self, byte: u8) -> Result<bool, Broken> {
        match byte {
            b'{' | b'[' => {
                if self.depth == DEPTH_MAX {
                    return Err(Broken::TooDeep);
                }
                self.depth = self.depth.saturating_add(1);
            }
            b'}' | b']' => self.depth = self.depth.saturating_sub(1),
            b'"' | b'\'' => {
                self.state = State::String { quote: byte };
                return self.keep(b'"').map(|()| false);
            }
            b'\t' | b'\r' | b'\n' => {}
            0..b' ' => return Err(self.stray(byte)),
            _ => {}
        }
        self.keep(byte)?;
        Ok(self.finish_if_outermost())
    }

    fn take_in_string(&mut self, byte: u8, quote: u8) -> Result<bool, Broken> {
        match byte {
            b'\n' => return Err(self.open_string()),
            b'\\' => {
                self.state = State::Escape { quote };
                return Ok(false);
            }
            _ if byte == quote => {
                self.keep(b'"')?;
                self.state = State::Inside;
                return Ok(self.finish_if_outermost());
            }
            // Inside single quotes; it leaves in double ones.
            b'"' => self.keep(b'\\')?,
            _ => {}
        }
        self.keep(byte).map(|()| false)
    }

    fn finish_if_outermost(&mut self) -> bool {
        let finished = self.depth == 0;
        if finished {
            self.state = State::Between;
        }
        finished
    }

    fn keep(&mut self, byte: u8) -> Result<(), Broken> {
        if self.text.len() >= self.bytes_max {
            return Err(Broken::TooLong {
                bytes_max: self.bytes_max,
            });
        }
        self.text.push(byte);
        Ok(())
    }

    fn stray(&self, byte: u8) -> Broken {
        Broken::Stray {
            byte,
            offset: self.text.len(),
        }
    }

    fn open_string(&self) -> Broken {
        Broken::OpenString {
            offset: self.text.len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(framer: &mut Framer, mut input: &[u8]) -> Vec<Frame> {
        let mut frames = Vec::new();
        loop {
            let (used, frame) = framer.advance(input);
            input = &input[used..];
            if frame == Frame::NeedMore {
                return frames;
            }
            frames.push(frame);
        }
    }

    fn texts(input: &str) -> Vec<String> {
        frames(&mut Framer::new(1000), input.as_bytes())
            .into_iter()
            .map(|frame| match frame {
                Frame::Text(text) => String::from_utf8(text).unwrap(),
                Frame::Broken(broken) => format!("! {broken}"),
                Frame::NeedMore => unreachable!(),
            })
            .collect()
    }

    #[test]
    fn values_are_cut_apart_wherever_they_end() {
        assert_eq!(
            texts("{\"a\":[1,{}]}{}  [2]\r\n\"x\"5 null\n"),
            ["{\"a\":[1,{}]}", "{}", "[2]", "\"x\"", "5", "null"]
        );
        assert_eq!(texts(r#"{"}{":"\"]}"}"#), [r#"{"}{":"\"]}"}"#]);
    }

    #[test]
    fn single_quotes_become_double_ones() {
        assert_eq!(
            texts(r#"{'a':'it\'s "so" \n', "b":"don't"}"#),
            [r#"{"a":"it's \"so\" \n", "b":"don't"}"#]
        );
    }

    #[test]
    fn garbage_is_dropped_up_to_the_newline() {
        let good = "{\"good\":1}";
        for (bad, reports) in [
            ("}{\"x\":1}", 1),
            ("{\"x\u{1}\":1, \u{1} {}", 1),
            ("{\"open", 1),
            ("{\"open\\", 1),
            ("\u{1}\u{2}", 1),
            ("nonsense}{", 1),
        ] {
            let seen = texts(&format!("{bad}\n{good}"));
            assert_eq!(seen.len(), reports + 1, "{bad:?}: {seen:?}");
            assert!(seen[0].starts_with("! JSON parse error"), "{seen:?}");
            assert_eq!(seen[reports], good);
        }
    }

    #[test]
    fn length_is_bounded_on_both_sides() {
        let exact = format!("{{\"{}\":1}}", "x".repeat(1000 - 6));
        assert_eq!(exact.len(), 1000);
        assert_eq!(texts(&exact), std::slice::from_ref(&exact));
        let long = format!("{{\"{}\":1}}\n[]", "x".repeat(1000 - 5));
        assert_eq!(
            texts(&long),
            ["! JSON message longer than 1000 bytes", "[]"]
        );
    }

    #[test]
    fn depth_is_bounded_on_both_sides() {
        let depth = usize::try_from(DEPTH_MAX).unwrap();
        let exact = "[".repeat(depth) + &"]".repeat(depth);
        assert_eq!(texts(&exact), std::slice::from_ref(&exact));
        assert!(crate::json::parse(exact.as_bytes()).is_ok());
        let deep = format!("[{exact}]\n{{}}");
        assert_eq!(texts(&deep), ["! JSON nesting deeper than 64 levels", "{}"]);
    }
}
