"""Published presets: model size x task x method x scheme -> learning rate, eps, batch, steps, with their source.

A name has a slash: `mezo/opt-13b/sst2/full`, or with the method where a study compares several,
`zo-bench/opt-1.3b/sst2/zo_momentum/lora`. `--preset NAME` fills method, scheme, task, options, batch, steps and rows where
they were not given; the model is the user's. Names without a slash are a method's own (`PRESETS` of its module).

Most studies publish the grid they searched, not what they found. A preset takes one value of it: the one marked * below
(stated to be good by the authors), else the middle of the grid; of two in the middle the larger, with momentum 0.9, whose
steps are ten times as long, the smaller; for eps 1e-3, the value of MeZO, where the grid has it. `grid` keeps all values.

Rows are those of `benchmark_split`, or k of every class (`k_shot`). It does not: choose a model, or set its dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from smidgen.config import ConfigError, RunConfig, nearest
from smidgen.config_file import with_values

__all__ = ["Preset", "fill", "get", "method_options", "names", "of_method"]


@dataclass(frozen=True)
class Preset:
    """One cell of a published table of settings."""

    name: str
    model: str  # size and family it was published for
    task: str
    method: str
    scheme: str
    options: Mapping[str, Any]  # of the method: lr, eps, ...
    grid: Mapping[str, tuple[float, ...]]  # every published value of lr, eps, ...
    keys: Mapping[str, Any]  # of the run: batch, steps or epochs, rows, ...
    source: str
    scheme_args: Mapping[str, Any] = field(default_factory=dict)


class _Study(NamedTuple):
    """What all cells of a study share."""

    source: str
    keys: Mapping[str, Any]
    options: Mapping[str, Any] = {}
    per_method: bool = False  # the method is part of the name


_MEZO = "MeZO, arXiv 2305.17333"
_SWEEPS = "ZO-Bench, arXiv 2402.11592, its public sweep files"
_GAUSS = {"distribution": "gaussian"}
_FLAGS = {"batch": "train.per_device_train_batch_size", "steps": "train.max_steps", "epochs": "train.num_train_epochs"}

_REFERENCE: Mapping[str, Any] = {  # options of cma_es: its preset `reference`
    "dimension": 500, "population": 20, "budget": 8000, "alpha": 1.0, "init": "hidden", "compat_whole_dimension": True,
    "covariance": "full", "incumbent": "best_ever",
}  # fmt: skip

_STUDIES = {  # the first word begins the names of its presets
    "mezo": _Study(f"{_MEZO}, table 16, and its README", {"batch": 16, "steps": 20000}, _GAUSS),
    "mezo-f1": _Study(f"{_MEZO}, its F1 objective", {"batch": 16, "steps": 20000, "objective": "f1"}, _GAUSS),
    "mezo-ft": _Study(f"{_MEZO}, table 16, its baseline", {"batch": 8, "epochs": 5, "train.lr_scheduler_type": "linear"}),
    "mezo roberta": _Study(f"{_MEZO}, table 15", {"batch": 64, "steps": 100000}, _GAUSS),
    "mezo-adam roberta": _Study(f"{_MEZO}, table 15 (eps as its SGD's)", {"batch": 64, "steps": 100000}, _GAUSS),
    "mezo-ft roberta": _Study(f"{_MEZO}, table 15, its baseline", {"batch": 8, "steps": 1000}),
    "zo-bench": _Study(_SWEEPS, {"batch": 16, "steps": 20000}, _GAUSS, True),
    "zo-bench first-order": _Study(f"{_SWEEPS} (625 steps as in the paper)", {"batch": 16, "steps": 625}, {}, True),
    "lozo": _Study("LOZO, arXiv 2410.07698, its scripts (eps times sqrt(2))", {"batch": 16, "steps": 20000}, _GAUSS),
    "subzero": _Study("SubZero, arXiv 2410.08989, its README", {"batch": 16, "steps": 20000}, _GAUSS),
    "zo-muon": _Study("ZO-Muon, arXiv 2602.17155, its scripts (eps times sqrt(64 / 5120))", {"steps": 8000}, _GAUSS),
    "dfo-lora": _Study("DFO-LoRA, its public code", {"batch": 224, "task_args": {"prompts": "dfo"}}, _REFERENCE),
    "sparse-mezo": _Study(
        "Sparse-MeZO, arXiv 2402.15751 (lr, eps, batch, steps are MeZO's)", {"batch": 16, "steps": 20000}, _GAUSS
    ),
}

_FIXED: Mapping[str, Mapping[str, Any]] = {  # further options of a study's method
    "zo-bench zo_momentum": {"momentum": 0.9},
    "zo-bench zo_sparse": {"mask": "random", "group": "global"},
    "sparse-mezo zo_sparse": {"mask": "small", "group": "layer"},
}
_REMARKS = {  # what the public runs did that the method does not
    "zo_sign": "; those runs drove AdamW by accident, which compat options repeat",
    "zo_conservative": "; those runs drove AdamW by accident, which compat options repeat",
    "zo_sparse": "; those runs zeroed more weights than they say, which a compat option repeats",
    "zo_block": "; those runs shared one noise among blocks, which a compat option repeats",
}

_OPT = "sst2 rte cb boolq wsc wic multirc copa record"
_ROBERTA = ("sst2", "sst5", "snli", "mnli", "rte", "trec")
_FEW_SHOT = ("sst2", "yelp", "ag_news", "dbpedia", "mrpc", "snli", "rte")
_WHERE = {  # models and tasks that share a line of the table
    "opt": ("opt-13b", _OPT),
    "opt-but-wsc": ("opt-13b", _OPT.replace("wsc ", "")),
    "opt-wsc": ("opt-13b", "wsc"),
    "opt-free": ("opt-13b", "squad drop"),
    "opt-squad": ("opt-13b", "squad"),
    "roberta": ("roberta-large", " ".join(f"{task}-k{k}" for task in _ROBERTA for k in (16, 512))),
    "sst2": ("opt-1.3b", "sst2"),
    "sst2-13b": ("opt-13b", "sst2"),
    "rte": ("opt-13b", "rte"),
    "copa": ("opt-13b llama-2-7b llama-2-13b", "copa"),
    "copa-opt": ("opt-13b", "copa"),
    "copa-llama": ("llama-2-7b llama-2-13b", "copa"),
    "copa-7b": ("vicuna-7b mistral-7b", "copa"),
    "wino": ("opt-13b", "winogrande"),
    "few-shot": ("roberta-large", " ".join(f"{task}-k16" for task in _FEW_SHOT)),
    "sparse": ("llama-7b llama-2-7b mistral-7b opt-13b", "boolq rte wic"),
}

# where | methods | schemes | lr | eps | further options, under the study's name. `..` goes down by tenths, and by halves of
# them too where an end is a 5. * marks a value that the authors name.
_SPARSE = "sparsity=0.9,0.8,0.7,0.6,0.5,0.4,0.3,0.2,0.1 | resample=20000,10000,5000,1000,500,100,10,1"
_TABLE = f"""
mezo
  opt-but-wsc  | zo_sgd | full   | 1e-6*,1e-7           | 1e-3
  opt-wsc      | zo_sgd | full   | 1e-6,1e-7*           | 1e-3
  opt-free     | zo_sgd | full   | 1e-6*,5e-7,1e-7      | 1e-3
  opt          | zo_sgd | prefix | 1e-2,1e-3            | 1e-1
  opt-free     | zo_sgd | prefix | 5e-2,1e-2,5e-3       | 1e-1
  opt          | zo_sgd | lora   | 1e-4,5e-5            | 1e-2
  opt-free     | zo_sgd | lora   | 1e-4,5e-5,1e-5       | 1e-2
