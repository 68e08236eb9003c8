"""Runs that are killed at random moments and resumed, again and again: at the end their weights equal an undisturbed run's.

A disturbance is a signal (SIGKILL, SIGTERM) to the single process, to rank 0 or to another rank of two; a disk that fills up (a
small tmpfs, or where it cannot be mounted a limit on the size of files); bytes torn off, or thrown at, the end of the journal
after a kill; a clock set to another day. After each the run is resumed, two ranks by torchrun by itself. What cannot go on says
so, with exit code 1: a full disk, which is then made larger. Counted: disturbances that hit a run in progress. Where the count
is not reached at the end of a run, another run begins with another seed. `equal` is 1 when all ends are those of undisturbed
runs; `unexplained` counts exit codes and messages that are none of ours.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _record import emit

KINDS = ("single-kill", "single-term", "rank0-kill", "rank1-kill", "rank1-term", "disk", "torn", "noise", "clock")
FULL = 400  # kB of a disk that is too small for a run: enough for its start


def command(folder: Path, args: argparse.Namespace, seed: int) -> list[str]:
    """A whole run on the embedded model."""
    train = ["train", "--task", "reviews", "--steps", str(args.steps), "--batch", "4", "--threads", "1", "--seed", str(seed)]
    train += ["--train-rows", "64", "--dev-rows", "16", "test_rows=16", "train.eval_steps=100000", "check_ranks=25"]
    return [sys.executable, "-m", "smidgen", *train, "method_args.queries=2", "-o", str(folder)]


def resume(folder: Path, args: argparse.Namespace, seed: int) -> list[str]:
    """The same run, gone on with if it has begun."""
    whole = command(folder, args, seed)
    return [*whole[:3], "train", "--resume", "-o", str(folder)] if (folder / "config.resolved.yaml").exists() else whole


def launched(whole: list[str], restarts: int) -> list[str]:
    """The command on two ranks that share the probes, so that its end is that of one process."""
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        str(restarts),
    ]
    return [*run, *whole[1:], *([] if "--resume" in whole else ["probe_ranks=2"])]


def steps_of(folder: Path) -> int:
    """Whole records of a run's journal."""
    path = folder / "journal.bin"
    if not path.exists() or len(data := path.read_bytes()) < 16:
        return 0
    return max(0, len(data) - 16 - int.from_bytes(data[8:12], "little")) // 52


def done(folder: Path) -> bool:
    """Whether a run has ended by itself."""
    path = folder / "result.json"
    return path.exists() and json.loads(path.read_text())["status"] == "done"


