"""Published presets: every one is a valid run, the numbers are the papers', and what the user says wins."""

from __future__ import annotations

import json

import pytest

from smidgen import adapt, optim, presets, tasks
from smidgen.cli import app
from smidgen.config import ConfigError
from smidgen.config_file import dump, load
from smidgen.trainer import method_config

NAME = "mezo/opt-13b/sst2/full"


def filled(**flags):
    lines = []
    return presets.fill(load(None, [], flags), lines.append), lines


@pytest.mark.parametrize("method", sorted({p.method for p in presets.of_method()}))
def test_every_preset_is_a_valid_run(method):
    for preset in presets.of_method(method):
        found, _ = filled(preset=preset.name)
        assert found.task in tasks.names() and found.scheme in adapt.names(), preset.name
        assert found.k_shot or tasks.get(found.task).SIZES, preset.name
        options = method_config(found.method, found.preset, found.method_args)
        assert options.lr == preset.options["lr"]
        for option, values in preset.grid.items():
            assert preset.options[option] in values and len(set(values)) == len(values), (preset.name, option)
        assert preset.source


def test_every_method_of_the_study_has_presets_for_every_scheme_it_was_run_with():
    schemes = {"full", "lora", "prefix", "prompt"}
    for method in ("zo_sgd", "zo_momentum", "zo_conservative", "zo_sign", "zo_adam", "forward_grad"):
        for cell in ("opt-1.3b/sst2", *(f"{m}/copa" for m in ("opt-13b", "llama-2-7b", "llama-2-13b"))):
            assert all(f"zo-bench/{cell}/{method}/{scheme}" in presets.names() for scheme in schemes), (cell, method)
        for cell in ("opt-13b/winogrande", "vicuna-7b/copa", "mistral-7b/copa"):
            assert all(f"zo-bench/{cell}/{method}/{scheme}" in presets.names() for scheme in ("full", "lora", "prefix"))


@pytest.mark.parametrize(
    "name,lr,eps,grid",
    [
        (NAME, 1e-6, 1e-3, {"lr": (1e-6, 1e-7)}),
        ("mezo/opt-13b/wsc/full", 1e-7, 1e-3, {"lr": (1e-6, 1e-7)}),
        ("mezo/opt-13b/drop/prefix", 1e-2, 1e-1, {"lr": (5e-2, 1e-2, 5e-3)}),
        ("mezo/roberta-large/mnli-k512/lora", 5e-5, 1e-3, {"lr": (1e-4, 5e-5, 1e-5)}),
        ("zo-bench/opt-1.3b/sst2/zo_sgd/full", 1e-6, 1e-3, {"lr": (1e-4, 1e-5, 1e-6, 1e-7, 1e-8), "eps": (1e-3, 1e-4, 1e-5)}),
        ("zo-bench/opt-1.3b/sst2/zo_momentum/lora", 1e-5, 1e-3, {"lr": (1e-3, 1e-4, 1e-5, 1e-6)}),
        ("zo-bench/opt-1.3b/sst2/zo_sign/full", 1e-6, 1e-3, {"lr": (1e-4, 1e-6, 1e-8), "eps": (1e-3, 1e-5)}),
        ("zo-bench/opt-1.3b/sst2/forward_grad/lora", 1e-5, None, {"lr": (5e-5, 1e-5, 5e-6, 1e-6, 5e-7, 1e-7)}),
        ("zo-bench/opt-13b/copa/forward_grad/full", 1e-6, None, {"lr": (1e-5, 5e-6, 1e-6, 5e-7, 1e-7, 5e-8)}),
    ],
)
def test_numbers_are_the_published_ones(name, lr, eps, grid):
    preset = presets.get(name)
    assert preset.options["lr"] == lr and preset.options.get("eps") == eps
    assert all(preset.grid[option] == values for option, values in grid.items())


def test_a_preset_fills_what_was_not_given_and_says_each_choice_with_its_source():
    found, lines = filled(preset=NAME)
    assert (found.method, found.scheme, found.task, found.train.learning_rate) == ("zo_sgd", "full", "sst2", 1e-6)
    assert found.method_args == {"eps": 1e-3, "distribution": "gaussian"}
    assert (found.train.per_device_train_batch_size, found.train.max_steps) == (16, 20000)
    assert found.benchmark_split and found.train_rows is None
    assert len(lines) == 9 and all("2305.17333" in line and NAME in line for line in lines)
    assert any(line.startswith("learning_rate = 1e-06 ") for line in lines)


