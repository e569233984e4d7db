"""Kills a command at random moments, starts it again until it is done, and compares what it leaves.

    python tools/kill_test.py --kills 100 --work /tmp/kills -- ecg-jax sweep configs/small.toml --out OUT
    python tools/kill_test.py --kills 20 --work /tmp/kills -- ecg-jax train configs/smoke.toml --run OUT \\
        checkpoint.every_steps=5

The word OUT (alone, or inside an argument) becomes a folder: first WORK/whole, where nobody disturbs, then WORK/cut0,
WORK/cut1, ... where a signal falls after a random time, uniform between --after seconds, until there were --kills of
them. A signal is SIGKILL or SIGTERM, to every process of the command or to one that it started, each with equal odds.
Every folder ends with a command that returned 0, and is compared with WORK/whole byte by byte in the files that
--compare names; resumes are counted in the timing.jsonl files. Exit code 0 if all are equal and a run was resumed.

Set checkpoint.every_steps so low that there is something to go on from. No JAX here: the commands are the user's.
"""

import argparse
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

SAME = ("metrics.jsonl", "encoder.safetensors", "results.csv", "results.jsonl")
ENOUGH = 60.0  # seconds that a process has to leave after SIGTERM
FRUITLESS = 25  # starts in a row that fail by themselves before this gives up


def command(words: list[str], out: Path) -> list[str]:
    return [word.replace("OUT", str(out)) for word in words]


def start(words: list[str], out: Path, log: Path) -> subprocess.Popen:
    with log.open("ab") as file:
        return subprocess.Popen(command(words, out), stdout=file, stderr=file, start_new_session=True)


def members(session: int) -> list[int]:
    """Living processes of a session, its leader left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z" and int(entry.name) != session:
                found.append(int(entry.name))
    return found


def send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it has just ended


def disturb(process: subprocess.Popen, rng: random.Random) -> str:
    """Send one signal; returns what was sent to whom. A whole command that was hit has ended afterwards."""
    number = rng.choice((signal.SIGKILL, signal.SIGTERM))
    others = members(process.pid)
    if others and rng.random() < 0.5:
        send(rng.choice(others), number)
        return f"{number.name} to a process that it started"
    for pid in (process.pid, *others):
        send(pid, number)
    end(process)
    return f"{number.name} to all"


def end(process: subprocess.Popen) -> None:
    """Wait until no process of the command is left; after a while they are killed."""
    until = time.monotonic() + ENOUGH
    while process.poll() is None or members(process.pid):
        if time.monotonic() > until:
            for pid in (process.pid, *members(process.pid)):
                send(pid, signal.SIGKILL)
        time.sleep(0.02)


def cut(words: list[str], out: Path, log: Path, kills: int, after: tuple[float, float], rng: random.Random) -> Counter:
    """Run the command in `out` to its end, with at most `kills` signals; returns what happened, by name."""
    happened: Counter[str] = Counter()
    fruitless = 0
    while fruitless < FRUITLESS:
        process, hit = start(words, out, log), False
        happened["starts"] += 1
        while process.poll() is None:
            try:
                process.wait(rng.uniform(*after) if happened["kills"] < kills else None)
            except subprocess.TimeoutExpired:
                happened[disturb(process, rng)] += 1
                happened["kills"] += 1
                hit = True
        end(process)
        happened[f"exit {process.returncode}"] += 1
        if process.returncode == 0:
            return happened
        fruitless = 0 if hit else fruitless + 1
    sys.exit(f"{out}: {FRUITLESS} starts failed that nobody disturbed, see {log}")


def digests(out: Path, names: tuple[str, ...]) -> dict[str, str]:
    files = sorted(path for path in out.rglob("*") if path.name in names)
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def resumes(out: Path) -> list[int]:
    """Updates after which runs were gone on with."""
    lines = [json.loads(line) for path in out.rglob("timing.jsonl") for line in path.read_text().splitlines()]
    return [line["update"] for line in lines if "resumed" in line]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--work", type=Path, required=True, help="a folder that does not exist")
    parser.add_argument("--after", type=float, nargs=2, default=(3.0, 15.0), metavar=("FROM", "TO"), help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", nargs="+", default=SAME, metavar="NAME", help="files that must be the same")
    parser.add_argument("words", nargs="+", metavar="COMMAND")
    args = parser.parse_args()
    args.work.mkdir(parents=True)
    rng, names = random.Random(args.seed), tuple(args.compare)

    began = time.monotonic()
    whole = args.work / "whole"
    process = start(args.words, whole, args.work / "whole.log")
    if process.wait() != 0:
        sys.exit(f"the undisturbed command failed with {process.returncode}, see {args.work / 'whole.log'}")
    wanted = digests(whole, names)
    if not wanted:
        sys.exit(f"{whole}: no file of {', '.join(names)} to compare")
    print(f"undisturbed: {time.monotonic() - began:.0f} s, {len(wanted)} files to compare", flush=True)

    total, gone_on, differing = Counter(), 0, 0
    for number in range(args.kills):
        if total["kills"] >= args.kills:
            break
        out = args.work / f"cut{number}"
        happened = cut(args.words, out, out.with_suffix(".log"), args.kills - total["kills"], tuple(args.after), rng)
        found, at = digests(out, names), resumes(out)
        wrong = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
        total, gone_on, differing = total + happened, gone_on + len(at), differing + len(wrong)
        print(f"{out.name}: {dict(happened)}, resumed after updates {at}, differing {wrong or 'none'}", flush=True)
        if not happened["kills"]:
            sys.exit("the command ends before a signal falls: lower --after or lengthen the runs")
    print(f"{total['kills']} kills, {gone_on} resumes, {differing} differing files: {dict(total)}")
    return 0 if gone_on and not differing else 1


if __name__ == "__main__":
    sys.exit(main())
