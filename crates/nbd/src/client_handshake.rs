//! The client's side of the handshake: structured replies, `base:allocation`, `GO`.

use std::time::Instant;

use crate::client::{Client, NbdError};
use crate::protocol::{
    BASE_ALLOCATION, Fields, Info, OPTION_BYTES_MAX, OPTION_MAGIC, OPTION_REPLY_BYTES,
    OPTION_REPLY_MAGIC, OptionCode, OptionReply, PAYLOAD_BYTES_MAX, SERVER_MAGIC, handshake,
};

/// What the server told about the export.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Export {
    pub(crate) length: u64,
    pub(crate) flags: u16,
    pub(crate) payload_bytes_max: u32,
    pub(crate) structured: bool,
    /// The number of `base:allocation`.
    pub(crate) allocation: Option<u32>,
}

/// Replies to one option that are no acknowledgement: more than any server needs.
const REPLIES_MAX: usize = 64;

/// Go through the handshake.
pub(crate) fn choose(
    client: &mut Client,
    name: &str,
    structured: bool,
    deadline: Option<Instant>,
) -> Result<Export, NbdError> {
    greet(client, deadline)?;
    let mut export = Export {
        payload_bytes_max: PAYLOAD_BYTES_MAX,
        ..Export::default()
    };
    if structured {
        let answer = ask(client, OptionCode::STRUCTURED_REPLY, &[], deadline)?;
        export.structured = answer.is_ok();
    }
    if export.structured {
        let mut data = string(name);
        data.extend(1u32.to_be_bytes());
        data.extend(string(BASE_ALLOCATION));
        if let Ok(replies) = ask(client, OptionCode::SET_META_CONTEXT, &data, deadline)? {
            export.allocation = replies
                .iter()
                .filter(|(kind, _)| *kind == OptionReply::META_CONTEXT)
                .find_map(|(_, body)| {
                    let mut fields = Fields(body);
                    let id = fields.u32()?;
                    (fields.0 == BASE_ALLOCATION.as_bytes()).then_some(id)
                });
        }
    }
    let mut data = string(name);
    data.extend(1u16.to_be_bytes());
    data.extend(Info::BLOCK_SIZE.0.to_be_bytes());
    let replies = match ask(client, OptionCode::GO, &data, deadline)? {
        Ok(replies) => replies,
        Err((reply, message)) => return Err(client.refused(OptionCode::GO, reply, &message)),
    };
    let mut described = false;
    for (_, body) in replies
        .iter()
        .filter(|(kind, _)| *kind == OptionReply::INFO)
    {
        described |= take_info(&mut export, body)
            .ok_or_else(|| client.broken("a piece of information is too short".to_owned()))?;
    }
    if !described {
        return Err(client.broken("the export was not described".to_owned()));
    }
    Ok(export)
}

fn greet(client: &mut Client, deadline: Option<Instant>) -> Result<(), NbdError> {
    let greeting = client.receive_message(18, deadline)?;
    let mut fields = Fields(&greeting);
    let (magic, style, flags) = (fields.u64(), fields.u64(), fields.u16().unwrap_or(0));
    if magic != Some(SERVER_MAGIC) {
        return Err(client.broken("it is no NBD server".to_owned()));
    }
    if style != Some(OPTION_MAGIC) || flags & handshake::FIXED_NEWSTYLE == 0 {
        return Err(client.broken("it speaks the old handshake".to_owned()));
    }
    let mine = flags & (handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
    client.send_message(u32::from(mine).to_be_bytes().to_vec(), deadline)
}

/// Everything that came before the acknowledgement, or the error.
type Answer = Result<Vec<(OptionReply, Vec<u8>)>, (OptionReply, Vec<u8>)>;

fn ask(
    client: &mut Client,
    option: OptionCode,
    data: &[u8],
    deadline: Option<Instant>,
) -> Result<Answer, NbdError> {
    let mut message = OPTION_MAGIC.to_be_bytes().to_vec();
    message.extend(option.0.to_be_bytes());
    message.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    message.extend(data);
    client.send_message(message, deadline)?;
    let mut replies = Vec::new();
    while replies.len() < REPLIES_MAX {
        let header = client.receive_message(OPTION_REPLY_BYTES, deadline)?;
        let mut fields = Fields(&header);
        let (magic, about) = (fields.u64(), fields.u32().map(OptionCode));
        let kind = OptionReply(fields.u32().unwrap_or(0));
        let length = fields.u32().unwrap_or(0);
        if magic != Some(OPTION_REPLY_MAGIC) || about != Some(option) {
            return Err(client.broken(format!("the reply to {option} is about something else")));
        }
        if length > OPTION_BYTES_MAX {
            return Err(client.broken(format!("the reply to {option} has {length} bytes")));
        }
        let body = client.receive_message(length as usize, deadline)?;
        if kind == OptionReply::ACK {
            return Ok(Ok(replies));
        }
        if kind.is_error() {
            return Ok(Err((kind, body)));
        }
        replies.push((kind, body));
    }
    Err(client.broken(format!("the reply to {option} does not end")))
}

/// Use a piece of information; true if it was the description of the export.
fn take_info(export: &mut Export, body: &[u8]) -> Option<bool> {
    let mut fields = Fields(body);
    match Info(fields.u16()?) {
        Info::EXPORT => {
            export.length = fields.u64()?;
            export.flags = fields.u16()?;
            Some(true)
        }
        Info::BLOCK_SIZE => {
            let (_smallest, _preferred) = (fields.u32()?, fields.u32()?);
            export.payload_bytes_max = fields.u32()?.clamp(512, PAYLOAD_BYTES_MAX);
            Some(false)
        }
        _ => Some(false),
    }
}

fn string(text: &str) -> Vec<u8> {
    let mut bytes = u32::try_from(text.len())
        .unwrap_or(u32::MAX)
        .to_be_bytes()
        .to_vec();
    bytes.extend(text.as_bytes());
    bytes
}
