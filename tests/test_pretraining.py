"""Settings of pre-training: what a preset and random weights fill in, and what the user keeps."""

from __future__ import annotations

import pytest

from smidgen import pretraining
from smidgen.config import ConfigError
from smidgen.config_file import load
from smidgen.pretraining import fill


def test_a_preset_is_the_published_run():
    said: list[str] = []
    config = fill(load(None, [], {"preset": "c4-60m"}), said.append)
    assert (config.model, config.data, config.streaming, config.packing) == (
        "config:llama-60m",
        "allenai/c4:en",
        True,
        "stream",
    )
    assert (config.method, config.activations, config.train.learning_rate) == ("velora_adamw", "velora", 0.01)
    train = config.train
    assert train.per_device_train_batch_size * train.gradient_accumulation_steps == 512 and train.max_steps == 10_000
    assert train.lr_scheduler_type == "cosine_with_min_lr" and train.extra == {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    assert config.preset is None and all(pretraining.SOURCE in line for line in said if "(preset" in line)
    assert fill(config, said.append) == config  # filled once, it stays as it is


def test_another_method_keeps_its_own_rate_and_another_text_is_read_whole():
    config = fill(
        load(None, [], {"preset": "c4-130m", "method": "galore", "data": "x", "train.max_steps": 7}), lambda line: None
    )
    assert config.method == "galore" and config.activations is None and config.train.learning_rate is None
    assert config.data == "x" and config.streaming is False and config.train.max_steps == 7
    config = fill(
        load(None, [], {"model": "config:llama-9m", "data": "x", "train.lr_scheduler_type": "linear"}), lambda line: None
    )
    assert config.train.lr_scheduler_type == "linear" and config.packing == "stream"


def test_other_runs_come_back_as_they_are():
    for values in (
        {"task": "reviews"},
        {"preset": "mezo/opt-13b/sst2/full"},
        {"model": "embedded", "data": "x", "packing": True},
    ):
        config = load(None, [], values)
        assert fill(config, lambda line: pytest.fail(line)) is config
    with pytest.raises(ConfigError, match="streaming is for text"):
        fill(load(None, [], {"preset": "c4-60m", "packing": False}), lambda line: None)
