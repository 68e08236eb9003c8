"""Use what a run produced: open its folder, evaluate it, continue prompts with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from smidgen import config_file as configuration
from smidgen import data as sources
from smidgen import folder as folders
from smidgen.adapt import _over_quantised
from smidgen.chat import Chat
from smidgen.config import ConfigError, RunConfig, notice
from smidgen.generation import generate
from smidgen.pixels import name_classes
from smidgen.probing import Engine
from smidgen.run import Loaded, evaluation_of, load
from smidgen.tasks._example import Example


def open_folder(name: str, *, classes: int | None = None) -> tuple[Loaded, RunConfig]:
    """A run's tuned model with the run's configuration, or any model with the defaults. Raises ConfigError."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path = Path(name)
    if not (path / folders.RESOLVED).exists():
        config = RunConfig(model=name)
        return load(config, classes), config
    if not (path / folders.RESULT).exists() or "weights_sha256" not in (
        result := json.loads((path / folders.RESULT).read_text())
    ):
        raise ConfigError(f"the run in {name} is not done: go on with `smidgen train --resume --output {name}`")
    config = folders.opened(path)
    classes = result.get("classes", classes)
    if config.scheme == "full" and not (path / _over_quantised.ADAPTER).exists():
        return load(configuration.with_values(config, {"model": name, "tokenizer": None}), classes), config
    loaded = load(config, classes)
    loaded.adapted.load(path)
    if "class_names" in result:
        name_classes(loaded.adapted.model, result["class_names"])
    return loaded, config


def evaluate_folder(
    name: str,
    *,
    task: str | None,
    data: str | None,
    split: str,
    batch_size: int | None,
    match: bool = False,
    reward: str | None = None,
) -> dict[str, Any]:
    """Metrics of a run or model on a split of its own data, or of another task, or of other rows for the same task."""
    path = Path(name) / folders.RESOLVED
    config = folders.opened(path.parent) if path.exists() else RunConfig(model=name)
    other = task not in (None, config.task)  # another task has other options
    if data is not None or other:
        new = {"task": task or config.task, "data": data, "eval_data": None, "benchmark_split": False, "k_shot": None}
        config = configuration.with_values(config, new | ({"task_args": {}, "objective": "auto"} if other else {}))
    config = configuration.with_values(config, {"reward": reward})  # the run's own is code, which nobody asked to run
    corpus = sources.open_corpus(config, notify=notice)
    loaded, _ = open_folder(name, classes=None if corpus.words is None else len(corpus.words))
    engine = Engine(loaded.adapted.model, loaded.adapted.view, loaded.kind)
    reference = None
    if corpus.beta is not None and path.exists():  # pairs are measured against the model that the run started from
        reference = load(configuration.with_values(config, {"scheme": "full", "scheme_args": {}}), None)
    measured = evaluation_of(config, corpus, loaded, split, batch_size=batch_size, generated=match, reference=reference)
    del reference
    return {"model": name, "data": corpus.name, "split": split, "rows": len(measured.rows), **measured(engine)}


def generate_from_folder(name: str, prompts: Sequence[str], *, max_new_tokens: int, chat: bool) -> list[str]:
    """Greedy continuations of prompts by a run or model."""
    loaded, _ = open_folder(name)
    if loaded.kind not in ("causal", "seq2seq"):
        raise ConfigError(f"{name} is a {loaded.kind} model: it does not generate text")
    engine = Engine(loaded.adapted.model, loaded.adapted.view, loaded.kind)
    asked: list[Any] = [Example(prompt=p, answer="") for p in prompts]
    if chat:
        asked = [
            Chat(({"role": "user", "content": p}, {"role": "assistant", "content": ""}), f"prompt {i + 1}")
            for i, p in enumerate(prompts)
        ]
    return generate(engine, loaded.tokenizer, asked, max_new_tokens=max_new_tokens, kind=loaded.kind)