mezo-f1
  opt-squad    | zo_sgd | full   | 1e-5,5e-6,1e-6       | 1e-3
  opt-squad    | zo_sgd | prefix | 1e-1,5e-2,1e-2       | 1e-1
mezo-ft
  opt opt-free | adamw  | full   | 8e-5,5e-5,1e-5       | -
mezo roberta
  roberta      | zo_sgd | full   | 1e-5,1e-6,1e-7       | 1e-3
  roberta      | zo_sgd | prefix | 1e-2,5e-3,1e-3       | 1e-1
  roberta      | zo_sgd | lora   | 1e-4,5e-5,1e-5       | 1e-3 | weight_decay=0.1
mezo-adam roberta
  roberta      | zo_adam | full  | 1e-3..1e-6           | 1e-3
mezo-ft roberta
  roberta      | adamw  | full   | 5e-5..1e-5           | -
zo-bench
  sst2         | zo_sgd          | full               | 1e-4..1e-8                     | 1e-3..1e-5
  sst2         | zo_sgd          | lora prompt        | 1e-3..1e-6                     | 1e-2..1e-4
  sst2         | zo_sgd          | prefix             | 1e-2..1e-4                     | 1e-1
  sst2-13b     | zo_sgd          | head               | 1e-4..1e-8                     | 1e-3..1e-5
  sst2         | zo_momentum     | full               | 1e-5..1e-8                     | 1e-3..1e-5
  sst2         | zo_momentum     | lora prompt        | 1e-3..1e-6                     | 1e-2..1e-4
  sst2         | zo_momentum     | prefix             | 1e-2..1e-4                     | 1e-1
  sst2         | zo_conservative | full               | 1e-5..1e-8                     | 1e-2..1e-4
  sst2         | zo_conservative | lora prompt        | 1e-4..1e-7                     | 1e-2..1e-4
  sst2         | zo_conservative | prefix             | 1e-3..1e-6                     | 1e-2..1e-4
  sst2         | zo_sign         | full prompt        | 1e-4,1e-6,1e-8                 | 1e-3,1e-5
  sst2         | zo_sign         | lora               | 1e-3..1e-6                     | 1e-2..1e-4
  sst2         | zo_sign         | prefix             | 1e-2..1e-4                     | 1e-1
  sst2         | zo_adam         | full prefix prompt | 1e-4..1e-8                     | 1e-3..1e-5
  sst2         | zo_adam         | lora               | 1e-4..1e-6                     | 1e-2..1e-5
  sst2         | forward_grad    | full               | 1e-5,1e-6,5e-7,1e-7,1e-8       | -
  sst2         | forward_grad    | lora               | 5e-5,1e-5*,5e-6,1e-6,5e-7,1e-7 | -
  sst2         | forward_grad    | prefix             | 5e-3..5e-4                     | -
  sst2         | forward_grad    | prompt             | 1e-2,1e-3,1e-4,5e-5            | -
  sst2         | zo_sparse       | full               | 1e-6 | 1e-3 | {_SPARSE}
  sst2         | zo_block        | full               | 1e-8                           | 1e-3
  copa-opt     | zo_sgd          | full               | 1e-4..1e-8                     | 1e-2..1e-4
  copa-llama   | zo_sgd          | full               | 1e-5..1e-8                     | 1e-2..1e-4
  copa         | zo_sgd          | lora               | 5e-3,1e-3,5e-4,1e-4,5e-5,1e-5  | 1e-2,1e-3
  copa         | zo_sgd          | prefix prompt      | 1e-4..1e-8                     | 1e-2..1e-4
  copa         | zo_momentum     | prefix prompt      | 1e-3..1e-6                     | 1e-2..1e-4
  copa         | zo_conservative | prefix prompt      | 1e-3..1e-7                     | 1e-2..1e-4
  copa         | zo_sign         | prefix prompt      | 1e-4..1e-8                     | 1e-3..1e-5
  copa         | zo_adam         | prefix prompt      | 1e-4..1e-8                     | 1e-2..1e-4
  copa         | zo_momentum zo_conservative zo_sign zo_adam | full | 1e-5..1e-8       | 1e-2..1e-4
  copa         | zo_momentum zo_conservative zo_sign zo_adam | lora | 5e-3,1e-4,5e-5,1e-5 | 1e-2,1e-3
  copa-opt     | forward_grad    | full               | 1e-5..5e-8                     | -
  copa-llama   | forward_grad    | full               | 1e-4..1e-8                     | -
  copa         | forward_grad    | lora prefix        | 1e-4..1e-8                     | -
  copa         | forward_grad    | prompt             | 1e-2..1e-6                     | -
  wino         | zo_sgd          | full               | 1e-4..1e-8                     | 1e-2..1e-4
  copa-7b      | zo_sgd          | full               | 1e-5..1e-8                     | 1e-2..1e-4
  wino copa-7b | zo_momentum     | full               | 1e-4..1e-8                     | 1e-3..1e-5
  wino copa-7b | zo_momentum     | lora               | 1e-3..1e-6                     | 1e-2..1e-4
  wino copa-7b | zo_momentum     | prefix             | 1e-3..1e-7                     | 1e-3..1e-5
  wino copa-7b | zo_conservative zo_sign zo_adam | full | 1e-5..1e-8                   | 1e-2..1e-4
  wino copa-7b | zo_sgd zo_conservative zo_sign  | lora prefix prompt | 1e-3..1e-7     | 1e-2..1e-4
  wino copa-7b | zo_adam         | lora prefix prompt | 1e-4..1e-8                     | 1e-2..1e-4
  wino         | forward_grad    | full               | 1e-5..5e-8                     | -
  copa-7b      | forward_grad    | full               | 1e-4..1e-8                     | -
  wino copa-7b | forward_grad    | lora prefix prompt | 1e-3..1e-7                     | -
