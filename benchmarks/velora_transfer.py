"""VeLoRA on a vision transformer: full fine-tuning, a linear probe, SSF, Hydra and LoRA, with and without compression.

After table 1 of VeLoRA's paper (VTAB-1k: 1,000 pictures of a set, a pre-trained ViT), at a size for a CPU: a ViT of 0.7M
weights, pre-trained here on MNIST's digits 0 to 4 (scripts/pretrain_vit.py), tuned on 1,000 pictures of 5 to 9; 500 more choose
the rate, the validation pictures of these digits are read once by each seed. Grid: velora_transfer.yaml; a second start makes
only what is missing. Goal: VeLoRA not below what it compresses by more than two standard errors over seeds.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

import _made
from _record import emit
from _study import ROOT, arguments, conduct, means
from _zo_grid import Grid, Run
from velora_quality import against, prepare

NEW = (5, 6, 7, 8, 9)
PAIRS = {f"{name}_velora": name for name in ("full", "probe", "ssf", "hydra", "lora")}
TRAIN, DEV = 1000, 500


def make(shared: Path, to: Path) -> None:
    """The pictures of the new digits, and the pre-trained trunk, unless they stand there."""
    source, folder = shared / "data" / "mnist", to / "digits"
    if not (folder / "test.npz").exists():
        folder.mkdir(parents=True, exist_ok=True)
        parts = {}
        for name in ("train", "validation"):
            with np.load(source / f"{name}.npz") as file:
                image, label = file["image"], file["label"]
            chosen = np.flatnonzero(np.isin(label, NEW))
            parts[name] = image[chosen], label[chosen]
        order = np.random.default_rng(0).permutation(len(parts["train"][1]))
        splits = {"train": order[:TRAIN], "validation": order[TRAIN : TRAIN + DEV]}
        for name, members in splits.items():
            np.savez_compressed(folder / f"{name}.npz", image=parts["train"][0][members], label=parts["train"][1][members])
        np.savez_compressed(folder / "test.npz", image=parts["validation"][0], label=parts["validation"][1])
    if not (to / "vit" / "config.json").exists():
        script = [sys.executable, str(ROOT / "scripts" / "pretrain_vit.py"), "--data", str(source), "--to", str(to / "vit")]
        subprocess.run([*script, "--steps", "300"], check=True)


def saved(config: Any, run: Run) -> int:
    """Bytes that one training batch saves."""
    import torch

    made = torch.Generator().manual_seed(0)
    rows = run.settings["batch"]
    batch = {"pixel_values": torch.rand(rows, 1, 28, 28, generator=made), "labels": torch.arange(rows) % len(NEW)}
    return _made.saved_bytes(config, batch, len(NEW))


def main() -> None:
    args = arguments(__doc__, __file__, "velora")
    grid = Grid.read(args.grid, args.scale)
    if not args.dry_run:
        make(args.shared, _made.MADE)
    how = {"find": _made.cells, "prepare": prepare, "measure": _made.measure(_made.MADE, saved)}
    made = conduct(grid, args, **how)
    if made is None:
        return
    records = {name: record for name, record in made[2].items() if record["place"] in grid.places}
    figures = means(grid, records)
    goals = against(grid, records, figures, PAIRS)
    emit("velora_transfer", figures, goals, {"grid": args.grid.name, "scale": args.scale, "seeds": grid.raw["seeds"]})


if __name__ == "__main__":
    main()
