//! The library under another name.

mod state {
    pub(crate) mod library {
        pub(crate) use vmferry_vmstate::*;
    }
}

use state::library::VmState;

#[derive(Default, VmState)]
#[vmstate(name = "lamp", version = 1, crate = crate::state::library)]
struct Lamp {
    #[vmstate(bool)]
    on: bool,
    #[vmstate(uint8, count = 2)]
    colour: Vec<u8>,
}

#[test]
fn the_library_may_have_another_name() {
    let mut bytes = Vec::new();
    let mut lamp = Lamp {
        on: true,
        colour: vec![2, 3],
    };
    lamp.save().unwrap().encode(&mut bytes);
    assert_eq!(bytes, [1, 2, 3]);
}
