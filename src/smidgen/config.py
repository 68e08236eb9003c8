"""RunConfig: what a run is told, from YAML, dotted overrides and flags; and the errors a user can cause.

Order: defaults < file < flags and ``a.b=c`` overrides. An unknown key is an error that names the nearest key, the file
and the line; a value of the wrong type names the value, the place and the type. YAML is read with the scalar rules of
YAML 1.2: ``1e-4`` is a number and ``no`` is a word, so ``words: [no, yes]`` means what it says.

The bottom layer: imports pydantic and the standard library, PyYAML only when a file or an override is read.
Names of methods, schemes and tasks, and the extra keys of ``train``, are checked where they are used.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

__all__ = [
    "FLAGS",
    "ConfigError",
    "DataError",
    "Diverged",
    "Interrupted",
    "MemoryRefused",
    "Option",
    "RunConfig",
    "Source",
    "TrainConfig",
    "UserError",
    "config_sha256",
    "dump",
    "json_schema",
    "load",
    "nearest",
    "notice",
    "options",
    "parse_value",
    "with_values",
]


# ---------------------------------------------------------------------------------------------------- errors


class UserError(Exception):
    """An error that its user can end: the message names the value, the rule and the way out; no traceback is shown."""

    exit_code = 1

    def __init__(self, message: str, exit_code: int | None = None):
        super().__init__(message)
        if exit_code is not None:
            self.exit_code = exit_code


class ConfigError(UserError, ValueError):
    """Usage or configuration."""

    exit_code = 2


class MemoryRefused(UserError):  # noqa: N818 - what happened, not what broke
    """The run does not fit in memory."""

    exit_code = 3


class Diverged(UserError):  # noqa: N818 - what happened, not what broke
    """Too many steps without a finite loss."""

    exit_code = 4


class DataError(UserError, ValueError):
    """The data set, not the command, is wrong."""

    exit_code = 5


class Interrupted(UserError):  # noqa: N818 - what happened, not what broke
    """Stopped by a signal with everything journalled: the same command with --resume goes on."""

    exit_code = 75


def notice(line: str) -> None:
    """Print one line to stderr: a value was read in another way than it was written, or replaced."""
    print(line, file=sys.stderr)


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that looks most like `name`, or None where none comes close.

    A dotted candidate also matches by its last part, so ``learning_rte`` finds ``train.learning_rate``.
    """
    import difflib

    names: dict[str, str] = {}
    for candidate in candidates:
        names.setdefault(candidate.rsplit(".", 1)[-1], candidate)
        names[candidate] = candidate
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)  # difflib's own default
    return names[close[0]] if close else None


# ---------------------------------------------------------------------------------------------------- fields


def _refuse_bool(cls: type[BaseModel], value: Any, info: Any) -> Any:
    """pydantic would read ``seed: true`` as 1."""
    if isinstance(value, bool) and "true or false" not in _expected(cls.model_fields[info.field_name].annotation):
        raise ValueError("true or false is not a number")
    return value


