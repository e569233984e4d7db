"""A line between the processes of a run, beside what jax has: who comes, who is gone, and what those say who leave.

jaxlib ends a process with a page of stack where another does not come, or names nobody, and Orbax waits for minutes. So
each process keeps one connection to process 0, opened on the coordinator's port before jax's own service stands there.
First it is the roll call. Then a thread listens to it: of a process that was killed the kernel closes it at once, of a
machine that is lost within a minute. Carries no data of the run.

Invariant: who leaves says so first (that all is well, or the error), so that a connection which closes without a word
is a lost process; its name, or the error, ends all others, with the exit code of the error.
"""

import contextlib
import json
import os
import socket
import threading
import time

from ecg_jax import errors
from ecg_jax.errors import EcgJaxError, MachineError

ALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4}  # s, s, times: what a lost machine may be silent
HELLO = 5.0  # seconds for the first word of a connection, which may be a stranger's
FAREWELL = 5.0  # seconds that process 0, which jax cannot do without, waits for the others to leave before it


class Line:
    """The connections of one process. Process 0 has one to each of the others, which have one to process 0."""

    def __init__(self, own: int, count: int, address: str, seconds: float) -> None:
        """Come together at `address` (host:port).

        Raises MachineError naming those of the `count` processes that do not come within `seconds`.
        """
        self._own, self._count = own, count
        self._leaving = threading.Lock()  # never given back
        host, _, port = address.rpartition(":")
        self._others = self._call(address, int(port), seconds) if own == 0 else self._answer(host, int(port), seconds)
        self._heard = {other: threading.Event() for other in self._others}
        for other, connection in self._others.items():
            threading.Thread(target=self._listen, args=(other, connection), name="peers", daemon=True).start()

    def _call(self, address: str, port: int, seconds: float) -> dict[int, socket.socket]:
        there: dict[int, socket.socket] = {}
        until, both = time.monotonic() + seconds, socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        try:
            with socket.create_server(("", port), family=family, dualstack_ipv6=both) as server:
                while len(there) < self._count - 1 and (left := until - time.monotonic()) > 0:
                    server.settimeout(left)
                    with contextlib.suppress(TimeoutError):
                        _admit(server.accept()[0], range(1, self._count), there)
        except OSError as error:
            raise MachineError(f"process 0 cannot listen at {address}: {error.strerror or error}") from None
        absent = sorted(set(range(1, self._count)) - set(there))
        text = f"{_names(absent)} of {self._count} did not come to {address} within {seconds:.0f} s: look why not"
        error = MachineError(text) if absent else None
        for connection in there.values():
            _send(connection, error)
            if error is not None:
                connection.close()
        if error is not None:
            raise error
        return there

    def _answer(self, host: str, port: int, seconds: float) -> dict[int, socket.socket]:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with contextlib.suppress(OSError, ValueError):  # it is not there yet, or still what was there before
                with contextlib.ExitStack() as stack:
                    connection = socket.create_connection((host.strip("[]"), port), timeout=seconds + HELLO)
                    stack.enter_context(connection)
                    connection.sendall(f"{json.dumps(self._own)}\n".encode())
                    if (error := _read(connection)) is not None:
                        raise error
                    _keep(connection)
                    stack.pop_all()
                    return {0: connection}
            time.sleep(0.1)
        text = f"process 0, the coordinator, did not come to {host}:{port} within {seconds:.0f} s: look why not"
        raise MachineError(text)

    def _listen(self, other: int, connection: socket.socket) -> None:
        try:
            error = _read(connection)
            if error is not None and self._own == 0:
                error = type(error)(f"process {other}: {error}")
        except (OSError, ValueError):
            again = f"look at its own messages; start all {self._count} again to go on from the last checkpoint"
            error = MachineError(f"{_names([other])} is gone: {again}")
        self._heard[other].set()
        if error is not None:
            self.leave(error, other)

    def tell(self, error: EcgJaxError | None, source: int | None = None) -> None:
        """Say to the others (not to the `source` of the news) that this process leaves: with `error`, or, None, because
        its work is done.
        """
        for other, connection in self._others.items():
            if other != source:
                _send(connection, error)

    def leave(self, error: EcgJaxError, source: int | None = None) -> None:
        """End this process, and with it all others, with the exit code of `error`, which each says in one line."""
        self._leaving.acquire()  # of several reasons the first counts
        os.write(2, f"ecg-jax: error: {' '.join(str(error).split())}\n".encode())
        self.tell(error, source)
        until = time.monotonic() + FAREWELL
        for heard in self._heard.values() if self._own == 0 else ():
            heard.wait(max(until - time.monotonic(), 0))
        os._exit(error.exit_code)


def _admit(connection: socket.socket, expected: range, there: dict[int, socket.socket]) -> None:
    """Take note of who it is; strangers are sent away."""
    connection.settimeout(HELLO)
    with contextlib.suppress(OSError, ValueError):
        who = json.loads(_line(connection))
        if type(who) is int and who in expected and who not in there:
            _keep(connection)
            there[who] = connection
            return
    connection.close()


def _keep(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in ALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _send(connection: socket.socket, error: EcgJaxError | None) -> None:
    said = None if error is None else [type(error).__name__, str(error)]
    with contextlib.suppress(OSError):  # it is gone itself
        connection.sendall(f"{json.dumps(said)}\n".encode())


def _read(connection: socket.socket) -> EcgJaxError | None:
    """What `_send` sent. Raises OSError or ValueError where the other side is gone, or no process of ours."""
    said = json.loads(_line(connection))
    return None if said is None else getattr(errors, said[0])(said[1])


def _line(connection: socket.socket) -> bytes:
    found = b""
    while not found.endswith(b"\n"):
        if not (byte := connection.recv(1)):
            raise ConnectionError("closed")
        found += byte
    return found


def _names(processes: list[int]) -> str:
    return " and ".join(f"process {p}" + (", the coordinator," if p == 0 else "") for p in processes)
