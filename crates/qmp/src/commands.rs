//! The table of commands and the table of events.

use serde_json::{Map, Value};

use crate::error::CommandError;
use crate::schema::{Described, Introspection, Shape, check_arguments, check_value, shorten};
use crate::types::BlockDeviceInfo;
use crate::types::{
    AnnounceParameters, BlockExportInfo, BlockInfo, CommandInfo, Empty, FdName, JobId, JobInfo,
    JobStatusChangeEvent, KvmInfo, Migrate, MigrateContinue, MigrateIncoming,
    MigrateSetCapabilities, MigrationCapabilityStatus, MigrationEvent, MigrationInfo,
    MigrationParameters, MigrationPassEvent, NameInfo, QmpCapabilities, QueryNamedBlockNodes,
    Resolve, SchemaInfo, ShutdownEvent, SnapshotDelete, SnapshotLoad, SnapshotSave, StatusInfo,
    VersionInfo, drop_absent_capabilities,
};

/// One row of the table.
struct Row {
    name: &'static str,
    arguments: Shape,
    returns: Shape,
    build: fn(Map<String, Value>) -> Result<Asked, serde_json::Error>,
}

macro_rules! commands {
    (
        $(#[$meta:meta])* $vis:vis $table:ident, $asked:ident, $rows:ident;
        $($(#[$command_meta:meta])* $variant:ident $name:literal ($arguments:ty) -> $returns:ty,)*
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq)]
        $vis enum $table {
            $($(#[$command_meta])* $variant($arguments),)*
        }

        const $rows: &[Row] = &[$(Row {
            name: $name,
            arguments: <$arguments as Described>::SHAPE,
            returns: <$returns as Described>::SHAPE,
            build: |arguments| {
                serde_json::from_value(Value::Object(arguments))
                    .map(|arguments| Asked::$asked($table::$variant(arguments)))
            },
        },)*];

        impl $table {
            /// The name on the wire.
            #[must_use]
            $vis fn name(&self) -> &'static str {
                match self {
                    $(Self::$variant(_) => $name,)*
                }
            }
        }
    };
}

commands! {
    /// A command for a handler, with its arguments.
    pub Command, Handler, COMMANDS;
    /// Migrate disks away; returns when it has been started.
    Migrate "migrate" (Migrate) -> Empty,
    /// Cancel the migration.
    MigrateCancel "migrate_cancel" (Empty) -> Empty,
    /// Listen for a migration.
    MigrateIncoming "migrate-incoming" (MigrateIncoming) -> Empty,
    /// Let a migration in `pre-switchover` go on.
    MigrateContinue "migrate-continue" (MigrateContinue) -> Empty,
    /// Change parameters, also of the running migration.
    MigrateSetParameters "migrate-set-parameters" (MigrationParameters) -> Empty,
    /// The parameters.
    QueryMigrateParameters "query-migrate-parameters" (Empty) -> MigrationParameters,
    /// Switch features.
    MigrateSetCapabilities "migrate-set-capabilities" (MigrateSetCapabilities) -> Empty,
    /// The features.
    QueryMigrateCapabilities "query-migrate-capabilities" (Empty) -> Vec<MigrationCapabilityStatus>,
    /// How far the migration is.
    QueryMigrate "query-migrate" (Empty) -> MigrationInfo,
    /// Tell the network where the guest's NICs are.
    AnnounceSelf "announce-self" (AnnounceParameters) -> Empty,
    /// Decide where disks live whose hand-over is undecided.
    Resolve "x-resolve" (Resolve) -> Empty,
    /// Hold the guests' requests.
    Stop "stop" (Empty) -> Empty,
    /// Let them run again.
    Cont "cont" (Empty) -> Empty,
    /// May guests' requests run?
    QueryStatus "query-status" (Empty) -> StatusInfo,
    /// Keep the descriptor that came with this command under a name.
    Getfd "getfd" (FdName) -> Empty,
    /// Close a kept descriptor.
    Closefd "closefd" (FdName) -> Empty,
    /// The disks, as devices.
    QueryBlock "query-block" (Empty) -> Vec<BlockInfo>,
    /// The disks, as nodes.
    QueryNamedBlockNodes "query-named-block-nodes" (QueryNamedBlockNodes) -> Vec<BlockDeviceInfo>,
    /// The exports.
    QueryBlockExports "query-block-exports" (Empty) -> Vec<BlockExportInfo>,
    /// Take a snapshot of disks; returns when that has begun, as the two that follow.
    SnapshotSave "snapshot-save" (SnapshotSave) -> Empty,
    /// Bring disks back to a snapshot.
    SnapshotLoad "snapshot-load" (SnapshotLoad) -> Empty,
    /// Delete a snapshot of disks.
    SnapshotDelete "snapshot-delete" (SnapshotDelete) -> Empty,
    /// The jobs.
    QueryJobs "query-jobs" (Empty) -> Vec<JobInfo>,
    /// Forget a job that is over.
    JobDismiss "job-dismiss" (JobId) -> Empty,
    /// The daemon's name.
    QueryName "query-name" (Empty) -> NameInfo,
    /// KVM: none.
    QueryKvm "query-kvm" (Empty) -> KvmInfo,
    /// End the daemon.
    Quit "quit" (Empty) -> Empty,
}

commands! {
    /// A command that the session answers itself.
    pub(crate) SessionCommand, Session, SESSION_COMMANDS;
    /// Leave negotiation.
    Capabilities "qmp_capabilities" (QmpCapabilities) -> Empty,
    /// Names of all commands.
    Commands "query-commands" (Empty) -> Vec<CommandInfo>,
    /// The version in the greeting.
    Version "query-version" (Empty) -> VersionInfo,
    /// Commands, events and types.
    Schema "query-qmp-schema" (Empty) -> Vec<SchemaInfo>,
}

/// What a request asks for.
#[derive(Debug)]
pub(crate) enum Asked {
    Session(SessionCommand),
    Handler(Command),
}

/// Check a request against the table and make a typed command of it.
pub(crate) fn lookup(name: &str, mut arguments: Map<String, Value>) -> Result<Asked, CommandError> {
    let Some(row) = row(name) else {
        return Err(CommandError::command_not_found(format!(
            "The command {} has not been found",
            shorten(name)
        )));
    };
    if name == "migrate-set-capabilities" {
        drop_absent_capabilities(&mut arguments);
    }
    if let Shape::Object(object) = row.arguments {
        check_arguments(object, &arguments)?;
    }
    let asked = (row.build)(arguments)
        .map_err(|error| CommandError::generic(format!("arguments of {name}: {error}")))?;
    if let Asked::Handler(Command::Migrate(migrate)) = &asked {
        migrate.address()?;
    }
    Ok(asked)
}

fn rows() -> impl Iterator<Item = &'static Row> {
    COMMANDS.iter().chain(SESSION_COMMANDS)
}

fn row(name: &str) -> Option<&'static Row> {
    rows().find(|row| row.name == name)
}

