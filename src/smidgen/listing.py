"""What the read verbs show: methods, tasks, data."""

from __future__ import annotations

import inspect
from typing import Any

from smidgen import auto, data, models, optim, presets, tasks
from smidgen.config import ConfigError, RunConfig, notice
from smidgen.config_file import load
from smidgen.encode import describe, encode
from smidgen.kinds import detect_kind
from smidgen.tasks._labelled import LabelledTask


def _title(module: Any) -> str:
    return (module.__doc__ or "").strip().splitlines()[0].rstrip(".")


def list_methods() -> list[dict[str, Any]]:
    """Name, status and first line of every method."""
    return [{"name": n, "status": optim.get(n).status, "title": _title(optim.get(n))} for n in optim.names()]


def describe_method(name: str) -> dict[str, Any]:
    """One method, or `auto`: its text, options and presets. Raises ConfigError for an unknown one."""
    if name == auto.NAME:
        chosen = {scheme: {"method": method, "lr": lr, **options} for scheme, (method, lr, options) in auto.CHOICES.items()}
        text = f"{inspect.getdoc(auto)}\n\nEvidence: {auto.EVIDENCE}."
        nothing: dict[str, Any] = {"options": [], "published": [], "suggested": {}}
        return {"name": name, "status": "experimental", "text": text, "presets": chosen, **nothing}
    module = optim.get(name)
    fields = module.Config.model_fields
    options = [{"name": k, "default": f.default, "description": f.description} for k, f in fields.items()]
    return {
        "name": name,
        "status": module.status,
        "text": inspect.getdoc(module),
        "options": options,
        "presets": getattr(module, "PRESETS", {}),
        "published": [preset.name for preset in presets.of_method(name)],
        "suggested": getattr(module, "SUGGESTED", {}),
    }


def list_presets(method: str | None) -> list[dict[str, Any]]:
    """The published presets of a method, or all. Raises ConfigError for an unknown method."""
    if method is not None:
        optim.get(method)
    return [
        {
            "name": preset.name,
            "method": preset.method,
            "scheme": preset.scheme,
            "options": dict(preset.options),
            "keys": dict(preset.keys),
            "grid": {option: list(values) for option, values in preset.grid.items()},
            "source": preset.source,
        }
        for preset in presets.of_method(method)
    ]


def list_tasks() -> list[dict[str, Any]]:
    """Name, status and first line of every task."""
    return [{"name": n, "status": tasks.get(n).status, "title": _title(tasks.get(n))} for n in tasks.names()]


def describe_task(name: str) -> dict[str, Any]:
    """One task: its text, prompts with label words, options, and published numbers of rows. Raises ConfigError for an
    unknown one."""
    module = tasks.get(name)
    fields, task = module.Config.model_fields, module.build(module.Config())
    forms = {"causal": task.causal, "masked": task.masked} if isinstance(task, LabelledTask) else {}
    return {
        "name": name,
        "status": module.status,
        "text": inspect.getdoc(module),
        "options": [{"name": k, "default": f.default, "description": f.description} for k, f in fields.items()],
        "prompts": {kind: form.template for kind, form in forms.items() if form is not None},
        "sizes": getattr(module, "SIZES", None),
    }


def describe_data(source: str, *, model: str, kind: str, row: int, max_length: int | None) -> dict[str, Any]:
    """Lengths and one encoded row of a data set, as `smidgen.encode.describe` gives them, and how many classes it has."""
    config: RunConfig = load(None, [], {"data": source, "model": model})
    corpus = data.open_corpus(config, notify=notice)
    if corpus.pictures:
        raise ConfigError(
            f"'{source}' holds {len(corpus.rows('train'))} pictures of {len(corpus.words or ())} classes "
            f"({', '.join((corpus.words or ())[:8])}): `smidgen data` shows tokens, and they have none"
        )
    model_config = models.load_config(model)
    tokenizer = models.load_tokenizer(model)
    chosen = detect_kind(model_config, corpus.words is not None) if kind == "auto" else kind
    context = models.context_length(model_config, tokenizer)
    examples: Any = corpus.examples("train", chosen)
    encoded = encode(examples, tokenizer, chosen, max_length, context=context)
    classes = None if corpus.words is None else len(corpus.words)
    return {**describe(encoded, tokenizer, min(row, len(encoded) - 1)), "classes": classes}
