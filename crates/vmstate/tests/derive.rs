//! What the derive says when something is missing or wrong.

#[test]
fn mistakes_are_told_what_to_write() {
    trybuild::TestCases::new().compile_fail("tests/ui/*.rs");
}