zo-bench first-order
  sst2         | adamw | full prompt | 1e-2,1e-4,1e-6            | -
  sst2         | adamw | lora prefix | 1e-2..1e-6                | -
  sst2         | sgd   | full        | 1e-3..1e-7                | -
  sst2         | sgd   | lora        | 1e-2..1e-6                | -
  sst2         | sgd   | prompt      | 1e-4..1e-8                | -
  copa         | adamw | full        | 1e-6,1e-7                 | -
  copa         | adamw | prefix      | 1e-2..1e-6                | -
  copa         | adamw sgd | lora    | 5e-3,1e-4,5e-5,1e-5       | -
  copa         | sgd   | full        | 1e-4*,1e-5,1e-6,1e-7,1e-8 | -
  wino copa-7b | adamw sgd | full    | 1e-3..1e-7                | -
  wino copa-7b | adamw | lora        | 1e-2..1e-6                | -
lozo
  opt opt-free | lozo | full | 1e-6,1e-7 | 1.4e-3,1.4e-4 | rank=1,2,4 | interval=50,100
subzero
  sst2         | subzero | prompt | 1e-3 | 1e-2 | rank=24 | interval=1000
zo-muon
  rte          | zo_muon | full | 1e-2 | 1.1e-4 | rank=64 | interval=100 | queries=4
