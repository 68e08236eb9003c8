"""finetune() and replay() over kinds of models, schemes and dtypes, and what happens when the disk is full."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch

import smidgen
from smidgen.config import ConfigError, UserError
from smidgen.config_file import load
from test_models import bert_masked, gpt2, llama, roberta, t5

pytestmark = pytest.mark.trainer

MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert_masked, "roberta": roberta, "t5": t5}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def labelled(folder):
    path = folder / "rows.jsonl"
    rows = [{"text": f"row {i} is {'fine' if i % 2 else 'poor'}", "label": "great" if i % 2 else "terrible"} for i in range(40)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def tune(model, folder, data, **options):
    values = {"model": str(model), "data": str(data), "output": str(folder), "train.max_steps": 5, "train.learning_rate": 1e-3}
    return smidgen.finetune(load(None, [], {**values, **options}), say=lambda line: None)


@pytest.mark.parametrize("scheme", ["full", "lora"])
@pytest.mark.parametrize(
    "name,kind",
    [("llama", "causal"), ("gpt2", "causal"), ("t5", "seq2seq"), ("bert", "classification"), ("roberta", "classification")],
)
def test_kinds_and_schemes_train_and_replay_to_the_same_hash(tmp_path, name, kind, scheme):
    model = MODELS[name](tmp_path / "model")
    found = tune(model, tmp_path / "run", labelled(tmp_path), kind=kind, scheme=scheme)
    assert found["kind"] == kind and found["forwards"] == 10 and "accuracy" in found["dev"]
    again = smidgen.replay(str(model), tmp_path / "run", tmp_path / "rebuilt")
    assert again["weights_sha256"] == found["weights_sha256"]
    assert (tmp_path / "run" / "init.safetensors").exists() == (scheme == "lora" or kind == "classification")


def test_masked_models_fill_in_the_label_word(tmp_path):
    found = tune(
        bert_masked(tmp_path / "model"), tmp_path / "run", labelled(tmp_path), kind="masked", template="{text} It was {answer}."
    )
    assert found["kind"] == "masked" and found["dev"]["accuracy"] >= 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", ["zo_sgd", "adamw"])
def test_sixteen_bit_weights_stay_sixteen_bit_and_replay(tmp_path, dtype, method):
    model = llama(tmp_path / "model")
    options = {"method_args.max_grad_norm": 1.0} if method == "adamw" else {"method_args.eps": 1e-2}
    found = tune(model, tmp_path / "run", labelled(tmp_path), dtype=dtype, method=method, **options)
    from safetensors.torch import load_file

    kinds = {str(t.dtype) for t in load_file(tmp_path / "run" / "model.safetensors").values()}
    assert kinds == {f"torch.{dtype}"}
    if method == "zo_sgd":
        again = smidgen.replay(str(model), tmp_path / "run", tmp_path / "rebuilt")
        assert again["weights_sha256"] == found["weights_sha256"]


def test_accumulated_batches_are_the_same_run(tmp_path):
    model, data = llama(tmp_path / "model"), labelled(tmp_path)
    size, steps = "train.per_device_train_batch_size", "train.gradient_accumulation_steps"
    whole = tune(model, tmp_path / "a", data, **{size: 8})
    split = tune(model, tmp_path / "b", data, **{size: 4, steps: 2})
    assert whole["dev"]["loss"] == pytest.approx(split["dev"]["loss"], abs=1e-4)


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    """The journal cannot grow after the fourth step; the run goes on later to the same weights."""
    model, data = llama(tmp_path / "model"), labelled(tmp_path)
    straight = tune(model, tmp_path / "straight", data)
    real, written = os.write, []

    def full(file, content):
        if len(content) == 36:
            written.append(1)
            if len(written) > 4:
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, content)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match="No space left on device") as error:
        tune(model, tmp_path / "run", data)
    assert error.value.exit_code == 1 and "--resume" in str(error.value)
    monkeypatch.undo()
    resumed = smidgen.finetune(load(None, [], {"output": str(tmp_path / "run"), "resume": True}), say=lambda line: None)
    assert resumed["weights_sha256"] == straight["weights_sha256"]


def test_out_of_memory_names_the_way_out(tmp_path, monkeypatch):
    from smidgen.probing import Engine

    def starve(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate")

    monkeypatch.setattr(Engine, "losses", starve)
    with pytest.raises(UserError, match="--batch 8") as error:
        tune(llama(tmp_path / "model"), tmp_path / "run", labelled(tmp_path))
    assert error.value.exit_code == 3


def test_weights_that_cannot_fit_are_refused_before_loading(tmp_path, monkeypatch):
    from smidgen import models

    monkeypatch.setattr(models, "available_memory", lambda *_: 10)
    with pytest.raises(UserError, match="do not fit") as error:
        tune(llama(tmp_path / "model"), tmp_path / "run", labelled(tmp_path))
    assert error.value.exit_code == 3 and not (tmp_path / "run").exists()


def test_a_torn_metrics_line_does_not_stop_a_resumed_run(tmp_path):
    from smidgen import folder

    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "before": {"loss": 1.0}}\n{"step": 3, "lo')
    assert folder.metrics(tmp_path) == [{"step": 0, "before": {"loss": 1.0}}]
    folder.rewind_metrics(tmp_path, 0)
    assert len(folder.metrics(tmp_path)) == 1


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(ConfigError, match="nothing to resume"):
        smidgen.finetune(load(None, [], {"output": str(tmp_path), "resume": True}))
