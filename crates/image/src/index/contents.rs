//! The table of contents of an index: everything of an image but its pages.
//!
//! Numbers are little endian; text has a length of 16 bits, a list one of 32.

use vmferry_inspect::LibvirtHeader;
use vmferry_stream::{
    Configuration, Ending, InstanceId, Name, PageBits, Section, SectionId, SectionKind,
};

use crate::head::{Contents, Extent, Head, ImageBlock, ImageSection, LiveSection};

/// Append the bytes of a table of contents.
pub(crate) fn encode(contents: &Contents, out: &mut Vec<u8>) {
    let Contents { head, description } = contents;
    let Head {
        configuration,
        footers,
        switchover_start,
        blocks,
        live,
        devices,
        early_devices,
        ending,
        libvirt,
    } = head;
    option(configuration.as_ref(), out, encode_configuration);
    flag(*footers, out);
    flag(*switchover_start, out);
    flag(*ending == Ending::WithDescription, out);
    list(blocks, out, |block, out| {
        text(&block.name, out);
        for number in [block.used_bytes, block.page_bytes, block.absent_pages] {
            out.extend(number.to_le_bytes());
        }
        option(block.guest_address.as_ref(), out, |address, out| {
            out.extend(address.to_le_bytes());
        });
    });
    list(live, out, |live, out| {
        list(&live.bodies, out, encode_section);
    });
    list(devices, out, encode_section);
    let early = u64::try_from(*early_devices).unwrap_or(0);
    out.extend(early.to_le_bytes());
    option(description.as_ref(), out, |extent, out| {
        out.extend(extent.offset.to_le_bytes());
        out.extend(extent.bytes.to_le_bytes());
        out.extend(extent.checksum.to_le_bytes());
    });
    option(libvirt.as_ref(), out, |header, out| {
        out.extend(header.version.to_le_bytes());
        out.extend(header.data_bytes.to_le_bytes());
        flag(header.was_running, out);
        flag(header.is_unfinished, out);
    });
}

fn encode_configuration(configuration: &Configuration, out: &mut Vec<u8>) {
    let Configuration {
        machine,
        page_bits,
        capabilities,
        uuid,
    } = configuration;
    text(machine, out);
    option(page_bits.as_ref(), out, |bits, out| {
        out.extend(bits.bits().to_le_bytes());
    });
    option(capabilities.as_ref(), out, |names, out| {
        list(names, out, text);
    });
    option(uuid.as_ref(), out, |uuid, out| out.extend(uuid.iter()));
}

fn encode_section(section: &ImageSection, out: &mut Vec<u8>) {
    let ImageSection {
        section,
        offset,
        bytes,
        checksum,
    } = section;
    out.push(match section.kind {
        SectionKind::Start => 1,
        SectionKind::Part => 2,
        SectionKind::End => 3,
        SectionKind::Full => 4,
    });
    out.extend(section.id.0.to_le_bytes());
    text(&section.name, out);
    out.extend(section.instance.0.to_le_bytes());
    out.extend(section.version.to_le_bytes());
    out.extend(offset.to_le_bytes());
    out.extend(bytes.to_le_bytes());
    out.extend(checksum.to_le_bytes());
}

fn flag(value: bool, out: &mut Vec<u8>) {
    out.push(u8::from(value));
}

fn option<T>(value: Option<&T>, out: &mut Vec<u8>, encode: impl Fn(&T, &mut Vec<u8>)) {
    flag(value.is_some(), out);
    if let Some(value) = value {
        encode(value, out);
    }
}

fn list<T>(values: &[T], out: &mut Vec<u8>, encode: impl Fn(&T, &mut Vec<u8>)) {
    let length = u32::try_from(values.len()).unwrap_or(u32::MAX);
    out.extend(length.to_le_bytes());
    for value in values {
        encode(value, out);
    }
}

/// A name has at most 255 bytes.
fn text(text: &Name, out: &mut Vec<u8>) {
    let length = u16::try_from(text.len()).unwrap_or(u16::MAX);
    out.extend(length.to_le_bytes());
    out.extend(text.bytes());
}

/// Read a table of contents; `None` if it is none. What follows it stays.
pub(crate) fn decode(bytes: &mut &[u8]) -> Option<Contents> {
    let input = &mut Input(bytes);
    let configuration = input.option(decode_configuration)?;
    let (footers, switchover_start, described) = (input.flag()?, input.flag()?, input.flag()?);
    let blocks = input.list(|input| {
        Some(ImageBlock {
            name: input.text()?,
            used_bytes: input.u64()?,
            page_bytes: input.u64()?,
            absent_pages: input.u64()?,
            guest_address: input.option(Input::u64)?,
        })
    })?;
    let live = input.list(|input| {
        let bodies = input.list(decode_section)?;
        Some(LiveSection { bodies })
    })?;
    let devices = input.list(decode_section)?;
    let early_devices = usize::try_from(input.u64()?).ok()?;
    let description = input.option(|input| {
        Some(Extent {
            offset: input.u64()?,
            bytes: input.u64()?,
            checksum: input.u32()?,
        })
    })?;
    let libvirt = input.option(|input| {
        Some(LibvirtHeader {
            version: input.u32()?,
            data_bytes: input.u32()?,
            was_running: input.flag()?,
            is_unfinished: input.flag()?,
        })
    })?;
    let ending = match described {
        true => Ending::WithDescription,
        false => Ending::WithoutDescription,
    };
    let head = Head {
        configuration,
        footers,
        switchover_start,
        early_devices: early_devices.min(devices.len()),
        blocks,
        live,
        devices,
        ending,
        libvirt,
    };
    Some(Contents { head, description })
}

