use vmferry_vmstate::VmState;

#[derive(VmState)]
#[vmstate(name = "uart", version = 1)]
struct Uart {
    #[vmstate(uint16)]
    divider: u32,
}

#[derive(VmState)]
#[vmstate(name = "board", version = 1)]
struct Board {
    #[vmstate(struct)]
    lamp: Lamp,
}

#[derive(Default)]
struct Lamp;

fn main() {}
