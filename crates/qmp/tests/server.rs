//! The server with several clients, good and bad ones, over real sockets.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmferry_channel::{Listener, Stop, Uri};
use vmferry_qmp::types::{
    Empty, MigrationPassEvent, ShutdownCause, ShutdownEvent, VersionInfo, VersionTriple,
};
use vmferry_qmp::{
    Broadcast, CLIENTS_MAX, Client, ClientContext, ClientError, Command, CommandError, EVENTS_MAX,
    ErrorClass, Event, Handler, MESSAGE_BYTES_MAX, OUTBOX_BYTES_MAX, Server,
};

/// Long enough for any machine; never reached when all is well.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Default)]
struct TestHandler {
    seen: Mutex<Vec<Command>>,
    received: Mutex<Vec<u8>>,
}

impl Handler for TestHandler {
    fn execute(&self, client: &ClientContext, command: Command) -> Result<Value, CommandError> {
        self.seen.lock().unwrap().push(command.clone());
        match command {
            Command::Getfd(name) => client.getfd(&name.fdname)?,
            Command::Closefd(name) => drop(client.take_fd(&name.fdname)?),
            Command::Migrate(migrate) => {
                let fd = client.take_fd(migrate.address()?.trim_start_matches("fd:"))?;
                let mut file = std::fs::File::from(fd);
                file.read_to_end(&mut self.received.lock().unwrap())
                    .unwrap();
            }
            Command::Stop(_) => panic!("a handler that panics"),
            Command::JobDismiss(job) => return Err(CommandError::device_not_found(&job.id)),
            _ => {}
        }
        Ok(json!({}))
    }
}

struct Fixture {
    server: Server,
    handler: Arc<TestHandler>,
    broadcast: Broadcast,
    uri: Uri,
    stop: Stop,
    dir: tempfile::TempDir,
}

impl Fixture {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let uri = Uri::Unix(dir.path().join("qmp.sock"));
        let handler = Arc::new(TestHandler::default());
        let broadcast = Broadcast::default();
        let version = VersionInfo {
            qemu: VersionTriple {
                major: 10,
                minor: 0,
                micro: 2,
            },
            package: "vmferry test".to_owned(),
        };
        let listener = Listener::bind(&uri).unwrap();
        let handler_too: Arc<dyn Handler> = handler.clone();
        let server =
            Server::start(vec![listener], version, handler_too, broadcast.clone()).unwrap();
        Self {
            server,
            handler,
            broadcast,
            uri,
            stop: Stop::new().unwrap(),
            dir,
        }
    }

    fn path(&self) -> std::path::PathBuf {
        self.dir.path().join("qmp.sock")
    }

    fn client(&self) -> Client {
        Client::connect(&self.uri, &self.stop).unwrap()
    }
}

/// A client by hand, out of negotiation.
fn raw_client(path: &Path) -> BufReader<UnixStream> {
    let mut reader = BufReader::new(UnixStream::connect(path).unwrap());
    reader.get_ref().set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(read_line(&mut reader).starts_with("{\"QMP\""));
    reader
        .get_mut()
        .write_all(b"{\"execute\":\"qmp_capabilities\"}")
        .unwrap();
    assert_eq!(read_line(&mut reader), "{\"return\":{}}\r\n");
    reader
}

fn read_line(reader: &mut BufReader<UnixStream>) -> String {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    line
}

fn deadline() -> Option<Instant> {
    Instant::now().checked_add(PATIENCE)
}

#[test]
fn commands_return_and_fail_with_their_classes() {
    let fixture = Fixture::start();
    let mut client = fixture.client();
    assert_eq!(client.version().qemu.major, 10);
    assert_eq!(client.execute("cont", json!({})).unwrap(), json!({}));
    let version = client.execute("query-version", json!({})).unwrap();
    assert_eq!(version["package"], "vmferry test");
    let error = client
        .execute("job-dismiss", json!({"id": "j"}))
        .unwrap_err();
    assert_eq!(error.class(), Some(ErrorClass::DeviceNotFound));
    assert_eq!(error.to_string(), "job-dismiss: Device 'j' not found");
    let error = client.execute("fly", json!({})).unwrap_err();
    assert_eq!(error.class(), Some(ErrorClass::CommandNotFound));
    let error = client.execute("cont", json!({"x": 1})).unwrap_err();
    assert_eq!(error.to_string(), "cont: Parameter 'x' is unexpected");
    let seen = fixture.handler.seen.lock().unwrap();
    assert_eq!(seen.len(), 2, "only checked commands reach it: {seen:?}");
}

#[test]
fn a_handler_that_panics_costs_only_its_reply() {
    let fixture = Fixture::start();
    let mut client = fixture.client();
    let error = client.execute("stop", json!({})).unwrap_err();
    assert_eq!(error.class(), Some(ErrorClass::GenericError));
    client.execute("cont", json!({})).unwrap();
}

