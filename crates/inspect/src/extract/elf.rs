//! The frame of an ELF core: what a debugger needs besides memory.
//!
//! ```text
//! ELF header │ memory, in its place already │ notes: NT_PRSTATUS of each processor
//!            │ program headers: PT_NOTE, PT_LOAD … │ section header, if there are too many of those
//! ```
//!
//! Notes and program headers stand behind the memory, because their number is known last. Layouts:
//! the ELF specification, and `elf_prstatus` of Linux on x86-64.

use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};

use super::cpu::CpuState;
use super::paging::Piece;

/// Memory may start here in the file.
pub(crate) const MEMORY_START: u64 = 1 << 16;

const HEADER_BYTES: u16 = 64;
const PROGRAM_HEADER_BYTES: u16 = 56;
const SECTION_HEADER_BYTES: u16 = 64;
const ET_CORE: u16 = 4;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const NT_PRSTATUS: u32 = 1;
/// The real number of program headers is in the first section header.
const PN_XNUM: u16 = 0xffff;
const READ_WRITE_EXECUTE: u32 = 7;
const PAGE_BYTES: u64 = 4096;
/// Bytes of `elf_prstatus`, and where its process id and registers are.
const STATUS_BYTES: usize = 336;
const STATUS_PID: usize = 32;
const STATUS_REGISTERS: usize = 112;

/// Write everything but the memory into `file`, whose memory ends at its end.
pub(crate) fn write(file: &File, cpus: &[CpuState], pieces: &[Piece]) -> io::Result<()> {
    let end = file.metadata()?.len();
    let start = end.checked_next_multiple_of(PAGE_BYTES).unwrap_or(end);
    let mut out = BufWriter::with_capacity(1 << 18, file);
    out.seek(SeekFrom::Start(start))?;

    let mut notes = Vec::new();
    for (number, cpu) in (1_u32..).zip(cpus) {
        note(&mut notes, &status(number, cpu));
    }
    out.write_all(&notes)?;
    let note_bytes = length(&notes);
    let headers = start.saturating_add(note_bytes);

    program_header(&mut out, PT_NOTE, &note_piece(start, note_bytes))?;
    for piece in pieces {
        program_header(&mut out, PT_LOAD, piece)?;
    }
    let count = u64::try_from(pieces.len())
        .unwrap_or(u64::MAX)
        .saturating_add(1);
    let sections = if count >= u64::from(PN_XNUM) {
        let bytes = count.saturating_mul(u64::from(PROGRAM_HEADER_BYTES));
        section_header(&mut out, count)?;
        Some(headers.saturating_add(bytes))
    } else {
        None
    };
    out.seek(SeekFrom::Start(0))?;
    header(&mut out, headers, count, sections)?;
    out.flush()
}

fn header(out: &mut impl Write, headers: u64, count: u64, sections: Option<u64>) -> io::Result<()> {
    // 64 bits, little-endian, version 1, System V.
    out.write_all(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0")?;
    out.write_all(&ET_CORE.to_le_bytes())?;
    out.write_all(&EM_X86_64.to_le_bytes())?;
    out.write_all(&1_u32.to_le_bytes())?;
    out.write_all(&0_u64.to_le_bytes())?;
    out.write_all(&headers.to_le_bytes())?;
    out.write_all(&sections.unwrap_or(0).to_le_bytes())?;
    out.write_all(&0_u32.to_le_bytes())?;
    let count = u16::try_from(count).unwrap_or(PN_XNUM);
    let section_count = u16::from(sections.is_some());
    for half in [
        HEADER_BYTES,
        PROGRAM_HEADER_BYTES,
        count,
        SECTION_HEADER_BYTES,
        section_count,
        0,
    ] {
        out.write_all(&half.to_le_bytes())?;
    }
    Ok(())
}

fn note_piece(start: u64, bytes: u64) -> Piece {
    Piece {
        address: 0,
        physical: 0,
        bytes,
        file_offset: start,
    }
}

fn program_header(out: &mut impl Write, kind: u32, piece: &Piece) -> io::Result<()> {
    let (flags, in_memory, alignment) = match kind {
        PT_LOAD => (READ_WRITE_EXECUTE, piece.bytes, PAGE_BYTES),
        _ => (0, 0, 4),
    };
    out.write_all(&kind.to_le_bytes())?;
    out.write_all(&flags.to_le_bytes())?;
    for word in [
        piece.file_offset,
        piece.address,
        piece.physical,
        piece.bytes,
        in_memory,
        alignment,
    ] {
        out.write_all(&word.to_le_bytes())?;
    }
    Ok(())
}

/// The first section header is empty but for the number of program headers.
fn section_header(out: &mut impl Write, count: u64) -> io::Result<()> {
    let count = u32::try_from(count).unwrap_or(u32::MAX);
    out.write_all(&[0; 44])?;
    out.write_all(&count.to_le_bytes())?;
    out.write_all(&[0; 16])
}

fn note(out: &mut Vec<u8>, status: &[u8; STATUS_BYTES]) {
    let name = b"CORE\0";
    for word in [name.len(), status.len()] {
        let word = u32::try_from(word).unwrap_or(0);
        out.extend(word.to_le_bytes());
    }
    out.extend(NT_PRSTATUS.to_le_bytes());
    out.extend(name);
    out.extend([0; 3]);
    out.extend(status);
}

/// `elf_prstatus` of the processor that a debugger shows as thread `number`.
fn status(number: u32, cpu: &CpuState) -> [u8; STATUS_BYTES] {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, rest @ ..] = cpu.registers;
    let [r8, r9, r10, r11, r12, r13, r14, r15] = rest;
    let [es, cs, ss, ds, fs, gs] = cpu.segments;
    // Not in a system call.
    let orig_rax = u64::MAX;
    let registers = [
        r15,
        r14,
        r13,
        r12,
        rbp,
        rbx,
        r11,
        r10,
        r9,
        r8,
        rax,
        rcx,
        rdx,
        rsi,
        rdi,
        orig_rax,
        cpu.rip,
        cs.selector,
        cpu.rflags,
        rsp,
        ss.selector,
        fs.base,
        gs.base,
        ds.selector,
        es.selector,
        fs.selector,
        gs.selector,
    ];
    let mut status = [0; STATUS_BYTES];
    put(&mut status, STATUS_PID, &number.to_le_bytes());
    for (at, register) in (STATUS_REGISTERS..).step_by(8).zip(registers) {
        put(&mut status, at, &register.to_le_bytes());
    }
    status
}

