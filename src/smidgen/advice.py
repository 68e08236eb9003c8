"""What can be done with the memory there is: a table of plans, one recommendation, the cheapest change for what does not fit.

The order of preference is that of the committed records (docs/zo_bench.md): where back-propagation fits, also with activation
checkpointing or as an adapter, it learns more from the same forwards than any method without it; methods from loss values
are for what is left.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from smidgen import adapt, models, optim
from smidgen.config import ConfigError
from smidgen.kinds import detect_kind
from smidgen.planner import Case, Keep, Model, Plan, Planner, refused
from smidgen.simulate import Rows

GIB = 1 << 30
TIGHT = 0.9  # share of the memory above which a plan is tight: libraries, fragmentation and the data come on top; chosen

# Parameter specs: shapes of LLaMA-2 (Touvron et al. 2023, arXiv 2307.09288).
SPECS: dict[str, dict[str, Any]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}

# The ways to tune that a table shows, the preferred first.
PREFERRED: tuple[Case, ...] = (
    Case("adamw", "full"),
    Case("adamw", "full", "checkpointing"),
    Case("velora_adamw", "full", "velora"),
    Case("adamw", "lora"),
    Case("adamw", "lora", "checkpointing"),
    Case("sinkgd", "full", "checkpointing"),
    Case("adamw", "lora", "checkpointing", quantise="nf4"),
    Case("lozo", "full"),
    Case("zo_adam", "full"),
    Case("zo_sgd", "full"),
    Case("zo_sgd", "lora"),
    Case("lozo", "full", quantise="nf4"),
)

LENGTH = 512  # tokens of a row where nobody says; chosen

Fit = Literal["fits", "tight", "no"]

_WHY = {
    "adamw": "back-propagation fits, and learns most from the same number of forwards",
    "velora_adamw": "back-propagation fits with compressed inputs, gradients and optimizer state",
    "sinkgd": "back-propagation fits without the state of an optimizer",
    "zo_adam": "back-propagation does not fit; of the methods that need no gradients it is the one with the most state",
    "lozo": "back-propagation does not fit; low-rank probes cost about what the forwards cost",
    "zo_sgd": "back-propagation does not fit; this needs little more memory than running the model",
}


def configuration(name: str, *, trust_remote_code: bool = False) -> Any:
    """A model's configuration: of a spec such as 7B, of a folder or of a hub name. Raises ConfigError."""
    spec = SPECS.get(_spec(name))
    if spec is None:
        return models.load_config(name, trust_remote_code=trust_remote_code)
    from transformers import LlamaConfig

    return LlamaConfig(**spec, vocab_size=32000, architectures=["LlamaForCausalLM"])


def _spec(name: str) -> str:
    return re.sub(r"^llama-?2?-", "", name.lower())


def is_spec(name: str) -> bool:
    """Whether a model is named by its size alone."""
    return _spec(name) in SPECS