/// Names of all commands, for `query-commands`.
pub(crate) fn names() -> Vec<CommandInfo> {
    rows()
        .map(|row| CommandInfo {
            name: row.name.to_owned(),
        })
        .collect()
}

/// The answer of `query-qmp-schema`: a list of `SchemaInfo`.
#[must_use]
pub fn introspect() -> Value {
    let mut introspection = Introspection::default();
    for row in rows() {
        introspection.command(row.name, row.arguments, row.returns);
    }
    for (name, data) in EVENTS {
        introspection.event(name, *data);
    }
    introspection.finish()
}

macro_rules! events {
    ($($(#[$meta:meta])* $variant:ident $name:literal ($data:ty),)*) => {
        /// Something happened; goes to every client.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Event {
            $($(#[$meta])* $variant($data),)*
        }

        const EVENTS: &[(&str, Shape)] = &[$(($name, <$data as Described>::SHAPE),)*];

        impl Event {
            /// The name on the wire.
            #[must_use]
            pub fn name(&self) -> &'static str {
                match self {
                    $(Self::$variant(_) => $name,)*
                }
            }

            /// The data on the wire.
            pub(crate) fn data(&self) -> Result<Value, serde_json::Error> {
                match self {
                    $(Self::$variant(data) => serde_json::to_value(data),)*
                }
            }

            /// An event of a server; `None` if it is not in the table or its data are not what the
            /// table says.
            #[must_use]
            pub fn from_wire(name: &str, data: Value) -> Option<Self> {
                match name {
                    $($name => serde_json::from_value(data).ok().map(Self::$variant),)*
                    _ => None,
                }
            }
        }
    };
}

events! {
    /// A migration has another status.
    Migration "MIGRATION" (MigrationEvent),
    /// A migration begins another pass over what became dirty.
    MigrationPass "MIGRATION_PASS" (MigrationPassEvent),
    /// Guests are held.
    Stop "STOP" (Empty),
    /// Guests run again.
    Resume "RESUME" (Empty),
    /// The daemon ends.
    Shutdown "SHUTDOWN" (ShutdownEvent),
    /// A job has another status.
    JobStatusChange "JOB_STATUS_CHANGE" (JobStatusChangeEvent),
}

/// Check that what a handler returned is what the table promises. For tests of handlers.
///
/// # Errors
/// One line that names the first part that does not fit.
pub fn check_returned(command: &str, value: &Value) -> Result<(), String> {
    let row = row(command).ok_or_else(|| format!("no command {command}"))?;
    check_value(row.returns, value, command).map_err(|mismatch| mismatch.to_string())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use serde_json::json;

    use super::*;

    #[test]
    fn names_are_unique_and_every_command_can_be_built() {
        let mut names = HashSet::new();
        for row in rows() {
            assert!(names.insert(row.name), "{} twice", row.name);
            let Shape::Object(object) = row.arguments else {
                panic!("{}: arguments are no object", row.name);
            };
            let mut arguments = Map::new();
            for member in object.members.iter().filter(|member| !member.optional) {
                let value = match member.shape {
                    Shape::Text => json!("x"),
                    Shape::Int => json!(1),
                    Shape::Array(_) => json!([]),
                    Shape::Enumeration(enumeration) => json!(enumeration.values[0]),
                    other => panic!("no sample for {other:?}"),
                };
                arguments.insert(member.name.to_owned(), value);
            }
            if row.name == "migrate" {
                // It needs one of two.
                arguments.insert("uri".to_owned(), json!("x"));
            }
            match lookup(row.name, arguments).unwrap() {
                Asked::Session(command) => assert_eq!(command.name(), row.name),
                Asked::Handler(command) => assert_eq!(command.name(), row.name),
            }
        }
    }

    #[test]
    fn what_is_absent_can_be_switched_off_but_not_on() {
        let set = |capability: &str, state: bool| {
            let change = |name: &str, state| json!({"capability": name, "state": state});
            let changes = json!([change("events", true), change(capability, state)]);
            let arguments = Map::from_iter([("capabilities".to_owned(), changes)]);
            lookup("migrate-set-capabilities", arguments)
        };
        let Ok(Asked::Handler(Command::MigrateSetCapabilities(set_only))) = set("xbzrle", false)
        else {
            panic!("not understood");
        };
        assert_eq!(set_only.capabilities.len(), 1);
        for (capability, state) in [("xbzrle", true), ("flying", false)] {
            let error = set(capability, state).unwrap_err().to_string();
            assert!(error.contains("does not accept value"), "{error}");
        }
    }

    #[test]
    fn unknown_commands_have_their_class() {
        let error = lookup("nope", Map::new()).unwrap_err();
        assert_eq!(error.class, crate::ErrorClass::CommandNotFound);
        assert_eq!(error.to_string(), "The command nope has not been found");
    }

    #[test]
    fn every_name_in_the_schema_is_listed_once() {
        let schema = introspect();
        let entries = schema.as_array().unwrap();
        let names: HashSet<&str> = entries
            .iter()
            .map(|entry| entry["name"].as_str().unwrap())
            .collect();
        assert_eq!(names.len(), entries.len());
        let mut used = Vec::new();
        for entry in entries {
            for key in ["arg-type", "ret-type", "element-type"] {
                used.extend(entry.get(key).and_then(Value::as_str));
            }
            if entry["meta-type"] == "object" {
                for member in entry["members"].as_array().unwrap() {
                    used.push(member["type"].as_str().unwrap());
                }
            }
        }
        for name in used {
            assert!(names.contains(name), "{name} is not listed");
        }
        check_returned("query-qmp-schema", &schema).unwrap();
        check_returned(
            "query-commands",
            &serde_json::to_value(super::names()).unwrap(),
        )
        .unwrap();
    }

    #[test]
    fn events_survive_the_wire() {
        let event = Event::Migration(MigrationEvent {
            status: crate::types::MigrationStatus::PreSwitchover,
        });
        let data = event.data().unwrap();
        assert_eq!(data, json!({"status": "pre-switchover"}));
        assert_eq!(Event::from_wire(event.name(), data), Some(event));
        assert_eq!(Event::from_wire("VSERPORT_CHANGE", json!({})), None);
    }
}
