"""Kills a command at random moments, starts it again until it is done, and compares what it leaves.

    python tools/kill_test.py --kills 100 --work kills -- ecg-jax sweep configs/sweep_smoke.toml --out OUT \\
        codebook.folder=OUT/book run.recipe.steps=40 run.checkpoint.every_steps=4
    python tools/kill_test.py --kills 20 --work kills -- ecg-jax train configs/smoke.toml --run OUT \\
        checkpoint.every_steps=5

The word OUT (alone, or inside an argument) becomes a folder: first WORK/whole, where nobody disturbs, then WORK/cut0,
WORK/cut1, ... where a signal falls after a random time, uniform between --after seconds, until there were --kills of
them. A signal is SIGKILL or SIGTERM, with equal odds; to every process of the command, or to one of them. Every folder
ends with a command that returned 0, and is compared with WORK/whole in the files that --compare names, byte by byte but
for columns `seconds` of tables. Resumes are counted in the timing.jsonl files, tracebacks in whatever was printed.

The same command goes on with a test that was itself stopped. Exit code 0 if all files are equal, a run was resumed,
nothing left a traceback, and every exit code was 0, 75 or that of the signal. Set checkpoint.every_steps so low that
there is something to go on from. No JAX here: the commands are the user's.
"""

import argparse
import csv
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

SAME = ("metrics.jsonl", "evals.jsonl", "encoder.safetensors", "runs.csv", "results.csv")
ENOUGH = 60.0  # seconds that a process has to leave after SIGTERM
FRUITLESS = 25  # starts in a row that fail by themselves before this gives up
EXITS = {0, 75, -signal.SIGKILL, -signal.SIGTERM}  # the last where SIGTERM comes before the first line of the program
MARK = f"ECG_KILL_TEST={os.getpid()}"  # in the environment of all processes of the command, whatever becomes of parents


def start(words: list[str], out: Path) -> subprocess.Popen:
    name, value = MARK.split("=")
    with out.with_suffix(".log").open("ab") as log:
        command = [word.replace("OUT", str(out)) for word in words]
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {name: value}, start_new_session=True)


