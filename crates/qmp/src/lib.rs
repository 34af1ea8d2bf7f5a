//! QMP: the protocol, server session and client.
