"""A method's options, from its defaults, a preset and what the user gave; and what kind of method it is."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from smidgen import optim
from smidgen import presets as published
from smidgen.config import ConfigError, nearest
from smidgen.optim._optimizer import Optimizer


def method_config(method: str, preset: str | None, options: dict[str, Any]) -> Any:
    """A method's validated options: its defaults, then the preset, then `options`. Raises ConfigError."""
    module = optim.get(method)
    presets = getattr(module, "PRESETS", {})
    if preset is not None and "/" in preset:
        values = {**published.method_options(preset, method), **options}
    elif preset is not None and preset not in presets:
        raise ConfigError(f"{method} has no preset {preset!r}; it has: {', '.join(presets) or 'none'}")
    else:
        values = {**presets.get(preset, {}), **options}
    known = module.Config.model_fields
    for name in values:
        if name not in known:
            raise ConfigError(
                f"{method} has no option {name!r}; did you mean {nearest(name, known)!r}? `smidgen methods {method}` lists them"
            )
    try:
        return module.Config(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        of = f"option {problem['loc'][0]!r} = {problem['input']!r}: " if problem["loc"] else ""  # else of several together
        raise ConfigError(f"{method}: {of}{problem['msg'].removeprefix('Value error, ')}") from None


def uses_backward(method: str) -> bool:
    """Whether a method back-propagates; such a run resumes from checkpoints and has no journal."""
    return "backward" in optimizer_class(optim.get(method)).uses


def optimizer_class(module: Any) -> type[Optimizer]:
    return module.build
