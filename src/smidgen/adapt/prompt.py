"""Prompt tuning: m tuned embeddings before every row; the model itself is frozen. The implementation is PEFT's.

Source: Lester, Al-Rfou and Constant, "The Power of Scale for Parameter-Efficient Prompt Tuning", 2021 (arXiv 2104.08691):

    y = f([P; E(x)]),  P in R^(m x h) tuned, E the model's embedding

m = 10 embeddings of random real tokens are what the zeroth-order benchmarks start from. Encoder-decoders get them before
the encoder's input. `position` puts them inside the rows of causal models, `nested` trains them so that any first k of them
can be used (Zhu et al., "One Token Can Help! Learning Scalable and Pluggable Virtual Tokens for Retrieval-Augmented Large
Language Models", 2024, arXiv 2405.19670): every step draws k from 1..m by its seed, evaluations take all m, or `use`.
Bytes: m h weights in float32, cast to the model's dtype in the forward; m positions of the context and of every forward.
Saved in PEFT's own format; cannot be merged. It does not: initialise from a text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from smidgen import noise
from smidgen.adapt._adapted import SchemeConfig
from smidgen.adapt._place import Place
from smidgen.adapt._virtual import NAME, Virtual, input_prompt, kind_of
from smidgen.config import ConfigError
from smidgen.noise import philox
from smidgen.params import tensor_id

status = "experimental"

EXPORTS = {"adapter": "PEFT's adapter_model.safetensors and adapter_config.json"}
REFUSED = {"merged": "the tuned embeddings are inputs, not weights"}


class Config(SchemeConfig):
    """Options of prompt tuning."""

    tokens: int = Field(10, ge=1, description="virtual tokens m")
    init: Literal["tokens", "random"] = Field(
        "tokens", description="start from embeddings of random real tokens, or from standard normal numbers"
    )
    position: int = Field(
        0,
        description="0: before the row; n: after its first n tokens; -n: before its last n; for causal models, in no export",
    )
    nested: bool = Field(False, description="train with a random number of the first tokens in each step; for causal models")
    use: int | None = Field(None, ge=0, description="how many of the first tokens are used; none: all")

    @property
    def positions(self) -> int:
        return self.tokens


class Nested(Virtual):
    """Virtual tokens of which every training step uses the first few, by the run's seed and the step; a `Moving` scheme."""

    def __init__(
        self, model: nn.Module, options: Any, init: Callable[[], Tensor], fresh: Sequence[str], config: Config, seed: int
    ):
        self._config, self._seed = config, seed
        self._optimizer: Any = None
        self._resting = False
        super().__init__(model, options, init, fresh, Place(config.tokens, config.position, self.count))

    def count(self) -> int:
        """Tokens used now: k of the optimizer's step, all where nothing trains."""
        if self._optimizer is None or self._resting:
            return self._config.tokens if self._config.use is None else self._config.use
        at = noise.Address(self._seed, tensor_id(NAME), self._optimizer.t, 0, philox.DATA)
        return 1 + int(philox.words(at, torch.arange(1))[0, 0]) % self._config.tokens

    def begin(self, optimizer: Any) -> None:
        """Follow the optimizer's steps."""
        self._optimizer = optimizer

    def after_step(self, optimizer: Any, steps: int) -> None:
        """The count is drawn when it is asked for."""

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Inside this context all tokens are used."""
        self._resting = True
        try:
            yield
        finally:
            self._resting = False

    def save_state(self, folder: Path) -> None:
        """PEFT's adapter files."""
        self.save(folder)

    def load_state(self, folder: Path) -> None:
        """Read them."""
        self.load(folder)


def build(model: nn.Module, config: Config, *, seed: int = 0, fresh: Sequence[str] = ()) -> Virtual:
    """Freeze `model` and put virtual tokens before its input; their values are addressed by `seed`.

    Raises ConfigError where PEFT cannot, and for a place inside the rows of a model that is not causal.
    """
    if (config.position or config.nested or config.use is not None) and kind_of(model) != "causal":
        raise ConfigError(
            f"position, nested and use are for causal models, and {type(model).__name__} is none: leave them out of scheme_args"
        )
    if config.use is not None and config.use > config.tokens:
        raise ConfigError(f"use = {config.use}, but there are {config.tokens} virtual tokens: use at most as many")

    options, init = input_prompt(model, config.tokens, config.init, seed)
    if config.nested:
        return Nested(model, options, init, fresh, config, seed)
    used = config.tokens if config.use is None else config.use
    return Virtual(model, options, init, fresh, Place(config.tokens, config.position, lambda: used))
