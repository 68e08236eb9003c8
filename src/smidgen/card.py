"""The model card of a run, README.md: how to load its result, how it was made, what it reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smidgen import adapt
from smidgen import folder as folders
from smidgen.config import RunConfig

_AUTO = {
    "causal": "ModelForCausalLM",
    "masked": "ModelForMaskedLM",
    "classification": "ModelForSequenceClassification",
    "seq2seq": "ModelForSeq2SeqLM",
}


def _loading(config: RunConfig, kind: str, output: str) -> tuple[str, str]:
    """The library that loads a run's result, and the lines that do."""
    if not adapt.get(config.scheme).EXPORTS:
        lines = ["from smidgen.inference import open_folder", "", f'loaded, config = open_folder("{output}")']
        return "smidgen", "\n".join(["```python", *lines, "model, tokenizer = loaded.adapted.model, loaded.tokenizer", "```"])
    plain, adapter = "Auto" + _AUTO[kind], "AutoPeft" + _AUTO[kind]
    if "adapter" not in adapt.get(config.scheme).EXPORTS:
        first = "" if config.scheme == "full" else f"```sh\nsmidgen export {output} --to MODEL --format merged\n```\n\n"
        folder = "MODEL" if first else output
        lines = [f"from transformers import {plain}", "", f'model = {plain}.from_pretrained("{folder}")']
        return "transformers", first + "\n".join(["```python", *lines, "```"])
    lines = [f"from peft import {adapter}", "", f'model = {adapter}.from_pretrained("{output}")']
    if kind == "masked":  # PEFT has no Auto class of it
        lines = ["from peft import PeftModel", f"from transformers import {plain}", ""]
        lines += [f'base = {plain}.from_pretrained("{config.model}")', f'model = PeftModel.from_pretrained(base, "{output}")']
    return "peft", "\n".join(["```python", *lines, "```"])


def model_card(config: RunConfig, result: dict[str, Any]) -> str:
    """README.md of the run: how to load it, how it was made, what it reached."""
    library, code = _loading(config, result["kind"], result["output"])
    before, after = result["before"], result["dev"]
    figures = "\n".join(f"| {k} | {before[k]:.4f} | {after[k]:.4f} |" for k in before if k in after)
    base = "smidgen's embedded model" if config.model == "embedded" else config.model
    how = f"tuned by {config.method} ({config.scheme})" if result["steps"] else f"fitted ({config.scheme})"
    front = "" if Path(config.model).is_dir() or config.model == "embedded" else f"base_model: {config.model}\n"
    return f"""---
{front}library_name: {library}
tags: [smidgen, {config.method}, {config.scheme}]
---

# {base}, {how}

{code}

| dev | before | after |
|---|---|---|
{figures}

{result["steps"]} steps, {result["forwards"]} forwards, {result["backwards"]} backwards, {result["seconds"]:.0f} s, peak memory
{result["peak_bytes"] / 2**20:.0f} MiB over the loaded libraries. Weights sha256 `{result["weights_sha256"]}`.
All settings are in `{folders.RESOLVED}`, versions in `{folders.ENVIRONMENT}`.
Repeat it with `smidgen train {folders.RESOLVED} output=NEW_FOLDER`.
"""
