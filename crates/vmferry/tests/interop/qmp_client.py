"""Drives a whole migration between two daemons with the QMP client that QEMU's project publishes (PyPI `qemu.qmp`).

Arguments: the control sockets of the source and of the destination, and the address at which the destination waits.
Ends with status 0 if everything was as a client of QEMU expects it; else with what was not.
"""

import asyncio
import sys

from qemu.qmp import EventListener, ExecuteError, QMPClient

PATIENCE_SECONDS = 120


def expect(condition, what):
    if not condition:
        sys.exit(f"unexpected: {what}")


async def refused(client, error_class, command, arguments=None):
    """Fails unless the command is refused with this class; what it says."""
    try:
        answer = await client.execute(command, arguments)
    except ExecuteError as error:
        expect(error.error_class == error_class, f"{command}: {error.error_class} {error}")
        return str(error)
    sys.exit(f"{command} {arguments} was not refused: {answer}")


async def wait_status(client, wanted):
    while True:
        info = await client.execute("query-migrate")
        if info["status"] == wanted:
            return info
        expect(info["status"] not in ("failed", "cancelled"), info)
        await asyncio.sleep(0.02)


async def refuse(source):
    """Wrong commands, each with the class that QEMU gives it."""
    await refused(source, "CommandNotFound", "no-such-command")
    await refused(source, "CommandNotFound", "qmp_capabilities")
    await refused(source, "GenericError", "migrate")
    await refused(source, "GenericError", "migrate", {"uri": 7})
    await refused(source, "GenericError", "migrate", {"uri": "tcp:h:1", "no-such": True})
    await refused(source, "GenericError", "migrate", {"uri": "carrier-pigeon:coop"})
    await refused(source, "GenericError", "migrate-set-parameters", {"downtime-limit": 2000001})
    await refused(source, "GenericError", "migrate-set-capabilities",
                  {"capabilities": [{"capability": "no-such", "state": True}]})
    await refused(source, "GenericError", "migrate-continue", {"state": "pre-switchover"})
    said = await refused(source, "DeviceNotFound", "migrate",
                         {"uri": "tcp:localhost:1", "x-disks": ["no-such"]})
    expect("no-such" in said, said)


async def prepare(source):
    """Capabilities and parameters say what they were set to."""
    wanted = {"events": True, "return-path": True, "pause-before-switchover": True}
    await source.execute("migrate-set-capabilities", {
        "capabilities": [{"capability": name, "state": state} for name, state in wanted.items()]})
    capabilities = await source.execute("query-migrate-capabilities")
    found = {each["capability"]: each["state"] for each in capabilities}
    expect(wanted.items() <= found.items(), found)
    wanted = {"max-bandwidth": 32 << 20, "downtime-limit": 1234}
    await source.execute("migrate-set-parameters", wanted)
    found = await source.execute("query-migrate-parameters")
    expect(wanted.items() <= found.items(), found)
    blocks = await source.execute("query-block")
    expect([block["device"] for block in blocks] == ["disk0"], blocks)
    image = blocks[0]["inserted"]["image"]
    expect(image["virtual-size"] == 16 << 20 and image["format"] == "raw", image)
    nodes = await source.execute("query-named-block-nodes", {"flat": True})
    expect(nodes[0]["node-name"] == "disk0", nodes)
    schema = await source.execute("query-qmp-schema")
    expect(any(entry["name"] == "migrate" for entry in schema), "no migrate in the schema")
    version = await source.execute("query-version")
    expect(version["qemu"]["major"] >= 7, version)
    answer = await source.execute("query-status")
    expect(answer["status"] == "running" and answer["running"], answer)


async def migrate(source, destination, uri):
    told = EventListener()
    arrived = EventListener(names=("MIGRATION", "RESUME"))
    with source.listen(told), destination.listen(arrived):
        await source.execute("migrate", {"uri": uri})
        await wait_status(source, "pre-switchover")
        status = await source.execute("query-status")
        expect(status["status"] == "finish-migrate" and not status["running"], status)
        await refused(source, "GenericError", "migrate", {"uri": uri})
        await source.execute("migrate-continue", {"state": "pre-switchover"})
        info = await wait_status(source, "completed")
        there = await wait_status(destination, "completed")
    expect(info["disk"]["remaining"] == 0 and info["disk"]["total"] == 16 << 20, info)
    expect(info["total-time"] >= info["downtime"] >= 0, info)
    expect(there["status"] == "completed", there)
    status = await source.execute("query-status")
    expect(status == {"running": False, "status": "postmigrate"}, status)
    status = await destination.execute("query-status")
    expect(status == {"running": True, "status": "running"}, status)

    events = told.history
    expect(all(event["timestamp"]["seconds"] > 0 for event in events), events)
    course = [event["data"]["status"] for event in events if event["event"] == "MIGRATION"]
    expect(course == ["setup", "active", "pre-switchover", "device", "completed"], course)
    passes = [event["data"]["pass"] for event in events if event["event"] == "MIGRATION_PASS"]
    expect(passes and passes == list(range(1, len(passes) + 1)), passes)
    names = [event["event"] for event in events]
    expect(names.count("STOP") == 1, names)
    course = [event["data"]["status"] for event in arrived.history if event["event"] == "MIGRATION"]
    expect(course[-2:] == ["active", "completed"], course)


async def main(source_socket, destination_socket, uri):
    source, destination = QMPClient("source"), QMPClient("destination")
    await source.connect(source_socket)
    expect("qemu" in source.greeting.QMP.version, source.greeting)
    await destination.connect(destination_socket)
    await destination.execute("migrate-set-capabilities", {
        "capabilities": [{"capability": "events", "state": True}]})
    await refuse(source)
    await prepare(source)
    await migrate(source, destination, uri)
    await source.disconnect()
    await destination.execute("quit")
    try:
        await destination.disconnect()
    except (EOFError, ConnectionError):
        # It was faster to close the connection.
        pass


asyncio.run(asyncio.wait_for(main(*sys.argv[1:]), PATIENCE_SECONDS))
