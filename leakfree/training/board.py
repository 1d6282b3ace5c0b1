"""Short messages between rank 0 and every other rank, beside the process group and on a connection of its own.

A process that dies closes its connection, so the others know at once; a machine that is gone is noticed by TCP
after about a minute. One thread of each rank uses it. Lines of JSON over TCP; a connection must begin with the token
that rank 0 gives to its ranks. Torch-free.
"""

from __future__ import annotations

import errno
import hmac
import json
import secrets
import selectors
import socket
import sys
from typing import Any

__all__ = ["LOST", "Board", "BoardError", "Message"]

Message = dict[str, Any]
LOST = "lost"  # the message of a connection that ended; "silent": the other machine does not answer any more

_LONGEST = 1 << 20  # bytes of a message
_GONE_AFTER = 60_000  # ms after which TCP gives up on a machine that does not answer
_SENDING = 5.0  # seconds; a message is far smaller than what the kernel takes at once
_SILENT = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN}
_CONNECTING = 5.0  # seconds for each address of rank 0


class BoardError(RuntimeError):
    """Rank 0's board cannot be reached."""


class Board:
    """Rank 0's end (:meth:`host`), another rank's (:meth:`join`), or that of a rank without others (:meth:`alone`)."""

    def __init__(self) -> None:
        self.address = ""  # for :meth:`join`
        self._token = ""
        self._server: socket.socket | None = None
        self._peers: dict[int, _Peer] = {}
        self._selector = selectors.DefaultSelector()
        self._woken, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)

    @classmethod
    def alone(cls) -> Board:
        return cls()

    @classmethod
    def host(cls, names: list[str]) -> Board:
        """Listen on a free port; ``names`` are those under which other ranks may find this machine."""
        board = cls()
        if all(name == "localhost" or name.startswith("127.") for name in names):
            board._server = socket.create_server(("127.0.0.1", 0), backlog=4096)
        elif socket.has_dualstack_ipv6():
            board._server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
        else:
            board._server = socket.create_server(("", 0), backlog=4096)
        board._server.setblocking(False)
        board._selector.register(board._server, selectors.EVENT_READ)
        board._token = secrets.token_hex(16)
        port = board._server.getsockname()[1]
        board.address = json.dumps({"names": names, "port": port, "token": board._token})
        return board

    @classmethod
    def join(cls, address: str, rank: int) -> Board:
        """Connect to rank 0.

        Raises:
            BoardError: none of its names leads to it.
        """
        known = json.loads(address)
        board = cls()
        faults = []
        for name in known["names"]:
            try:
                connection = socket.create_connection((name, known["port"]), timeout=_CONNECTING)
            except OSError as error:
                faults.append(f"{name}: {error}")
                continue
            peer = _Peer(connection, 0)
            if peer.send({"token": known["token"], "rank": rank}) and peer.welcomed():
                board._peers[0] = peer
                board._selector.register(connection, selectors.EVENT_READ, peer)
                return board
            connection.close()
            faults.append(f"{name}: another program answers")
        board.close()
        raise BoardError(f"port {known['port']} of rank 0 cannot be reached ({'; '.join(faults)})")

    def wake(self) -> None:
        """Let :meth:`receive` return now; from any thread."""
        try:
            self._waker.send(b".")
        except OSError:  # full: it is about to return; closed: nobody listens
            return

    def receive(self, timeout: float) -> list[tuple[int, Message]]:
        """What came, as (rank, message), waiting up to ``timeout`` s; ``{"is": LOST, ...}`` is a connection's end."""
        found: list[tuple[int, Message]] = []
        for key, _ in self._selector.select(timeout):
            if key.fileobj is self._woken:
                self._woken.recv(4096)
            elif key.fileobj is self._server:
                self._accept()
            else:
                found += self._read(key.data)
        return found

    def send(self, message: Message, rank: int | None = None) -> None:
        """Send to one rank or to all. That a connection has ended is told by :meth:`receive`."""
        for peer in list(self._peers.values()):
            if rank is None or rank == peer.rank:
                peer.send(message)

    def close(self) -> None:
        """Also for a forked process, which must not keep the connections of its parent open."""
        for key in list((self._selector.get_map() or {}).values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()
        self._waker.close()

    def _accept(self) -> None:
        assert self._server is not None
        try:
            connection, _ = self._server.accept()
        except OSError:  # it is gone again
            return
        self._selector.register(connection, selectors.EVENT_READ, _Peer(connection, -1))

    def _read(self, peer: _Peer) -> list[tuple[int, Message]]:
        messages, ended = peer.receive()
        if peer.rank < 0 and messages:
            hello = messages.pop(0)
            if not isinstance(hello, dict) or not hmac.compare_digest(
                str(hello.get("token")).encode(), self._token.encode()
            ):
                ended = True
            elif peer.send({"is": "welcome"}):
                peer.rank = int(hello["rank"])
                self._peers[peer.rank] = peer
        found = [(peer.rank, message) for message in messages] if peer.rank >= 0 else []
        if ended:
            self._drop(peer)
            if peer.rank >= 0:
                found.append((peer.rank, {"is": LOST, "silent": peer.silent}))
        return found

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.connection)
        peer.connection.close()
        self._peers.pop(peer.rank, None)


class _Peer:
    """One connection."""

    def __init__(self, connection: socket.socket, rank: int) -> None:
        self.connection = connection
        self.rank = rank  # -1: it has not said which
        self.silent = False  # the connection has ended since its machine does not answer
        self._buffer = b""
        self._mute = False
        connection.settimeout(_SENDING)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if sys.platform == "linux":
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _GONE_AFTER)

    def send(self, message: Message) -> bool:
        """False if it cannot be sent: the connection has ended, or the other side has long taken nothing."""
        if self._mute:
            return False
        try:
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            self._mute = True  # part of it may have left; what the other side has said can still be read
            self.silent = self.silent or error.errno in _SILENT
        return not self._mute

    def receive(self) -> tuple[list[Message], bool]:
        """The whole messages that have come, and whether the connection has ended."""
        try:
            data = self.connection.recv(1 << 16)
        except OSError as error:
            data = b""
            self.silent = self.silent or error.errno in _SILENT
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        longest = _LONGEST if self.rank >= 0 else 4096  # a stranger may not fill the memory
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:  # a stranger
            return [], True
        return messages, not data or len(self._buffer) > longest

    def welcomed(self) -> bool:
        """Whether the other side answers the hello that was sent."""
        messages: list[Message] = []
        ended = False
        while not messages and not ended:
            messages, ended = self.receive()
        self._buffer = b"".join(json.dumps(early).encode() + b"\n" for early in messages[1:]) + self._buffer
        return bool(messages) and messages[0] == {"is": "welcome"}
