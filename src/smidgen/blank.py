"""Blank models: a configuration without weights, under the name `config:NAME`; its weights are drawn from the run's seed.

NAME is a configuration that ships with smidgen (llama-9m, llama-60m, llama-130m: the sizes of GaLore's and VeLoRA's
pre-training, arXiv 2403.03507 and 2405.17991), a folder with config.json, such a file alone, or a hub id; weights beside it are
not read. The number of rows of the embedding and the special tokens are the tokenizer's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smidgen.config import ConfigError

PREFIX = "config:"
HELP = "random weights of a configuration: llama-9m, llama-60m, llama-130m, or its folder"

_SHIPPED = Path(__file__).parent / "configs"


def chosen_name(model: str | None, configuration: str | None) -> str | None:
    """The model that `--model` and `--from-config` name. Raises ConfigError where both do."""
    if configuration is None:
        return model
    if model is not None:
        raise ConfigError(f"--from-config {configuration} and --model {model} both name a model: give one of the two")
    return PREFIX + configuration


def shipped() -> list[str]:
    """Names of the configurations that ship, the smallest first."""
    return sorted((path.name for path in _SHIPPED.iterdir() if path.is_dir()), key=lambda name: (len(name), name))


def is_blank(name: str) -> bool:
    """Whether a model's name stands for a configuration without weights."""
    return name.startswith(PREFIX)


def inner(name: str) -> str:
    """The folder, file or hub id that a name without its prefix stands for."""
    found = name.removeprefix(PREFIX)
    return str(_SHIPPED / found) if found in shipped() else found


def fit(config: Any, tokenizer: Any) -> None:
    """Give a configuration the tokenizer's vocabulary and special tokens."""
    config.vocab_size = len(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))


def draw(auto_class: Any, config: Any, dtype: Any, seed: int) -> Any:
    """A model of a configuration, drawn on the CPU from `seed`; the global generator is left as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = auto_class.from_config(config, dtype=torch.float32 if dtype == "auto" else dtype)
    model.smidgen_fresh = outer_parameters(model)
    return model


def outer_parameters(model: Any) -> tuple[str, ...]:
    """Names of the tensors of the input and output embeddings: those that every scheme tunes whole, since no adapter of the
    layers between them learns what a random one does not say."""
    ends = {id(p) for part in (model.get_input_embeddings(), model.get_output_embeddings()) for p in part.parameters()}
    return tuple(sorted(name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in ends))
