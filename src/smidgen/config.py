"""RunConfig: the keys of a run, their types, defaults and help; and the errors a user can cause.

The bottom layer: imports pydantic and the standard library. Files, flags and overrides are read by `config_file`.
Names of methods, schemes and tasks, and the extra keys of ``train``, are checked where they are used.
"""

from __future__ import annotations

import os
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = [
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
    "expected",
    "json_schema",
    "nearest",
    "notice",
    "options",
    "speaker",
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
    """Print one line to stderr, by the first of several ranks: a value was read in another way than written, or replaced."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def speaker() -> str:
    """Who says a line on the console: the command, and of several ranks which."""
    return f"smidgen (rank {os.environ.get('RANK', '0')})" if os.environ.get("WORLD_SIZE", "1") != "1" else "smidgen"


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
    if isinstance(value, bool) and "true or false" not in expected(cls.model_fields[info.field_name].annotation):
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

    model: str = Field(
        "embedded", description="hub name, folder, 'embedded' (the model that ships), or config:NAME for random weights"
    )
    tokenizer: str | None = Field(None, description="folder or hub name of the tokenizer; none: the model's own")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of the weights; auto: float32 on a CPU, the checkpoint's elsewhere"
    )
    quantise: Literal["nf4", "int8"] | None = Field(
        None, description="hold the linear layers in 4 or 8 bits, never written; scheme full then saves a LoRA adapter"
    )
    offload: Literal["disk", "host"] | None = Field(
        None, description="keep weights on disk, or in host memory beside a CUDA device; forward-only, layer by layer"
    )
    device_map: Literal["auto"] | None = Field(
        None, description="auto: accelerate spreads the layers over the devices there are; forward-only"
    )
    kind: Literal["auto", "causal", "masked", "classification", "seq2seq", "image"] = Field(
        "auto", description="what the model predicts; auto: from its architecture and the data"
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the model")

    task: str | None = Field(None, description="a task's name (see `smidgen tasks`)")
    data: str | list[str | Source] | None = Field(
        None, description="file (.jsonl .json .csv .tsv .parquet .txt .npz), folder, hub id, or a weighted list of these"
    )
    eval_data: str | list[str | Source] | None = Field(
        None, description="rows to evaluate on; none: 10 % of the rows, at most 500, held out by row hash"
    )
    template: str | None = Field(
        None, description="prompt of labelled rows: {column} slots and one {answer} slot, '{text}\\nLabel: {answer}'"
    )
    words: list[str] | None = Field(None, min_length=2, description="label words; word i stands for integer label i")
    task_args: dict[str, Any] = Field({}, description="further options of the task (see `smidgen tasks NAME`)")
    chat: Literal["none", "model", "vicuna", "tulu"] = Field(
        "none",
        description="form of conversation for prompts: the model's, Vicuna's or Tulu's; rows of turns always have one",
    )
    packing: bool | Literal["stream"] = Field(
        False, description="several rows in one of max_length tokens, apart; stream: text end to end, cut into rows"
    )
    streaming: bool = Field(False, description="read text while the run goes, not at its start; with packing=stream")
    benchmark_split: bool = Field(
        False, description="the task's published numbers of rows: dev drawn from training rows by seed, validation is the test"
    )
    k_shot: int | None = Field(
        None, ge=1, description="rows of every class to train on, and as many for dev, by seed; validation is the test"
    )
    max_length: int | None = Field(None, ge=2, description="tokens of a row; none: 95th percentile, at most 1024")
    train_rows: int | None = Field(None, ge=1, description="rows to train on; none: all")
    dev_rows: int | None = Field(None, ge=1, description="rows of the dev split; none: all")
    test_rows: int | None = Field(None, ge=1, description="rows of the test split; none: all")

    method: str = Field("zo_sgd", description="optimiser (see `smidgen methods`); auto: forward-only, chosen for the scheme")
    preset: str | None = Field(
        None, description="a named set of the method's options, or published settings (see `smidgen methods --presets`)"
    )
    method_args: dict[str, Any] = Field({}, description="options of the method (see `smidgen methods NAME`)")
    scheme: str = Field("full", description="what is tuned: full, lora, ...")
    scheme_args: dict[str, Any] = Field({}, description="options of the scheme")
    head_start: Literal["model", "readout"] = Field(
        "model", description="how a classification head or the label words' rows start; readout: fitted in closed form"
    )
    activations: str | None = Field(
        None, description="what back-propagation keeps of the forward: velora; none: what torch keeps"
    )
    activations_args: dict[str, Any] = Field({}, description="options of activations")

    objective: Literal["auto", "answer", "choice", "hinge", "accuracy", "f1", "exact_match"] = Field(
        "auto",
        description="what a step minimises: an answer's loss, that of choosing it, or minus a metric; auto: the task's",
    )
    reward: str | None = Field(None, description="what a step maximises: module:function of (prompt, text, answers)")
    base_penalty: float = Field(
        0.0, ge=0, description="what a reward loses for each nat a token that the base's own answers lose"
    )
    max_new_tokens: int = Field(50, ge=1, description="tokens of an answer that is generated to be measured")
    scoring: Literal["mean", "sum"] = Field(
        "mean", description="how options of several tokens compare: by the mean or the sum of their log-likelihoods"
    )

    train: TrainConfig = Field(
        default_factory=lambda: TrainConfig.model_validate({}), description="names of transformers.TrainingArguments, unchanged"
    )

    seed: int = Field(0, ge=0, lt=2**64, description="addresses all noise, the row order and new heads; 64 bits")
    threads: int | None = Field(None, ge=1, description="CPU threads of torch and numba; none: as torch chooses")
    reuse: int = Field(
        1, ge=0, description="block-wise probing keeps the hidden states of every k-th layer; 0: runs all layers each time"
    )
    best: bool = Field(
        False,
        description="keep the tuned tensors with the best dev figure of all evaluations, and measure the test split there",
    )
    probes_at_once: int | None = Field(
        None, ge=1, description="low-rank probes of one forward, at most; none: as many as memory takes"
    )
    cuda_graphs: bool = Field(
        True,
        description="on CUDA, capture the evaluations of dense probes as graphs and replay them: fewer milliseconds a step",
    )
    probe_ranks: int = Field(1, ge=1, description="ranks in a row that see the same rows and share a step's probes; 1: none")
    check_ranks: int = Field(100, ge=0, description="steps between comparisons of all ranks' weights by hash; 0: none")
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
                found.append(Option(prefix + name, expected(field.annotation), default, field.description or ""))
    return found


def json_schema() -> dict[str, Any]:
    """JSON schema of a configuration file, for editors."""
    schema = RunConfig.model_json_schema()
    train = schema["$defs"]["TrainConfig"]
    train["properties"].pop("extra")
    train["additionalProperties"] = True
    return schema


def expected(annotation: Any) -> str:
    """A type in words."""
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Source: "{path, weight}"}
    if annotation in plain:
        return plain[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(expected(part) for part in arguments if part is not type(None))
    if origin is list:
        return f"a list of {expected(arguments[0])}"
    return "a section of 'key: value' lines"
