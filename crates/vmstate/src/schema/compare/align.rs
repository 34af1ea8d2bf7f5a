//! One direction: the fields of the sender laid beside those of the receiver.
//!
//! Fields of the same name and shape are matched first. Between them lie gaps: fields that were
//! renamed, retired, regrouped, added. In a gap, structs of the same description are matched, then
//! structs are opened, and what is left is compared by its length in bytes, for that is all that
//! counts on the wire.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::reason::{Cause, Direction, Extent, Names, Reason, Verdict};
use super::totals::Totals;
use crate::schema::{SchemaField, SchemaState, Source};

/// Largest product of the numbers of fields on both sides that are matched by name; longer runs are
/// compared by their length only. QEMU's longest state has about 150 fields.
const MAX_CELLS: usize = 1 << 18;
/// The name that QEMU gives to bytes without a meaning: it matches nothing.
const UNUSED: &str = "unused";

/// Does `receiver` load what `sender` sends?
pub(super) fn direction(
    sender: (Source, &SchemaState),
    receiver: (Source, &SchemaState),
) -> Direction {
    let mut aligner = Aligner {
        sender: sender.0,
        receiver: receiver.0,
        found: Direction::default(),
    };
    aligner.device(sender.1, receiver.1);
    let mut found = aligner.found;
    join_moved(&mut found);
    found
}

struct Aligner {
    sender: Source,
    receiver: Source,
    found: Direction,
}

/// A field, or the subsections of a struct that was opened.
#[derive(Clone)]
struct Item<'a> {
    what: What<'a>,
    owner: Option<Rc<Place<'a>>>,
    conditional: bool,
    /// Which of the fields of its name, if there are several.
    number: Option<usize>,
}

#[derive(Clone, Copy)]
enum What<'a> {
    Field(&'a SchemaField),
    Subsections(&'a [SchemaState]),
}

/// The structs and subsections around a field.
struct Place<'a> {
    name: &'a str,
    owner: Option<Rc<Place<'a>>>,
}

impl Aligner {
    fn device(&mut self, sent: &SchemaState, read: &SchemaState) {
        for (state, cause) in [(sent, Cause::CannotBeSaved), (read, Cause::CannotBeLoaded)] {
            if state.fields.is_none() {
                return self.add(Verdict::No, String::new(), cause);
            }
        }
        if self.version_is_loaded(None, sent, read, true) {
            self.state(None, (sent, sent.version), (read, sent.version), true);
        }
    }

    fn version_is_loaded(
        &mut self,
        place: Option<&Rc<Place<'_>>>,
        sent: &SchemaState,
        read: &SchemaState,
        certain: bool,
    ) -> bool {
        let version = sent.version;
        let cause = if version > read.version {
            Cause::VersionTooNew {
                sent: version,
                known: read.version,
            }
        } else if version < read.minimum_version {
            Cause::VersionTooOld {
                sent: version,
                minimum: read.minimum_version,
            }
        } else {
            return true;
        };
        self.add(no(certain), path(place), cause);
        false
    }

    /// A state in the versions that each side takes. Not `certain`: only if it is sent at all.
    fn state<'a>(
        &mut self,
        place: Option<&Rc<Place<'a>>>,
        sent: (&'a SchemaState, u32),
        read: (&'a SchemaState, u32),
        certain: bool,
    ) {
        let sent_items = items(sent.0, sent.1, place, false);
        let read_items = items(read.0, read.1, place, false);
        self.fields(&sent_items, &read_items, certain);
        self.subsections(place, &sent.0.subsections, &read.0.subsections, certain);
    }

    fn subsections<'a>(
        &mut self,
        owner: Option<&Rc<Place<'a>>>,
        sent: &'a [SchemaState],
        read: &'a [SchemaState],
        certain: bool,
    ) {
        // A schema says that one may be sent, a stream has those that were.
        let certain = certain && self.sender == Source::Stream;
        let known: BTreeMap<_, _> = read
            .iter()
            .rev()
            .map(|state| (state.name.as_str(), state))
            .collect();
        for state in sent {
            let place = Rc::new(Place {
                name: &state.name,
                owner: owner.cloned(),
            });
            match known.get(state.name.as_str()) {
                None => self.add(no(certain), path(Some(&place)), Cause::UnknownSubsection),
                Some(known) => {
                    if self.version_is_loaded(Some(&place), state, known, certain) {
                        let version = state.version;
                        self.state(Some(&place), (state, version), (known, version), certain);
                    }
                }
            }
        }
    }