#[test]
fn events_reach_every_negotiated_client_and_no_other() {
    let fixture = Fixture::start();
    let mut first = fixture.client();
    let mut second = fixture.client();
    let mut outsider = BufReader::new(UnixStream::connect(fixture.path()).unwrap());
    assert!(read_line(&mut outsider).starts_with("{\"QMP\""));
    fixture
        .broadcast
        .publish(&Event::MigrationPass(MigrationPassEvent { pass: 2 }));
    fixture.broadcast.publish(&Event::Resume(Empty {}));
    for client in [&mut first, &mut second] {
        // The events came first; a command in between keeps them.
        client.execute("cont", json!({})).unwrap();
        let event = client.wait_event(deadline()).unwrap().unwrap();
        assert_eq!(
            (event.name.as_str(), &event.data),
            ("MIGRATION_PASS", &json!({"pass": 2}))
        );
        assert!(event.at.unwrap().seconds > 1_600_000_000);
        let rest = client.take_events();
        assert_eq!(rest.len(), 1);
        assert_eq!(rest[0].name, "RESUME");
        assert_eq!(client.wait_event(Some(Instant::now())).unwrap(), None);
    }
    outsider
        .get_mut()
        .write_all(b"{\"execute\":\"qmp_capabilities\"}")
        .unwrap();
    assert_eq!(read_line(&mut outsider), "{\"return\":{}}\r\n");
}

#[test]
fn requests_in_one_piece_are_answered_in_order() {
    let fixture = Fixture::start();
    let mut reader = raw_client(&fixture.path());
    let mut batch = Vec::new();
    for id in 0..200 {
        writeln!(batch, "{{\"execute\":\"cont\",\"id\":{id}}}").unwrap();
    }
    batch.extend_from_slice(b"rubbish\n{'execute': 'cont', 'id': 'last'}");
    reader.get_mut().write_all(&batch).unwrap();
    for id in 0..200 {
        let reply: Value = serde_json::from_str(&read_line(&mut reader)).unwrap();
        assert_eq!(reply, json!({"return": {}, "id": id}));
    }
    assert!(read_line(&mut reader).contains("JSON parse error"));
    assert!(read_line(&mut reader).contains("last"));
}

#[test]
fn a_client_that_closes_its_side_still_gets_its_replies() {
    let fixture = Fixture::start();
    let mut reader = raw_client(&fixture.path());
    reader
        .get_mut()
        .write_all(b"{\"execute\":\"cont\"}")
        .unwrap();
    reader.get_mut().shutdown(Shutdown::Write).unwrap();
    let mut rest = String::new();
    reader.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "{\"return\":{}}\r\n");
}

#[test]
fn a_client_that_does_not_read_is_lost_and_holds_up_nobody() {
    let fixture = Fixture::start();
    let mut lazy = raw_client(&fixture.path());
    let mut eager = fixture.client();
    let event = Event::MigrationPass(MigrationPassEvent { pass: 1 });
    // Much more than the outbox and the socket's buffers take, while the other client reads.
    let events = 4 * OUTBOX_BYTES_MAX / 100;
    for index in 0..events {
        fixture.broadcast.publish(&event);
        if index % 100 == 0 {
            eager.execute("cont", json!({})).unwrap();
            eager.take_events();
        }
    }
    eager.execute("cont", json!({})).unwrap();
    let mut rest = Vec::new();
    // The end comes, perhaps as a reset, after no more than what had room.
    let _ = lazy.read_to_end(&mut rest);
    assert!(rest.len() < 2 * OUTBOX_BYTES_MAX, "{}", rest.len());
}

#[test]
fn a_client_that_only_asks_is_made_to_wait() {
    let fixture = Fixture::start();
    let mut greedy = raw_client(&fixture.path());
    greedy
        .get_ref()
        .set_write_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    // Each schema is tens of KiB: without back-pressure this would pile up without end.
    let request = b"{\"execute\":\"query-qmp-schema\"}\n";
    let mut asked = 0_usize;
    while greedy.get_mut().write_all(request).is_ok() && asked < 1_000_000 {
        asked += 1;
    }
    assert!(asked < 1_000_000, "the server reads without bound");
    // It is served on when it reads.
    assert!(read_line(&mut greedy).contains("query-qmp-schema"));
}

