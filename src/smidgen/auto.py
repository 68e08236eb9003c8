"""`method: auto`: the forward-only method and options for each scheme that one setting serves best, and what says so.

Provisional: the choice among the methods that existed when it was made, see `EVIDENCE`; benchmarks/speed_to_accuracy.py
compares it with the others, and a better one takes its place here and nowhere else. It is replaced before anything is
loaded, so a run's resolved configuration, journal and card name the method itself. It does not: look at the model or the
data, search, choose a method with back-propagation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from smidgen.config import ConfigError, RunConfig
from smidgen.config_file import with_values

NAME = "auto"

# scheme -> (method, rate, options). Constants of the default: change them with new evidence only.
CHOICES: Mapping[str, tuple[str, float, Mapping[str, Any]]] = {
    "full": ("lozo", 3e-4, {"normalise": "rms", "eps": 1e-3, "rank": 2, "interval": 50}),
    "lora": ("zo_sgd", 1e-3, {"normalise": "rms", "eps": 1e-2}),
}
EVIDENCE = (
    "single runs. full: ends no higher than normalised MeZO at the same rate on the embedded model (0.691, 0.696 nats after "
    "4,800 forwards), nor than a searched one on two cells of a prototype (9,000 and 12,000 forwards; 0.671, 0.675 and 1.117, "
    "1.121); a rate of 1e-3 is better on small encoders and harms causal models. lora: the prototype, level with or ahead of "
    "full MeZO on four cells, at this rate on its causal ones"
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
    if config.scheme not in CHOICES:
        raise ConfigError(
            f"method auto has no choice for scheme {config.scheme}, only for {', '.join(CHOICES)}: name a method (zo_sgd)"
        )
    method, lr, options = CHOICES[config.scheme]
    values: dict[str, Any] = {"method": method, "method_args": dict(options)}
    if config.train.learning_rate is None:
        values["train.learning_rate"] = lr
    for key, value in [("method", method), *options.items()]:
        say(f"{key} = {value}  (method auto for scheme {config.scheme})")
    if config.train.learning_rate is None:
        say(f"lr = {lr:g}  (method auto for scheme {config.scheme})")
    return with_values(config, values)
