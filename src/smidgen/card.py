"""The model card of a run, README.md: how to load its result, how it was made, what it reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smidgen import adapt
from smidgen import folder as folders
from smidgen.blank import is_blank
from smidgen.config import RunConfig
from smidgen.intervals import interval

_AUTO = {
    "causal": "ModelForCausalLM",
    "masked": "ModelForMaskedLM",
    "classification": "ModelForSequenceClassification",
    "seq2seq": "ModelForSeq2SeqLM",
    "image": "ModelForImageClassification",
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
    if kind in ("masked", "image"):  # PEFT has no Auto class of it
        lines = ["from peft import PeftModel", f"from transformers import {plain}", ""]
        lines += [f'base = {plain}.from_pretrained("{config.model}")', f'model = PeftModel.from_pretrained(base, "{output}")']
    return "peft", "\n".join(["```python", *lines, "```"])


def model_card(config: RunConfig, result: dict[str, Any]) -> str:
    """README.md of the run: what it is, base, data, method, figures with their spread, memory, how to load and to repeat it."""
    library, code = _loading(config, result["kind"], result["output"])
    base = "smidgen's embedded model" if config.model == "embedded" else config.model.removeprefix("config:")
    held, train = f", held in {config.quantise}" if config.quantise else "", config.train
    rows = train.per_device_train_batch_size * train.gradient_accumulation_steps
    start = "trained from random weights" if is_blank(config.model) else "tuned"
    how = f"{start} by {config.method} ({config.scheme})" if result["steps"] else f"fitted ({config.scheme})"
    return f"""---
{_front(config, library)}---

# {base}, {how}

{code}

{_figures(result)}

- Base: {base}{held}; {result["weights"]:,} weights, {result["tuned_weights"]:,} tuned
- Data: {_data(config, result)}
- Method: {config.method} with {_listed(config.method_args)}learning rate {train.learning_rate:g}; seed {config.seed}
- Rows a step: {rows}
- Cost: {result["steps"]} steps, {result["forwards"]} forwards, {result["backwards"]} backwards, {result["seconds"]:.0f} s
- Memory: peak {result["peak_bytes"] / 2**20:.0f} MiB over the loaded libraries
- Weights sha256 `{result["weights_sha256"]}`

All settings are in `{folders.RESOLVED}`, versions in `{folders.ENVIRONMENT}`.
Repeat it with `smidgen train {folders.RESOLVED} output=NEW_FOLDER`.
"""


def _front(config: RunConfig, library: str) -> str:
    """The front matter that the hub reads."""
    local = Path(config.model).is_dir() or config.model == "embedded" or is_blank(config.model)
    hub = "" if local else config.model
    tags = ["smidgen", config.method, config.scheme, *([f"base_model:adapter:{hub}"] if hub and library == "peft" else [])]
    named = isinstance(config.data, str) and not Path(config.data).exists() and config.data.count("/") == 1
    lines = [f"base_model: {hub}"] * bool(hub) + [f"library_name: {library}", f"tags: [{', '.join(tags)}]"]
    return "\n".join([*lines, *([f"datasets: [{config.data}]"] if named else [])]) + "\n"


def _figures(result: dict[str, Any]) -> str:
    """The measures before and after, each share with the 95 % interval that its rows leave. One run knows no other spread."""
    splits = [name for name in ("dev", "test") if name in result]
    lines = [f"| | before (dev) | {' | '.join(f'{s} ({_count(result, s)} rows)' for s in splits)} |"]
    lines.append("|---" * (len(splits) + 2) + "|")
    for name in (key for key in result["before"] if key in result["dev"]):
        cells = [f"{result['before'][name]:.4f}"]
        for split in splits:
            value, rows = result[split].get(name), result.get("data", {}).get(split, {}).get("rows")
            room = None if value is None else interval(name, value, rows)
            cells.append(
                "-" if value is None else f"{value:.4f}" + ("" if room is None else f" [{room[0]:.3f}, {room[1]:.3f}]")
            )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    known = any(interval(name, 0.5, 1) for name in result["dev"])
    note = "In brackets: 95 % interval over the rows; `smidgen compare` gives the spread over seeds." if known else ""
    return "\n".join([*lines, *(["", note] if note else [])])


def _count(result: dict[str, Any], split: str) -> str:
    return str(result.get("data", {}).get(split, {}).get("rows", "unknown"))


def _data(config: RunConfig, result: dict[str, Any]) -> str:
    source = config.task or config.data
    if config.task and config.data:
        source = f"{config.task} from {config.data}"
    return f"{source}; {_count(result, 'train')} training rows of at most {config.max_length} tokens"


def _listed(options: dict[str, Any]) -> str:
    return "".join(f"{key} {value}, " for key, value in options.items() if key != "lr")