def memory_of(text: str) -> int:
    """Bytes of a size such as 8GB, 7.5 GiB or 512M; units are powers of 1024. Raises ConfigError.

    >>> memory_of("8GB") // 2**20
    8192
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*", text.lower())
    if found is None or float(found[1]) <= 0:
        raise ConfigError(f"memory {text!r} is not a size: give one such as 8GB or 512MB")
    return int(float(found[1]) * 1024 ** " kmgt".index(found[2] or " "))


@dataclass(frozen=True)
class Row:
    """A way to tune the model, what it needs and whether that is there."""

    case: Case
    plan: Plan | None
    reason: str | None  # why there is no plan
    fit: Fit
    measured: int | None = None  # of a row without a plan

    @property
    def needed(self) -> int:
        """Bytes, planned or else measured."""
        return self.plan.terms.total if self.plan is not None else self.measured or 0


@dataclass(frozen=True)
class Advice:
    """All rows for one model, batch and memory."""

    planner: Planner
    memory: int
    rows: tuple[Row, ...]

    @property
    def chosen(self) -> Row | None:
        """The preferred one of those that fit, else of those that are tight."""
        for wanted in ("fits", "tight"):
            for row in self.rows:
                if row.fit == wanted:
                    return row
        return None

    def recommendation(self) -> str:
        """One sentence with its reason."""
        row = self.chosen
        if row is None:
            return f"nothing fits {size(self.memory)}: {self.change() or 'take a smaller model'}"
        tight = ", though tightly" if row.fit == "tight" else ""
        flag = f"--method {row.case.method} --scheme {row.case.scheme}"
        flag += f" --quantise {row.case.quantise}" if row.case.quantise else ""
        flag += {"all": "", "checkpointing": " train.gradient_checkpointing=true", "velora": " activations=velora"}[
            row.case.keep
        ]
        return f"take {flag} ({size(row.needed)}{tight}): {_WHY.get(row.case.method, 'it is what was asked for')}"

    def change(self, case: Case | None = None) -> str | None:
        """The cheapest change with which a case, or the preferred one of all, would fit."""
        for wanted in (case,) if case is not None else PREFERRED:
            now = refused(self.planner, wanted)
            if not isinstance(now, Plan):
                continue
            kept = (now.terms.weights + now.terms.optimizer) / self.planner.model.dtype.itemsize  # whatever the batch
            for said, changed, planner in changes(self.planner, wanted):
                if changed.quantise is None and kept * planner.model.dtype.itemsize > TIGHT * self.memory:
                    continue
                found = refused(planner, changed)
                if isinstance(found, Plan) and found.terms.total <= TIGHT * self.memory:
                    return f"{wanted.label} on {wanted.scheme} would fit with {said} ({size(found.terms.total)})"
        return None


def changes(planner: Planner, case: Case) -> Iterator[tuple[str, Case, Planner]]:
    """Ways to make a case smaller, the cheapest first: recomputation, fewer rows at once, 16-bit weights, an adapter."""
    b, model = planner.rows, planner.model
    recomputed = replace(case, keep="checkpointing")
    backward = case.method in ("adamw", "sgd", "sinkgd")
    if backward and case.keep == "all":
        yield "activation checkpointing", recomputed, planner
    rows = b.rows
    while rows > 1:
        rows //= 2
        fewer = Planner(model, replace(b, rows=rows))
        times = f"batches of {rows} rows, accumulated over {-(-b.rows // rows)}"
        yield times, case, fewer
        if backward and case.keep == "all":
            yield f"activation checkpointing and {times}", recomputed, fewer
    if case.quantise is None and case.scheme == "lora":
        yield "weights in 4 bits (--quantise nf4)", replace(case, quantise="nf4"), planner
        if backward:
            yield "weights in 4 bits and activation checkpointing", replace(recomputed, quantise="nf4"), planner
    if model.dtype == torch.float32:
        yield "weights in bfloat16", case, Planner(replace(model, dtype=torch.bfloat16), b)
        yield (
            "weights in bfloat16 and batches of one row",
            recomputed if backward else case,
            Planner(replace(model, dtype=torch.bfloat16), replace(b, rows=1)),
        )


def advise(planner: Planner, memory: int, cases: Sequence[Case] = PREFERRED) -> Advice:
    """Plans of all cases against a memory."""
    rows = []
    for case in cases:
        found = refused(planner, case)
        if isinstance(found, Plan):
            rows.append(Row(case, found, None, fit_of(found.terms.total, memory)))
        else:
            rows.append(Row(case, None, found, "no"))
    return Advice(planner, memory, tuple(rows))


def with_measured(told: Advice, real: Mapping[str, int | str]) -> Advice:
    """The advice in which rows without a plan are judged by what was measured of them."""
    rows = []
    for row in told.rows:
        found = real.get(row.case.key)
        if row.plan is None and isinstance(found, int):
            rows.append(replace(row, measured=found, fit=fit_of(found, told.memory)))
        else:
            rows.append(row)
    return replace(told, rows=tuple(rows))


def cases(method: str | None, scheme: str | None) -> tuple[Case, ...]:
    """The cases of a table, or those of one method, of one scheme, or of both. Raises ConfigError for unknown names."""
    if scheme is not None:
        adapt.get(scheme)
    if method is None:
        found = tuple(case for case in PREFERRED if scheme in (None, case.scheme))
        return found or tuple(replace(case, scheme=scheme or "") for case in PREFERRED if case.scheme == "lora")
    keeps: tuple[Keep, ...] = ("all", "checkpointing", "velora") if "backward" in optim.get(method).build.uses else ("all",)
    schemes = [scheme] if scheme else ["full", "lora"]
    return tuple(Case(method, s, keep) for s in schemes for keep in keeps)


def default_length(config: Any) -> int:
    """Tokens of a row where nobody says: 512, or what the model has room for."""
    return min(LENGTH, models.context_length(config) or LENGTH)


def fit_of(needed: int, memory: int) -> Fit:
    """Whether so many bytes are there."""
    return "no" if needed > memory else "tight" if needed > TIGHT * memory else "fits"


def model_of(config: Any, dtype: str, device: str, classes: int | None = None) -> Model:
    """What a planner wants to know, from a configuration. Raises ConfigError."""
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "auto":
        chosen = torch.float32 if device == "cpu" else (config.dtype or torch.bfloat16)
    elif dtype in kinds:
        chosen = kinds[dtype]
    else:
        raise ConfigError(f"unknown dtype '{dtype}': auto, {', '.join(kinds)}")
    return Model(config, detect_kind(config, classes is not None), chosen, device, classes)


def size(n: float) -> str:
    """Bytes as a person reads them.

    >>> size(1536 * 2**20)
    '1.5 GiB'
    """
    return f"{n / GIB:.1f} GiB" if n >= GIB else f"{n / 2**20:.0f} MiB"


def table(advice: Advice) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(heads, rows) as text."""
    heads = ("method", "scheme", "weights", "grads", "optim", "activ", "logits", "scratch", "total", "passes", "fits")
    lines = []
    for row in advice.rows:
        if row.plan is None:
            if row.measured is not None:
                lines.append((row.case.label, row.case.scheme, *["-"] * 6, _short(row.measured), "-", row.fit))
                continue
            lines.append((row.case.label, row.case.scheme, *["-"] * 8, f"refused: {row.reason}"))
            continue
        lines.append((row.case.label, row.case.scheme, *map(_short, row.plan.terms.values()), _passes(row.plan), row.fit))
    return heads, lines


