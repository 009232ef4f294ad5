"""The local transport of a client on the server's host: a unix socket for messages, shared memory for arrays.

A server on the wildcard or a loopback address also listens on an abstract unix socket, which is named by its gRPC port.
Such names belong to the network namespace, as ports do. So a client that reaches the port as localhost reaches the same
server by the socket, also within one pod. A process that is killed leaves nothing behind.

The rules:

1. Both ends ask the kernel for the user at the other end. They go on only if it is the same user.
2. A connection carries one call at a time. For more calls at once, a client opens more connections. The client first
   sends its metadata, as JSON. The server answers with its name and two descriptors: the request buffer, which the
   client writes, and the response buffer, which it reads. Buffers can grow, but never shrink, so that no process that
   maps one can be made to fail. A client may bring its own request buffer, sealed in this way: the memory of one
   ``shared_array``.
3. A request is a header (bytes of the message, seconds until the deadline, whether it may be repeated, bytes of the
   path), the path, which is the method's, a space and the call's id, and a message of ``server.proto``. Its ``place``
   fields say where arrays lie. The server checks each place: it must lie in the request buffer, and fit the array's
   shape and dtype. Only workers map buffers.
4. A response is a header (bytes, gRPC's number of the status and FINAL, whether a new request buffer follows) and the
   message, or the error's text. Only the server sends on a connection; workers never hold it. If a model retains an
   input, the client must ask for a new request buffer, and gets it in a message of its own. If the buffer is the
   client's own, the model gets a copy instead.
5. What a call leaves in the response buffer is valid until the client's next request. A client copies what it returns.
6. A client that gives up closes the connection, which cancels the call. When a connection ends, however it ended, the
   server frees its memory.
"""

from __future__ import annotations

import os
import select
import socket
import struct

REQUEST = struct.Struct("<IfBB")
ANSWER = struct.Struct("<IBB")
FINAL = 0x80
"""Added to a status' number: the call must not be retried."""
READY = b"r"
HELLO = struct.Struct("<I")
BUFFER = 1 << 16
AT_ONCE = 1 << 15
"""Bytes that a socket takes at once, even if the other end does not read."""
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")


def address(port: int) -> str:
    """The abstract name of the unix socket of the server with this gRPC port."""
    return f"\0tiny-model-server:{port}"


def same_user(connection: socket.socket) -> bool:
    """True if the process at the other end runs as the same user."""
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return bool(user == os.geteuid())


def receive(connection: socket.socket, size: int) -> bytes:
    """Receives exactly so many bytes. ConnectionError if the other end disconnects first."""
    data = connection.recv(min(size, BUFFER))
    if len(data) == size:
        return data
    buffer = bytearray(data)
    while len(buffer) < size:
        if not (more := connection.recv(min(size - len(buffer), 1 << 20))):
            raise ConnectionError("the other end has disconnected")
        buffer += more
    return bytes(buffer)


def available() -> bool:
    """True if the system has what the local transport needs."""
    system = (os, "memfd_create"), (os, "eventfd"), (socket, "SO_PEERCRED"), (socket, "recv_fds"), (select, "epoll")
    return all(hasattr(module, name) for module, name in system)
