use vmferry_vmstate::VmState;

const THIRD: usize = 2;

#[derive(VmState)]
#[vmstate(name = "timer", version = 1)]
struct Timer {
    #[vmstate(uint8, at = channels[THIRD].level)]
    #[vmstate(struct)]
    channels: [Channel; 3],
    #[vmstate(uint8, at = list[2])]
    #[vmstate(uint8, count = 3)]
    list: Vec<u8>,
    #[vmstate(uint8, at = group.members[0])]
    #[vmstate(skip = "sent in parts")]
    group: Group,
}

#[derive(VmState)]
#[vmstate(name = "timer", version = 1)]
struct Wrong {
    #[vmstate(uint32)]
    selected: usize,
    #[vmstate(uint8, at = levels[selected])]
    #[vmstate(uint8, at = levels.first())]
    #[vmstate(skip = "sent in parts")]
    levels: [u8; 4],
}

#[derive(VmState)]
#[vmstate(name = "channel", version = 1)]
struct Channel {
    #[vmstate(uint8)]
    level: u8,
}

struct Group {
    members: Box<[u8]>,
}

fn main() {}