#[test]
fn the_place_after_the_last_is_not_given() {
    let fixture = Fixture::start();
    let mut clients: Vec<Client> = (0..CLIENTS_MAX).map(|_| fixture.client()).collect();
    let error = Client::connect(&fixture.uri, &fixture.stop).unwrap_err();
    assert!(matches!(error, ClientError::Unwelcome { .. }), "{error}");
    for client in &mut clients {
        client.execute("cont", json!({})).unwrap();
    }
    // A place that was left can be taken again, once the server has noticed.
    clients.pop();
    let end = Instant::now() + PATIENCE;
    while Client::connect(&fixture.uri, &fixture.stop).is_err() {
        assert!(Instant::now() < end, "the place stays taken");
        std::thread::yield_now();
    }
}

#[test]
fn descriptors_travel_and_belong_to_their_client() {
    let fixture = Fixture::start();
    let mut client = fixture.client();
    let mut other = fixture.client();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    client.getfd("channel", theirs.as_fd()).unwrap();
    drop(theirs);
    ours.write_all(b"through the descriptor").unwrap();
    ours.shutdown(Shutdown::Write).unwrap();
    let migrate = json!({"uri": "fd:channel"});
    let error = other.execute("migrate", migrate.clone()).unwrap_err();
    assert!(error.to_string().contains("'channel' not found"), "{error}");
    client.execute("migrate", migrate.clone()).unwrap();
    assert_eq!(
        *fixture.handler.received.lock().unwrap(),
        b"through the descriptor"
    );
    assert!(client.execute("migrate", migrate).is_err(), "it was taken");

    let error = client.execute("getfd", json!({"fdname": "x"})).unwrap_err();
    assert!(error.to_string().contains("SCM_RIGHTS"), "{error}");
    let error = client.getfd("1x", ours.as_fd()).unwrap_err();
    assert!(error.to_string().contains("digit"), "{error}");
    client.getfd("x", ours.as_fd()).unwrap();
    client.execute("closefd", json!({"fdname": "x"})).unwrap();
    assert!(client.execute("closefd", json!({"fdname": "x"})).is_err());
}

#[test]
fn as_many_descriptors_are_kept_as_promised() {
    let fixture = Fixture::start();
    let mut client = fixture.client();
    let (ours, _theirs) = UnixStream::pair().unwrap();
    for index in 0..vmferry_qmp::KEPT_FDS_MAX {
        client.getfd(&format!("n{index}"), ours.as_fd()).unwrap();
    }
    let error = client.getfd("more", ours.as_fd()).unwrap_err();
    assert!(error.to_string().contains("kept already"), "{error}");
    client.getfd("n0", ours.as_fd()).unwrap();
}

#[test]
fn kept_descriptors_go_with_their_client() {
    let fixture = Fixture::start();
    let mut client = fixture.client();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    client.getfd("channel", theirs.as_fd()).unwrap();
    drop((client, theirs));
    // The end of the stream says that nobody has the other end any more.
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(ours.read(&mut [0]).unwrap(), 0);
}

#[test]
fn shutdown_lets_replies_and_the_last_event_out() {
    let fixture = Fixture::start();
    let mut client = fixture.client();
    client.execute("quit", json!({})).unwrap();
    let farewell = Event::Shutdown(ShutdownEvent {
        guest: false,
        reason: ShutdownCause::HostQmpQuit,
    });
    let path = fixture.path();
    fixture.server.shutdown(&farewell, PATIENCE);
    let event = client.wait_event(deadline()).unwrap().unwrap();
    assert_eq!(event.name, "SHUTDOWN");
    assert_eq!(event.data["reason"], "host-qmp-quit");
    let error = client.wait_event(deadline()).unwrap_err();
    assert!(matches!(error, ClientError::Closed { .. }), "{error}");
    assert!(!path.exists(), "the socket's file is removed");
}

#[test]
fn a_server_that_says_nothing_is_suspected_to_be_taken() {
    let dir = tempfile::tempdir().unwrap();
    let uri = Uri::Unix(dir.path().join("silent.sock"));
    let stop = Stop::new().unwrap();
    let _listener = Listener::bind(&uri).unwrap();
    let error = Client::connect(&uri, &stop).unwrap_err();
    assert!(matches!(error, ClientError::NoGreeting { .. }));
    assert!(error.to_string().contains("second -qmp"), "{error}");
}

#[test]
fn a_server_of_another_kind_is_recognised() {
    for (speech, expected) in [
        (&b"SSH-2.0-x\r\n"[..], "not QMP"),
        (b"NBDMAGIC", "closed before"),
        (b"{\"QMP\": {}}\n", "no greeting"),
        (b"{\"return\": {}}\n", "no greeting"),
        (b"[1]\n", "no object"),
        (b"", "closed before"),
    ] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(speech).unwrap();
        drop(theirs);
        let stop = Stop::new().unwrap();
        let error = Client::over(ours.into(), "peer", &stop).unwrap_err();
        assert!(error.to_string().contains(expected), "{speech:?}: {error}");
    }
}