dfo-lora
  few-shot     | cma_es | dfo_lora | 1 | -
sparse-mezo
  sparse       | zo_sparse | full | 1e-6 | 1e-3 | sparsity=0.8,0.7,0.6,0.5
"""


def names() -> list[str]:
    """Names of all presets, sorted."""
    return sorted(_all())


def get(name: str) -> Preset:
    """The preset of a name. Raises ConfigError with the nearest name for an unknown one."""
    if name not in _all():
        close = nearest(name, _all())
        hint = f"did you mean {close!r}? " if close else ""
        raise ConfigError(f"unknown preset {name!r}: {hint}`smidgen methods --presets` lists them all")
    return _all()[name]


def of_method(method: str | None = None) -> list[Preset]:
    """The presets of a method, or all, by name."""
    return [preset for name, preset in sorted(_all().items()) if method in (None, preset.method)]


def method_options(name: str, method: str) -> Mapping[str, Any]:
    """A preset's options of the method. Raises ConfigError for an unknown preset, and for one of another method."""
    preset = get(name)
    if preset.method != method:
        raise ConfigError(f"preset {name!r} belongs to method {preset.method}, not {method}: leave out one of the two")
    return preset.options


def fill(config: RunConfig, say: Callable[[str], None]) -> RunConfig:
    """What the configuration's preset sets and the user did not, filled in; each choice is said with its source.

    A configuration without a preset of this module comes back as it is. Raises ConfigError for an unknown preset, and for
    a method or scheme that is not the preset's.
    """
    if config.preset is None or "/" not in config.preset:
        return config
    preset, train = get(config.preset), config.train
    given = {key for key in config.model_fields_set if getattr(config, key) is not None}
    given |= {f"train.{key}" for key in train.model_fields_set if getattr(train, key) is not None}
    if "method" in given:
        method_options(preset.name, config.method)
    if "scheme" in given and config.scheme != preset.scheme:
        raise ConfigError(
            f"preset {preset.name!r} belongs to scheme {preset.scheme}, not {config.scheme}: leave out one of the two"
        )
    if train.max_steps is not None or train.num_train_epochs is not None:
        given |= {"train.max_steps", "train.num_train_epochs"}
    if config.data is not None or config.task not in (None, preset.task):  # other rows than the preset's
        given |= {"task", "task_args", "k_shot", "benchmark_split", "objective"}
    if config.eval_data is not None:
        given |= {"k_shot", "benchmark_split"}
    options = {key: value for key, value in preset.options.items() if key not in config.method_args}
    lr = options.pop("lr", None)
    if "train.weight_decay" in given:
        options.pop("weight_decay", None)
    values = {"method": preset.method, "scheme": preset.scheme, "task": preset.task, **preset.keys}
    values = {key: value for key, value in values.items() if key not in given}
    if lr is not None and train.learning_rate is None:
        values["train.learning_rate"] = lr
    sections = {
        "method_args": options,
        "scheme_args": {key: value for key, value in preset.scheme_args.items() if key not in config.scheme_args},
    }
    for key, value in [*values.items(), *sections["scheme_args"].items(), *options.items()]:
        say(f"{key.removeprefix('train.')} = {value}  (preset {preset.name}: {preset.source})")
    whole = {section: {**added, **getattr(config, section)} for section, added in sections.items()}
    return with_values(config, {**values, **whole})


