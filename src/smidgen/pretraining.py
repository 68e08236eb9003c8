"""Pre-training: what a run from random weights takes where it is not told, and published settings of such runs.

A preset names the configuration, the text, the length of rows, batch, steps and schedule; with its own method also the rate and
the placement of VeLoRA. A run may name another method, scheme, text or tokenizer, which then keeps its own rate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from smidgen.blank import is_blank
from smidgen.config import ConfigError, RunConfig
from smidgen.config_file import with_values

__all__ = ["PRESETS", "SOURCE", "fill"]

SOURCE = "VeLoRA, arXiv 2405.17991, its public scripts"

_SCHEDULE: Mapping[str, Any] = {  # GaLore's and VeLoRA's: a tenth of the steps up, a cosine down to a tenth of the rate
    "lr_scheduler_type": "cosine_with_min_lr",
    "warmup_steps": 0.1,
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
}


def _c4(size: str, lr: float, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(keys of the run, keys that belong to the method). Batches of 512 rows of 256 tokens."""
    run = {
        "model": f"config:llama-{size}",
        "tokenizer": "t5-base",
        "data": "allenai/c4:en",
        "streaming": True,
        "packing": "stream",
        "max_length": 256,
        "dev_rows": 20_000,  # about the ten million tokens that GaLore evaluates on
        "train.per_device_train_batch_size": 128,
        "train.gradient_accumulation_steps": 4,
        "train.max_steps": steps,
    }
    # 64 sub-tokens of value inputs as published; of down inputs, where the 60M script has 86 of 16, 63 of 22
    velora = {"activations": "velora", "activations_args": {"groups": 64, "layers": "value+down"}}
    return run, {"method": "velora_adamw", "scheme": "full", "train.learning_rate": lr, **velora}


PRESETS = {"c4-60m": _c4("60m", 0.01, 10_000), "c4-130m": _c4("130m", 0.003, 20_000)}


def fill(config: RunConfig, say: Callable[[str], None]) -> RunConfig:
    """The configuration with what its preset, and a start from random weights, set and the user did not; each choice is said.

    Any other comes back as it is. Raises ConfigError for packing=false beside a preset, whose rows are a stream.
    """
    given = {key for key in config.model_fields_set if getattr(config, key) is not None} - {"preset"}
    given |= {f"train.{key}" for key in config.train.model_fields_set if key != "extra"} | {
        f"train.{k}" for k in config.train.extra
    }
    values: dict[str, Any] = {}
    if config.preset in PRESETS:
        run, own = PRESETS[config.preset]
        if not given & {"method", "scheme", "activations"}:
            run = {**run, **own}
        if "train.num_train_epochs" in given:
            given.add("train.max_steps")
        if "data" in given:  # a file of one's own is small enough to be read at once, unless its user says otherwise
            given.add("streaming")
        values = {key: value for key, value in run.items() if key not in given}
        for key, value in values.items():
            say(f"{key.removeprefix('train.')} = {value}  (preset {config.preset}: {SOURCE})")
        values["preset"] = None  # all of it is written out
    if is_blank(values.get("model", config.model)) and not given & {f"train.{key}" for key in _SCHEDULE}:
        for key, value in _SCHEDULE.items():
            values[f"train.{key}"] = value
        say("lr_scheduler_type = cosine_with_min_lr  (random weights: a tenth of the steps up, down to a tenth of the rate)")
    if is_blank(values.get("model", config.model)) and "packing" not in {*given, *values} and config.task is None:
        values["packing"] = "stream"
        say("packing = stream  (random weights learn text: documents one after another)")
    if values.get("packing", config.packing) != "stream" and values.get("streaming", config.streaming):
        raise ConfigError("streaming is for text that is cut into rows of one length: set packing=stream, or streaming=false")
    return with_values(config, values) if values else config