def _short(n: int) -> str:
    return f"{n / GIB:.2f}"


def _passes(plan: Plan) -> str:
    p = plan.passes
    parts = [f"{p.forwards} forwards"] if p.forwards else []
    parts += [f"{p.backwards} backward"] if p.backwards else []
    parts += [f"{p.slopes} tangent"] if p.slopes else []
    return " + ".join(parts)


def as_json(advice: Advice) -> dict[str, Any]:
    """The whole advice for --json."""
    rows: list[Mapping[str, Any]] = []
    for row in advice.rows:
        entry: dict[str, Any] = {"method": row.case.method, "scheme": row.case.scheme, "keep": row.case.keep}
        entry |= {"quantise": row.case.quantise, "fits": row.fit}
        if row.plan is None:
            entry["refused"] = row.reason
        else:
            p = row.plan.passes
            entry |= {"bytes": {**vars(row.plan.terms), "total": row.plan.terms.total}, "tuned_weights": row.plan.tuned}
            entry |= {"forwards": p.forwards, "backwards": p.backwards, "slopes": p.slopes}
        rows.append(entry)
    chosen = advice.chosen
    return {
        "memory": advice.memory,
        "batch": advice.planner.rows.rows,
        "length": advice.planner.rows.length,
        "dtype": str(advice.planner.model.dtype).removeprefix("torch."),
        "rows": rows,
        "recommended": None
        if chosen is None
        else {key: getattr(chosen.case, key) for key in ("method", "scheme", "keep", "quantise")},
        "recommendation": advice.recommendation(),
    }


def rows_of(batch: int, length: int, labels: int | None) -> Rows:
    """The batch of a plan. Raises ConfigError."""
    if batch < 1 or length < 2:
        raise ConfigError(f"a batch of {batch} rows of {length} tokens: give at least one row of two tokens")
    return Rows(batch, length, labels)