@functools.cache
def _all() -> dict[str, Preset]:
    found: dict[str, Preset] = {}
    study = ""
    for line in _TABLE.strip().splitlines():
        if not line.startswith(" "):
            study = line
            continue
        where, methods, schemes, lr, eps, *more = (cell.strip() for cell in line.split("|"))
        for cell in where.split():
            models, tasks = (words.split() for words in _WHERE[cell])
            grids = {"lr": lr, "eps": eps, **dict(option.split("=") for option in more)}
            for model in models:
                for task in tasks:
                    for method in methods.split():
                        for scheme in schemes.split():
                            preset = _preset(study, model, task, method, scheme, grids)
                            assert preset.name not in found, preset.name
                            found[preset.name] = preset
    return found


def _preset(study: str, model: str, task: str, method: str, scheme: str, grids: Mapping[str, str]) -> Preset:
    source, keys, options, per_method = _STUDIES[study]
    parts = [study.split()[0], model, task, *([method] if per_method else []), scheme]
    task, _, k = task.partition("-k")
    rows: dict[str, Any] = {"k_shot": int(k)} if k else {"benchmark_split": True}
    read = {option: _grid(text) for option, text in grids.items() if text != "-"}
    taken = {option: named or _middle(option, values, method) for option, (values, named) in read.items()}
    return Preset(
        name="/".join(parts),
        model=model,
        task=task,
        method=method,
        scheme=scheme,
        options={**options, **_FIXED.get(f"{study} {method}", {}), **taken},
        grid={option: values for option, (values, _) in read.items()},
        keys={**{_FLAGS.get(key, key): value for key, value in keys.items()}, **rows},
        scheme_args={"head_bias": "zero"} if study == "dfo-lora" else {},
        source=source + _REMARKS.get(method, "") * per_method,
    )


def _grid(text: str) -> tuple[tuple[float, ...], float | None]:
    """The values of a cell, largest first, and the one that is marked.

    >>> _grid("1e-5..5e-7")
    ((1e-05, 5e-06, 1e-06, 5e-07), None)
    >>> _grid("1e-6*,1e-7")
    ((1e-06, 1e-07), 1e-06)
    """
    values: list[float] = []
    named = None
    for part in text.split(","):
        if ".." in part:
            first, last = part.split("..")
            steps = (5, 1) if "5e" in part else (1,)
            powers = range(int(first.partition("e")[2]), int(last.partition("e")[2]) - 1, -1)
            between = [float(f"{step}e{power}") for power in powers for step in steps]
            values += [value for value in between if float(last) <= value <= float(first)]
        else:
            number = part.removesuffix("*")
            values.append(int(number) if number.isdigit() else float(number))
            named = values[-1] if part.endswith("*") else named
    return tuple(values), named


def _middle(option: str, values: tuple[float, ...], method: str) -> float:
    if option == "eps" and 1e-3 in values:
        return 1e-3
    smaller = method == "zo_momentum"
    return sorted(values, reverse=True)[len(values) // 2 if smaller else (len(values) - 1) // 2]
