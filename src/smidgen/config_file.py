"""Configuration files: a RunConfig out of YAML, flags and dotted overrides, and YAML out of a RunConfig.

Order: defaults < file < flags < ``a.b=c`` overrides. An unknown key is an error that names the nearest key, the file
and the line; a value of the wrong type names the value, the place and the type. YAML is read with the scalar rules of
YAML 1.2: ``1e-4`` is a number and ``no`` is a word, so ``words: [no, yes]`` means what it says.

PyYAML is imported when a file or an override is read.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ValidationError

from smidgen.config import ConfigError, RunConfig, TrainConfig, expected, nearest, notice, options

__all__ = ["FLAGS", "config_sha256", "dump", "load", "parse_value", "split_arguments", "template", "with_values"]

FLAGS: Mapping[str, str] = {  # short flag -> key; every other flag is its key
    "steps": "train.max_steps",
    "lr": "train.learning_rate",
    "batch": "train.per_device_train_batch_size",
    "eps": "method_args.eps",
}

_SECTIONS = ("train", "task_args", "method_args", "scheme_args", "activations_args")

_ALIASES: Mapping[str, str] = {  # spellings of other tools -> key
    "model_name_or_path": "model",
    "model_name": "model",
    "base_model": "model",
    "tokenizer_name_or_path": "tokenizer",
    "tokenizer_name": "tokenizer",
    "dataset_name": "data",
    "dataset": "data",
    "output_dir": "output",
    "train.output_dir": "output",
    "train.seed": "seed",
    "cutoff_len": "max_length",
    "max_seq_length": "max_length",
    "sequence_len": "max_length",
    "train.max_length": "max_length",
    "train.max_seq_length": "max_length",
    "micro_batch_size": "train.per_device_train_batch_size",
    "warmup_ratio": "train.warmup_steps",  # transformers 5 reads warmup_steps below 1 as the ratio
    "train.warmup_ratio": "train.warmup_steps",
    "lora_r": "scheme_args.rank",
    "lora_rank": "scheme_args.rank",
    "lora_alpha": "scheme_args.alpha",
    "lora_dropout": "scheme_args.dropout",
}

# Names that copied training files carry at the top level besides the typed keys of TrainConfig.
# fmt: off
_TRAINING_NAMES = frozenset(TrainConfig.model_fields) - {"extra"} | {
    "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "data_seed", "dataloader_num_workers", "disable_tqdm",
    "eval_strategy", "fp16", "gradient_checkpointing", "gradient_checkpointing_kwargs", "greater_is_better",
    "hub_private_repo", "hub_strategy", "label_smoothing_factor", "load_best_model_at_end", "logging_first_step",
    "lr_scheduler_kwargs", "metric_for_best_model", "neftune_noise_alpha", "optim", "resume_from_checkpoint",
    "run_name", "save_strategy", "tf32", "torch_compile",
}
# fmt: on

_KeyPath = tuple[str, ...]
_Layer = dict[_KeyPath, tuple[Any, str]]  # path of a key -> (value, where it was written)


def load(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    *,
    notify: Callable[[str], None] = notice,
) -> RunConfig:
    """Read a configuration: defaults < file < flags < overrides.

    overrides are ``a.b=c`` with c in YAML; flags map a key, a dotted key or a short flag (FLAGS) to a value, None
    meaning "not given". `notify` gets one line for every key that was read under another name.
    Raises ConfigError: missing or malformed file, unknown or repeated key, value of the wrong type.
    """
    file = _read_file(Path(path)) if path is not None else {}
    given: _Layer = {}
    for key, value in (flags or {}).items():
        if value is not None:
            if key in ("data", "eval_data") and isinstance(value, str) and value.startswith("["):  # a weighted list
                value = parse_value(value)
            given |= _flatten(_key_path(key), value, f"--{key.replace('_', '-')}")
    typed: _Layer = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip(" -"):
            raise ConfigError(f"'{text}' is not an override: write key=value, such as train.max_steps=100")
        typed |= _flatten(_key_path(key.strip(" -")), parse_value(value), f"'{text}'")
    return _validate(_merge(_canonical(layer, notify) for layer in (file, given, typed)))


def split_arguments(arguments: list[str] | None) -> tuple[str | None, list[str]]:
    """The configuration file and the a.b=c overrides among the positional arguments."""
    files = [a for a in arguments or [] if "=" not in a]
    if len(files) > 1:
        raise ConfigError(f"'{files[1]}' is neither a configuration file (one was given already) nor key=value")
    return (files[0] if files else None), [a for a in arguments or [] if "=" in a]


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """A copy of `config` with dotted keys, or whole sections, replaced; validated as `load` does."""
    layers = [_flatten((), _plain(config), "")]
    for key, value in values.items():
        where, place = tuple(key.split(".")), f"'{key}'"
        layers += [{where: ({}, place)}, _flatten(where, value, place)]  # nothing of an old section stays
    return _validate(_merge(layers))


def parse_value(text: str) -> Any:
    """The value that `text` spells in YAML: ``1e-4`` a number, ``[a, b]`` a list, ``null`` None, ``no`` a word."""
    import yaml

    try:
        return yaml.load(text, Loader=_yaml().loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def _key_path(key: str) -> _KeyPath:
    key = key.replace("-", "_")
    return tuple(FLAGS.get(key, key).split("."))


def _read_file(path: Path) -> _Layer:
    import yaml

    if path.is_dir():
        raise ConfigError(f"'{path}' is a folder, a configuration is a file: try '{path / 'config.resolved.yaml'}'")
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        close = nearest(path.name, beside)
        raise ConfigError(
            f"there is no configuration file '{path}'"
            + (f": did you mean '{path.parent / close}'?" if close else ": a file ends in .yaml; `smidgen init` writes one")
        )
    try:
        loader = _yaml().loader(path.read_text(encoding="utf-8-sig"))
        node = loader.get_single_node()
        _refuse_repeats(node, path)
        values = loader.construct_document(node) if node is not None else {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(f"{path}:{mark.line + 1 if mark else 1}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # text that is no UTF-8, numbers beyond Python's, deep lists
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not valid YAML: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}:1: a configuration is 'key: value' lines, found {_show(values)}")
    lines = dict(_lines(node, (), path)) if node is not None else {}
    layer = _flatten((), values, str(path))
    return {where: (value, f"{path}:{lines[where]}" if where in lines else place) for where, (value, place) in layer.items()}


def _refuse_repeats(node: Any, path: Path) -> None:
    """Raise ConfigError for a YAML alias of a list or mapping: ten lines of them can stand for a billion values, or for
    themselves."""
    seen: set[int] = set()
    waiting = [] if node is None or node.id == "scalar" else [node]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            raise ConfigError(f"{path}:{one.start_mark.line + 1}: a list or section is used again by its *name: write it out")
        seen.add(id(one))
        parts = one.value if one.id == "sequence" else [part for pair in one.value for part in pair]
        waiting += [part for part in parts if part.id != "scalar"]


def _lines(node: Any, where: _KeyPath, path: Path) -> Iterable[tuple[_KeyPath, int]]:
    """(path of a key, its line) for every key under a YAML mapping; a key written twice is an error."""
    seen: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in seen:
            raise ConfigError(f"{path}:{line}: '{name}' is already given in line {seen[name]}: keep one of the two")
        seen[name] = line
        yield (*where, name), line
        if value.id == "mapping":
            yield from _lines(value, (*where, name), path)


def _flatten(where: _KeyPath, value: Any, place: str) -> _Layer:
    """Leaves of a nested mapping; only sections are opened, any other mapping is a value."""
    if isinstance(value, Mapping) and (not where or where[0] in _SECTIONS) and (value or not where):
        leaves: _Layer = {}
        for key, inner in value.items():
            leaves |= _flatten((*where, str(key)), inner, place)
        return leaves
    if value is None and len(where) == 1 and where[0] in _SECTIONS:
        value = {}  # a section with nothing under it
    return {where: (value, place)}


def _canonical(layer: _Layer, notify: Callable[[str], None]) -> _Layer:
    """The layer under our own names: aliases renamed, training names moved into ``train``, unknown keys refused."""
    found: _Layer = {}
    for where, (value, place) in layer.items():
        key = ".".join(where)
        target = _ALIASES.get(key)
        if target is None and where[0] in _TRAINING_NAMES:
            target = f"train.{key}"
        if target is not None:
            if key in _ALIASES or not place.startswith(("-", "'")):  # --learning-rate needs no remark
                notify(f"{place}: '{key}' is read as '{target}'")
            where = tuple(target.split("."))
        elif where[0] not in RunConfig.model_fields or (len(where) > 1 and where[0] not in _SECTIONS):
            close = nearest(key, [option.key for option in options()] + [*_SECTIONS, *_ALIASES])
            hint = f"did you mean '{close}'?" if close else "`smidgen train --help` lists the keys"
            raise ConfigError(f"{place}: unknown key '{key}': {hint}")
        if where in found:
            raise ConfigError(f"{place}: '{'.'.join(where)}' is already given at {found[where][1]}: keep one of the two")
        found[where] = (value, place)
    for where, (_, place) in layer.items():
        if where[0].startswith("lora_"):
            found.setdefault(("scheme",), ("lora", place))
    return found


def _merge(layers: Iterable[_Layer]) -> _Layer:
    """One layer out of several; a later value replaces an earlier one, and whatever lies above or below it."""
    merged: _Layer = {}
    for layer in layers:
        for where, entry in layer.items():
            for other in [p for p in merged if p[: len(where)] == where or where[: len(p)] == p]:
                del merged[other]
            merged[where] = entry
    return merged


def _validate(layer: _Layer) -> RunConfig:
    tree: dict[str, Any] = {}
    for where, (value, _) in layer.items():
        branch = tree
        for part in where[:-1]:
            branch = branch.setdefault(part, {})
        branch[where[-1]] = value
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines: dict[_KeyPath, str] = {}
        for problem in sorted(error.errors(), key=lambda problem: "weight" not in problem["loc"]):
            where = tuple(part for part in problem["loc"] if isinstance(part, str))
            while where not in layer and len(where) > 1:
                where = where[:-1]
            lines.setdefault(where, _complaint(where, problem, *layer.get(where, (problem["input"], ""))))
        raise ConfigError("\n".join(lines.values())) from None


def _complaint(where: _KeyPath, problem: Any, value: Any, place: str) -> str:
    key = ".".join(where)
    if "weight" in problem["loc"]:
        return f"{place}: {key} = {_show(value)}: a weight is above 0: leave out a source that is not wanted"
    model: type[BaseModel] = TrainConfig if where[0] == "train" and len(where) > 1 else RunConfig
    field = model.model_fields.get(where[1] if model is TrainConfig else where[0])
    if field is None:
        return f"{place}: unknown key '{key}': `smidgen train --help` lists the keys"
    bounds = {"greater_than_equal": "at least {ge}", "greater_than": "above {gt}", "less_than": "below {lt}"}
    rule = bounds.get(problem["type"], "").format(**problem.get("ctx", {}))
    if problem["type"] == "too_short":
        rule = f"with at least {problem['ctx']['min_length']} entries"
    return f"{place}: {key} = {_show(value)}: expected {expected(field.annotation)}{' ' + rule if rule else ''}"


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------------------------------------------- writing


def dump(config: RunConfig) -> str:
    """YAML of every key, which `load` reads back as an equal RunConfig."""
    return _yaml_text(_plain(config))


def config_sha256(config: RunConfig) -> str:
    """Hex digest of the canonical JSON of what is computed: all keys but output, resume and force."""
    plain = {key: value for key, value in _plain(config).items() if key not in ("output", "resume", "force")}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


_HEAD = """\
# Configuration of a run of smidgen: every key, with its default. Run it with: smidgen train FILE
# '#key:', without a space, is not given: off, or chosen at the start. Take the '#' away and write a value to give it.
"""


def template() -> str:
    """A commented YAML file of every key with its help and default, which `load` reads as RunConfig().

    A key whose default is None is commented out, so that it counts as not given.
    """
    lines = [_HEAD]
    for option in options():
        section, _, name = option.key.rpartition(".")
        if section and f"{section}:" not in lines:
            lines += [f"# {RunConfig.model_fields[section].description}", f"{section}:"]
        indent = "  " if section else ""
        choices = f"; {option.expected}" if option.expected.startswith("one of") else ""
        value = f"#{name}:" if option.default is None else _yaml_text({name: option.default}).rstrip()
        lines += [f"{indent}# {option.help}{choices}", f"{indent}{value}", *([] if section else [""])]
    return "\n".join(lines) + "\n"


def _plain(config: RunConfig) -> dict[str, Any]:
    values = config.model_dump(mode="json")
    values["train"] |= values["train"].pop("extra")
    return values


def _yaml_text(values: Mapping[str, Any]) -> str:
    import yaml

    return yaml.dump(values, Dumper=_yaml().dumper, sort_keys=False, allow_unicode=True, width=120)


class _Yaml(typing.NamedTuple):
    loader: Any
    dumper: Any


@functools.cache
def _yaml() -> _Yaml:
    """PyYAML's safe loader and dumper with the scalar rules of YAML 1.2's core schema (yaml.org/spec/1.2.2, 10.3.2)."""
    import yaml

    rules = (
        ("null", r"~|null|Null|NULL|", "~nN\0"),
        ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
        ("int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
        ("float", r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
        ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
        ("merge", r"<<", "<"),
    )

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]

    for tag, pattern, first in rules:
        letters = ["" if letter == "\0" else letter for letter in first]
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), letters)

    class Dumper(yaml.SafeDumper):
        """Quotes what either version of YAML would read as something else than text."""

        def ignore_aliases(self, data: Any) -> bool:
            return True  # they are not read: `_refuse_repeats`

    def text(dumper: Any, value: str) -> Any:
        plain = yaml.load(value, Loader=Loader) if re.fullmatch(r"[-+.~\w]*", value) else value
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain == value else "'")

    Dumper.add_representer(str, text)
    return _Yaml(Loader, Dumper)