fn put(status: &mut [u8], at: usize, bytes: &[u8]) {
    let place = status.get_mut(at..).unwrap_or_default();
    for (place, byte) in place.iter_mut().zip(bytes) {
        *place = *byte;
    }
}

fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn bytes_at<const N: usize>(file: &File, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    fn half(file: &File, at: u64) -> u16 {
        u16::from_le_bytes(bytes_at(file, at))
    }

    fn word(file: &File, at: u64) -> u32 {
        u32::from_le_bytes(bytes_at(file, at))
    }

    fn long(file: &File, at: u64) -> u64 {
        u64::from_le_bytes(bytes_at(file, at))
    }

    fn pieces(count: u64) -> Vec<Piece> {
        let piece = |number| Piece {
            address: 0xffff_8000_0000_0000 + number * 8192,
            physical: number * 4096,
            bytes: 4096,
            file_offset: MEMORY_START,
        };
        (0..count).map(piece).collect()
    }

    fn core(cpus: &[CpuState], pieces: &[Piece]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(MEMORY_START + 4097).unwrap();
        write(&file, cpus, pieces).unwrap();
        file
    }

    #[test]
    fn headers_stand_behind_the_memory() {
        let file = core(&[], &pieces(2));
        assert_eq!(&bytes_at(&file, 0), b"\x7fELF\x02\x01\x01\0");
        let headers = long(&file, 32);
        assert_eq!(headers, MEMORY_START + 8192);
        assert_eq!((half(&file, 54), half(&file, 56)), (56, 3));
        assert_eq!((long(&file, 40), half(&file, 60)), (0, 0));
        assert_eq!(word(&file, headers), PT_NOTE);
        let second = headers + 2 * 56;
        assert_eq!(word(&file, second), PT_LOAD);
        assert_eq!(long(&file, second + 8), MEMORY_START);
        assert_eq!(long(&file, second + 16), 0xffff_8000_0000_2000);
        assert_eq!(long(&file, second + 24), 4096);
        assert_eq!(
            (long(&file, second + 32), long(&file, second + 40)),
            (4096, 4096)
        );
    }

    #[test]
    fn more_headers_than_a_half_can_count_are_counted_elsewhere() {
        for (count, is_elsewhere) in [(65_533, false), (65_534, true), (70_000, true)] {
            let file = core(&[], &pieces(count));
            let sections = long(&file, 40);
            assert_eq!(sections != 0, is_elsewhere, "{count}");
            if is_elsewhere {
                assert_eq!((half(&file, 56), half(&file, 60)), (PN_XNUM, 1));
                assert_eq!(u64::from(word(&file, sections + 44)), count + 1);
                assert_eq!(file.metadata().unwrap().len(), sections + 64);
            } else {
                assert_eq!(u64::from(half(&file, 56)), count + 1);
            }
        }
    }

    #[test]
    fn each_processor_is_a_thread() {
        let mut cpus = [CpuState::default(); 2];
        cpus[1].rip = 0x1234;
        cpus[1].registers[0] = 0x5678;
        cpus[1].segments[4].base = 0x9abc;
        let file = core(&cpus, &[]);
        let notes = MEMORY_START + 8192;
        let second = notes + 356;
        assert_eq!(word(&file, second + 8), NT_PRSTATUS);
        assert_eq!(&bytes_at(&file, second + 12), b"CORE\0\0\0\0");
        let status = second + 20;
        assert_eq!(word(&file, status + 32), 2);
        assert_eq!(long(&file, status + 112 + 10 * 8), 0x5678);
        assert_eq!(long(&file, status + 112 + 16 * 8), 0x1234);
        assert_eq!(long(&file, status + 112 + 21 * 8), 0x9abc);
        assert_eq!(long(&file, notes + 20 + 112 + 16 * 8), 0);
    }
}
