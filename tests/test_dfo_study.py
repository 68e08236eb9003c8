"""The derivative-free study: budgets, the choice of a step size, the order of runs, one run on a tiny model, its page."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import dfo_lora
import dfo_tables
from smidgen import adapt, optim, tasks
from smidgen.config import RunConfig
from smidgen.trainer import method_config

ROOT = Path(__file__).parents[1]
GRIDS = [ROOT / "benchmarks" / name for name in ("dfo_lora.yaml", "dfo_lora_gpu.yaml")]


def grid(path=GRIDS[0]):
    return dfo_lora.Draws(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("path", GRIDS, ids=lambda p: p.stem)
def test_every_run_is_a_configuration_within_its_budget(path):
    made = grid(path)
    for cell in made.cells():
        run = made.run(cell, "seed", 0, made.methods[cell[2]].get("values", [None])[0])
        config = RunConfig.model_validate(run.settings["values"])
        options = method_config(config.method, config.preset, config.method_args)
        assert config.task in tasks.names() and config.best and config.k_shot == 16
        adapt.get(config.scheme).Config(**config.scheme_args)
        steps, budget = config.train.max_steps, made.budget(cell[0])
        if "backward" in optim.get(config.method).build.uses:
            assert budget - 3 < 3 * steps <= budget
        elif config.scheme == "readout":
            assert steps == 0
        else:
            assert steps * options.population == budget == options.budget


def trial(run, accuracy, loss=1.0, status="done"):
    best = {"step": 1, "forwards": 20, "dev": {"accuracy": accuracy, "loss": loss}}
    return {"settings_sha256": run.sha256, "status": status, "best": best, "role": run.role}


def test_a_step_size_is_chosen_by_all_trials_and_draws_come_one_after_another():
    made = grid()
    trials = made.search("cma_es")
    assert {run.seed for run in trials} == {100} and 100 not in made.raw["draws"] and len(trials) == 6
    records = {run.name: trial(run, 0.5, loss=run.settings["lr"]) for run in trials[:-1]}
    assert made.chosen("cma_es", records) is None
    records[trials[-1].name] = trial(trials[-1], 0.6)
    assert made.chosen("cma_es", records) == trials[-1].settings["lr"] == 1.0
    for run in trials:
        records[run.name] = trial(run, 0.5, loss=run.settings["lr"])
    assert made.chosen("cma_es", records) == 0.25
    records[trials[0].name] = trial(trials[0], 0.9, status="diverged")
    assert made.chosen("cma_es", records) == 0.5
    cells = [cell for cell in made.cells() if cell[2] in ("cma_es", "bbt")]
    finals = [run for run in made.stated(records, cells) if run.role == "seed"]
    assert [run.seed for run in finals] == sorted(run.seed for run in finals) and len(finals) == 5 * 12
    assert {run.settings["lr"] for run in finals if run.method == "cma_es"} == {0.5}


@pytest.mark.trainer
def test_a_run_and_its_page(tmp_path):
    from test_models import bert_masked

    model, rows = tmp_path / "model", tmp_path / "shared" / "data" / "tiny"
    bert_masked(model)
    rows.mkdir(parents=True)
    for split in ("train", "validation"):
        lines = [{"sentence": f"row {i} is {'fine' if i % 2 else 'poor'}", "label": i % 2} for i in range(20)]
        (rows / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = grid()
    made.raw |= {"tasks": {"sst2": {"data": "tiny", "max_length": 16, "budget": 40, "chance": 0.5}}, "k_shot": 2, "draws": [0]}
    made.raw["tasks"]["sst2"]["task_args"] = {"words": ["bad", "good"]}
    records = tmp_path / "records" / "sst2"
    records.mkdir(parents=True)
    for method, lr in (("cma_es", 0.5), ("readout", None)):
        run = made.run(("sst2", made.methods[method]["scheme"], method), "seed", 0, lr)
        if method == "cma_es":
            run.settings["values"]["method_args"] |= {"dimension": 16}
        record = dfo_lora.completed(made, run, dfo_lora.measure(model, run, tmp_path / "shared", tmp_path, 1))
        assert record["status"] in ("done", "refused"), record
        if method == "cma_es":
            assert record["status"] == "done", record
            assert record["forwards"] == 41 and record["majority"] == 0.5  # one forward for the statistics of the maps
            assert set(record["best"]) == {"step", "forwards", "dev", "test"}
        (records / f"{method}.json").write_text(json.dumps(record, default=str))
    text = dfo_tables.page(tmp_path / "records")
    assert "| cma_es | " in text and "## sst2" in text
    assert dfo_tables.main(["--records", str(tmp_path / "records"), "--docs", str(tmp_path)]) == 0
    assert dfo_tables.main(["--records", str(tmp_path / "records"), "--docs", str(tmp_path), "--check"]) == 0
