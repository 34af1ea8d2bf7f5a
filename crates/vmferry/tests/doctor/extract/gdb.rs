//! A core of a Linux guest, in a debugger.

use std::collections::BTreeMap;

use serde_json::json;

use super::{extracted, linux, migrate_into, pipe_into, utf8};
use crate::need;
use crate::peers::guest::Guest;
use crate::peers::nbd::{run_tool, tool};
use crate::peers::qemu::{Qemu, Version};

const COMMAND_LINE: &str = "console=ttyS0 quiet ferry.banner";

/// Where the guest says that its kernel's banner is.
fn banner(guest: &Guest) -> String {
    let text = guest.text();
    let line = text.lines().find_map(|line| line.strip_prefix("BANNER "));
    let address = line.and_then(|line| line.split(' ').next());
    address
        .expect("the guest says where the banner is")
        .to_owned()
}

/// The registers of each processor, as QEMU shows them.
fn registers(qemu: &mut Qemu) -> Vec<BTreeMap<String, u64>> {
    let command = json!({"command-line": "info registers -a"});
    let text = qemu.qmp.execute("human-monitor-command", &command);
    let text = text
        .as_str()
        .expect("the monitor answers in text")
        .to_owned();
    let cpus = text.split("CPU#").skip(1);
    cpus.map(|cpu| {
        // `R8 =…` has a space.
        let cpu = cpu.replace(" =", "=");
        let values = cpu.split_whitespace().filter_map(|word| {
            let (name, value) = word.split_once('=')?;
            let name = match name {
                "RFL" => "eflags".to_owned(),
                _ => name.to_lowercase(),
            };
            Some((name, u64::from_str_radix(value, 16).ok()?))
        });
        values.collect()
    })
    .collect()
}

/// Memory and registers of this guest are in a core where a debugger looks for them.
fn opens(version: Version, args: &[&str], cpus: usize) {
    need!(tool("gdb"));
    let dir = tempfile::tempdir().expect("a temporary folder");
    let args = [&["-append", COMMAND_LINE], args].concat();
    let (guest, mut qemu) = need!(linux(version, dir.path(), false, &args));
    qemu.qmp.execute("stop", &json!({}));
    let (stream, core) = (dir.path().join("stream"), dir.path().join("core"));
    let registers = registers(&mut qemu);
    migrate_into(&mut qemu, &pipe_into(&stream));
    let report = extracted(&["ram", utf8(&stream), "--core", "-o", utf8(&core)]);
    assert_eq!(report["addresses"], "virtual", "{report}");
    assert_eq!(report["processors"], cpus, "{report}");

    let look = format!("x/s 0x{}", banner(&guest));
    let said = gdb(utf8(&core), &[&look]);
    assert!(said.contains("\"Linux version 6"), "{said}");
    assert_eq!(registers.len(), cpus);
    let names = [
        "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12",
        "r13", "r14", "r15", "rip", "eflags",
    ];
    for (number, registers) in (1..).zip(registers) {
        let thread = format!("thread {number}");
        for name in names {
            let said = gdb(utf8(&core), &[&thread, &format!("p/x ${name}")]);
            let value = said
                .lines()
                .last()
                .and_then(|line| line.split("= 0x").nth(1));
            let value = value.map(|value| u64::from_str_radix(value, 16));
            assert_eq!(value, Some(Ok(registers[name])), "{number}: {name}: {said}");
        }
    }
}

fn gdb(core: &str, commands: &[&str]) -> String {
    let mut args = vec!["-batch", "-nx"];
    for command in commands {
        args.extend(["-ex", command]);
    }
    args.extend(["-core", core]);
    run_tool("gdb", args).expect("gdb is there")
}

#[test]
fn a_linux_guest_of_qemu_10_0_opens_in_gdb() {
    opens(Version::V10_0, &["-smp", "2"], 2);
}

#[test]
fn a_linux_guest_of_qemu_7_2_opens_in_gdb() {
    opens(Version::V7_2, &[], 1);
}

/// Such a processor has its kernel hide from user space.
#[test]
fn a_guest_with_isolated_page_tables_opens_in_gdb() {
    opens(Version::V10_0, &["-cpu", "Skylake-Client"], 1);
}
