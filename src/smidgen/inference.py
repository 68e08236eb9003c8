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
from smidgen import models
from smidgen.chat import Chat
from smidgen.collate import Collator
from smidgen.config import ConfigError, RunConfig, notice
from smidgen.evaluate import evaluation, exact_match, generate
from smidgen.probing import Engine
from smidgen.run import Loaded, load
from smidgen.tasks._example import Example

_LENGTH = 1024  # tokens of a row, at most; chosen


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
    config = configuration.load(path / folders.RESOLVED)
    classes = result.get("classes", classes)
    if config.scheme == "full":
        return load(configuration.with_values(config, {"model": name}), classes), config
    loaded = load(config, classes)
    loaded.adapted.load(path)
    return loaded, config


def evaluate_folder(
    name: str, *, task: str | None, data: str | None, split: str, batch_size: int | None, match: bool = False
) -> dict[str, Any]:
    """Metrics of a run or model on a split of its own data, or of a task or data that is given."""
    path = Path(name) / folders.RESOLVED
    config = configuration.load(path) if path.exists() else RunConfig(model=name)
    if task or data:
        config = configuration.with_values(config, {"task": task, "data": data, "eval_data": None})
    corpus = sources.open_corpus(config, notify=notice)
    loaded, _ = open_folder(name, classes=None if corpus.words is None else len(corpus.words))
    engine = Engine(loaded.adapted.model, loaded.adapted.view, loaded.kind)
    collator = Collator(
        loaded.tokenizer.pad_token_id, loaded.kind, position_ids=models.wants_position_ids(loaded.adapted.model)
    )
    measured = evaluation(
        corpus,
        split,
        loaded.tokenizer,
        loaded.kind,
        max_length=min(loaded.context or _LENGTH, _LENGTH),
        context=loaded.context,
        collator=collator,
        batch_size=batch_size or config.train.per_device_eval_batch_size,
    )
    found: dict[str, Any] = {"model": name, "data": corpus.name, "split": split, "rows": len(measured.rows), **measured(engine)}
    if match:
        found["exact_match"] = _exact(engine, loaded, corpus.examples(split))
    return found


def _exact(engine: Engine, loaded: Loaded, examples: Sequence[Any]) -> float:
    if loaded.kind not in ("causal", "seq2seq"):
        raise ConfigError(f"--exact-match generates text, which a model of kind {loaded.kind} does not")
    golds = [e.answer if isinstance(e, Example) else e.messages[-1]["content"] for e in examples]
    texts = generate(engine, loaded.tokenizer, examples, kind=loaded.kind)
    return exact_match(texts, golds)


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
