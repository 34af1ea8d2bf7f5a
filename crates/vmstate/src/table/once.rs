//! Tables that are built when they are first asked for.

use std::any::{TypeId, type_name};
use std::cell::RefCell;
use std::sync::OnceLock;

use super::Table;

thread_local! {
    /// The types whose tables this thread is building, outermost first.
    static BUILDING: RefCell<Vec<(TypeId, &'static str)>> = const { RefCell::new(Vec::new()) };
}

impl<T: 'static> Table<T> {
    /// The table in `slot`; the first who asks has it built.
    ///
    /// # Panics
    /// `T` holds itself, through other types: its description would not end.
    pub fn once(slot: &'static OnceLock<Self>, build: fn() -> Self) -> &'static Self {
        if let Some(table) = slot.get() {
            return table;
        }
        // Built outside of the slot: two threads that build types which hold each other would wait
        // for each other in there.
        let _building = Building::begin(TypeId::of::<T>(), type_name::<T>());
        let table = build();
        slot.get_or_init(|| table)
    }
}

/// Ends when it is dropped, also by a panic.
struct Building;

impl Building {
    fn begin(id: TypeId, name: &'static str) -> Self {
        let holders = BUILDING.with_borrow_mut(|building| {
            let same = building.iter().position(|(other, _)| *other == id);
            let inside = same.and_then(|same| building.get(same..));
            let holders = inside.map(|inside| inside.iter().map(|(_, name)| *name).collect());
            if holders.is_none() {
                building.push((id, name));
            }
            holders
        });
        let holders: Vec<_> = holders.unwrap_or_default();
        assert!(
            holders.is_empty(),
            "the description of `{name}` would not end: `{name}` is held by {}",
            held(&holders)
        );
        Self
    }
}

/// "`B`, which is held by `A`", the innermost first.
fn held(holders: &[&str]) -> String {
    let held: Vec<_> = holders
        .iter()
        .rev()
        .map(|name| format!("`{name}`"))
        .collect();
    held.join(", which is held by ")
}

impl Drop for Building {
    fn drop(&mut self) {
        BUILDING.with_borrow_mut(Vec::pop);
    }
}
