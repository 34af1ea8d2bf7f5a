//! One test for each way in which a client can go right or wrong.

use std::time::Duration;

use super::*;

struct Shelf(Vec<&'static str>);

impl Catalog for Shelf {
    type Export = String;

    fn list(&self) -> Vec<String> {
        self.0.iter().map(ToString::to_string).collect()
    }

    fn open(&self, name: &str) -> Result<(String, ExportInfo), Unavailable> {
        let info = ExportInfo {
            length: 1000,
            read_only: name == "ro",
            preferred_bytes: 4096,
        };
        match name {
            "moved" => Err(Unavailable::Departed),
            name if self.0.contains(&name) => Ok((name.to_owned(), info)),
            _ => Err(Unavailable::Unknown),
        }
    }

    fn description(&self, name: &str) -> Option<String> {
        Some(format!("about {name}"))
    }
}

/// A server's side under test; time stands still unless told.
struct Bench {
    negotiation: Negotiation,
    shelf: Shelf,
    now: Instant,
    window: Vec<u8>,
    out: Vec<u8>,
}

impl Bench {
    fn with(exports: &[&'static str], client_flags: u32) -> Self {
        let now = Instant::now();
        let mut out = Vec::new();
        let negotiation = Negotiation::new(now + Duration::from_secs(10), &mut out);
        assert_eq!(out, b"NBDMAGICIHAVEOPT\0\x03");
        let mut bench = Self {
            negotiation,
            shelf: Shelf(exports.to_vec()),
            now,
            window: client_flags.to_be_bytes().to_vec(),
            out: Vec::new(),
        };
        assert_eq!(bench.run(), Ok(Progress::NeedMore));
        bench
    }

    fn new() -> Self {
        Self::with(&["disk", "ro"], 3)
    }

    /// Handle everything in the window.
    fn run(&mut self) -> Result<Progress<String>, Misbehaviour> {
        loop {
            let (used, progress) =
                self.negotiation
                    .handle(self.now, &self.window, &self.shelf, &mut self.out)?;
            self.window.drain(..used);
            match progress {
                Progress::Advanced => {}
                progress => return Ok(progress),
            }
        }
    }

    fn option(&mut self, code: OptionCode, data: &[u8]) -> Result<Progress<String>, Misbehaviour> {
        self.window.extend(OPTION_MAGIC.to_be_bytes());
        self.window.extend(code.0.to_be_bytes());
        self.window.extend((data.len() as u32).to_be_bytes());
        self.window.extend(data);
        self.out.clear();
        self.run()
    }

    /// The kinds and bodies of the replies to one option.
    fn replies(&mut self, code: OptionCode, data: &[u8]) -> Vec<(OptionReply, Vec<u8>)> {
        assert_eq!(self.option(code, data), Ok(Progress::NeedMore), "{code}");
        self.parse(code)
    }

    fn parse(&self, code: OptionCode) -> Vec<(OptionReply, Vec<u8>)> {
        let mut fields = Fields(&self.out);
        let mut replies = Vec::new();
        while let Some(magic) = fields.u64() {
            assert_eq!(magic, OPTION_REPLY_MAGIC);
            assert_eq!(fields.u32(), Some(code.0));
            let kind = OptionReply(fields.u32().unwrap());
            replies.push((kind, fields.string().unwrap().to_vec()));
        }
        replies
    }

    fn kinds(&mut self, code: OptionCode, data: &[u8]) -> Vec<OptionReply> {
        let replies = self.replies(code, data);
        replies.into_iter().map(|(kind, _)| kind).collect()
    }
}

fn strings(texts: &[&str], count_after_first: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (number, text) in texts.iter().enumerate() {
        bytes.extend((text.len() as u32).to_be_bytes());
        bytes.extend(text.as_bytes());
        if number == 0 && count_after_first {
            bytes.extend((texts.len() as u32 - 1).to_be_bytes());
        }
    }
    bytes
}

fn go(name: &str, wanted: &[Info]) -> Vec<u8> {
    let mut data = strings(&[name], false);
    data.extend((wanted.len() as u16).to_be_bytes());
    for info in wanted {
        data.extend(info.0.to_be_bytes());
    }
    data
}

#[test]
fn go_describes_the_export_and_starts() {
    let mut bench = Bench::new();
    assert_eq!(
        bench.kinds(OptionCode::STRUCTURED_REPLY, &[]),
        [OptionReply::ACK]
    );
    let wanted = [Info::NAME, Info::DESCRIPTION, Info(99)];
    let progress = bench.option(OptionCode::GO, &go("disk", &wanted));
    let agreed = Agreed {
        export: "disk".to_owned(),
        structured: true,
        allocation: false,
    };
    assert_eq!(progress, Ok(Progress::Ready(agreed)));
    let replies = bench.parse(OptionCode::GO);
    let bodies: Vec<&[u8]> = replies.iter().map(|(_, body)| &body[..]).collect();
    assert_eq!(bodies[0][..10], [0, 0, 0, 0, 0, 0, 0, 0, 3, 0xe8]);
    assert_eq!(bodies[1], b"\0\x01disk");
    assert_eq!(bodies[2], b"\0\x02about disk");
    assert_eq!(bodies[3], [0, 3, 0, 0, 0, 1, 0, 0, 0x10, 0, 2, 0, 0, 0]);
    assert_eq!(replies[4], (OptionReply::ACK, Vec::new()));
}

#[test]
fn info_describes_and_goes_on() {
    let mut bench = Bench::new();
    let kinds = bench.kinds(OptionCode::INFO, &go("ro", &[]));
    assert_eq!(
        kinds,
        [OptionReply::INFO, OptionReply::INFO, OptionReply::ACK]
    );
    let flags = u16::from_be_bytes([bench.out[30], bench.out[31]]);
    assert_ne!(flags & transmission::READ_ONLY, 0);
    assert_eq!(flags & transmission::SEND_TRIM, 0);
    assert_eq!(flags & transmission::SEND_DF, 0);
}

#[test]
fn exports_are_found_by_exact_name_or_as_the_only_one() {
    for (name, reply) in [
        ("dis", OptionReply::ERR_UNKNOWN),
        ("DISK", OptionReply::ERR_UNKNOWN),
        ("", OptionReply::ERR_UNKNOWN),
        ("moved", OptionReply::ERR_SHUTDOWN),
    ] {
        let mut bench = Bench::new();
        assert_eq!(bench.kinds(OptionCode::GO, &go(name, &[])), [reply]);
        let progress = bench.option(OptionCode::GO, &go("disk", &[]));
        assert!(matches!(progress, Ok(Progress::Ready(_))));
    }
    let mut bench = Bench::with(&["disk"], 3);
    let progress = bench.option(OptionCode::GO, &go("", &[]));
    assert!(matches!(progress, Ok(Progress::Ready(agreed)) if agreed.export == "disk"));
}

#[test]
fn list_names_every_export() {
    let mut bench = Bench::new();
    let replies = bench.replies(OptionCode::LIST, &[]);
    assert_eq!(replies[0].1, b"\0\0\0\x04diskabout disk");
    assert_eq!(replies[1].0, OptionReply::SERVER);
    assert_eq!(replies[2].0, OptionReply::ACK);
}

#[test]
fn contexts_need_structured_replies() {
    let mut bench = Bench::new();
    let data = strings(&["disk", BASE_ALLOCATION], true);
    for option in [OptionCode::LIST_META_CONTEXT, OptionCode::SET_META_CONTEXT] {
        assert_eq!(bench.kinds(option, &data), [OptionReply::ERR_INVALID]);
    }
}

#[test]
fn contexts_are_listed_by_wildcard_and_set_by_name() {
    let mut bench = Bench::new();
    bench.kinds(OptionCode::STRUCTURED_REPLY, &[]);
    let (list, set) = (OptionCode::LIST_META_CONTEXT, OptionCode::SET_META_CONTEXT);
    let (found, none) = (
        vec![OptionReply::META_CONTEXT, OptionReply::ACK],
        vec![OptionReply::ACK],
    );
    for (option, queries, kinds) in [
        (list, &["disk"][..], &found),
        (list, &["disk", "base:"], &found),
        (list, &["disk", "qemu:", "base:allocation"], &found),
        (list, &["disk", "qemu:"], &none),
        (set, &["disk"], &none),
        (set, &["disk", "base:"], &none),
        (set, &["disk", "base:allocation"], &found),
    ] {
        let data = strings(queries, true);
        assert_eq!(&bench.kinds(option, &data), kinds, "{option} {queries:?}");
    }
    let data = strings(&["other", BASE_ALLOCATION], true);
    assert_eq!(bench.kinds(set, &data), [OptionReply::ERR_UNKNOWN]);
}

#[test]
fn a_context_counts_for_its_own_export_only() {
    for (name, allocation) in [("disk", true), ("ro", false)] {
        let mut bench = Bench::new();
        bench.kinds(OptionCode::STRUCTURED_REPLY, &[]);
        let data = strings(&["disk", BASE_ALLOCATION], true);
        bench.kinds(OptionCode::SET_META_CONTEXT, &data);
        let progress = bench.option(OptionCode::GO, &go(name, &[]));
        assert!(matches!(progress, Ok(Progress::Ready(agreed)) if agreed.allocation == allocation));
    }
}

#[test]
fn the_old_option_starts_without_a_reply() {
    for (flags, length) in [(3, 10), (1, 134), (0, 134)] {
        let mut bench = Bench::with(&["disk"], flags);
        let progress = bench.option(OptionCode::EXPORT_NAME, b"disk");
        assert!(matches!(progress, Ok(Progress::Ready(_))));
        assert_eq!(bench.out.len(), length);
    }
    let mut bench = Bench::new();
    assert_eq!(
        bench.option(OptionCode::EXPORT_NAME, b"other"),
        Err(Misbehaviour::ExportName(Unavailable::Unknown))
    );
    let mut bench = Bench::new();
    assert_eq!(
        bench.option(OptionCode::EXPORT_NAME, &[0xff]),
        Err(Misbehaviour::ExportNameInvalid(1))
    );
}

#[test]
fn abort_is_acknowledged() {
    let mut bench = Bench::new();
    assert_eq!(
        bench.option(OptionCode::ABORT, b"why"),
        Ok(Progress::Goodbye)
    );
    assert_eq!(bench.parse(OptionCode::ABORT)[0].0, OptionReply::ACK);
}

#[test]
fn unknown_options_are_refused_and_the_handshake_goes_on() {
    let mut bench = Bench::new();
    for option in [
        OptionCode::STARTTLS,
        OptionCode::EXTENDED_HEADERS,
        OptionCode(4),
        OptionCode(0xffff_ffff),
    ] {
        assert_eq!(bench.kinds(option, b"data"), [OptionReply::ERR_UNSUP]);
    }
}

#[test]
fn unknown_client_flags_end_it() {
    let mut bench = Bench::new();
    bench.negotiation.phase = Phase::ClientFlags;
    bench.window = 4u32.to_be_bytes().to_vec();
    assert_eq!(bench.run(), Err(Misbehaviour::ClientFlags(4)));
}

#[test]
fn an_option_without_its_magic_ends_it_at_once() {
    let mut bench = Bench::new();
    bench.window = b"GET / HT".to_vec();
    assert!(matches!(bench.run(), Err(Misbehaviour::OptionMagic(_))));
}

#[test]
fn a_client_that_is_not_fixed_may_only_name_an_export() {
    let mut bench = Bench::with(&["disk"], 0);
    assert_eq!(
        bench.option(OptionCode::LIST, &[]),
        Err(Misbehaviour::NotFixed(OptionCode::LIST))
    );
}

#[test]
fn an_option_at_the_limit_is_read_and_one_above_it_skipped() {
    let mut bench = Bench::new();
    let longest = vec![0; OPTION_BYTES_MAX as usize];
    assert_eq!(
        bench.kinds(OptionCode(99), &longest),
        [OptionReply::ERR_UNSUP]
    );
    let longer = vec![0; OPTION_BYTES_MAX as usize + 1];
    assert_eq!(
        bench.kinds(OptionCode::INFO, &longer),
        [OptionReply::ERR_TOO_BIG]
    );
    assert_eq!(
        bench.option(OptionCode::EXPORT_NAME, &longer),
        Err(Misbehaviour::ExportNameInvalid(OPTION_BYTES_MAX + 1))
    );
}

#[test]
fn malformed_options_are_refused_and_the_handshake_goes_on() {
    let mut bench = Bench::new();
    bench.kinds(OptionCode::STRUCTURED_REPLY, &[]);
    let long_name = "x".repeat(STRING_BYTES_MAX + 1);
    let trailing = [go("disk", &[]), vec![0]].concat();
    let short = go("disk", &[Info::NAME]);
    let contexts = strings(&["disk", BASE_ALLOCATION], true);
    let mut many = contexts.clone();
    many[8] = 0xff;
    for (option, data) in [
        (OptionCode::LIST, &b"x"[..]),
        (OptionCode::STRUCTURED_REPLY, b"x"),
        (OptionCode::GO, b""),
        (OptionCode::GO, &trailing),
        (OptionCode::GO, &short[..short.len() - 1]),
        (OptionCode::GO, &go(&long_name, &[])),
        (OptionCode::INFO, &[0xff; 40]),
        (
            OptionCode::SET_META_CONTEXT,
            &contexts[..contexts.len() - 1],
        ),
        (
            OptionCode::SET_META_CONTEXT,
            &[&contexts[..], b"x"].concat(),
        ),
        (OptionCode::LIST_META_CONTEXT, &many),
    ] {
        assert_eq!(bench.kinds(option, data), [OptionReply::ERR_INVALID]);
    }
    let longest_name = go(&"x".repeat(STRING_BYTES_MAX), &[]);
    assert_eq!(
        bench.kinds(OptionCode::GO, &longest_name),
        [OptionReply::ERR_UNKNOWN]
    );
}

#[test]
fn a_client_that_takes_too_long_is_dropped() {
    let mut bench = Bench::new();
    bench.now = bench.negotiation.deadline() - Duration::from_nanos(1);
    bench.kinds(OptionCode::LIST, &[]);
    bench.now = bench.negotiation.deadline();
    assert_eq!(
        bench.option(OptionCode::GO, &go("disk", &[])),
        Err(Misbehaviour::TimedOut)
    );
}

#[test]
fn any_split_of_the_input_gives_the_same_replies() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut whole = Bench::new();
    let mut script = Vec::new();
    for (option, data) in [
        (OptionCode::STRUCTURED_REPLY, Vec::new()),
        (OptionCode(77), vec![1; 500]),
        (OptionCode::INFO, vec![2; OPTION_BYTES_MAX as usize + 9]),
        (OptionCode::LIST, Vec::new()),
        (
            OptionCode::SET_META_CONTEXT,
            strings(&["disk", BASE_ALLOCATION], true),
        ),
    ] {
        script.extend(OPTION_MAGIC.to_be_bytes());
        script.extend(option.0.to_be_bytes());
        script.extend((data.len() as u32).to_be_bytes());
        script.extend(data);
    }
    whole.window.clone_from(&script);
    assert_eq!(whole.run(), Ok(Progress::NeedMore));
    for _ in 0..50 {
        let mut split = Bench::new();
        let mut rest = &script[..];
        while !rest.is_empty() {
            let most = rest.len().min([3, 40, 9000][random.usize(..3)]);
            let (piece, tail) = rest.split_at(random.usize(1..=most));
            split.window.extend(piece);
            assert_eq!(split.run(), Ok(Progress::NeedMore));
            rest = tail;
        }
        assert!(split.out == whole.out);
    }
}

#[test]
fn block_sizes_are_powers_of_two_in_bounds() {
    for (bytes, announced) in [
        (0, 512),
        (512, 512),
        (4095, 4096),
        (1 << 25, 1 << 25),
        (u32::MAX, 1 << 25),
    ] {
        assert_eq!(preferred(bytes), announced);
    }
}