    fn fields<'a>(&mut self, sent: &[Item<'a>], read: &[Item<'a>], certain: bool) {
        let like = |one: &Item<'a>, other: &Item<'a>| {
            one.conditional == other.conditional && one.is_like(other)
        };
        self.by_anchors(sent, read, certain, like, |this, sent, read, certain| {
            this.by_anchors(sent, read, certain, Item::is_like, Self::gap);
        });
    }

    /// Compare the pairs that `like` finds, and with `between` what lies between them.
    fn by_anchors<'a>(
        &mut self,
        sent: &[Item<'a>],
        read: &[Item<'a>],
        certain: bool,
        like: impl Fn(&Item<'a>, &Item<'a>) -> bool,
        between: impl Fn(&mut Self, &[Item<'a>], &[Item<'a>], bool),
    ) {
        let mut done = (0, 0);
        for (one, other) in in_common(sent, read, like) {
            let gap = (sent.get(done.0..one), read.get(done.1..other));
            between(
                self,
                gap.0.unwrap_or_default(),
                gap.1.unwrap_or_default(),
                certain,
            );
            if let (Some(one), Some(other)) = (sent.get(one), read.get(other)) {
                self.pair(one, other, certain);
            }
            done = (one.saturating_add(1), other.saturating_add(1));
        }
        let rest = (sent.get(done.0..), read.get(done.1..));
        between(
            self,
            rest.0.unwrap_or_default(),
            rest.1.unwrap_or_default(),
            certain,
        );
    }

    /// Two fields that stand for each other.
    fn pair(&mut self, sent: &Item<'_>, read: &Item<'_>, certain: bool) {
        let (one, other) = match (sent.what, read.what) {
            (What::Field(one), What::Field(other)) => (one, other),
            (What::Subsections(one), What::Subsections(other)) => {
                let certain = certain && !sent.conditional;
                return self.subsections(sent.owner.as_ref(), one, other, certain);
            }
            _ => return,
        };
        let from_stream = self.sender == Source::Stream;
        match (sent.conditional, read.conditional) {
            (true, false) => self.add(Verdict::Depends, sent.path(), Cause::SentSometimes),
            (false, true) if !from_stream => {
                self.add(Verdict::Depends, sent.path(), Cause::ReadSometimes);
            }
            _ => {}
        }
        let certain = certain && !sent.conditional;
        self.elements(sent, (one, other), certain);
        match (&one.inner, &other.inner) {
            (Some(inner), Some(other)) => {
                let place = Some(sent.place());
                self.state(
                    place.as_ref(),
                    (inner, inner.version),
                    (other, other.version),
                    certain,
                );
            }
            (None, None) if one.element_bytes == other.element_bytes => {}
            _ if from_stream => {}
            _ => self.add(Verdict::Depends, sent.path(), Cause::UnknownLength),
        }
    }

    fn elements(&mut self, at: &Item<'_>, pair: (&SchemaField, &SchemaField), certain: bool) {
        let (sent, read) = (pair.0.count, pair.1.count);
        let verdict = match (sent, read) {
            (Some(sent), Some(read)) if sent != read => no(certain),
            (None, Some(_)) if self.sender == Source::Counting => Verdict::Depends,
            (Some(_), None)
                if self.receiver == Source::Counting && self.sender == Source::Counting =>
            {
                Verdict::Depends
            }
            _ => return,
        };
        self.add(verdict, at.path(), Cause::Elements { sent, read });
    }

    fn gap<'a>(&mut self, sent: &[Item<'a>], read: &[Item<'a>], certain: bool) {
        if sent.is_empty() && read.is_empty() {
            return;
        }
        self.by_anchors(
            sent,
            read,
            certain,
            Item::has_same_description,
            Self::gap_without_twins,
        );
    }

    fn gap_without_twins<'a>(&mut self, sent: &[Item<'a>], read: &[Item<'a>], certain: bool) {
        let can_open = |items: &[Item<'_>]| items.iter().any(Item::can_be_opened);
        let both_there = !sent.is_empty() && !read.is_empty();
        if both_there && (can_open(sent) || can_open(read)) {
            return self.fields(&opened(sent), &opened(read), certain);
        }
        // The subsections of a struct that only the receiver has are not sent, which is well.
        let is_read = |item: &&Item<'_>| !matches!(item.what, What::Subsections(_));
        let read: Vec<_> = read.iter().filter(is_read).cloned().collect();
        if !sent.is_empty() || !read.is_empty() {
            self.by_length(sent, &read, certain);
        }
    }

    fn by_length(&mut self, sent: &[Item<'_>], read: &[Item<'_>], certain: bool) {
        if is_renamed(sent, read) {
            for (one, other) in sent.iter().zip(read) {
                self.renamed(std::slice::from_ref(one), std::slice::from_ref(other));
            }
            return;
        }
        // First as if fields without a count were single values.
        let as_single = |items| total(items, Source::Counting).exactly();
        let lengths = (as_single(sent), as_single(read));
        if lengths.0.is_some() && lengths.0 == lengths.1 {
            return self.renamed(sent, read);
        }
        let possible = read.iter().fold(Totals::nothing(), |total, item| {
            let perhaps = item.conditional || self.may_be_empty(item);
            total.plus(&item.bytes(self.receiver), perhaps)
        });
        if total(sent, self.sender).meets(&possible) {
            self.unclear(sent, read);
        } else {
            self.explain(sent, read, certain);
        }
    }

    fn renamed(&mut self, sent: &[Item<'_>], read: &[Item<'_>]) {
        let same = sent.iter().map(Item::name).eq(read.iter().map(Item::name));
        if !same {
            let place = sent.first().or(read.first()).map(Item::owner_path);
            let (sent, read) = (names(sent), names(read));
            let cause = Cause::Renamed { sent, read };
            self.add(Verdict::Yes, place.unwrap_or_default(), cause);
        }
    }

    /// Arrays without elements leave no trace in a stream's description, and a schema does not tell
    /// those of variable length from single structs.
    fn may_be_empty(&self, item: &Item<'_>) -> bool {
        let field = item.field();
        self.sender == Source::Stream
            && field.is_some_and(|field| field.inner.is_some() && field.count.is_none())
    }

    /// It may fit: what would have to hold?
    fn unclear(&mut self, sent: &[Item<'_>], read: &[Item<'_>]) {
        // What a stream has was sent, and the receiver's conditions are taken to be the same.
        if self.sender == Source::Stream {
            let always = read.iter().filter(|item| !item.conditional);
            for item in always.filter(|_| sent.is_empty()) {
                let cause = if self.may_be_empty(item) {
                    Cause::NotSentUnlessEmpty
                } else {
                    Cause::UnknownLength
                };
                self.add(Verdict::Depends, item.path(), cause);
            }
            return;
        }
        let cause = |item: &Item<'_>, known: Cause| match (item.what, item.conditional) {
            (What::Subsections(_), _) => Cause::UnknownSubsection,
            (What::Field(_), true) => known,
            (What::Field(_), false) => Cause::UnknownLength,
        };
        match (sent, read) {
            ([], _) => {
                for item in read {
                    let cause = cause(item, Cause::NotSentSometimes);
                    self.add(Verdict::Depends, item.path(), cause);
                }
            }
            (_, []) => {
                for item in sent {
                    let cause = cause(item, Cause::NotReadSometimes);
                    self.add(Verdict::Depends, item.path(), cause);
                }
            }
            ([first, ..], _) => {
                let cause = Cause::Unclear {
                    sent: names(sent),
                    read: names(read),
                };
                self.add(Verdict::Depends, first.owner_path(), cause);
            }
        }
    }

    /// It does not fit: which fields are to blame?
    fn explain(&mut self, sent: &[Item<'_>], read: &[Item<'_>], certain: bool) {
        let mut done = (0, 0);
        for (one, other) in in_common(sent, read, Item::has_same_name) {
            let before = (sent.get(done.0..one), read.get(done.1..other));
            self.blame(
                before.0.unwrap_or_default(),
                before.1.unwrap_or_default(),
                certain,
            );
            if let (Some(one), Some(other)) = (sent.get(one), read.get(other)) {
                let (sent, read) = (self.sent_extent(one), self.read_extent(other));
                if sent != read {
                    self.add(no(certain), one.path(), Cause::Size { sent, read });
                }
            }
            done = (one.saturating_add(1), other.saturating_add(1));
        }
        let rest = (sent.get(done.0..), read.get(done.1..));
        self.blame(
            rest.0.unwrap_or_default(),
            rest.1.unwrap_or_default(),
            certain,
        );
    }

    fn blame(&mut self, sent: &[Item<'_>], read: &[Item<'_>], certain: bool) {
        match (sent, read) {
            ([], _) => {
                for item in read {
                    let cause = Cause::NotSent(self.read_extent(item));
                    self.add(no(certain), item.path(), cause);
                }
            }
            (_, []) => {
                for item in sent {
                    let cause = Cause::NotRead(self.sent_extent(item));
                    self.add(no(certain), item.path(), cause);
                }
            }
            ([first, ..], _) => {
                let cause = Cause::Fields {
                    sent: (names(sent), total(sent, self.sender).extent()),
                    read: (names(read), total(read, self.receiver).extent()),
                };
                self.add(no(certain), first.owner_path(), cause);
            }
        }
    }

    fn sent_extent(&self, item: &Item<'_>) -> Extent {
        item.bytes(self.sender).extent()
    }

    fn read_extent(&self, item: &Item<'_>) -> Extent {
        item.bytes(self.receiver).extent()
    }

    fn add(&mut self, verdict: Verdict, place: String, cause: Cause) {
        self.found.add(Reason {
            verdict,
            place,
            cause,
        });
    }
}

