//! How many bytes a run of fields may have on the wire.

use std::collections::BTreeSet;

use super::reason::Extent;
use crate::schema::{SchemaField, SchemaState, Source};

/// How many sums of conditional fields are told apart; above that, every length is thought possible.
const MAX_SUMS: usize = 64;

/// The lengths that are possible.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Totals {
    /// One for each choice of conditions.
    sums: BTreeSet<u64>,
    /// To each of them, any multiple of this may be added: arrays and fields of unknown length.
    step: Option<u64>,
}

impl Totals {
    pub(super) fn nothing() -> Self {
        Self {
            sums: BTreeSet::from([0]),
            step: None,
        }
    }

    fn of_bytes(bytes: u64) -> Self {
        Self {
            sums: BTreeSet::from([bytes]),
            step: None,
        }
    }

    /// A length that only the sender knows.
    pub(super) fn anything() -> Self {
        Self {
            sums: BTreeSet::from([0]),
            step: Some(1),
        }
    }

    /// Of a field by a schema from `source`. `version` is that of the state around it.
    pub(super) fn of_field(field: &SchemaField, source: Source) -> Self {
        let element = match &field.inner {
            Some(inner) => Self::of_state(inner, inner.version, source),
            None if field.element_bytes == 0 => return Self::anything(),
            None => Self::of_bytes(field.element_bytes),
        };
        match (field.count, source) {
            (Some(count), _) => element.times(count),
            (None, Source::Counting) => element,
            (None, Source::NotCounting | Source::Stream) => {
                let step = element.exactly();
                element.plus_multiples_of(step.unwrap_or(1))
            }
        }
    }

    /// Of all fields that a state has in `version`.
    pub(super) fn of_state(state: &SchemaState, version: u32, source: Source) -> Self {
        let fields = state.fields.iter().flatten();
        let fields = fields.filter(|field| field.since <= version);
        let total = fields.fold(Self::nothing(), |total, field| {
            total.plus(&Self::of_field(field, source), field.conditional)
        });
        if state.subsections.is_empty() {
            total
        } else {
            total.plus(&Self::anything(), true)
        }
    }

    /// And these, or, if `conditional`, perhaps these.
    pub(super) fn plus(self, other: &Self, conditional: bool) -> Self {
        let step = match (self.step, other.step) {
            (Some(one), Some(other)) => Some(greatest_common_divisor(one, other)),
            (one, other) => one.or(other),
        };
        let without = if conditional { Some(0) } else { None };
        let added: BTreeSet<u64> = other.sums.iter().copied().chain(without).collect();
        let mut sums = BTreeSet::new();
        for one in &self.sums {
            sums.extend(added.iter().map(|other| one.saturating_add(*other)));
        }
        Self { sums, step }.bounded()
    }

    fn times(self, count: u32) -> Self {
        match self.exactly() {
            Some(bytes) => Self::of_bytes(bytes.saturating_mul(count.into())),
            None => Self::anything(),
        }
    }

    fn plus_multiples_of(mut self, step: u64) -> Self {
        self.step = Some(match self.step {
            Some(other) => greatest_common_divisor(step, other),
            None => step.max(1),
        });
        self
    }

    fn bounded(mut self) -> Self {
        if self.sums.len() > MAX_SUMS {
            let least = self.sums.first().copied().unwrap_or(0);
            self.sums = BTreeSet::from([least]);
            self.step = Some(1);
        }
        self
    }

    /// The length, if there is only one.
    pub(super) fn exactly(&self) -> Option<u64> {
        match self.step {
            None if self.sums.len() == 1 => self.sums.first().copied(),
            _ => None,
        }
    }

    pub(super) fn extent(&self) -> Extent {
        self.exactly().map_or(Extent::Unknown, Extent::Bytes)
    }

    /// Is there a length that both can have?
    pub(super) fn meets(&self, other: &Self) -> bool {
        self.sums.iter().any(|one| {
            let mut sums = other.sums.iter();
            sums.any(|other_sum| Self::reaches(*one, self.step, *other_sum, other.step))
        })
    }

    fn reaches(one: u64, one_step: Option<u64>, other: u64, other_step: Option<u64>) -> bool {
        let step = match (one_step, other_step) {
            (Some(one), Some(other)) => greatest_common_divisor(one, other),
            (Some(step), None) if other >= one => step,
            (None, Some(step)) if one >= other => step,
            _ => return one == other,
        };
        one.abs_diff(other).checked_rem(step).unwrap_or(0) == 0
    }
}

fn greatest_common_divisor(mut one: u64, mut other: u64) -> u64 {
    while let Some(rest) = one.checked_rem(other) {
        (one, other) = (other, rest);
    }
    one
}

#[cfg(test)]
mod tests {
    use super::*;

    fn totals(sums: &[u64], step: Option<u64>) -> Totals {
        Totals {
            sums: sums.iter().copied().collect(),
            step,
        }
    }

    #[test]
    fn conditions_and_unknown_lengths_are_added_up() {
        let four = Totals::of_bytes(4);
        let fixed = four.clone().plus(&Totals::of_bytes(2), false);
        assert_eq!(fixed, totals(&[6], None));
        assert_eq!(fixed.exactly(), Some(6));
        let perhaps = fixed.clone().plus(&Totals::of_bytes(2), true);
        assert_eq!(perhaps, totals(&[6, 8], None));
        assert_eq!(perhaps.exactly(), None);
        assert_eq!(
            fixed.plus(&Totals::anything(), false),
            totals(&[6], Some(1))
        );
    }

    #[test]
    fn lengths_meet_where_they_can_be_equal() {
        let meets = |one: &Totals, other: &Totals| {
            assert_eq!(one.meets(other), other.meets(one));
            one.meets(other)
        };
        assert!(meets(&totals(&[4], None), &totals(&[2, 4], None)));
        assert!(!meets(&totals(&[4], None), &totals(&[2, 8], None)));
        assert!(meets(&totals(&[4], Some(4)), &totals(&[20], None)));
        assert!(!meets(&totals(&[4], Some(4)), &totals(&[22], None)));
        assert!(!meets(&totals(&[4], Some(4)), &totals(&[0], None)));
        assert!(meets(&totals(&[4], Some(4)), &totals(&[2], Some(6))));
        assert!(!meets(&totals(&[4], Some(4)), &totals(&[1], Some(6))));
    }

    #[test]
    fn too_many_sums_become_any_length() {
        let many = (0..20).fold(Totals::nothing(), |total, k| {
            total.plus(&Totals::of_bytes(1 << k), true)
        });
        assert!(many.sums.len() <= MAX_SUMS);
        assert!(many.meets(&Totals::of_bytes(12_345)));
    }
}
