//! The monitor itself, run states, file descriptors.

use crate::schema::{enumeration, object};

object! {
    /// No arguments, or nothing to return.
    Empty = "Empty" {}
}

enumeration! {
    /// Capabilities that a monitor can offer. We offer none; `oob` is known so that its refusal
    /// is worded like QEMU's.
    QmpCapability = "QMPCapability" {
        /// Out-of-band execution.
        Oob "oob",
    }
}

object! {
    /// Arguments of `qmp_capabilities`.
    QmpCapabilities = "q_obj_qmp_capabilities-arg" {
        /// What to switch on.
        enable "enable": Option<Vec<QmpCapability>>,
    }
}

object! {
    /// Three numbers of a version.
    VersionTriple = "VersionTriple" {
        /// First.
        major "major": u64,
        /// Second.
        minor "minor": u64,
        /// Third.
        micro "micro": u64,
    }
}

object! {
    /// The version in the greeting and from `query-version`.
    VersionInfo = "VersionInfo" {
        /// The numbers that clients compare.
        qemu "qemu": VersionTriple,
        /// Who made it, free text.
        package "package": String,
    }
}

object! {
    /// An element of `query-commands`.
    CommandInfo = "CommandInfo" {
        /// The command.
        name "name": String,
    }
}

enumeration! {
    /// What an entry of the schema is.
    SchemaMetaType = "SchemaMetaType" {
        /// A type that is JSON's own.
        Builtin "builtin",
        /// A set of strings.
        Enum "enum",
        /// Equal elements.
        Array "array",
        /// Members.
        Object "object",
        /// A command.
        Command "command",
        /// An event.
        Event "event",
    }
}

object! {
    /// A value of an enumeration, or a member of an object type.
    SchemaInfoMember = "XSchemaInfoMember" {
        /// The value, or the key.
        name "name": String,
        /// The member's type.
        kind "type": Option<String>,
        /// Present if the member may be left out.
        default "default": Option<serde_json::Value>,
    }
}

object! {
    /// An element of `query-qmp-schema`. Which of the optional members there are depends on the
    /// meta-type.
    SchemaInfo = "SchemaInfo" {
        /// The entity.
        name "name": String,
        /// What it is.
        meta_type "meta-type": SchemaMetaType,
        /// JSON's name of a built-in type.
        json_type "json-type": Option<String>,
        /// The values of an enumeration.
        values "values": Option<Vec<String>>,
        /// The values again, or the members of an object type.
        members "members": Option<Vec<SchemaInfoMember>>,
        /// What an array has.
        element_type "element-type": Option<String>,
        /// A command's arguments, or an event's data.
        arg_type "arg-type": Option<String>,
        /// What a command returns.
        ret_type "ret-type": Option<String>,
    }
}

object! {
    /// Answer of `query-name`.
    NameInfo = "NameInfo" {
        /// The name, if it has one.
        name "name": Option<String>,
    }
}

object! {
    /// Answer of `query-kvm`.
    KvmInfo = "KvmInfo" {
        /// A guest runs with it.
        enabled "enabled": bool,
        /// The program could use it.
        present "present": bool,
    }
}

enumeration! {
    /// What guests may do.
    RunState = "RunState" {
        /// Requests run.
        Running "running",
        /// Stopped by `stop`.
        Paused "paused",
        /// A migration is expected or arriving.
        Inmigrate "inmigrate",
        /// The last data of an outgoing migration is on its way.
        FinishMigrate "finish-migrate",
        /// The disks were given up, or may have been.
        Postmigrate "postmigrate",
        /// On the way out.
        Shutdown "shutdown",
        /// The host failed a request.
        IoError "io-error",
        /// Something is broken.
        InternalError "internal-error",
        /// Not started yet.
        Prelaunch "prelaunch",
        /// A snapshot is being loaded.
        RestoreVm "restore-vm",
        /// A snapshot is being saved.
        SaveVm "save-vm",
        /// Asleep.
        Suspended "suspended",
        /// A watchdog fired.
        Watchdog "watchdog",
        /// The guest panicked.
        GuestPanicked "guest-panicked",
        /// Waits for its other half.
        Colo "colo",
        /// Under a debugger.
        Debug "debug",
    }
}

object! {
    /// Answer of `query-status`.
    StatusInfo = "StatusInfo" {
        /// Requests run.
        running "running": bool,
        /// Why, or why not.
        status "status": RunState,
    }
}

object! {
    /// Arguments of `getfd` and `closefd`.
    FdName = "q_obj_getfd-arg" {
        /// The name; must not start with a digit.
        fdname "fdname": String,
    }
}

enumeration! {
    /// Why a daemon ends.
    ShutdownCause = "ShutdownCause" {
        /// Nothing said.
        None "none",
        /// The host failed.
        HostError "host-error",
        /// The `quit` command.
        HostQmpQuit "host-qmp-quit",
        /// A signal, such as SIGTERM.
        HostSignal "host-signal",
        /// A user interface.
        HostUi "host-ui",
        /// The guest.
        GuestShutdown "guest-shutdown",
    }
}

object! {
    /// Data of `SHUTDOWN`.
    ShutdownEvent = "q_obj_SHUTDOWN-arg" {
        /// The guest asked for it.
        guest "guest": bool,
        /// Who asked for it.
        reason "reason": ShutdownCause,
    }
}