/// A failure, if what fails is sent.
fn no(certain: bool) -> Verdict {
    if certain {
        Verdict::No
    } else {
        Verdict::Depends
    }
}

/// The fields that a state has in `version`.
fn items<'a>(
    state: &'a SchemaState,
    version: u32,
    owner: Option<&Rc<Place<'a>>>,
    conditional: bool,
) -> Vec<Item<'a>> {
    let fields = || state.fields.iter().flatten();
    let mut seen = BTreeMap::new();
    for field in fields() {
        let count: &mut usize = seen.entry(field.name.as_str()).or_default();
        *count = count.saturating_add(1);
    }
    seen.retain(|_, count| std::mem::take(count) > 1);
    // Numbers count those that the version has not, as in a stream.
    let mut number = |field: &'a SchemaField| {
        let next = seen.get_mut(field.name.as_str())?;
        let number = *next;
        *next = number.saturating_add(1);
        Some(number)
    };
    fields()
        .map(|field| Item {
            what: What::Field(field),
            owner: owner.cloned(),
            conditional: conditional || field.conditional,
            number: number(field),
        })
        .filter(|item| item.field().is_some_and(|field| field.since <= version))
        .collect()
}

/// With each single struct replaced by what is in it.
fn opened<'a>(closed: &[Item<'a>]) -> Vec<Item<'a>> {
    let mut open = Vec::new();
    for item in closed {
        let inner = match item.what {
            What::Field(SchemaField {
                inner: Some(inner), ..
            }) if item.can_be_opened() => inner,
            _ => {
                open.push(item.clone());
                continue;
            }
        };
        let place = item.place();
        let conditional = item.conditional;
        open.extend(items(inner, inner.version, Some(&place), conditional));
        if !inner.subsections.is_empty() {
            open.push(Item {
                what: What::Subsections(&inner.subsections),
                owner: Some(place),
                conditional: true,
                number: None,
            });
        }
    }
    open
}