def living() -> list[int]:
    """All processes of the command."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and MARK.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:  # another user's, or it has ended
            continue
    return found


def send(pids: list[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass  # it has just ended


def disturb(process: subprocess.Popen, rng: random.Random) -> str:
    """Send one signal; returns what was sent to whom. A command that was hit itself has ended afterwards."""
    number, one, pids = rng.choice((signal.SIGKILL, signal.SIGTERM)), rng.random() < 0.5, sorted(living())
    hit = [rng.choice(pids)] if one and pids else pids
    send(hit, number)
    if process.pid in hit:
        end(process)
    who = "all" if not one else "the command" if process.pid in hit else "a process that it started"
    return f"{number.name} to {who}"


def end(process: subprocess.Popen) -> None:
    """Wait until no process of the command is left; after a while they are killed."""
    until = time.monotonic() + ENOUGH
    while process.poll() is None or living():
        if time.monotonic() > until:
            print(f"still there after {ENOUGH:.0f} s: {living()}", flush=True)
            send(living(), signal.SIGKILL)
        time.sleep(0.05)


def cut(words: list[str], out: Path, note: Any, left: int, after: tuple[float, float], rng: random.Random) -> None:
    """Run the command in `out` to its end, with at most `left` signals; `note` is told of each thing that happens."""
    fruitless = 0
    while fruitless < FRUITLESS:
        process, hit = start(words, out), False
        note("starts")
        while process.poll() is None:
            try:
                process.wait(rng.uniform(*after) if left else None)
            except subprocess.TimeoutExpired:
                what = disturb(process, rng)
                note("kills", what)
                left, hit = left - 1, True
        end(process)
        note(f"exit {process.returncode}")
        if process.returncode == 0:
            return
        fruitless = 0 if hit else fruitless + 1
    sys.exit(f"{out}: {FRUITLESS} starts failed that nobody disturbed, see {out.with_suffix('.log')}")


def digests(out: Path, names: tuple[str, ...]) -> dict[str, str]:
    files = sorted(path for path in out.rglob("*") if path.name in names)
    return {str(path.relative_to(out)): hashlib.sha256(content(path)).hexdigest() for path in files}


def content(path: Path) -> bytes:
    """What has to be the same."""
    if path.suffix != ".csv":
        return path.read_bytes()
    with path.open(newline="") as file:
        rows = [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]
    return json.dumps(rows).encode()


def resumes(out: Path) -> list[int]:
    """Updates after which runs were gone on with; of a run that is a copy of another, once."""
    texts = {path.read_text() for path in out.rglob("timing.jsonl")}
    lines = [json.loads(line) for text in sorted(texts) for line in text.splitlines()]
    return [line["update"] for line in lines if "resumed" in line]


def tracebacks(out: Path) -> list[str]:
    logs = [out.with_suffix(".log"), *out.rglob("*.log"), *out.rglob("*.err")]
    return [str(path) for path in logs if "Traceback" in path.read_text(errors="replace")]


def undisturbed(words: list[str], work: Path, names: tuple[str, ...]) -> dict[str, str]:
    """The digests of WORK/whole, which is made if need be."""
    whole, kept = work / "whole", work / "whole.json"
    if not kept.exists():
        began = time.monotonic()
        if start(words, whole).wait() != 0:
            sys.exit(f"the undisturbed command failed, see {work / 'whole.log'}")
        wanted = digests(whole, names)
        if not wanted:
            sys.exit(f"{whole}: no file of {', '.join(names)} to compare")
        kept.write_text(json.dumps(wanted))
        print(f"undisturbed: {time.monotonic() - began:.0f} s, {len(wanted)} files to compare", flush=True)
    return json.loads(kept.read_text())


def stop(number: int, frame: Any) -> None:
    send(living(), signal.SIGKILL)
    os._exit(75)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--work", type=Path, required=True, help="a folder for all of it; a test in it is gone on with")
    parser.add_argument("--after", type=float, nargs=2, default=(3.0, 15.0), metavar=("FROM", "TO"), help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", nargs="+", default=SAME, metavar="NAME", help="files that must be the same")
    parser.add_argument("words", nargs="+", metavar="COMMAND")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    names = tuple(args.compare)
    wanted = undisturbed(args.words, args.work, names)

    events = args.work / "events.jsonl"
    happened = [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []
    rng = random.Random(f"{args.seed} {len(happened)}")

    def note(*what: str, **more: Any) -> None:
        happened.append({"what": what} | more)
        with events.open("a") as file:
            file.write(json.dumps(happened[-1]) + "\n")

    def kills() -> int:
        return sum("kills" in event["what"] for event in happened)

    while kills() < args.kills:
        compared = [i for i, event in enumerate(happened, 1) if "compared" in event["what"]]
        number, before = len(compared), max(compared, default=0)
        out = args.work / f"cut{number}"
        cut(args.words, out, note, args.kills - kills(), tuple(args.after), rng)
        found = digests(out, names)
        wrong = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
        said = {"resumes": resumes(out), "differing": wrong, "tracebacks": tracebacks(out)}
        counted = dict(Counter(what for event in happened[before:] for what in event["what"]))
        note("compared", **said)
        print(f"{out.name}: {counted}, {said}", flush=True)
        if not number and not kills():
            sys.exit("the command ends before a signal falls: lower --after or lengthen the runs")
    counted = Counter(what for event in happened for what in event["what"])
    gone_on, wrong, traces = (
        sum(len(event.get(name, [])) for event in happened) for name in ("resumes", "differing", "tracebacks")
    )
    strange = {name for name in counted if name.startswith("exit ")} - {f"exit {code:d}" for code in EXITS}
    print(
        f"{kills()} kills, {gone_on} resumes, {wrong} of {counted['compared'] * len(wanted)} files differ, "
        f"{traces} logs with a traceback, undocumented exit codes {sorted(strange) or 'none'}: {dict(counted)}"
    )
    return 0 if gone_on and not (wrong or traces or strange) else 1


if __name__ == "__main__":
    sys.exit(main())
