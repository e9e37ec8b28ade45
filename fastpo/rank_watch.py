"""``watch_ranks``: a process of a run that dies ends the others too, with its reason, instead of a long wait.

A collective with a process that is gone waits until its timeout, half an hour by default: under NCCL always,
under gloo where the process still lives but has left. A shorter timeout is no remedy, as a process may be slow
for good reasons: an evaluation on the main one, a large save, a compilation.

So every process keeps a TCP connection to that of rank 0. Nothing is sent on it while all goes well. A process
that fails says why; of one that dies without a word the operating system closes the connection. Neither can be
mistaken for slowness: what answers for a busy process is its kernel, which also answers the keepalive probes
that find a host which is down. Rank 0 passes on what it learns. Each process then has ``GRACE`` seconds to fail
by itself, as it does where all raise the same error or where gloo notices, and is ended after that.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import selectors
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

GRACE = 10.0  # seconds between the news that another process failed and the end of this one
NEWS_WAIT = 2.0  # seconds that an error of the communication waits for news of its cause
CONNECT_TIMEOUT = 20.0  # seconds
HELLO_TIMEOUT = 2.0  # seconds that a connection has to say whose it is, which it does at once
# Probes of an idle connection, in seconds and times: a host that is down is found after 10 + 4 · 5 seconds.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
MESSAGE_LIMIT = 2000  # characters of an error's text that are passed on
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class RankFailure(RuntimeError):
    """Another process of the run failed; the message says which one and why."""


@contextlib.contextmanager
def watch_ranks() -> Iterator[None]:
    """Inside, all processes of the default process group stand and fall together.

    Every process must enter. One that leaves by an exception tells the others, which have ``GRACE`` seconds to
    leave as well; then they print the reason on stderr and end with status 1, whatever they are doing. A
    process that dies without a word, by a signal or ``os._exit``, or whose host is lost, counts as failed; one
    that has left is no longer ended. Inside another watch, or without several processes, this does nothing.
    A process that cannot reach that of rank 0 warns: deaths go unnoticed there.

    Raises:
        RankFailure: in place of an error of the communication that another process's failure explains.
    """
    global _current
    if _current is not None or not _several():
        yield
        return
    _current = watch = _Watch(dist.get_rank(), _connect())
    try:
        yield
    except BaseException as error:
        # Gloo and NCCL raise a plain RuntimeError, or a subclass that torch.distributed declares.
        if type(error) is RuntimeError or isinstance(error, dist.DistError):
            cause = watch.cause(NEWS_WAIT)
            if cause is not None and _one_line(error) not in cause:  # not the same that others met
                raise RankFailure(cause) from error
        watch.say_failed(error)
        raise
    finally:
        watch.leave()
        _current = None


def tell_launcher(error: BaseException) -> None:
    """Write the exception that is being handled where torch's elastic launcher looks for the reason of a death.

    It prints it as the root cause of the job's failure. Without such a launcher nothing is written.
    """
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _Peer:
    """A connection to another process."""

    def __init__(self, connection: socket.socket, rank: int, name: str) -> None:
        self.connection = connection
        self.rank = rank
        self.name = name
        self.unread = b""

    def send(self, message: dict[str, Any]) -> None:
        # A peer that is gone is found by reading.
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> tuple[list[dict[str, Any]], str | None]:
        """The messages that have come, and why none will come any more."""
        try:
            data = self.connection.recv(65536)
        except OSError as error:
            return [], f"the connection to it was lost ({error.strerror or error})"
        if not data:
            return [], (
                "it ended without a Python error, as by a signal (such as the kernel's when memory runs out) "
                "or os._exit"
            )
        *lines, self.unread = (self.unread + data).split(b"\n")
        return [json.loads(line) for line in lines], None


class _Watch:
    """This process's part: a thread that listens to the peers, and what it has heard."""

    def __init__(self, rank: int, peers: list[_Peer]) -> None:
        self.rank = rank
        self.peers = {peer.rank: peer for peer in peers}
        self._failures: list[str] = []
        self._news = threading.Event()
        self._lock = threading.Lock()  # of leaving, and of ending the process
        self._left = False
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._listen, name="fastpo-rank-watch", daemon=True)
        self._thread.start()

    def cause(self, wait: float) -> str | None:
        """Which other processes failed, and why, waiting some seconds for the news."""
        return "; ".join(self._failures) if self._news.wait(wait) else None

    def say_failed(self, error: BaseException) -> None:
        """Tell the others that this process fails."""
        self._tell({"failed": f"rank {self.rank} ({_own_name()}) failed: {_one_line(error)}"})

    def leave(self) -> None:
        """Take leave of the others, and stop listening."""
        with self._lock:
            self._left = True
        self._tell({"left": True})
        self._wake.send(b".")
        self._thread.join()
        self.close()

    def close(self) -> None:
        """Close all files; in a forked child those of its parent, whose death must show."""
        for file in (self._wake, self._woken, *(p.connection for p in self.peers.values())):
            file.close()

    def _tell(self, message: dict[str, Any], sender: int | None = None) -> None:
        for peer in tuple(self.peers.values()):
            if peer.rank != sender:
                peer.send(message)

    def _listen(self) -> None:
        deadline: float | None = None
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for peer in self.peers.values():
                selector.register(peer.connection, selectors.EVENT_READ, peer)
            while True:
                wait = None if deadline is None else deadline - time.monotonic()
                if wait is not None and wait <= 0:
                    self._end_process()
                    return
                for key, _ in selector.select(wait):
                    if key.data is None:
                        return
                    if not self._hear(key.data):
                        selector.unregister(key.fileobj)
                if self._failures and deadline is None:
                    deadline = time.monotonic() + GRACE

    def _hear(self, peer: _Peer) -> bool:
        """Take in what a peer says; whether it will say more."""
        messages, end = peer.read()
        for message in messages:
            if "left" in message:
                return False
            self._learn(message["failed"], peer.rank)
        if end is not None:
            self._learn(f"rank {peer.rank} ({peer.name}) is gone: {end}", peer.rank)
        return end is None

    def _learn(self, failure: str, sender: int) -> None:
        # At once: the launcher may end this process in a moment.
        if self.rank == 0:
            self._tell({"failed": failure}, sender)
        self._failures.append(failure)
        self._news.set()

    def _end_process(self) -> None:
        with self._lock:
            if self._left:
                return
            try:
                raise RankFailure("; ".join(self._failures))
            except RankFailure as error:
                text = f"\nfastpo: rank {self.rank} ends, because another process did: {error}\n"
                # Not by way of sys.stderr, whose lock the main thread may hold.
                os.write(2, text.encode())
                with contextlib.suppress(OSError):
                    tell_launcher(error)
            self._tell({"left": True})  # the cause is known; this end is no news
            os._exit(1)


