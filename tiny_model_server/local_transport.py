"""The short cut between a client and a server on one host: a unix socket for messages, shared memory for arrays.

A server on the wildcard or a loopback address also listens on an abstract unix socket that is named by its gRPC port:
such names belong to the network namespace, as ports do, so who reaches the port as localhost reaches the same server
here, in one pod too, and nothing is left behind by a process that is killed.

The rules:

1. Both ends ask the kernel who the other is, and take part only if it is the same user.
2. One connection is one caller with one call at a time; more at once are more connections. The first message is the
   client's metadata, JSON; the server answers with its name and two descriptors: memory into which the client writes
   what it sends, and in which it finds what it gets. They can grow, never shrink, so that nobody who maps them can be
   made to fail. A client may bring its own memory for what it sends, sealed in this way: that of one ``shared_array``.
3. A request is a header (bytes of the message, seconds that remain, whether it may be repeated, bytes of the method's
   path), the path and the message of ``server.proto``, whose ``place`` fields say where arrays lie. A server believes
   no place: it must lie in this caller's memory and fit shape and dtype. Only workers map that memory.
4. An answer is a header (bytes, gRPC's number of the status and FINAL, whether new memory comes along) and the message,
   or the error's text. Only the server sends on a connection; workers never hold it. New memory for what the client
   sends comes when a model keeps what lies in the old, in a message of its own that the client asks for; of a client's
   own the model gets a copy.
5. What a call leaves in the shared memory is valid until the caller's next request; a client copies what it hands on.
6. A caller that gives up closes the connection, which cancels the call. When a connection ends, so do its memory and
   its place in the server, however it ended.
"""

from __future__ import annotations

import os
import select
import socket
import struct

REQUEST = struct.Struct("<IfBB")
ANSWER = struct.Struct("<IBB")
FINAL = 0x80
"""Beside a status' number: the call is not to be tried again."""
READY = b"r"
HELLO = struct.Struct("<I")
BUFFER = 1 << 16
AT_ONCE = 1 << 15
"""Bytes that a socket surely takes, whoever reads."""
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")


def address(port: int) -> str:
    """The abstract name of the unix socket of the server with this gRPC port."""
    return f"\0tiny-model-server:{port}"


def same_user(connection: socket.socket) -> bool:
    """True if the process at the other end runs as the same user."""
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return bool(user == os.geteuid())


def receive(connection: socket.socket, size: int) -> bytes:
    """Exactly so many bytes; ConnectionError if the other end goes before."""
    data = connection.recv(min(size, BUFFER))
    if len(data) == size:
        return data
    buffer = bytearray(data)
    while len(buffer) < size:
        if not (more := connection.recv(min(size - len(buffer), 1 << 20))):
            raise ConnectionError("the other end has gone")
        buffer += more
    return bytes(buffer)


def available() -> bool:
    """True where the system has what the short cut needs."""
    system = (os, "memfd_create"), (os, "eventfd"), (socket, "SO_PEERCRED"), (socket, "recv_fds"), (select, "epoll")
    return all(hasattr(module, name) for module, name in system)
