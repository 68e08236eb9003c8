"""Memory before and at the end of a run: refused with its plan before loading, explained and resumable after."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from smidgen import data, exhausted, models, run
from smidgen.config import MemoryRefused, RunConfig
from smidgen.optim.zo_sgd import ZOSGD

MIB = 1 << 20


def config(tmp_path, **more):
    train = {"max_steps": 4, "per_device_train_batch_size": 4, "eval_strategy": "no"}
    values = {"task": "reviews", "train_rows": 16, "dev_rows": 8, "test_rows": 8, "max_length": 24, "threads": 1}
    return RunConfig.model_validate({**values, "train": train, "output": str(tmp_path / "run"), **more})


def test_a_run_that_does_not_fit_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "available_memory", lambda device="cpu": 20 * MIB)  # the weights alone fit
    asked = config(tmp_path, method="adamw")
    with pytest.raises(
        MemoryRefused, match=r"adamw on full with 4 rows of 24 tokens needs \d+ MiB \(weights .*optimizer .*--force"
    ) as e:
        run.finetune(asked, say=lambda line: None)
    assert e.value.exit_code == 3 and not (tmp_path / "run").exists()
    said = []
    corpus = data.open_corpus(asked, notify=lambda line: None)
    exhausted.check(asked.model_copy(update={"force": True}), corpus, "cpu", said.append)
    assert "tried all the same" in said[0]


def test_what_plainly_fits_is_not_simulated(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "available_memory", lambda device="cpu": 1 << 40)
    monkeypatch.setattr(exhausted.estimate, "planned", lambda *a: pytest.fail("simulated"))
    exhausted.check(config(tmp_path), SimpleNamespace(pictures=False), "cpu", print)


def test_a_model_without_a_plan_is_let_through_with_a_line(tmp_path, monkeypatch):
    def fail(*_):
        raise exhausted.estimate.Unplanned("no plan")

    monkeypatch.setattr(models, "available_memory", lambda device="cpu": 30 * MIB)
    monkeypatch.setattr(exhausted.estimate, "planned", fail)
    said = []
    asked = config(tmp_path)
    exhausted.check(asked, data.open_corpus(asked, notify=lambda line: None), "cpu", said.append)
    assert "no plan" in said[0] and "--measure" in said[0]


@pytest.mark.trainer
def test_a_run_that_dies_of_memory_says_where_and_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    whole = run.finetune(config(tmp_path / "whole"), say=lambda line: None)
    step, calls = ZOSGD._step, []

    def fail(self, objective):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("tried to allocate 9 GiB")
        return step(self, objective)

    monkeypatch.setattr(ZOSGD, "_step", fail)
    asked = config(tmp_path / "cut")
    with pytest.raises(MemoryRefused, match=r"out of memory in .*, with 4 rows of up to 24 tokens.*--batch 2.*--resume") as end:
        run.finetune(asked, say=lambda line: None)
    assert end.value.exit_code == 3
    again = run.finetune(asked.model_copy(update={"resume": True}), say=lambda line: None)
    assert again["weights_sha256"] == whole["weights_sha256"]


def raised(file):
    scope: dict = {}
    exec(compile("def fail():\n    raise MemoryError\n", file, "exec"), scope)
    try:
        scope["fail"]()
    except MemoryError as error:
        return error


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("/x/torch/autograd/graph.py", "the backward pass"),
        ("/x/transformers/models/opt/modeling_opt.py", "the forward pass"),
        ("/x/smidgen/loss.py", "the output head and the loss"),
        ("/x/smidgen/optim/_adam.py", "the update"),
        ("/x/transformers/modeling_utils.py", "loading the weights"),
        ("/x/smidgen/evaluate.py", "an evaluation"),
        ("/x/nowhere.py", "the run"),
    ],
)
def test_the_part_is_read_from_where_the_error_came(file, part):
    assert exhausted.part_of(raised(file)) == part
