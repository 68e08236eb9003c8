"""The studies of vision and pre-training: every run of their grids is valid, and their page says what records hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import _made
import _zo_run as one
import transfer_tables
import velora_transfer
from _zo_grid import Grid
from smidgen.rows import read_rows
from smidgen.settings import activations_config, scheme_config
from smidgen.trainer import method_config

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["velora_transfer", "velora_pretrain", "velora_60m"])
def test_every_run_of_the_grids_is_valid(name, tmp_path):
    grid = Grid.read(ROOT / "benchmarks" / f"{name}.yaml")
    cells, reasons = _made.cells(grid, tmp_path, [])
    assert cells and not reasons
    for cell in cells:
        run = grid.run(cell, "seed", 0, grid.centre(cell), grid.steps(cell))
        settings = _made.placed(run.settings, tmp_path)
        assert "{made}" not in json.dumps(settings) and "{made}" in json.dumps(run.settings)
        config = one.configuration(type(run)(*cell, "seed", 0, settings), tmp_path, tmp_path, tmp_path / "run", 1)
        scheme_config(config)
        activations_config(config)
        method_config(config.method, None, config.method_args)


def test_digits_are_divided_without_overlap(tmp_path, monkeypatch):
    made = np.random.default_rng(0)
    folder = tmp_path / "data" / "mnist"
    folder.mkdir(parents=True)
    for name, count in (("train", 60), ("validation", 30)):
        images = made.integers(0, 255, (count, 4, 4)).astype(np.uint8)
        np.savez(folder / f"{name}.npz", image=images, label=np.arange(count) % 10)
    monkeypatch.setattr(velora_transfer, "TRAIN", 16)
    monkeypatch.setattr(velora_transfer, "DEV", 8)
    (tmp_path / "made" / "vit").mkdir(parents=True)
    (tmp_path / "made" / "vit" / "config.json").touch()
    velora_transfer.make(tmp_path, tmp_path / "made")
    rows = {split: read_rows(tmp_path / "made" / "digits", split) for split in ("train", "validation", "test")}
    assert {split: len(found) for split, found in rows.items()} == {"train": 16, "validation": 8, "test": 15}
    names = [str(row["image"]) for found in rows.values() for row in found]
    assert len(set(names)) == len(names) and {row["label"] for found in rows.values() for row in found} == {5, 6, 7, 8, 9}


def test_the_page_is_made_of_the_records(tmp_path):
    common = {"status": "done", "role": "seed", "lr": 0.01, "steps_made": 4, "batch": 2, "max_length": 8, "weights": 100}
    common |= {"tuned_weights": 50, "state_bytes": 2**20, "saved_bytes": 2**21, "peak_bytes": 2**22, "cpu_seconds": 2.0}
    places = {"digits": ("ssf", "full_velora"), "llama-9m": ("full", "velora"), "llama-60m": ("full",)}
    for place, methods in places.items():
        (tmp_path / place).mkdir()
        for method in methods:
            for seed in (0, 1):
                metric = "accuracy" if place == "digits" else "perplexity"
                record = common | {"place": place, "scheme": "full", "method": method, "seed": seed, "metric": metric}
                record |= {"test": {metric: 0.5 + seed / 4}, "curve": [[2, 2.0], [4, 1.0 + seed]]}
                (tmp_path / place / f"{method}-{seed}.json").write_text(json.dumps(record))
    page = transfer_tables.pages(tmp_path)["velora_transfer.md"]
    assert "| full_velora | 0.01 | 62.5 ± 17.7 | 50 | 1.0 | 2.0 | 4.0 | 500 |" in page
    assert page.index("full_velora") < page.index("ssf") and "step 4" in page and "2 rows of\n8 tokens" in page
    assert transfer_tables.pages(tmp_path / "digits") == {}
