//! The ways into a file and out of it.

use std::ffi::OsString;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use serde_json::{Value, json};
use vmferry_ram::{AnonymousRam, check_postcopy};

use crate::host::Host;
use crate::link::Link;
use crate::peers::until;
use crate::peers::vmferry::Vmferry;

/// No limit.
pub(crate) const FAST: u64 = 1 << 40;
/// However slow this machine is, what a guest writes meanwhile fits.
const DOWNTIME_MS: u64 = 60_000;
/// Slow enough for a postcopy to begin with most of the memory unsent.
const SLOW: u64 = 8 << 20;

/// Says that postcopy cannot be tested here, if so.
pub(crate) fn postcopy() -> Option<()> {
    let ram = AnonymousRam::new(&[("some", 4096)]).expect("memory");
    match check_postcopy(&ram) {
        Ok(()) => Some(()),
        Err(error) => {
            assert!(!crate::peers::required(), "{error}");
            println!("left out: {error}");
            None
        }
    }
}

/// How a machine gets into a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Park {
    /// `migrate --vm`.
    Migrate,
    /// `receive --save` of a precopy, whose source waits for our word or does not.
    Precopy { return_path: bool },
    /// `receive --save` of a postcopy that starts with most of the memory unsent.
    Postcopy,
}

impl Park {
    /// Parks the machine; what was reported of it in the end.
    pub(crate) fn park(self, source: &mut Host, file: &Path) -> Value {
        self.park_with(source, file, &[])
    }

    /// The same with more options for `vmferry`.
    pub(crate) fn park_with(self, source: &mut Host, file: &Path, more: &[&str]) -> Value {
        let more = more.iter().map(OsString::from);
        let downtime = json!({"max-bandwidth": FAST, "downtime-limit": DOWNTIME_MS});
        if self == Self::Migrate {
            let vm = source.vm();
            let uri = format!("file:{}", file.display());
            let words = ["migrate", "--vm", &vm, &uri, "--downtime", "60s"];
            let words = words.iter().map(OsString::from).chain(more);
            let mut migrate = Vmferry::start(words);
            let report = migrate.event("completed");
            migrate.succeeds();
            return report;
        }
        let words = [
            "receive".into(),
            "unix:".into(),
            "--save".into(),
            file.into(),
        ];
        let mut words: Vec<OsString> = words.into_iter().chain(more).collect();
        words[1] = format!("unix:{}", source.qemu.path("parking").display()).into();
        let mut receive = Vmferry::start(words);
        let uri = receive.address();
        match self {
            Self::Migrate => {}
            Self::Precopy { return_path } => {
                if return_path {
                    source.enable(&["return-path"]);
                }
                source.set(&downtime);
                source.qemu.qmp.execute("migrate", &json!({"uri": uri}));
            }
            Self::Postcopy => {
                source.enable(&["postcopy-ram"]);
                source.set(&json!({"max-bandwidth": SLOW, "downtime-limit": 1}));
                source.qemu.qmp.execute("migrate", &json!({"uri": uri}));
                until("some memory to be sent", || {
                    let sent = source.migration()["ram"]["transferred"].as_u64();
                    (sent > Some(1 << 20)).then_some(())
                });
                source
                    .qemu
                    .qmp
                    .execute("migrate-start-postcopy", &json!({}));
            }
        }
        let report = receive.event("completed");
        receive.succeeds();
        source.qemu.migrated();
        report
    }
}

/// Where to send so that what arrives at this socket of a host arrives slowly: the URI, and who waits for somebody there.
pub(crate) fn slow_link(host: &Host, socket: &str) -> (String, impl FnOnce() -> Link + use<>) {
    let destination = host.qemu.path(socket);
    let slow = host.qemu.path(&format!("{socket}-slow"));
    let listener = UnixListener::bind(&slow).expect("a socket");
    let accept = move || {
        let (source, _) = listener.accept().expect("the source connects");
        let destination = until("the destination to listen", || {
            UnixStream::connect(&destination).ok()
        });
        let link = Link::new(source, destination);
        link.slow_down();
        link
    };
    (format!("unix:{}", slow.display()), accept)
}

/// How a machine gets out of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Restore {
    /// Its guest runs before its memory is there.
    pub(crate) postcopy: bool,
    /// `vmferry` sets the destination up itself.
    pub(crate) vm: bool,
}

impl Restore {
    pub(crate) const PRECOPY: Self = Self {
        postcopy: false,
        vm: false,
    };
    pub(crate) const POSTCOPY: Self = Self {
        postcopy: true,
        vm: false,
    };
    /// Every way.
    pub(crate) const ALL: [Self; 4] = [
        Self::POSTCOPY,
        Self::PRECOPY,
        Self {
            postcopy: true,
            vm: true,
        },
        Self {
            postcopy: false,
            vm: true,
        },
    ];

    /// What `send` needs to put an image into this host, which listens if it must.
    pub(crate) fn words(self, image: &Path, host: &mut Host) -> Vec<OsString> {
        let mut words = vec!["send".into(), image.into()];
        if self.postcopy {
            words.push("--postcopy".into());
        }
        if self.vm {
            words.extend(["--vm".into(), host.vm().into()]);
        } else {
            if self.postcopy {
                host.enable(&["postcopy-ram"]);
            }
            words.push(host.qemu.listen().into());
        }
        words
    }

    /// Starts to restore with these options on top.
    pub(crate) fn start(self, image: &Path, host: &mut Host, more: &[&str]) -> Vmferry {
        let words = self.words(image, host);
        Vmferry::start(words.into_iter().chain(more.iter().map(OsString::from)))
    }

    /// The same over a slow connection, without `--vm`.
    pub(crate) fn start_slowly(
        self,
        image: &Path,
        host: &mut Host,
        more: &[&str],
    ) -> (Vmferry, Link) {
        assert!(!self.vm, "it would make a connection of its own");
        let mut words = self.words(image, host);
        let (uri, accept) = slow_link(host, "incoming");
        *words.last_mut().expect("a URI is the last word") = uri.into();
        // What is logged of a connection that breaks is not what the command has to say.
        words.push("--quiet".into());
        words.extend(more.iter().map(OsString::from));
        let send = Vmferry::start(words);
        (send, accept())
    }

    /// Restores; what was reported of it in the end.
    pub(crate) fn restore(self, image: &Path, host: &mut Host) -> Value {
        self.restore_with(image, host, &[])
    }

    /// The same with more options for `vmferry`.
    pub(crate) fn restore_with(self, image: &Path, host: &mut Host, more: &[&str]) -> Value {
        let mut send = self.start(image, host, more);
        let report = send.event("completed");
        send.succeeds();
        host.qemu.migrated();
        report
    }
}