class Soak:
    """One run after another, and what happened to them."""

    def __init__(self, args: argparse.Namespace, home: Path):
        self.args, self.home = args, home
        self.random = random.Random(args.seed)
        self.hits: collections.Counter[str] = collections.Counter()
        self.codes: collections.Counter[str] = collections.Counter()
        self.unexplained: list[str] = []

    def start(self, arguments: list[str], **options: Any) -> subprocess.Popen[str]:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **options.pop("env", {})}
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, **options)

    def wait_a_while(self, process: subprocess.Popen[str], folder: Path) -> bool:
        """Until a random moment of the run's start or steps; False where it ended before."""
        if self.random.random() < 0.2:  # while it loads, or before its first step
            moment = time.monotonic() + self.random.uniform(0.5, 12.0)
            while process.poll() is None and time.monotonic() < moment:
                time.sleep(0.01)
        else:
            target = min(self.args.steps - 1, steps_of(folder) + self.random.randint(1, max(2, self.args.steps // 20)))
            while process.poll() is None and steps_of(folder) < target:
                time.sleep(0.002)
            time.sleep(self.random.uniform(0, 0.05))
        return process.poll() is None

    def end(self, process: subprocess.Popen[str], kind: str, expected: tuple[int, ...]) -> None:
        """Take the end of a process; anything but what was expected, or a traceback, is not explained."""
        output, _ = process.communicate(timeout=300)
        self.codes[str(process.returncode)] += 1
        if process.returncode not in expected or ("Traceback" in output and "torch.distributed.run" not in kind):
            self.unexplained.append(f"{kind}: exit {process.returncode}: {output[-1500:]}")

    def disturb(self, kind: str, folder: Path, seed: int) -> None:
        whole = resume(folder, self.args, seed)
        if kind.startswith("rank"):
            self._ranks(kind, folder, whole)
        elif kind == "disk":
            self._disk(folder, whole)
        else:
            moved = {"SMIDGEN_SOAK_CLOCK": str(self.random.choice([-86400 * 400, 86400 * 400]))} if kind == "clock" else {}
            process = self.start(whole if not moved else [sys.executable, __file__, "--clock", *whole[3:]], env=moved)
            if self.wait_a_while(process, folder):
                self.hits[kind] += 1
                process.send_signal(signal.SIGTERM if kind == "single-term" else signal.SIGKILL)
            self.end(process, kind, (0, 75, -signal.SIGKILL, -signal.SIGTERM))
            journal = folder / "journal.bin"
            if kind in ("torn", "noise") and steps_of(folder) > 1 and not done(folder):
                size = journal.stat().st_size
                if kind == "torn":
                    os.truncate(journal, size - self.random.randint(1, 51))
                else:  # a record that was begun and never reached the disk
                    with journal.open("ab") as file:
                        file.write(bytes(self.random.randint(1, 4096)))

    def _ranks(self, kind: str, folder: Path, whole: list[str]) -> None:
        import psutil

        process = self.start(launched(whole, 3))
        if self.wait_a_while(process, folder):
            rank, how = kind[4], signal.SIGTERM if kind.endswith("term") else signal.SIGKILL
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(process.pid).children(recursive=True):
                    if child.environ().get("RANK") == rank:
                        child.send_signal(how)
                        self.hits[kind] += 1
        self.end(process, kind + " torch.distributed.run", (0,))

    def _disk(self, folder: Path, whole: list[str]) -> None:
        """The run's folder moves to a disk that is too small, fails there, and goes on when there is room."""
        with self._small(folder) as (how, options):
            process = self.start(whole, **options)
            output, _ = process.communicate(timeout=300)
            self.codes[str(process.returncode)] += 1
            if process.returncode == 1 and ("No space left" in output or "File too large" in output):
                self.hits[f"disk ({how})"] += 1
            elif process.returncode != 0:
                self.unexplained.append(f"disk: exit {process.returncode}: {output[-1500:]}")

    @contextlib.contextmanager
    def _small(self, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        import resource
        import shutil

        folder.mkdir(exist_ok=True)
        held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        aside, kilobytes = folder.with_suffix(".aside"), (held >> 10) + self.random.randint(24, FULL)
        folder.rename(aside)
        folder.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], capture_output=True
        )
        if mounted.returncode == 0:
            try:
                for path in aside.iterdir():
                    (shutil.copytree if path.is_dir() else shutil.copy2)(path, folder / path.name)
                yield "tmpfs", {}
            finally:
                shutil.rmtree(aside)
                shutil.copytree(folder, aside)
                subprocess.run(["umount", str(folder)], check=True)
                folder.rmdir()
                aside.rename(folder)
            return
        folder.rmdir()
        aside.rename(folder)
        journal = folder / "journal.bin"
        limit = (journal.stat().st_size if journal.exists() else 4096) + self.random.randint(60, 2000)

        def limited() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

        yield "file size limit", {"preexec_fn": limited}

    def whole_run(self, seed: int) -> tuple[str, str]:
        """The hashes of an undisturbed run and of a disturbed one."""
        calm, folder = self.home / f"calm-{seed}", self.home / f"run-{seed}"
        subprocess.run(command(calm, self.args, seed), check=True, capture_output=True)
        while not done(folder) and sum(self.hits.values()) < self.args.kills:
            left = [kind for kind in KINDS if self.hits[kind] == min(self.hits[k] for k in KINDS)]
            kind = self.random.choice(left if self.random.random() < 0.7 else list(KINDS))
            self.disturb(kind, folder, seed)
            print(
                f"{sum(self.hits.values())} of {self.args.kills}: {kind}, {steps_of(folder)} steps", file=sys.stderr, flush=True
            )
            if len(self.unexplained) > 3:
                raise SystemExit("\n\n".join(self.unexplained))
        if not done(folder):
            process = self.start(resume(folder, self.args, seed))
            self.end(process, "last", (0,))
        a, b = (json.loads((f / "result.json").read_text())["weights_sha256"] for f in (calm, folder))
        return a, b


def with_another_clock(arguments: list[str]) -> None:
    """`smidgen` in a process whose wall clock shows another day, and jumps back and forth while it runs."""
    shift, real, calls = float(os.environ["SMIDGEN_SOAK_CLOCK"]), time.time, [0]

    def moved() -> float:
        calls[0] += 1
        return real() + (shift if calls[0] % 3 else 0.0)

    time.time = moved  # type: ignore[assignment]
    from smidgen.cli import main as smidgen

    sys.argv = ["smidgen", *arguments]
    smidgen()


def main() -> None:
    if sys.argv[1:2] == ["--clock"]:
        with_another_clock(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30, help="disturbances of a run in progress")
    parser.add_argument("--steps", type=int, default=600, help="of a run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--small", action="store_true", help="three disturbances, to try the script")
    args = parser.parse_args()
    if args.small:
        args.kills, args.steps = 3, 120
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        soak, pairs, seed = Soak(args, Path(temporary)), [], 0
        while sum(soak.hits.values()) < args.kills:
            pairs.append(soak.whole_run(seed))
            seed += 1
    for line in soak.unexplained:
        print(line, file=sys.stderr)
    figures = {
        "equal": int(all(a == b for a, b in pairs)),
        "disturbances": sum(soak.hits.values()),
        "runs": len(pairs),
        "unexplained": len(soak.unexplained),
        "minutes": (time.monotonic() - begun) / 60,
    }
    goals = {"equal": (">=", 1.0), "disturbances": (">=", 30.0), "unexplained": ("<=", 0.0)}
    setting = {
        "steps": args.steps,
        "seed": args.seed,
        "by_kind": dict(soak.hits),
        "exit_codes": dict(soak.codes),
        "hashes": pairs,
    }
    emit("soak", figures, goals, {"model": "embedded", "method": "zo_sgd", "ranks": "1 and 2 (probe_ranks=2)", **setting})


if __name__ == "__main__":
    main()