fn decode_configuration(input: &mut Input<'_, '_>) -> Option<Configuration> {
    Some(Configuration {
        machine: input.text()?,
        page_bits: input.option(|input| PageBits::new(input.u32()?))?,
        capabilities: input.option(|input| input.list(Input::text))?,
        uuid: input.option(|input| Some(*input.take(16)?.first_chunk()?))?,
    })
}

fn decode_section(input: &mut Input<'_, '_>) -> Option<ImageSection> {
    let kind = match input.take(1)? {
        [1] => SectionKind::Start,
        [2] => SectionKind::Part,
        [3] => SectionKind::End,
        [4] => SectionKind::Full,
        _ => return None,
    };
    Some(ImageSection {
        section: Section {
            kind,
            id: SectionId(input.u32()?),
            name: input.text()?,
            instance: InstanceId(input.u32()?),
            version: input.u32()?,
        },
        offset: input.u64()?,
        bytes: input.u64()?,
        checksum: input.u32()?,
    })
}

/// What is left to read.
struct Input<'a, 'b>(&'a mut &'b [u8]);

impl<'b> Input<'_, 'b> {
    fn take(&mut self, bytes: usize) -> Option<&'b [u8]> {
        let (taken, rest) = self.0.split_at_checked(bytes)?;
        *self.0 = rest;
        Some(taken)
    }

    fn flag(&mut self) -> Option<bool> {
        match self.take(1)? {
            [0] => Some(false),
            [1] => Some(true),
            _ => None,
        }
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(*self.take(4)?.first_chunk()?))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(*self.take(8)?.first_chunk()?))
    }

    fn text(&mut self) -> Option<Name> {
        let length = u16::from_le_bytes(*self.take(2)?.first_chunk()?);
        let text = self.take(usize::from(length))?;
        Name::new(std::str::from_utf8(text).ok()?).ok()
    }

    fn option<T>(&mut self, decode: impl Fn(&mut Self) -> Option<T>) -> Option<Option<T>> {
        match self.flag()? {
            true => Some(Some(decode(self)?)),
            false => Some(None),
        }
    }

    /// Grows with what is there: every entry has some bytes.
    fn list<T>(&mut self, decode: impl Fn(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let mut values = Vec::new();
        for _ in 0..self.u32()? {
            values.push(decode(self)?);
        }
        Some(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents() -> Contents {
        let section = |kind, name: &str| ImageSection {
            section: Section {
                kind,
                id: SectionId(7),
                name: Name::new(name).unwrap(),
                instance: InstanceId(1),
                version: 3,
            },
            offset: 1000,
            bytes: 20,
            checksum: 0x1234_5678,
        };
        Contents {
            head: Head {
                configuration: Some(Configuration {
                    machine: Name::new("pc").unwrap(),
                    page_bits: PageBits::new(12),
                    capabilities: Some(vec![Name::new("x-ignore-shared").unwrap()]),
                    uuid: Some([9; 16]),
                }),
                footers: true,
                switchover_start: true,
                blocks: vec![ImageBlock {
                    name: Name::new("pc.ram").unwrap(),
                    used_bytes: 1 << 30,
                    page_bytes: 2 << 20,
                    guest_address: Some(4096),
                    absent_pages: 3,
                }],
                live: vec![LiveSection {
                    bodies: vec![
                        section(SectionKind::Start, "dirty-bitmap"),
                        section(SectionKind::End, "dirty-bitmap"),
                    ],
                }],
                devices: vec![section(SectionKind::Full, "cpu")],
                early_devices: 1,
                ending: Ending::WithDescription,
                libvirt: Some(LibvirtHeader {
                    version: 2,
                    was_running: true,
                    is_unfinished: false,
                    data_bytes: 4000,
                }),
            },
            description: Some(Extent {
                offset: 5000,
                bytes: 600,
                checksum: 1,
            }),
        }
    }

    #[test]
    fn survives() {
        let contents = contents();
        let mut bytes = Vec::new();
        encode(&contents, &mut bytes);
        bytes.push(77);
        let mut rest = bytes.as_slice();
        assert_eq!(decode(&mut rest), Some(contents));
        assert_eq!(rest, [77]);
    }

    #[test]
    fn is_not_believed() {
        let mut bytes = Vec::new();
        encode(&contents(), &mut bytes);
        for length in 0..bytes.len() {
            assert_eq!(decode(&mut &bytes[..length]), None, "{length}");
        }
        for at in 0..bytes.len() {
            for byte in [0, 1, 0x7f, 0xff] {
                let mut wrong = bytes.clone();
                wrong[at] = byte;
                let _ = decode(&mut wrong.as_slice());
            }
        }
    }
}
