use vmferry_vmstate::VmState;

#[derive(VmState)]
#[vmstate(name = "uart", version = 1)]
struct Uart {
    divider: u16,
    #[vmstate(unused(2))]
    fifo: [u8; 16],
    deadline: Option<u64>,
    irq: std::sync::Arc<()>,
}

fn main() {}
