//! Machines of real QEMUs that are parked, converted, and loaded by real QEMUs. See `scripts/peers`.

#[path = "../../../vmferry/tests/memory/checker.rs"]
#[expect(dead_code, reason = "other tests use the rest of it")]
mod checker;
#[path = "../../../vmferry/tests/memory/contents.rs"]
mod contents;
#[path = "../../../vmferry/tests/memory/link.rs"]
mod link;
#[expect(dead_code, reason = "other tests use the rest of it")]
mod peers;

mod bitmaps;
mod forms;
mod journeys;
mod parking;
mod recovery;
