//! What the destination says, read by a thread of its own.

use std::sync::mpsc::Sender;
use std::thread::JoinHandle;
use std::time::Instant;

use vmferry_channel::Reader;
use vmferry_stream::Step;
use vmferry_stream::return_path::{ReturnDecoder, ReturnMessage};

use crate::source::Event;

/// Start the thread. It ends with the channel, or when the reader's stop is triggered.
pub(crate) fn listen(reader: Reader, events: Sender<Event>) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name("migrate-return".to_owned())
        .spawn(move || {
            let reason = read_messages(reader, &events);
            let _ = events.send(Event::ReturnClosed(reason));
        })
}

fn read_messages(mut reader: Reader, events: &Sender<Event>) -> String {
    let mut decoder = ReturnDecoder::new();
    let mut window = Vec::new();
    let mut piece = [0; 4096];
    loop {
        match decoder.step(&window) {
            Ok(Step::Record { record, used }) => {
                window.drain(..used);
                let event = match record {
                    ReturnMessage::Pong(value) => Event::Pong {
                        value,
                        at: Instant::now(),
                    },
                    ReturnMessage::Shut(status) => Event::Shut(status),
                    ReturnMessage::SwitchoverAck => continue,
                    other => {
                        return format!("the destination sent {other:?}, which only RAM needs");
                    }
                };
                if events.send(event).is_err() {
                    return String::new();
                }
                continue;
            }
            Ok(Step::End) => return "the destination has closed its side".to_owned(),
            Ok(Step::Payload(_)) => return "the destination sent payload".to_owned(),
            Ok(Step::NeedMore(_)) => {}
            Err(error) => return format!("the return path is broken: {error}"),
        }
        match reader.read(&mut piece) {
            Ok(0) => return "the destination has closed its side".to_owned(),
            Ok(length) => window.extend_from_slice(&piece[..length]),
            Err(error) => return error.to_string(),
        }
    }
}
