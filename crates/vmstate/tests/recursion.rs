//! Types that hold each other have no description, and say so.

use std::panic::catch_unwind;

use vmferry_vmstate::VmState;

#[derive(Clone, Default, VmState)]
#[vmstate(name = "tree", version = 1)]
struct Tree {
    #[vmstate(qtailq, max = 3)]
    branches: Vec<Branch>,
}

#[derive(Clone, Default, VmState)]
#[vmstate(name = "branch", version = 1)]
struct Branch {
    #[vmstate(struct)]
    leaf: Leaf,
}

#[derive(Clone, Default, VmState)]
#[vmstate(name = "leaf", version = 1)]
struct Leaf {
    #[vmstate(qlist, max = 3)]
    trees: Vec<Tree>,
    #[vmstate(struct)]
    colour: Colour,
}

#[derive(Clone, Default, VmState)]
#[vmstate(name = "colour", version = 1)]
struct Colour {
    #[vmstate(uint8)]
    red: u8,
}

fn panic_of<T: VmState>() -> String {
    let panic = catch_unwind(|| T::description().name.clone()).unwrap_err();
    panic.downcast_ref::<String>().unwrap().clone()
}

#[test]
fn types_that_hold_each_other_are_named() {
    let held = "the description of `recursion::Tree` would not end: `recursion::Tree` is held by \
                `recursion::Leaf`, which is held by `recursion::Branch`, which is held by \
                `recursion::Tree`";
    // Two threads that begin at different ends do not wait for each other.
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert_eq!(panic_of::<Tree>(), held));
            scope
                .spawn(|| assert!(panic_of::<Branch>().contains("`recursion::Branch` is held by")));
        }
    });
    // After the panic the thread can go on; a type that they hold is not concerned.
    assert_eq!(panic_of::<Tree>(), held);
    assert_eq!(Colour::description().name, "colour");
}