fn total(items: &[Item<'_>], source: Source) -> Totals {
    items.iter().fold(Totals::nothing(), |total, item| {
        total.plus(&item.bytes(source), item.conditional)
    })
}

fn names(items: &[Item<'_>]) -> Names {
    Names::new(items.iter().map(Item::name))
}

/// The same fields under other names, one for one.
fn is_renamed(sent: &[Item<'_>], read: &[Item<'_>]) -> bool {
    let like = |pair: (&Item<'_>, &Item<'_>)| match (pair.0.what, pair.1.what) {
        (What::Field(one), What::Field(other)) => {
            let plain = one.inner.is_none() && other.inner.is_none() && one.element_bytes > 0;
            plain
                && one.element_bytes == other.element_bytes
                && (one.count == other.count || one.count.is_none() || other.count.is_none())
                && pair.0.conditional == pair.1.conditional
        }
        _ => false,
    };
    sent.len() == read.len() && sent.iter().zip(read).all(like)
}

/// A field that is not read at its place and not sent at another is one that moved.
fn join_moved(found: &mut Direction) {
    let read_elsewhere: Vec<String> = found
        .reasons
        .iter()
        .filter(|reason| matches!(reason.cause, Cause::NotSent(_)))
        .map(|reason| reason.place.clone())
        .collect();
    let mut moved = Vec::new();
    for reason in &mut found.reasons {
        if matches!(reason.cause, Cause::NotRead(_)) && read_elsewhere.contains(&reason.place) {
            reason.cause = Cause::Moved;
            moved.push(reason.place.clone());
        }
    }
    found.reasons.retain(|reason| {
        !(matches!(reason.cause, Cause::NotSent(_)) && moved.contains(&reason.place))
    });
}

impl<'a> Item<'a> {
    fn name(&self) -> &'a str {
        match self.what {
            What::Field(field) => &field.name,
            What::Subsections(_) => "subsections",
        }
    }

    fn field(&self) -> Option<&'a SchemaField> {
        match self.what {
            What::Field(field) => Some(field),
            What::Subsections(_) => None,
        }
    }

    /// The same name, and nothing in its shape that speaks against it.
    fn is_like(&self, other: &Self) -> bool {
        let (one, twin) = match (self.what, other.what) {
            (What::Field(one), What::Field(twin)) => (one, twin),
            (What::Subsections(_), What::Subsections(_)) => return true,
            _ => return false,
        };
        let same_shape = match (&one.inner, &twin.inner) {
            (Some(_), Some(_)) => true,
            // A list without elements, and opaque state.
            (None, Some(_)) => one.element_bytes == 0,
            (Some(_), None) => twin.element_bytes == 0,
            (None, None) => {
                let bytes = (one.element_bytes, twin.element_bytes);
                bytes.0 == bytes.1 || bytes.0 == 0 || bytes.1 == 0
            }
        };
        same_shape && self.has_same_name(other)
    }

    fn has_same_name(&self, other: &Self) -> bool {
        let same =
            self.name() == other.name() || self.is_numbered(other) || other.is_numbered(self);
        same && self.name() != UNUSED
    }

    /// In a stream, fields of one state that share a name are numbered: `config[1]`.
    fn is_numbered(&self, plain: &Self) -> bool {
        let name = self.name().strip_suffix(']');
        match name.and_then(|name| name.rsplit_once('[')) {
            Some((name, number)) if name == plain.name() => {
                plain.number.is_none() || number.parse() == Ok(plain.number.unwrap_or(0))
            }
            _ => false,
        }
    }

    fn has_same_description(&self, other: &Self) -> bool {
        let description = |item: &Self| item.field().and_then(|field| field.inner.as_ref());
        match (description(self), description(other)) {
            (Some(one), Some(other)) => one.name == other.name,
            _ => false,
        }
    }

    fn can_be_opened(&self) -> bool {
        let field = self.field();
        field.is_some_and(|field| field.inner.is_some() && matches!(field.count, None | Some(1)))
    }

    fn bytes(&self, source: Source) -> Totals {
        match self.what {
            What::Field(field) => Totals::of_field(field, source),
            What::Subsections(_) => Totals::anything(),
        }
    }

    /// The place inside this field.
    fn place(&self) -> Rc<Place<'a>> {
        Rc::new(Place {
            name: self.name(),
            owner: self.owner.clone(),
        })
    }

    fn path(&self) -> String {
        path(Some(&self.place()))
    }

    fn owner_path(&self) -> String {
        path(self.owner.as_ref())
    }
}

