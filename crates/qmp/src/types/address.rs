//! Where to migrate to, in the two ways in which QEMU lets it be said: as a URI, and (since 8.2) as
//! a list of channels.

use crate::error::CommandError;
use crate::schema::{enumeration, object, shorten};
use crate::types::Migrate;

enumeration! {
    /// What a channel carries.
    MigrationChannelType = "MigrationChannelType" {
        /// The stream.
        Main "main",
    }
}

enumeration! {
    /// How an address is reached.
    MigrationAddressType = "MigrationAddressType" {
        /// A socket.
        Socket "socket",
        /// A command.
        Exec "exec",
        /// A file.
        File "file",
    }
}

enumeration! {
    /// Family of a socket.
    SocketAddressType = "SocketAddressType" {
        /// TCP.
        Inet "inet",
        /// A path.
        Unix "unix",
        /// A descriptor of `getfd`.
        Fd "fd",
    }
}

object! {
    /// An address. Which members there must be depends on `transport`, and for a socket on `type`.
    MigrationAddress = "MigrationAddress" {
        /// How it is reached.
        transport "transport": MigrationAddressType,
        /// Family of a socket.
        family "type": Option<SocketAddressType>,
        /// `inet`: name or address.
        host "host": Option<String>,
        /// `inet`: the number of the port, as text.
        port "port": Option<String>,
        /// `unix`: the socket.
        path "path": Option<String>,
        /// `fd`: its name.
        name "str": Option<String>,
        /// `exec`: the command; only what a shell runs.
        args "args": Option<Vec<String>>,
        /// `file`: the file.
        filename "filename": Option<String>,
        /// `file`: where in it the stream begins.
        offset "offset": Option<u64>,
    }
}

object! {
    /// A channel of a migration.
    MigrationChannel = "MigrationChannel" {
        /// What it carries.
        channel_type "channel-type": MigrationChannelType,
        /// Where it leads.
        addr "addr": MigrationAddress,
    }
}

impl Migrate {
    /// Where to, as a URI.
    ///
    /// # Errors
    /// It is said twice or not at all, or the channels are not one that a URI can say.
    pub fn address(&self) -> Result<String, CommandError> {
        let wrong = |text: &str| Err(CommandError::generic(text));
        match (&self.uri, self.channels.as_deref()) {
            (Some(uri), None) => Ok(uri.clone()),
            (None, Some([channel])) => channel.addr.uri(),
            (None, Some(_)) => wrong("Parameter 'channels' must have exactly one element"),
            (Some(_), Some(_)) => wrong("Parameters 'uri' and 'channels' exclude each other"),
            (None, None) => wrong("Parameter 'uri' is missing"),
        }
    }
}

impl MigrationAddress {
    fn uri(&self) -> Result<String, CommandError> {
        match (self.transport, self.family) {
            (MigrationAddressType::Socket, Some(SocketAddressType::Inet)) => {
                let (host, port) = (need(&self.host, "host")?, need(&self.port, "port")?);
                Ok(match host.contains(':') {
                    true => format!("tcp:[{host}]:{port}"),
                    false => format!("tcp:{host}:{port}"),
                })
            }
            (MigrationAddressType::Socket, Some(SocketAddressType::Unix)) => {
                Ok(format!("unix:{}", need(&self.path, "path")?))
            }
            (MigrationAddressType::Socket, Some(SocketAddressType::Fd)) => {
                Ok(format!("fd:{}", need(&self.name, "str")?))
            }
            (MigrationAddressType::Socket, None) => Err(missing("type")),
            (MigrationAddressType::Exec, _) => match need(&self.args, "args")?.as_slice() {
                [shell, option, command] if shell == "/bin/sh" && option == "-c" => {
                    Ok(format!("exec:{command}"))
                }
                other => Err(CommandError::generic(format!(
                    "'{}': a command must be run as /bin/sh -c COMMAND",
                    shorten(&other.join(" "))
                ))),
            },
            (MigrationAddressType::File, _) => Ok(format!(
                "file:{},offset={}",
                need(&self.filename, "filename")?,
                self.offset.unwrap_or(0)
            )),
        }
    }
}

fn need<'a, T>(member: &'a Option<T>, name: &str) -> Result<&'a T, CommandError> {
    member.as_ref().ok_or_else(|| missing(name))
}

fn missing(name: &str) -> CommandError {
    CommandError::generic(format!("Parameter 'channels[0].addr.{name}' is missing"))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::commands::{Asked, Command, lookup};

    fn address(arguments: &Value) -> Result<String, String> {
        let arguments = arguments.as_object().unwrap().clone();
        match lookup("migrate", arguments).map_err(|error| error.to_string())? {
            Asked::Handler(Command::Migrate(migrate)) => {
                migrate.address().map_err(|error| error.to_string())
            }
            other => panic!("{other:?}"),
        }
    }

    fn channel(addr: &Value) -> Value {
        json!({"channels": [{"channel-type": "main", "addr": addr}]})
    }

    #[test]
    fn a_channel_is_a_uri() {
        for (addr, uri) in [
            (
                json!({"transport": "socket", "type": "inet", "host": "h", "port": "4444"}),
                "tcp:h:4444",
            ),
            (
                json!({"transport": "socket", "type": "inet", "host": "::1", "port": "1"}),
                "tcp:[::1]:1",
            ),
            (
                json!({"transport": "socket", "type": "unix", "path": "/x"}),
                "unix:/x",
            ),
            (
                json!({"transport": "socket", "type": "fd", "str": "name"}),
                "fd:name",
            ),
            (
                json!({"transport": "exec", "args": ["/bin/sh", "-c", "cat > /x"]}),
                "exec:cat > /x",
            ),
            (
                json!({"transport": "file", "filename": "/x", "offset": 7}),
                "file:/x,offset=7",
            ),
        ] {
            assert_eq!(address(&channel(&addr)), Ok(uri.to_owned()));
        }
        assert_eq!(
            address(&json!({"uri": "unix:/x"})),
            Ok("unix:/x".to_owned())
        );
    }

    #[test]
    fn what_is_no_address_is_refused() {
        let main = json!({"channel-type": "main", "addr": {"transport": "file", "filename": "x"}});
        for (arguments, expected) in [
            (json!({}), "'uri' is missing"),
            (json!({"channels": []}), "exactly one"),
            (json!({"channels": [main, main]}), "exactly one"),
            (json!({"uri": "unix:/x", "channels": [main]}), "exclude"),
            (
                channel(&json!({"transport": "socket"})),
                "'channels[0].addr.type' is missing",
            ),
            (
                channel(&json!({"transport": "socket", "type": "inet", "host": "h"})),
                "'channels[0].addr.port' is missing",
            ),
            (
                channel(&json!({"transport": "exec", "args": ["cat"]})),
                "/bin/sh",
            ),
            (
                channel(&json!({"transport": "rdma"})),
                "does not accept value 'rdma'",
            ),
        ] {
            let error = address(&arguments).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
