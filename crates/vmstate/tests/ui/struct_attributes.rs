use vmferry_vmstate::VmState;

#[derive(VmState)]
struct Nothing {}

#[derive(VmState)]
#[vmstate(name = "uart")]
struct NoVersion {}

#[derive(VmState)]
#[vmstate(version = 1)]
struct NoName {}

#[derive(VmState)]
#[vmstate(name = "", version = 1)]
struct EmptyName {}

#[derive(VmState)]
#[vmstate(name = "uart", version = 1, minimum_version = 2)]
struct MinimumAbove {}

#[derive(VmState)]
#[vmstate(name = "uart", version = 1 + 1)]
struct NoNumber {}

#[derive(VmState)]
#[vmstate(name = "uart", name = "usart", version = 1)]
struct Twice {}

#[derive(VmState)]
#[vmstate(name = "uart", version = 1, pre_save = "stop", post_load)]
struct Hooks {}

fn main() {}