fn path(place: Option<&Rc<Place<'_>>>) -> String {
    let mut names = Vec::new();
    let mut next = place;
    while let Some(place) = next {
        names.push(place.name);
        next = place.owner.as_ref();
    }
    names.reverse();
    names.join(".")
}

/// Places of a longest sequence that both have in common. Where both are so long that finding it
/// would take too long, only what they start and end with.
fn in_common<T>(one: &[T], other: &[T], same: impl Fn(&T, &T) -> bool) -> Vec<(usize, usize)> {
    let pairs = || one.iter().zip(other);
    let start = pairs().take_while(|(one, other)| same(one, other)).count();
    let shorter = one.len().min(other.len()).saturating_sub(start);
    let ends = one.iter().rev().zip(other.iter().rev()).take(shorter);
    let end = ends.take_while(|(one, other)| same(one, other)).count();
    let middle = |items: &[T]| start..items.len().saturating_sub(end);
    let (rows, columns) = (middle(one), middle(other));
    let mut common: Vec<_> = (0..start).map(|k| (k, k)).collect();
    let inner = longest_common(
        one.get(rows.clone()).unwrap_or_default(),
        other.get(columns.clone()).unwrap_or_default(),
        &same,
    );
    let shift =
        |(row, column): (usize, usize)| (row.saturating_add(start), column.saturating_add(start));
    common.extend(inner.into_iter().map(shift));
    common.extend((rows.end..one.len()).zip(columns.end..other.len()));
    common
}

