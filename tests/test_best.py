"""The best step of a run: kept at the first best look, measured on the test split, over a resume; what cannot be kept."""

from __future__ import annotations

import json

import pytest
import torch

import smidgen
from smidgen import folder as folders
from smidgen.best import Best, check_best
from smidgen.config import ConfigError
from smidgen.config_file import load
from smidgen.params import ParamView
from test_run import labelled


def test_the_first_of_equal_looks_is_kept(tmp_path):
    w = torch.zeros(2)
    made = iter([0, 20, 40, 60])
    best = Best(tmp_path, ParamView.of_tensors([w]), "accuracy", lambda: next(made))
    for step, accuracy in enumerate([0.5, 0.75, 0.75, 0.25]):
        best.look(step, {"accuracy": accuracy, "loss": 1.0})
        w += 1.0
    assert best.found == {"step": 1, "forwards": 20, "dev": {"accuracy": 0.75, "loss": 1.0}}
    found = best.figures(lambda: {"accuracy": float(w[0])})
    assert found["test"] == {"accuracy": 1.0} and torch.equal(w, torch.ones(2))
    lower = Best(tmp_path / "..", ParamView.of_tensors([w]), "loss", lambda: 0)
    for step, loss in enumerate([2.0, 1.0, 1.5]):
        lower.look(step, {"loss": loss})
    assert lower.found["step"] == 1


@pytest.mark.trainer
def test_a_run_says_what_its_best_step_scores_on_the_test_split(tmp_path):
    """The same figures as the run rebuilt at that step; the run itself publishes its last step."""
    rows = labelled(tmp_path)
    values = {"data": str(rows), "method": "cma_es", "scheme": "dfo_lora", "method_args": {"population": 4, "dimension": 16}}
    values |= {"train.max_steps": 6, "train.eval_steps": 2, "train.logging_steps": 2, "best": True, "train.learning_rate": 2.0}
    values |= {"output": str(tmp_path / "run"), "k_shot": 4}
    found = smidgen.finetune(load(None, [], values), say=lambda line: None)
    best = found["best"]
    looks = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    seen = {0: found["before"]["accuracy"]} | {row["step"]: row["eval_accuracy"] for row in looks if "eval_accuracy" in row}
    step = min(seen, key=lambda at: (-seen[at], at))
    assert best["step"] == step and best["dev"]["accuracy"] == seen[step] and best["forwards"] == 4 * step
    assert ("test" in best) == ("test" in found)
    again = smidgen.replay("embedded", tmp_path / "run", tmp_path / "rebuilt")
    assert again["weights_sha256"] == found["weights_sha256"]
    at = smidgen.replay("embedded", tmp_path / "run", tmp_path / "at", at=step)
    view = ParamView.of_tensors([torch.zeros(1)])
    assert Best(tmp_path / "run", view, "accuracy", lambda: 0).found["step"] == step and at["steps"] == step
    assert (tmp_path / "run" / folders.BEST).exists()


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ((True, False, False), "merges its factors"),
        ((False, True, False), "positions move"),
        ((False, False, True), "quantised"),
    ],
)
def test_what_cannot_be_kept(facts, message):
    with pytest.raises(ConfigError, match=message):
        check_best("lozo", *facts)