_current: _Watch | None = None


def _forget_in_child() -> None:
    global _current
    if _current is not None:
        _current.close()
        _current = None


os.register_at_fork(after_in_child=_forget_in_child)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:MESSAGE_LIMIT]


def _own_name() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _connect() -> list[_Peer]:
    """The peers of this process: rank 0 has all others, the others have rank 0."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    token = secrets.token_hex(16)
    listener: socket.socket | None = None
    offer: list[Any] = [None]
    if rank == 0:
        with contextlib.suppress(OSError):
            listener = _listener(ranks)
            offer = [(listener.getsockname()[1], token, _own_name())]
    dist.broadcast_object_list(offer)
    peer, problem = None, "rank 0 could not open a port"
    if rank and offer[0] is not None:
        port, token, name = offer[0]
        address = (os.environ.get("MASTER_ADDR", "localhost"), port)
        try:
            connection = socket.create_connection(address, timeout=CONNECT_TIMEOUT)
            _keep_alive(connection)
            peer = _Peer(connection, 0, name)
            peer.send({"token": token, "rank": rank, "name": _own_name()})
        except OSError as error:
            problem = f"no connection from {socket.gethostname()} to {address[0]}:{port} ({error})"
    # Connections wait in the listener's queue until all have tried.
    connected: list[Any] = [None] * ranks
    dist.all_gather_object(connected, peer is not None)
    if listener is not None:
        with listener:
            return _accepted(listener, token, sum(connected))
    if peer is None:
        if rank:
            warnings.warn(
                f"the death of another process will not end that of rank {rank}: {problem}",
                stacklevel=4,
            )
        return []
    return [peer]


def _listener(ranks: int) -> socket.socket:
    address = os.environ.get("MASTER_ADDR", "localhost")
    if address in LOOPBACK:
        family = socket.AF_INET6 if address == "::1" else socket.AF_INET
        host = "::1" if address == "::1" else "127.0.0.1"
        return socket.create_server((host, 0), family=family, backlog=ranks)
    # The name that the others know this host by may be another interface's here.
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", 0), family=socket.AF_INET6, backlog=ranks, dualstack_ipv6=True
        )
    return socket.create_server(("", 0), backlog=ranks)


def _accepted(listener: socket.socket, token: str, count: int) -> list[_Peer]:
    """The ``count`` peers in the listener's queue, strangers left out."""
    listener.settimeout(CONNECT_TIMEOUT)
    peers: list[_Peer] = []
    while len(peers) < count:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            warnings.warn(f"rank 0 watches only {len(peers)} of {count} processes", stacklevel=6)
            break
        try:
            connection.settimeout(HELLO_TIMEOUT)
            hello = json.loads(_first_line(connection))
            known = hmac.compare_digest(hello["token"], token)
            peer = _Peer(connection, int(hello["rank"]), str(hello["name"]))
        except (OSError, ValueError, KeyError, TypeError):
            known = False
        if known:
            _keep_alive(connection)
            peers.append(peer)
        else:
            connection.close()
    return peers


def _first_line(connection: socket.socket) -> bytes:
    """The first line and no byte more: the peer may have failed already and said so in the next one."""
    line = b""
    while not line.endswith(b"\n") and len(line) < MESSAGE_LIMIT:
        byte = connection.recv(1)
        if not byte:
            break
        line += byte
    return line


def _keep_alive(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # not every system has all of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