fn longest_common<T>(one: &[T], other: &[T], same: impl Fn(&T, &T) -> bool) -> Vec<(usize, usize)> {
    if one.is_empty() || other.is_empty() || one.len().saturating_mul(other.len()) > MAX_CELLS {
        return Vec::new();
    }
    // `lengths[row][column]`: of the longest sequence that starts there.
    let mut lengths = vec![vec![0_u32; other.len().saturating_add(1)]];
    for item in one.iter().rev() {
        let below = lengths.last().map(Vec::as_slice).unwrap_or_default();
        let mut row = vec![0_u32];
        for (twin, below) in other.iter().zip(below.windows(2)).rev() {
            let [straight, diagonal] = *below else { break };
            let right = row.last().copied().unwrap_or(0);
            row.push(if same(item, twin) {
                diagonal.saturating_add(1)
            } else {
                straight.max(right)
            });
        }
        row.reverse();
        lengths.push(row);
    }
    lengths.reverse();
    let length = |row: usize, column: usize| {
        let row = lengths.get(row);
        row.and_then(|row| row.get(column)).copied().unwrap_or(0)
    };
    let (mut row, mut column) = (0, 0);
    let mut common = Vec::new();
    while let (Some(item), Some(twin)) = (one.get(row), other.get(column)) {
        let (next_row, next_column) = (row.saturating_add(1), column.saturating_add(1));
        if same(item, twin) {
            common.push((row, column));
            (row, column) = (next_row, next_column);
        } else if length(next_row, column) >= length(row, next_column) {
            row = next_row;
        } else {
            column = next_column;
        }
    }
    common
}
