"""Every scheme with every method, and whole runs of each: journal, replay, resume, evaluation, export."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import types

import pytest
import torch

import smidgen
from families import batch, make
from smidgen import adapt, optim
from smidgen import export as exporting
from smidgen.config import ConfigError
from smidgen.config_file import load
from smidgen.export import export
from smidgen.inference import evaluate_folder, generate_from_folder
from smidgen.lowrank import matrices
from smidgen.objective import ModelObjective, Recorded, Replayed
from smidgen.probing import Engine
from test_models import bert_masked, gpt2, llama, opt, roberta, t5

SCHEMES = [s for s in adapt.names() if not hasattr(adapt.get(s), "FITTED")]  # those are fitted: test_head_start.py
VALUES = [name for name in optim.names() if "backward" not in optim.get(name).build.uses]


def built(scheme: str, family: str):
    kind, model = make(family)
    module = adapt.get(scheme)
    options = {"bitfit": {"norms": True}, "dfo_lora": {"start": "random"}}.get(scheme, {})
    return kind, module.build(model, module.Config(**options), seed=3)


@pytest.mark.parametrize("family", ["opt-tied", "llama-untied"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("method", [*VALUES, "adamw"])
def test_every_method_tunes_every_scheme(method, scheme, family):
    kind, found = built(scheme, family)
    frozen = {n: p.detach().clone() for n, p in found.model.named_parameters() if not p.requires_grad}
    before = found.view.snapshot()
    options = {"lr": 1e-2} | ({"eps": 1e-2} if method != "adamw" and "eps" in optim.get(method).Config.model_fields else {})
    if method == "zo_conservative":  # a step that is too short to change the loss is no move
        options["normalise"] = "rms"
    if optim.get(method).build.lazy and not matrices(found.view):
        with pytest.raises(ConfigError, match="no tuned tensor is a matrix"):
            optim.get(method).build(found.view, optim.get(method).Config(**options))
        return
    if method == "node" and all(e.tensor.ndim > 1 or e.support is not None for e in found.view):
        with pytest.raises(ConfigError, match="node credits biases"):
            optim.get(method).build(found.view, optim.get(method).Config(**options))
        return
    stepper = optim.get(method).build(found.view, optim.get(method).Config(**options))
    objective = ModelObjective(Engine(found.model, found.view, kind), [batch(kind)])
    transcript = []
    with torch.random.fork_rng() if method == "adamw" else contextlib.nullcontext():  # its forwards have dropout
        for _ in range(2):
            recorded = Recorded(objective)
            assert math.isfinite(stepper.step(recorded))
            transcript.append(recorded)
    stepper.merge_()
    assert any(not torch.equal(e.storage, before[e.name]) for e in found.view)
    with getattr(found, "bare", contextlib.nullcontext)():  # sparse deltas stand in the frozen weights: without them
        assert all(torch.equal(frozen[n], p) for n, p in found.model.named_parameters() if n in frozen)
    if method != "adamw":
        _, again = built(scheme, family)
        twin = optim.get(method).build(again.view, optim.get(method).Config(**options))
        for recorded in transcript:
            twin.step(Replayed(recorded.values))
        twin.merge_()
        assert all(torch.equal(e.storage, again.view[e.name].storage) for e in found.view)


# -- runs -----------------------------------------------------------------------------------------------------------------

MODELS = {"opt": opt, "llama": llama, "gpt2": gpt2, "bert": bert_masked, "roberta": roberta, "t5": t5}
KINDS = {"opt": "causal", "llama": "causal", "gpt2": "causal", "bert": "masked", "roberta": "classification", "t5": "seq2seq"}


@pytest.fixture
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


def tune(tmp_path, name, scheme, to="run", **options):
    model = tmp_path / "model"
    if not model.exists():
        MODELS[name](model)
    values = {"model": str(model), "data": str(labelled(tmp_path)), "output": str(tmp_path / to), "train.max_steps": 4}
    values |= {"train.learning_rate": 1e-2, "method_args.eps": 1e-2, "kind": KINDS[name], "scheme": scheme}
    if KINDS[name] == "masked":
        values["template"] = "{text} It was {answer}."
    if scheme == "bitfit" and name in ("llama", "t5"):
        values["scheme_args.norms"] = True
    values = {k: v for k, v in (values | options).items() if v is not None}
    return smidgen.finetune(load(None, [], values), say=lambda line: None)


QUICK = {("prefix", "llama"), ("prompt", "opt"), ("prompt", "roberta"), ("prefix", "t5"), ("bitfit", "bert"), ("head", "gpt2")}
RUNS = [
    pytest.param(scheme, name, marks=[] if (scheme, name) in QUICK else pytest.mark.slow)
    for scheme in ("prefix", "prompt", "bitfit", "head")
    for name in MODELS
]
FORMS = {"adapter": ("prefix", "prompt"), "merged": ("bitfit", "head")}


@pytest.fixture
def reload_here(monkeypatch):
    """Exports are loaded in this process, which is quick; the tests of the command line start a fresh one."""

    def run(command, **_):
        monkeypatch.setattr(sys, "argv", ["-c", *command[3:]])
        exec(command[2], {})
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(exporting, "subprocess", types.SimpleNamespace(run=run))


@pytest.mark.trainer
@pytest.mark.parametrize("scheme,name", RUNS)
def test_a_run_replays_evaluates_and_exports(tmp_path, one_thread, reload_here, scheme, name):
    found = tune(tmp_path, name, scheme)
    run = tmp_path / "run"
    again = smidgen.replay(str(tmp_path / "model"), run, tmp_path / "rebuilt")
    assert again["weights_sha256"] == found["weights_sha256"]
    dev = evaluate_folder(str(run), task=None, data=None, split="dev", batch_size=None)
    assert dev["loss"] == pytest.approx(found["dev"]["loss"], abs=1e-6)
    form = next(f for f, schemes in FORMS.items() if scheme in schemes)
    assert export(run, tmp_path / "out", form)["max_difference"] < 1e-5
    other = next(f for f in FORMS if f != form)
    with pytest.raises(ConfigError, match=rf"scheme {scheme} cannot be exported as '{other}' \(.*\): it has {form}"):
        export(run, tmp_path / "nope", other)
    card = (run / "README.md").read_text()
    assert ("smidgen export" in card) == (form == "merged") and "AutoPeftModelForMaskedLM" not in card
    if KINDS[name] in ("causal", "seq2seq"):
        assert len(generate_from_folder(str(run), ["row 1 is"], max_new_tokens=3, chat=False)) == 1


@pytest.mark.trainer
@pytest.mark.parametrize(
    ("scheme", "method"),
    [
        ("prompt", "adamw"),
        ("head", "adamw"),
        ("full", "node"),  # crediting weights
        *(pytest.param(s, "adamw", marks=pytest.mark.slow) for s in ("prefix", "bitfit")),
    ],
)
def test_a_run_without_journal_resumes_from_its_checkpoint(tmp_path, one_thread, scheme, method, monkeypatch):
    optimizer = optim.get(method).build
    options = {"method": method, "train.save_steps": 2, "train.max_steps": 5}
    options |= {"method_args.eps": None} if method == "adamw" else {"method_args.credit": "weights"}
    straight = tune(tmp_path, "opt", scheme, "straight", **options)
    real, made = optimizer._step, []

    def dies(self, objective):
        made.append(1)
        if len(made) == 4:
            raise KeyboardInterrupt
        return real(self, objective)

    monkeypatch.setattr(optimizer, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path, "opt", scheme, "run", **options)
    monkeypatch.undo()
    steps = []
    monkeypatch.setattr(optimizer, "_step", lambda self, objective: (steps.append(1), real(self, objective))[1])
    resumed = smidgen.finetune(load(None, [], {"output": str(tmp_path / "run"), "resume": True}), say=lambda line: None)
    assert len(steps) == 3 and resumed["weights_sha256"] == straight["weights_sha256"]
    with pytest.raises(ConfigError, match="has no journal"):
        smidgen.replay(str(tmp_path / "model"), tmp_path / "run", tmp_path / "rebuilt")


@pytest.mark.trainer
def test_virtual_tokens_leave_room_for_rows(tmp_path, one_thread):
    opt(tmp_path / "model")
    context = json.loads((tmp_path / "model" / "config.json").read_text())["max_position_embeddings"]
    refused = rf"{context} virtual tokens do not fit the model's {context} positions.*scheme_args.tokens"
    with pytest.raises(ConfigError, match=refused):
        tune(tmp_path, "opt", "prompt", **{"scheme_args.tokens": context})
    with pytest.raises(ConfigError, match=rf"5 virtual tokens and max_length {context} do not fit.*at most {context - 5}"):
        tune(tmp_path, "opt", "prefix", max_length=context)
    assert not (tmp_path / "run").exists()
    long = [{"text": "word " * context, "label": "great" if i % 2 else "terrible"} for i in range(8)]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in long))
    for scheme, taken in (("prompt", 10), ("prefix", 5)):
        found = tune(tmp_path, "opt", scheme, f"run-{scheme}", data=str(path), eval_data=str(path))
        assert load(tmp_path / f"run-{scheme}" / "config.resolved.yaml").max_length == context - taken
        assert found["status"] == "done"
