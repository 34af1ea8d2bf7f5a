use vmferry_vmstate::VmState;

#[derive(VmState)]
#[vmstate(name = "disk", version = 1)]
struct Disk {
    #[vmstate(uint32, count = used, max = 8)]
    early: Vec<u32>,
    #[vmstate(uint32)]
    used: u32,
    #[vmstate(uint32, count = usde)]
    misspelt: Vec<u32>,
    #[vmstate(uint32, count = used)]
    unbounded: Vec<u32>,
    #[vmstate(uint32)]
    uncounted: Vec<u32>,
    #[vmstate(uint32)]
    boxed: Box<[u32]>,
    #[vmstate(buffer)]
    bytes: Vec<u8>,
    #[vmstate(buffer, length = used)]
    unbounded_bytes: Vec<u8>,
    #[vmstate(buffer, count = used, max = 4)]
    counted_bytes: Vec<u8>,
    #[vmstate(qtailq)]
    requests: Vec<u32>,
    #[vmstate(uint32, max = 3)]
    one: u32,
    #[vmstate(uint32, nullable)]
    pointer: Option<u32>,
    #[vmstate(uint32, count = "8")]
    text: Vec<u32>,
    #[vmstate(uint32, count = |disk| 8)]
    closure: Vec<u32>,
}

fn main() {}