def test_what_the_user_gives_wins():
    found, lines = filled(preset=NAME, lr=3e-6, eps=2e-3, batch=4, steps=10, train_rows=7, method="zo_sgd", task="rte")
    assert found.train.learning_rate == 3e-6 and found.method_args["eps"] == 2e-3 and found.task == "rte"
    assert (found.train.per_device_train_batch_size, found.train.max_steps, found.train_rows) == (4, 10, 7)
    assert not found.benchmark_split  # of another task
    assert [line.partition(" ")[0] for line in lines] == ["scheme", "distribution"]
    assert not filled(preset=NAME, eval_data="my.jsonl")[0].benchmark_split
    few, _ = filled(preset="mezo/roberta-large/mnli-k16/full")
    assert (few.task, few.k_shot, few.benchmark_split) == ("mnli", 16, False)
    assert filled(preset=NAME, data="my.jsonl")[0].task is None
    assert filled(preset="mezo-ft/opt-13b/sst2/full", steps=5)[0].train.num_train_epochs is None
    decayed, _ = filled(**{"preset": "mezo/roberta-large/sst2-k16/lora", "train.weight_decay": 0.5})
    assert "weight_decay" not in decayed.method_args
    assert filled(preset="mezo/roberta-large/sst2-k16/lora")[0].method_args["weight_decay"] == 0.1


def test_a_filled_configuration_is_complete_and_stays_as_it_is(tmp_path):
    found, _ = filled(preset=NAME)
    (tmp_path / "resolved.yaml").write_text(dump(found))
    lines = []
    again = presets.fill(load(tmp_path / "resolved.yaml"), lines.append)
    assert again == found and not lines


def test_conflicts_and_unknown_names_are_refused():
    with pytest.raises(ConfigError, match=r"belongs to method zo_sgd, not zo_adam: leave out one"):
        filled(preset=NAME, method="zo_adam")
    with pytest.raises(ConfigError, match=r"belongs to scheme full, not lora"):
        filled(preset=NAME, scheme="lora")
    with pytest.raises(ConfigError, match=r"did you mean 'mezo/opt-13b/sst2/full'"):
        filled(preset="mezo/opt-13b/sst2/ful")
    with pytest.raises(ConfigError, match=r"methods --presets"):
        filled(preset="a/b")
    with pytest.raises(ConfigError, match=r"belongs to method zo_sgd, not sgd"):
        method_config("sgd", NAME, {})


def test_a_method_takes_a_published_preset_too_and_keeps_its_own():
    assert method_config("zo_sgd", NAME, {"lr": 5e-6}) == optim.get("zo_sgd").Config(lr=5e-6, distribution="gaussian")
    assert presets.fill(load(None, [], {"preset": "mezo"}), print).preset == "mezo"


def test_finetune_takes_a_preset(tmp_path, monkeypatch):
    from smidgen import finetune

    monkeypatch.chdir(tmp_path)
    lines = []
    config = load(None, [], {"preset": NAME, "task": "reviews", "output": "run"})
    found = finetune(config, dry_run=True, say=lines.append)
    again = load(None, [], {}) if not (tmp_path / "c.yaml").write_text(found["config"]) else load(tmp_path / "c.yaml")
    assert again.train.learning_rate == 1e-6 and again.method_args["distribution"] == "gaussian"
    assert any("table 16" in line for line in lines)


def test_listing(capsys):
    from typer.testing import CliRunner

    listed = CliRunner().invoke(app, ["methods", "zo_sgd", "--presets"])
    assert f"{NAME}\t1e-06\t0.001\tMeZO" in listed.output
    everything = json.loads(CliRunner().invoke(app, ["methods", "--presets", "--json"]).output)
    assert [entry["name"] for entry in everything] == presets.names()
    assert "published presets: smidgen methods zo_sgd --presets" in CliRunner().invoke(app, ["methods", "zo_sgd"]).output
