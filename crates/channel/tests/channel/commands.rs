//! `exec:` channels.

use std::time::{Duration, Instant};

use rustix::process::{Pid, test_kill_process};
use vmferry_channel::{Channel, ChannelError, Reader, Stop, Writer, open_incoming, open_outgoing};

use crate::{halves, read_to_end, rng, stop, stop_while_blocked, uri};

fn run(command: &str, stop: &Stop) -> (Reader, Writer) {
    halves(open_outgoing(&uri(&format!("exec:{command}")), stop, Duration::ZERO).unwrap())
}

/// The command prints its process id first.
fn process_id(reader: &mut Reader) -> Pid {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        reader.read_exact(&mut byte).unwrap();
        if byte == *b"\n" {
            let text = String::from_utf8(line).unwrap();
            return Pid::from_raw(text.parse().unwrap()).unwrap();
        }
        line.push(byte[0]);
    }
}

fn is_gone(process: Pid) -> bool {
    test_kill_process(process) == Err(rustix::io::Errno::SRCH)
}

#[test]
fn a_command_echoes_both_ways_at_once() {
    let mut rng = rng();
    let mut data = vec![0; 5_000_000];
    rng.fill(&mut data);
    let (mut reader, mut writer) = run("cat", &stop());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            writer.write_all(&data).unwrap();
            writer.finish(None).unwrap();
        });
        assert!(read_to_end(&mut reader) == data);
    });
}

#[test]
fn incoming_commands_are_two_way_too() {
    let channel = open_incoming(&uri("exec:read line; echo \"got $line\""), &stop()).unwrap();
    assert_eq!(channel.peer(), "exec:read line; echo \"got $line\"");
    let (mut reader, mut writer) = halves(channel);
    writer.write_all(b"it\n").unwrap();
    assert_eq!(read_to_end(&mut reader), b"got it\n");
    writer.finish(None).unwrap();
}

#[test]
fn a_failure_shows_at_the_end_of_the_read_half() {
    let (mut reader, _writer) = run("echo data; exit 3", &stop());
    let mut buf = [0; 5];
    reader.read_exact(&mut buf).unwrap();
    let error = reader.read(&mut buf).unwrap_err();
    assert_eq!(
        error.to_string(),
        "exec:echo data; exit 3: the command exited with status 3"
    );
    let error = reader.read_exact(&mut buf).unwrap_err();
    assert!(
        matches!(error, ChannelError::CommandFailed { .. }),
        "it stays failed"
    );

    let (mut reader, _writer) = run("kill -9 $$", &stop());
    let error = reader.read(&mut buf).unwrap_err();
    assert!(
        error.to_string().ends_with("was killed by signal 9"),
        "{error}"
    );
}

#[test]
fn a_failure_shows_in_the_write_half() {
    let (_reader, mut writer) = run("exit 4", &stop());
    let error = loop {
        if let Err(error) = writer.write_all(&[0; 4096]) {
            break error;
        }
    };
    assert!(
        error.to_string().ends_with("exited with status 4"),
        "{error}"
    );

    let (_reader, writer) = run("cat > /dev/null; exit 5", &stop());
    let error = writer.finish(None).unwrap_err();
    assert!(
        error.to_string().ends_with("exited with status 5"),
        "{error}"
    );

    let (_reader, mut writer) = run("no-such-command-anywhere 2> /dev/null", &stop());
    let _ = writer.write_all(b"x");
    let error = writer.finish(None).unwrap_err();
    assert!(
        error.to_string().ends_with("exited with status 127"),
        "{error}"
    );
}

#[test]
fn finishing_has_a_deadline_and_can_be_stopped() {
    let (_reader, writer) = run("exec sleep 1000", &stop());
    let error = writer.finish(Some(Instant::now())).unwrap_err();
    assert!(matches!(error, ChannelError::TimedOut { .. }), "{error}");

    let mine = stop();
    let (_reader, writer) = run("exec sleep 1000", &mine);
    let error = stop_while_blocked(&mine, || writer.finish(None).unwrap_err());
    assert!(error.is_stopped(), "{error}");
}

#[test]
fn dropping_both_halves_leaves_no_process_behind() {
    // It ends by itself once its input is closed …
    let (mut reader, writer) = run("echo $$; exec cat", &stop());
    let process = process_id(&mut reader);
    assert!(!is_gone(process));
    drop(writer);
    drop(reader);
    assert!(is_gone(process));

    // … or is ended, politely after a stop …
    let mine = stop();
    let (mut reader, writer) = run("echo $$; exec sleep 1000", &mine);
    let process = process_id(&mut reader);
    mine.trigger();
    drop((reader, writer));
    assert!(is_gone(process));

    // … and for good if it does not listen.
    let mine = stop();
    let (mut reader, writer) = run(
        "trap '' TERM; echo $$; for i in $(seq 30); do sleep 1; done",
        &mine,
    );
    let process = process_id(&mut reader);
    mine.trigger();
    drop((writer, reader));
    assert!(is_gone(process));
}

#[test]
fn a_stop_wakes_who_reads_from_a_silent_command() {
    let mine = stop();
    let (mut reader, _writer) = run("exec sleep 1000", &mine);
    let error = stop_while_blocked(&mine, || reader.read(&mut [0; 1]).unwrap_err());
    assert!(error.is_stopped(), "{error}");
}

#[test]
fn a_command_that_only_takes_may_close_its_output() {
    let (mut reader, mut writer) = run("exec >&-; cat > /dev/null", &stop());
    assert_eq!(reader.read(&mut [0; 1]).unwrap(), 0);
    writer.write_all(&[0; 100_000]).unwrap();
    writer.finish(None).unwrap();
}

#[test]
fn commands_have_a_channel_of_their_own() {
    // A second command must not hold the pipes of the first one open.
    let first = open_incoming(&uri("exec:cat"), &stop()).unwrap();
    let _second = open_incoming(&uri("exec:cat"), &stop()).unwrap();
    let Channel::TwoWay(mut reader, mut writer) = first else {
        panic!("commands are two-way");
    };
    writer.shutdown().unwrap();
    assert_eq!(read_to_end(&mut reader), b"");
}
