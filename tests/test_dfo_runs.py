"""Runs of derivative-free search: the budget and what it counts, presets, and what is refused before anything is loaded."""

from __future__ import annotations

import json

import pytest

import smidgen
from families import make
from smidgen import presets, settings
from smidgen.adapt import dfo_lora
from smidgen.config import ConfigError, RunConfig
from smidgen.config_file import load
from smidgen.optim.cma_es import PRESETS
from test_run import labelled


@pytest.mark.trainer
@pytest.mark.parametrize("method", ["fireworks"])
def test_a_budget_is_spent_on_candidates_and_evaluations_are_counted_apart(tmp_path, method):
    data, lines = labelled(tmp_path), []
    values = {"data": str(data), "method": method, "scheme": "dfo_lora", "train.per_device_train_batch_size": 64}
    values |= {"method_args": {"budget": 27, "population": 8, "dimension": 16}, "objective": "hinge", "train.eval_steps": 2}
    values |= {"output": str(tmp_path / "run")}
    found = smidgen.finetune(load(None, [], values), say=lines.append)
    assert "steps = 3  (the budget of " + method + ": 27 forwards, 8 a step)" in lines
    assert found["steps"] == 3 and found["forwards"] == 24 and found["backwards"] == 0 and found["evaluation_forwards"] > 0
    assert found["objective"] == "hinge" and found["metric"] == "accuracy"
    again = smidgen.replay("embedded", tmp_path / "run", tmp_path / "rebuilt")
    assert again["weights_sha256"] == found["weights_sha256"]


def test_the_reference_preset_is_the_published_setting():
    said = []
    config = presets.fill(RunConfig.model_validate({"preset": "dfo-lora/roberta-large/sst2-k16/dfo_lora"}), said.append)
    assert (config.method, config.scheme, config.task, config.k_shot) == ("cma_es", "dfo_lora", "sst2", 16)
    assert config.scheme_args == {"head_bias": "zero"} and config.task_args == {"prompts": "dfo"}
    assert {**config.method_args, "lr": config.train.learning_rate} == PRESETS["reference"]
    scheme = dfo_lora.Config(**config.scheme_args)
    assert scheme.rank == 4 and scheme.matrices == ("query", "key") and scheme.start == "zero"
    other = presets.fill(
        RunConfig.model_validate({"preset": "dfo-lora/roberta-large/rte-k16/dfo_lora", "task": "trec"}), said.append
    )
    assert other.task == "trec" and other.task_args == {} and other.k_shot is None


def test_the_scheme_starts_at_the_model_and_says_what_does_not_fit():
    import torch

    _, model = make("roberta-masked")
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        plain = model(ids).logits
        bias = model.lm_head.bias.clone()
        adapted = dfo_lora.build(model, dfo_lora.Config(head_bias="zero", start="random"), seed=2)
        assert torch.allclose(adapted.model(ids).logits, plain - bias, atol=1e-5) and bool(bias.any())
    assert all(".lora_B." in name for name in adapted.view.entries) and len(adapted.view) == 4
    for family, options, message in [
        ("llama-tied", {"pattern": r"mlp"}, "'mlp' has no attention projections: it is found in none of the 2"),
        ("llama-tied", {"pattern": "("}, "not a regular expression"),
        ("llama-tied", {"head_bias": "zero"}, "LlamaForCausalLM has no output head with a bias"),
        ("llama-tied", {"matrices": ("key", "key")}, "names a projection twice"),
    ]:
        with pytest.raises(ConfigError, match=message):
            dfo_lora.build(make(family)[1], dfo_lora.Config(**options))


def test_a_random_start_is_the_seeds():
    found = [dfo_lora.build(make("llama-tied")[1], dfo_lora.Config(start="random"), seed=s) for s in (1, 1, 2)]
    states = [{n: p.clone() for n, p in a.model.named_parameters() if ".lora_A." in n} for a in found]
    name = next(iter(states[0]))
    assert (states[0][name] == states[1][name]).all() and not (states[0][name] == states[2][name]).all()


@pytest.mark.trainer
def test_bad_input_is_refused_before_the_folder_is_touched(tmp_path):
    data = labelled(tmp_path)
    base = {"data": str(data), "method": "cma_es", "scheme": "dfo_lora", "output": str(tmp_path / "run")}
    for values, message in [
        ({"method_args": {"budget": 5}}, "budget 5 is smaller than one generation of 20 forwards"),
        ({"method_args": {"dimension": 10**6}}, "dimension = 1000000, but the block of"),
        ({"scheme_args": {"pattern": "mlp"}}, "'mlp' has no attention projections"),
        ({"k_shot": 10**4}, "k_shot = 10000 needs 20000 rows of every class"),
    ]:
        with pytest.raises((ConfigError, smidgen.config.DataError), match=message):
            smidgen.finetune(load(None, [], base | values), say=lambda line: None)
        assert not (tmp_path / "run" / "journal.bin").exists()


def test_hinge_and_masked_prompts_that_cannot_be(tmp_path):
    from smidgen.encode import encode
    from smidgen.tasks import Example
    from texts import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.mask_token = None
    rows = [Example("it was", " great", ".", (" terrible", " great"), 1, ("it",))]
    with pytest.raises((ConfigError, smidgen.config.DataError), match="mask"):
        encode(rows, tokenizer, "masked", 32, context=None)
    free = tmp_path / "free.jsonl"
    free.write_text("".join(json.dumps({"prompt": f"{i}", "completion": " x"}) + "\n" for i in range(20)))
    values = {"data": str(free), "method": "cma_es", "scheme": "dfo_lora", "objective": "hinge", "output": str(tmp_path / "r")}
    with pytest.raises(ConfigError, match="objective hinge compares the options of a row"):
        smidgen.finetune(load(None, [], values), say=lambda line: None)


def test_a_method_that_would_stand_still_is_refused():
    values = {"task": "reviews", "scheme": "dfo_lora", "method": "zo_sgd"}
    with pytest.raises(ConfigError, match=r"scheme_args.start=random"):
        settings.check_start(RunConfig.model_validate(values))
    settings.check_start(RunConfig.model_validate({**values, "scheme_args": {"start": "random"}}))
    settings.check_start(RunConfig.model_validate({**values, "method": "fireworks"}))
