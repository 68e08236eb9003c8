"""`method: auto`: the forward-only method and options for each scheme that one setting serves best, and what says so.

The constants stood before the last task of benchmarks/speed_to_accuracy.py was run (MiniLM on AG News), whose page says how
they fare. A better choice takes its place here and nowhere else. It is replaced before anything is loaded, so a run's resolved
configuration and card name the method itself. Scheme full takes node perturbation, which leaves no journal, unless only values
of the loss can be had or the base cannot be written: then lozo, which leaves one. It does not: look at the model or the
data, search, choose a method with back-propagation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from smidgen.config import ConfigError, RunConfig
from smidgen.config_file import with_values

NAME = "auto"

VALUES = "values"  # scheme full where weights cannot be credited

# scheme or VALUES -> (method, rate, options). Constants of the default: change them with new evidence only.
CHOICES: Mapping[str, tuple[str, float, Mapping[str, Any]]] = {
    "full": ("node", 3e-4, {"credit": "weights", "eps": 0.05, "momentum": 0.0}),
    VALUES: ("lozo", 3e-4, {"normalise": "rms", "eps": 1e-3, "rank": 2, "interval": 50}),
    "lora": ("zo_sgd", 1e-3, {"normalise": "rms", "eps": 1e-2}),
}
EVIDENCE = (
    "full: single runs on TinyStories-3M and SST-2, 1,600 forwards, where the loss falls three times as far as with normalised "
    "MeZO (docs/decisions.md), and a prototype in which its kind alone lowered the loss in all four cells. values: lozo ends "
    "no higher than normalised MeZO at the same rate on the embedded model (0.691, 0.696 nats after 4,800 forwards). lora: the "
    "prototype, level with or ahead of full MeZO on four cells, at this rate on its causal ones"
)


def resolve(config: RunConfig, say: Callable[[str], None]) -> RunConfig:
    """The configuration with `method: auto` replaced, each choice said; any other comes back as it is.

    A rate that is given stays. Raises ConfigError where options or a preset are given, which belong to a method that the
    user would have to name, and for a scheme for which there is no choice.
    """
    if config.method != NAME:
        return config
    if config.method_args or config.preset is not None:
        given = "a preset" if config.preset is not None else f"method_args ({', '.join(config.method_args)})"
        raise ConfigError(f"method auto chooses its own options, and {given} belongs to a method: name it, or leave them out")
    if config.scheme not in CHOICES or config.scheme == VALUES:
        known = ", ".join(key for key in CHOICES if key != VALUES)
        raise ConfigError(f"method auto has no choice for scheme {config.scheme}, only for {known}: name a method (zo_sgd)")
    only = config.quantise is not None or config.reward is not None or config.objective in ("accuracy", "f1", "exact_match")
    method, lr, options = CHOICES[VALUES if only and config.scheme == "full" else config.scheme]
    values: dict[str, Any] = {"method": method, "method_args": dict(options)}
    if config.train.learning_rate is None:
        values["train.learning_rate"] = lr
    for key, value in [("method", method), *options.items()]:
        say(f"{key} = {value}  (method auto for scheme {config.scheme})")
    if config.train.learning_rate is None:
        say(f"lr = {lr:g}  (method auto for scheme {config.scheme})")
    return with_values(config, values)
