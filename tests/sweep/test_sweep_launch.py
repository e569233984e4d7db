"""Real workers in processes of their own: killed, stopped, run twice at once, through submitit: one table."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from ecg_jax import stops
from ecg_jax.errors import DataError, DivergedError, InterruptedRun, MachineError, UsageError
from ecg_jax.evaluation import evalog
from ecg_jax.scaling import table as fit_table
from ecg_jax.sweep import launch, spec, table, work
from ecg_jax.sweep.folder import Folder
from ecg_jax.training import loop, runtime


def start(toml, out, environment, *words):
    """`ecg-jax sweep` on one core, as a process."""
    command = [sys.executable, "-m", "ecg_jax.cli", "sweep", str(toml), "--out", str(out), "--devices", "cpu"]
    return subprocess.Popen(
        [*command, "--per-device", "1", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def final(out):
    """The results table, without the seconds."""
    with open(out / table.NAME, newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(toml, environment, tmp_path_factory):
    """The folder of a sweep that nobody disturbed, and what it gave."""
    out = tmp_path_factory.mktemp("undisturbed") / "sweep"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        return out, launch.sweep(spec.load(toml), out, devices="cpu", per_device=1, quiet=True)


def test_all_of_it(undisturbed):
    out, result = undisturbed
    rows = final(out)
    assert [(row["kind"], row["status"]) for row in rows] == [("trial", "done")] * 2 + [("run", "done")] * 2
    assert result["states"] == {"done": 4} and result["table"] == str(out / "runs.csv")
    best = min(rows[:2], key=lambda row: float(row["val"]))
    assert {row["lr"] for row in rows[2:]} == {best["lr"]}, "chosen on val"
    (same,) = (row for row in rows[2:] if row["n_records"] == best["n_records"])
    assert (same["trial"], same["test"]) == (best["trial"], best["test"]), "the chosen trial is the run"
    log = evalog.read(sorted((out / "runs").iterdir()))
    trained = [row for row in log if ":" not in row["run"]]
    assert {row["run"] for row in trained} == {row["run"] for row in rows[2:]}
    assert {(row["run"], str(row["trial"])) for row in trained} == {(row["run"], row["trial"]) for row in rows[2:]}
    assert {row["task"] for row in log} == {"pretrain", "code"}
    assert result["results"] == [str(out / "results.csv")] and evalog.read(out / "results.csv") == log
    assert any(f"ecg-jax fit {out / 'results.csv'}" in line for line in launch.result_lines(result))
    assert len(fit_table.read([out / "results.csv"]).rows) >= 2, "fit reads the table"


def test_killed_stopped_and_by_two_launchers_to_the_same_table(undisturbed, toml, environment, tmp_path, monkeypatch):
    """kill -9 of a worker, SIGTERM to the launcher, then two launchers at once, one of them through submitit, whose
    local executor does as Slurm would. Without the probe, whose programs every worker compiles.
    """
    pytest.importorskip("submitit")
    out = tmp_path / "sweep"
    text, toml = toml.read_text(), tmp_path / "sweep.toml"
    toml.write_text(text[: text.index("[[probe]]")])

    def holders():
        found = [json.loads(text) for path in (out / "claims").glob("*-lr*.lock") if (text := path.read_text())]
        return {entry["pid"] for entry in found}

    first = start(toml, out, environment)
    wait_for(lambda: any((out / "trials").glob("*/checkpoints/[0-9]*")), first)
    (worker,) = holders()
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: len(holders() - {worker}) == 1, first)  # another one has taken its place
    first.send_signal(signal.SIGTERM)
    _, progress = first.communicate(timeout=60)
    assert first.returncode == 75 and "run it again to go on" in progress

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    second = start(toml, out, environment)
    slurm = {"launcher": "slurm", "cluster": "local", "slurm": {"timeout_min": 5}, "quiet": True}
    assert launch.sweep(spec.load(toml), out, **slurm)["states"] == {"done": 4}
    _, progress = second.communicate(timeout=240)
    assert second.returncode == 0, progress
    assert list((out / "logs").glob("slurm-*/*_result.pkl")), "the array has run"
    assert final(out) == final(undisturbed[0])
    rows = [[r for r in evalog.read(of / "results.csv") if r["task"] == "pretrain"] for of in (out, undisturbed[0])]
    assert rows[0] == rows[1] and rows[0]
    assert not any("Traceback" in path.read_text() for path in (out / "logs").glob("worker*.log"))
    for path in (out / "runs").glob("*/metrics.jsonl"):
        assert path.read_bytes() == (undisturbed[0] / "runs" / path.parent.name / path.name).read_bytes()


def test_claims_exclude_and_are_freed_by_death(tiny, tmp_path):
    folder = Folder(tmp_path, tiny)
    folder.begin()
    job = folder.jobs()[0]
    hold = "import fcntl, json, os, socket, sys; lock = open(sys.argv[1], 'w'); fcntl.flock(lock, fcntl.LOCK_EX)\n"
    hold += "lock.write(json.dumps({'host': socket.gethostname(), 'pid': os.getpid()})); lock.flush()\n"
    hold += "print(True, flush=True); sys.stdin.read()"
    lock = tmp_path / "claims" / f"{job.name}.lock"
    process = subprocess.Popen(
        [sys.executable, "-c", hold, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "True\n"
    with folder.claim(job) as mine:
        assert not mine and folder.claimed(job)
    assert folder.held_by(process.pid, [job]) == job
    process.kill()
    process.communicate()
    with folder.claim(job) as mine:
        assert mine


def test_deaths_are_counted_from_the_last_checkpoint_and_errors_are_final(tiny, tmp_path):
    folder = Folder(tmp_path, tiny)
    folder.begin()
    job = folder.jobs()[0]
    for _ in range(4):
        folder.failed(job, "died", -9)
    assert not folder.failure(job)["final"]
    (folder.place(job) / "checkpoints" / "8").mkdir(parents=True)
    folder.failed(job, "died", -9)
    assert folder.failure(job)["attempts"] == 1
    for _ in range(4):
        folder.failed(job, "died", -9)
    assert folder.states([job])[job.name] == "failed"
    folder.begin()
    assert folder.states([job])[job.name] == "ready", "a new launch tries again"
    folder.failed(job, "no such label", DataError.exit_code)
    assert folder.failure(job)["final"]
    with pytest.raises(DataError, match="no such label"):
        launch._result(folder, folder.states(folder.jobs()))


def test_a_diverged_run_is_kept_and_what_is_finished_is_not_begun_again(changed, tmp_path, monkeypatch):
    sweep = changed(tunings=(), probes=())
    folder = Folder(tmp_path, sweep)
    folder.begin()
    begun = []

    def train(config, where, quiet):
        begun.append(where.name)
        status = "diverged" if len(begun) == 1 else "done"
        row = {"run": where.name, "architecture": "transformer", "paradigm": "SL", "n_params": 1, "n_records": 1}
        row |= {"dataset": "d", "task": "pretrain", "metric": "bce", "value": None, "status": status, "step": 3}
        evalog.append(where / "evals.jsonl", [row | ({"value": 0.5} if status == "done" else {})])
        said = {"status": status, "losses": {"val": None}, "step": 3}
        (where / "summary.json").write_text(json.dumps(said))
        if status == "diverged":
            raise DivergedError("too many steps were not finite")
        return said

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(Folder, "open", lambda root: Folder(root, sweep))
    monkeypatch.setattr(stops, "heard", [])
    monkeypatch.setattr(runtime, "spread", lambda: None)
    assert work.work(tmp_path) == 2 and work.work(tmp_path) == 0 and len(begun) == 2
    states = Folder(tmp_path, sweep).states(folder.jobs())
    assert list(states.values()) == ["diverged", "done"]
    assert launch._result(folder, states)["states"] == {"done": 1, "diverged": 1}


def test_what_is_missing_is_said_before_anything_is_begun(toml, tmp_path):
    sweep = spec.load(toml, ['data.synthetic.folders=["nowhere"]', "data.synthetic.records={train=100,val=10,test=10}"])
    with pytest.raises(DataError, match="nowhere"):
        launch.sweep(sweep, tmp_path / "out", devices="cpu", quiet=True)
    sweep = spec.load(toml, ["data.synthetic.task=cod"])
    with pytest.raises(DataError, match="did you mean 'code'"):
        launch.sweep(sweep, tmp_path / "out", devices="cpu", quiet=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="holds no sweep"):
        Folder.open(tmp_path)


def test_a_signal_at_the_very_end_of_a_run_stops_the_worker(changed, tmp_path, monkeypatch):
    """Training hears it and ends as if nothing had been; the next job is not begun."""
    sweep = changed(tunings=())
    folder = Folder(tmp_path, sweep)
    folder.begin()
    done = []

    def do(_, job):
        done.append(job.name)
        with runtime.stop_signals():
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(work, "_do", do)
    monkeypatch.setattr(stops, "heard", [])
    monkeypatch.setattr(runtime, "spread", lambda: None)
    with pytest.raises(InterruptedRun, match="SIGTERM: stopped after"):
        work.work(tmp_path)
    assert len(done) == 1


def test_every_worker_is_told_to_stop_once(tiny, tmp_path):
    """A second SIGTERM would end it before it has saved; one that was just being started is told later."""
    told = []

    class Process:
        pid = 1

        def poll(self):
            return None

        send_signal = told.append

    folder = Folder(tmp_path, tiny)
    crew = launch.Crew(folder, [launch.Slot({}), launch.Slot({})])
    crew.places[0].process = Process()
    crew.stop(signal.SIGTERM)
    crew.places[1].process = Process()
    assert crew.poll([], stopping=True) and crew.poll([], stopping=True)
    assert told == [signal.SIGTERM] * 2
    crew.stop(signal.SIGKILL)
    assert told[2:] == [signal.SIGKILL] * 2


def test_what_is_shown_fits_80_columns_and_says_where_runs_are(changed, tmp_path):
    sweep = changed(grid={"architectures": ("resnet1d", "transformer")})
    folder = Folder(tmp_path, sweep)
    folder.begin()
    planned = folder.jobs()
    states = dict.fromkeys((job.name for job in planned), "waiting")
    running, other = planned[0], planned[1]
    states |= {running.name: "running", other.name: "diverged", planned[2].name: "unconverged"}
    folder.place(running).mkdir(parents=True)
    lines = [{"step": 8, "val/best": 0.5}, {"step": 10, "train/loss": 0.25}]
    (folder.place(running) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = io.StringIO()
    Console(file=out, width=80).print(table.live(folder, planned, states, "3 of 8", lambda job: 24))
    head, columns, where, families, *rows = out.getvalue().splitlines()
    assert head == "3 of 8" and max(map(len, out.getvalue().splitlines())) <= 80
    assert columns.split() == ["running", "step", "at", "most", "train", "best", "val"]
    assert where.split() == [running.name, "10", "24", "0.2500", "0.5000"]
    assert families.split() == ["done", "diverged", "running", "left"], "nothing failed"
    counted = {tuple(row.split()[:4]): row.split()[4:] for row in rows}
    assert counted["trials", "resnet1d", "SL", "signal"] and counted["runs", "resnet1d", "SL", "signal"] == ["2"]


def test_slots():
    def shape(slots):
        return [(dict(slot.env), slot.cores) for slot in slots]

    assert shape(launch.slots("0,3")) == [({"CUDA_VISIBLE_DEVICES": "0"}, None), ({"CUDA_VISIBLE_DEVICES": "3"}, None)]
    packed = shape(launch.slots("1", per_device=3))
    assert packed == [({"CUDA_VISIBLE_DEVICES": "1", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.300"}, None)] * 3
    assert shape(launch.slots("tpu")) == [({}, None)]
    (whole,) = launch.slots("cpu", per_device=1)
    assert set(map(int, whole.cores.split(","))) == os.sched_getaffinity(0)
    with pytest.raises(UsageError):
        launch.slots("0,,1")


def test_workers_that_cannot_begin_end_the_sweep(tiny, tmp_path):
    folder = Folder(tmp_path, tiny)
    folder.begin()
    crew = launch.Crew(folder, [launch.Slot({"PYTHONPATH": "/nowhere", "PYTHONHOME": "/nowhere"})])
    with pytest.raises(MachineError, match="before they begin"):
        launch._follow(folder, crew, quiet=True)


def test_nothing_is_started_where_nothing_is_left(undisturbed, tiny):
    pytest.importorskip("submitit")
    before = {path: path.stat().st_mtime_ns for path in undisturbed[0].glob("*/*/summary.json")}
    result = launch.sweep(tiny, undisturbed[0], launcher="slurm", cluster="local", quiet=True)
    assert result["states"] == {"done": 4} and not list((undisturbed[0] / "logs").glob("slurm-*"))
    assert len(before) == 4 and before == {path: path.stat().st_mtime_ns for path in before}
    with pytest.raises(UsageError, match="slurm"):
        launch.sweep(tiny, undisturbed[0], launcher="slurm", slurm={"no_such": 1}, cluster="local", quiet=True)
