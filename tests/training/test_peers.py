"""The line between processes: absent ones are named before a run, lost ones in it, and errors end all alike.

The processes import next to nothing, so that many of them cost little.
"""

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from ecg_jax.errors import MachineError
from ecg_jax.training import hosts, peers

CHILD = """
import os, sys, time
from ecg_jax.errors import DataError
from ecg_jax.training.peers import Line

own, count, address, seconds, what = sys.argv[1:]
line = Line(int(own), int(count), address, float(seconds))
print("there", flush=True)
sys.stdin.readline()
if what == "error":
    line.leave(DataError("a shard is\\nbroken"))
if what == "done":
    line.tell(None)
    sys.exit()
time.sleep(60)
"""


def _address() -> str:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return f"localhost:{found.getsockname()[1]}"


def _start(count: int, *whats: str) -> list[subprocess.Popen]:
    """A process for each of `whats`, wait, done or error, which does it once all are there."""
    address = _address()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    whole = [sys.executable, "-c", CHILD]
    started = [
        subprocess.Popen([*whole, str(own), str(count), address, "30", what], **pipes) for own, what in enumerate(whats)
    ]
    for process in started:
        assert process.stdout.readline() == "there\n", process.communicate()
    for process, what in zip(started, whats, strict=True):
        if what != "wait":
            process.stdin.write("\n")
            process.stdin.flush()
        if what == "done":
            assert process.wait(50) == 0
    return started


def _ends(started: list[subprocess.Popen]) -> list[tuple[int, str]]:
    return [(process.returncode, err) for process in started for _, err in [process.communicate(timeout=50)]]


@pytest.mark.parametrize("lost", [0, 2])
def test_a_process_that_is_killed_ends_the_others_by_name(lost):
    started = _start(4, *["wait"] * 4)
    started[lost].kill()
    name = "process 0, the coordinator," if lost == 0 else "process 2"
    for own, (code, err) in enumerate(_ends(started)):
        wanted = f"ecg-jax: error: {name} is gone: look at its own messages; start all 4 again to go on from the last"
        assert (code == -signal.SIGKILL) if own == lost else (code == 5 and err.startswith(wanted)), (own, code, err)
        assert err.count("\n") == (own != lost)


def test_the_error_of_one_is_that_of_all_and_who_is_done_may_go():
    ended = _ends(_start(4, "wait", "done", "error", "wait"))
    assert [code for code, _ in ended] == [3, 0, 3, 3]
    assert ended[2][1] == "ecg-jax: error: a shard is broken\n" and ended[1][1] == ""
    assert ended[0][1] == ended[3][1] == "ecg-jax: error: process 2: a shard is broken\n"


def test_who_does_not_come_is_named_and_strangers_are_no_matter(monkeypatch):
    address, said = _address(), {}

    def come(own: int, seconds: float) -> None:
        try:
            peers.Line(own, 4, address, seconds)
        except MachineError as error:
            said[own] = str(error)

    present = [threading.Thread(target=come, args=(own, 1.5)) for own in (0, 2)]
    for thread in present:
        thread.start()
    for word in (b"GET / HTTP/1.1\r\n", b"7\n", b'"1"\n', b""):
        with contextlib.suppress(OSError):
            time.sleep(0.05)
            with socket.create_connection(("localhost", int(address.split(":")[1])), timeout=1) as stranger:
                stranger.sendall(word)
    for thread in present:
        thread.join()
    assert said[0] == said[2] == f"process 1 and process 3 of 4 did not come to {address} within 2 s: look why not"

    for name, value in zip(hosts.VARIABLES, (address, "2", "1"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ECG_JAX_TIMEOUT", "1")
    with pytest.raises(MachineError, match=f"process 0, the coordinator, did not come to {address} within 1 s"):
        hosts.join()
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    with socket.create_server(("", int(address.split(":")[1]))), pytest.raises(MachineError, match="cannot listen at"):
        hosts.join()


def test_the_watchdog_names_the_process_that_does_not_answer(monkeypatch):
    class Client:
        def __init__(self):
            self.said = {"ecg_jax/stands/2": "completed 14 dispatches"}

        def key_value_set(self, key, value, allow_overwrite):
            self.said[key] = value

        def key_value_dir_get(self, key):
            return list(self.said.items())

    assert hosts.stands(3) == "", "a process that is alone"
    monkeypatch.setattr(hosts, "count", lambda: 3)
    monkeypatch.setattr(hosts, "LOST", 0)
    monkeypatch.setattr(hosts.distributed.global_state, "client", Client())
    found = hosts.stands(15)
    assert found == "process 0 completed 15 dispatches; process 1 does not answer; process 2 completed 14 dispatches"
