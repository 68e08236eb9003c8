"""A run on real input killed with SIGKILL at a random step, resumed, and replayed: three weight hashes, which must be equal.

Prints the record with the three hashes; `equal` is 1 when they agree. Needs the data and model folders as arguments.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from _record import emit

RECORD = 36  # bytes of a journal record of these runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    shared = Path(__file__).parents[2] / "shared"
    parser.add_argument("--data", type=Path, default=shared / "data" / "sst2")
    parser.add_argument("--model", type=Path, default=shared / "models" / "tinystories-instruct-3m-chat")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the random step")
    args = parser.parse_args()
    target = random.Random(args.seed).randrange(10, args.steps - 10)
    smidgen = [sys.executable, "-m", "smidgen"]
    train = ["train", "--model", str(args.model), "--task", "sst2", "--data", str(args.data), "--steps", str(args.steps)]
    train += ["--train-rows", "1000", "--dev-rows", "200", "train.eval_steps=100000", "--threads", "1", "-o"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subprocess.run([*smidgen, *train, str(folder / "straight")], check=True, capture_output=True)
        process = subprocess.Popen(
            [*smidgen, *train, str(folder / "run")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        journal = folder / "run" / "journal.bin"
        while process.poll() is None:
            if journal.exists() and (data := journal.read_bytes()):
                done = (len(data) - 16 - int.from_bytes(data[8:12], "little")) // RECORD
                if done >= target:
                    break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        subprocess.run([*smidgen, "train", "--resume", "-o", str(folder / "run")], check=True, capture_output=True)
        subprocess.run(
            [*smidgen, "replay", str(args.model), str(folder / "run"), "--to", str(folder / "rebuilt")],
            check=True,
            capture_output=True,
        )
        results = {n: json.loads((folder / n / "result.json").read_text()) for n in ("straight", "run", "rebuilt")}
    hashes = {name: result["weights_sha256"] for name, result in results.items()}
    figures = {"equal": float(len(set(hashes.values())) == 1), "killed_after_step": float(done), "steps": float(args.steps)}
    emit("crash", figures, {"equal": (">=", 1.0)}, {"method": "zo_sgd", "scheme": "full", "hashes": hashes})


if __name__ == "__main__":
    main()
