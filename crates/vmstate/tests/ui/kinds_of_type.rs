use vmferry_vmstate::VmState;

#[derive(VmState)]
#[vmstate(name = "mode", version = 1)]
enum Mode {
    Idle,
    Busy,
}

#[derive(VmState)]
#[vmstate(name = "pair", version = 1)]
struct Pair(#[vmstate(uint8)] u8, #[vmstate(uint8)] u8);

#[derive(VmState)]
#[vmstate(name = "ring", version = 1)]
struct Ring<T> {
    #[vmstate(uint32)]
    head: T,
}

#[derive(VmState)]
#[vmstate(name = "bits", version = 1)]
union Bits {
    #[vmstate(uint32)]
    word: u32,
}

#[derive(VmState)]
#[vmstate(name = "node", version = 1)]
struct Node {
    #[vmstate(qlist, max = 4)]
    children: Vec<Node>,
}

fn main() {}