#[test]
fn a_stopped_client_returns() {
    let fixture = Fixture::start();
    let mut client = fixture.client();
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| client.wait_event(None));
        fixture.stop.trigger();
        assert!(waiter.join().unwrap().is_err());
    });
}

/// A server that says what a test wants: greeting, then `speech` as the answer to the second
/// request.
fn scripted(speech: Vec<u8>) -> (Client, std::thread::JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || {
        let mut reader = BufReader::new(theirs);
        let mut say = |bytes: &[u8]| {
            // A client that has heard enough may be gone.
            let _ = reader.get_mut().write_all(bytes);
            let mut request = String::new();
            let _ = reader.read_line(&mut request);
        };
        say(br#"{"QMP":{"version":{"qemu":{"major":9}},"capabilities":[]}}"#);
        say(br#"{"return":{},"id":"vmferry-1"}"#);
        say(&speech);
    });
    let stop = Stop::new().unwrap();
    (Client::over(ours.into(), "script", &stop).unwrap(), server)
}

#[test]
fn a_client_keeps_the_newest_events_and_no_more() {
    for extra in [0, 1] {
        let mut speech = Vec::new();
        for number in 0..EVENTS_MAX + extra {
            writeln!(speech, "{{\"event\":\"E\",\"data\":{{\"n\":{number}}}}}").unwrap();
        }
        speech.extend_from_slice(br#"{"return":7,"id":"vmferry-2"}"#);
        let (mut client, server) = scripted(speech);
        assert_eq!(client.execute("x", json!({})).unwrap(), 7);
        let events = client.take_events();
        assert_eq!(events.len(), EVENTS_MAX);
        assert_eq!(events[0].data["n"], extra);
        drop(client);
        server.join().unwrap();
    }
}

#[test]
fn a_client_takes_the_longest_message_and_no_longer_one() {
    let frame = r#"{"return":"","id":"vmferry-2"}"#;
    for extra in [0, 1] {
        let text = "x".repeat(MESSAGE_BYTES_MAX - frame.len() + extra);
        let speech = format!("{{\"return\":\"{text}\",\"id\":\"vmferry-2\"}}\n");
        let (mut client, server) = scripted(speech.into_bytes());
        let outcome = client.execute("x", json!({}));
        if extra == 0 {
            assert_eq!(outcome.unwrap(), text);
        } else {
            let error = outcome.unwrap_err().to_string();
            assert!(error.contains("longer than 8388608 bytes"), "{error}");
        }
        drop(client);
        server.join().unwrap();
    }
}

#[test]
fn a_second_greeting_is_passed_over() {
    let speech = br#"{"QMP":{"version":{},"capabilities":[]}}{"return":7,"id":"vmferry-2"}"#;
    let (mut client, server) = scripted(speech.to_vec());
    assert_eq!(client.execute("x", json!({})).unwrap(), 7);
    drop(client);
    server.join().unwrap();
}

#[test]
fn a_reply_to_somebody_else_is_noticed() {
    for speech in [
        &br#"{"return":{},"id":"vmferry-1"}"#[..],
        br#"{"answer":{}}"#,
    ] {
        let (mut client, server) = scripted(speech.to_vec());
        let error = client.execute("x", json!({})).unwrap_err();
        assert!(matches!(error, ClientError::NotQmp { .. }), "{error}");
        drop(client);
        server.join().unwrap();
    }
}

#[test]
fn commands_go_out_of_band_where_the_server_offers_it() {
    for (offered, enabled, how) in [
        (json!(["oob"]), json!({"enable": ["oob"]}), "exec-oob"),
        (json!([]), Value::Null, "execute"),
    ] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || {
            let mut stream = BufReader::new(theirs);
            let version = json!({"qemu": {"major": 9}});
            let mut say = |message: Value| -> Value {
                writeln!(stream.get_mut(), "{message}").unwrap();
                let mut request = String::new();
                stream.read_line(&mut request).unwrap();
                serde_json::from_str(&request).unwrap_or_default()
            };
            let greeting = json!({"QMP": {"version": version, "capabilities": offered}});
            let negotiation = say(greeting);
            let request = say(json!({"return": {}, "id": "vmferry-1"}));
            say(json!({"return": {}, "id": "vmferry-2"}));
            (negotiation, request)
        });
        let stop = Stop::new().unwrap();
        let mut client = Client::over(ours.into(), "script", &stop).unwrap();
        let arguments = json!({"uri": "unix:/x"});
        client
            .execute_out_of_band("migrate-recover", arguments)
            .unwrap();
        drop(client);
        let (negotiation, request) = server.join().unwrap();
        assert_eq!(negotiation["arguments"], enabled);
        assert_eq!(request[how], "migrate-recover");
        assert_eq!(request["arguments"]["uri"], "unix:/x");
    }
}