class Source(BaseModel):
    """One of several data sources."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(description="file, folder or hub id")
    weight: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="how often an epoch shows each of its rows; 0.5 shows half of them"
    )


class TrainConfig(BaseModel):
    """Section ``train``: names of transformers.TrainingArguments, unchanged."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    per_device_train_batch_size: int = Field(16, ge=1, description="rows of one micro-batch")
    per_device_eval_batch_size: int = Field(32, ge=1, description="rows of one evaluation batch")
    gradient_accumulation_steps: int = Field(1, ge=1, description="micro-batches of one step")
    learning_rate: float | None = Field(None, ge=0, description="step size; chosen for the method where not given")
    max_steps: int | None = Field(None, ge=0, description="steps of the run; chosen for the method where not given")
    num_train_epochs: float | None = Field(None, gt=0, description="passes over the training rows, instead of steps")
    lr_scheduler_type: str = Field("constant", description="learning-rate schedule")
    warmup_steps: float = Field(0, ge=0, description="steps of linear warm-up; below 1: a share of all steps")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    max_grad_norm: float = Field(1.0, ge=0, description="gradient clipping of methods with back-propagation; 0: off")
    logging_steps: float | None = Field(None, gt=0, description="steps between two log lines; none: a 50th of the run")
    eval_steps: float | None = Field(None, gt=0, description="steps between two evaluations; none: a fifth of the run")
    save_steps: float | None = Field(None, gt=0, description="steps between two checkpoints; none: chosen for the method")
    save_total_limit: int | None = Field(2, ge=1, description="checkpoints that are kept")
    report_to: str | list[str] = Field("none", description="trackers, as in transformers")
    push_to_hub: bool = Field(False, description="upload the result")
    hub_model_id: str | None = Field(None, description="where to upload it")
    extra: dict[str, Any] = Field(
        {}, description="any other field of transformers.TrainingArguments; written beside the keys above"
    )

    _numbers = field_validator("*", mode="before")(_refuse_bool)

    @model_validator(mode="before")
    @classmethod
    def _collect_extra(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        known = {k: v for k, v in values.items() if k in cls.model_fields and k != "extra"}
        extra = dict(values.get("extra") or {}) | {k: v for k, v in values.items() if k not in cls.model_fields}
        return known | {"extra": extra}

    @field_validator("max_steps", mode="before")
    @classmethod
    def _unset_steps(cls, value: Any) -> Any:
        return None if value == -1 else value  # transformers writes -1 for "not given"


class RunConfig(BaseModel):
    """Everything a run is told. ``None`` means: chosen at the start, and printed with its source."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field("embedded", description="hub name, folder, or 'embedded' for the model that ships with smidgen")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of the weights; auto: float32 on a CPU, the checkpoint's elsewhere"
    )
    kind: Literal["auto", "causal", "masked", "classification", "seq2seq"] = Field(
        "auto", description="what the model predicts; auto: from its architecture and the data"
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the model")

    task: str | None = Field(None, description="a task's name (see `smidgen tasks`)")
    data: str | list[str | Source] | None = Field(
        None, description="file (.jsonl .json .csv .tsv .parquet .txt), folder, hub id, or a weighted list of these"
    )
    eval_data: str | list[str | Source] | None = Field(
        None, description="rows to evaluate on; none: 10 % of the rows, at most 500, held out by row hash"
    )
    template: str | None = Field(
        None, description="prompt of labelled rows: {column} slots and one {answer} slot, '{text}\\nLabel: {answer}'"
    )
    words: list[str] | None = Field(None, min_length=2, description="label words; word i stands for integer label i")
    max_length: int | None = Field(None, ge=2, description="tokens of a row; none: 95th percentile, at most 1024")
    train_rows: int | None = Field(None, ge=1, description="rows to train on; none: all")
    dev_rows: int | None = Field(None, ge=1, description="rows of the dev split; none: all")
    test_rows: int | None = Field(None, ge=1, description="rows of the test split; none: all")

    method: str = Field("zo_sgd", description="optimiser (see `smidgen methods`)")
    preset: str | None = Field(None, description="a named set of the method's options")
    method_args: dict[str, Any] = Field({}, description="options of the method (see `smidgen methods NAME`)")
    scheme: str = Field("full", description="what is tuned: full, lora, ...")
    scheme_args: dict[str, Any] = Field({}, description="options of the scheme")

    train: TrainConfig = Field(
        default_factory=lambda: TrainConfig.model_validate({}), description="names of transformers.TrainingArguments, unchanged"
    )

    seed: int = Field(0, ge=0, lt=2**64, description="addresses all noise, the row order and new heads; 64 bits")
    threads: int | None = Field(None, ge=1, description="CPU threads of torch and numba; none: as torch chooses")
    max_bad_steps: int = Field(20, ge=1, description="steps without a finite loss before the run ends")
    output: str | None = Field(None, description="folder of the run")
    resume: bool = Field(False, description="go on with the run in the output folder")
    force: bool = Field(False, description="replace what is in the output folder")

    _numbers = field_validator("*", mode="before")(_refuse_bool)

    @field_validator("words", mode="before")
    @classmethod
    def _number_words(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        return [str(word) if isinstance(word, int) and not isinstance(word, bool) else word for word in value]


FLAGS: Mapping[str, str] = {  # short flag -> key; every other flag is its key
    "steps": "train.max_steps",
    "lr": "train.learning_rate",
    "batch": "train.per_device_train_batch_size",
    "eps": "method_args.eps",
}

_SECTIONS = ("train", "method_args", "scheme_args")

_ALIASES: Mapping[str, str] = {  # spellings of other tools -> key
    "model_name_or_path": "model",
    "model_name": "model",
    "base_model": "model",
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


class Option(typing.NamedTuple):
    """One key of RunConfig, for help texts and tables."""

    key: str
    expected: str
    default: Any
    help: str


def options() -> list[Option]:
    """Every key of RunConfig, those of ``train`` dotted, in the order of declaration."""
    found = []
    for prefix, model in (("", RunConfig), ("train.", TrainConfig)):
        for name, field in model.model_fields.items():
            if prefix + name not in ("train", "train.extra"):
                default = field.get_default(call_default_factory=True)
                found.append(Option(prefix + name, _expected(field.annotation), default, field.description or ""))
    return found


def json_schema() -> dict[str, Any]:
    """JSON schema of a configuration file, for editors."""
    schema = RunConfig.model_json_schema()
    train = schema["$defs"]["TrainConfig"]
    train["properties"].pop("extra")
    train["additionalProperties"] = True
    return schema


# ---------------------------------------------------------------------------------------------------- reading

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
            given |= _flatten(_key_path(key), value, f"--{key.replace('_', '-')}")
    typed: _Layer = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip(" -"):
            raise ConfigError(f"'{text}' is not an override: write key=value, such as train.max_steps=100")
        typed |= _flatten(_key_path(key.strip(" -")), parse_value(value), f"'{text}'")
    return _validate(_merge(_canonical(layer, notify) for layer in (file, given, typed)))


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """A copy of `config` with dotted keys replaced, validated as `load` does."""
    changes = [_flatten(tuple(key.split(".")), value, f"'{key}'") for key, value in values.items()]
    return _validate(_merge([_flatten((), _plain(config), ""), *changes]))


def parse_value(text: str) -> Any:
    """The value that `text` spells in YAML: ``1e-4`` a number, ``[a, b]`` a list, ``null`` None, ``no`` a word."""
    import yaml

    try:
        return yaml.load(text, Loader=_yaml().loader)
    except yaml.YAMLError:
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
        values = loader.construct_document(node) if node is not None else {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(f"{path}:{mark.line + 1 if mark else 1}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}:1: a configuration is 'key: value' lines, found {_show(values)}")
    lines = dict(_lines(node, (), path)) if node is not None else {}
    layer = _flatten((), values, str(path))
    return {where: (value, f"{path}:{lines[where]}" if where in lines else place) for where, (value, place) in layer.items()}


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
        for problem in error.errors():
            where = tuple(part for part in problem["loc"] if isinstance(part, str))
            while where not in layer and len(where) > 1:
                where = where[:-1]
            lines.setdefault(where, _complaint(where, problem, *layer.get(where, (problem["input"], ""))))
        raise ConfigError("\n".join(lines.values())) from None


def _complaint(where: _KeyPath, problem: Any, value: Any, place: str) -> str:
    key = ".".join(where)
    model: type[BaseModel] = TrainConfig if where[0] == "train" and len(where) > 1 else RunConfig
    field = model.model_fields[where[1] if model is TrainConfig else where[0]]
    bounds = {"greater_than_equal": "at least {ge}", "greater_than": "above {gt}", "less_than": "below {lt}"}
    rule = bounds.get(problem["type"], "").format(**problem.get("ctx", {}))
    if problem["type"] == "too_short":
        rule = f"with at least {problem['ctx']['min_length']} entries"
    return f"{place}: {key} = {_show(value)}: expected {_expected(field.annotation)}{' ' + rule if rule else ''}"


def _expected(annotation: Any) -> str:
    """A type in words."""
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Source: "{path, weight}"}
    if annotation in plain:
        return plain[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_expected(part) for part in arguments if part is not type(None))
    if origin is list:
        return f"a list of {_expected(arguments[0])}"
    return "a section of 'key: value' lines"


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------------------------------------------- writing


def dump(config: RunConfig) -> str:
    """YAML of every key, which `load` reads back as an equal RunConfig."""
    import yaml

    return yaml.dump(_plain(config), Dumper=_yaml().dumper, sort_keys=False, allow_unicode=True, width=120)


def config_sha256(config: RunConfig) -> str:
    """Hex digest of the canonical JSON of what is computed: all keys but output, resume and force."""
    plain = {key: value for key, value in _plain(config).items() if key not in ("output", "resume", "force")}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _plain(config: RunConfig) -> dict[str, Any]:
    values = config.model_dump(mode="json")
    values["train"] |= values["train"].pop("extra")
    return values


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
        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    for tag, pattern, first in rules:
        letters = ["" if letter == "\0" else letter for letter in first]
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), letters)

    class Dumper(yaml.SafeDumper):
        """Quotes what either version of YAML would read as something else than text."""

    def text(dumper: Any, value: str) -> Any:
        plain = yaml.load(value, Loader=Loader) if re.fullmatch(r"[-+.~\w]*", value) else value
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain == value else "'")

    Dumper.add_representer(str, text)
    return _Yaml(Loader, Dumper)
