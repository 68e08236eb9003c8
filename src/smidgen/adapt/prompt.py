"""Prompt tuning: m tuned embeddings before every row; the model itself is frozen. The implementation is PEFT's.

Source: Lester, Al-Rfou and Constant, "The Power of Scale for Parameter-Efficient Prompt Tuning", 2021 (arXiv 2104.08691):

    y = f([P; E(x)]),  P in R^(m x h) tuned, E the model's embedding

m = 10 embeddings of random real tokens are what the zeroth-order benchmarks start from. Encoder-decoders get them before
the encoder's input. Bytes: m h weights in float32, cast to the model's dtype in the forward; m positions of the context and
of every forward. Saved in PEFT's own format; cannot be merged. It does not: initialise from a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from smidgen.adapt._adapted import SchemeConfig
from smidgen.adapt._virtual import Virtual, random_normal, random_tokens

status = "experimental"

EXPORTS = {"adapter": "PEFT's adapter_model.safetensors and adapter_config.json"}
REFUSED = {"merged": "the tuned embeddings are inputs, not weights"}


class Config(SchemeConfig):
    """Options of prompt tuning."""

    tokens: int = Field(10, ge=1, description="virtual tokens m")
    init: Literal["tokens", "random"] = Field(
        "tokens", description="start from embeddings of random real tokens, or from standard normal numbers"
    )

    @property
    def positions(self) -> int:
        return self.tokens


def build(model: nn.Module, config: Config, *, seed: int = 0, fresh: Sequence[str] = ()) -> Virtual:
    """Freeze `model` and put virtual tokens before its input; their values are addressed by `seed`.

    Raises ConfigError where PEFT cannot.
    """
    import peft

    embedding = model.get_input_embeddings()  # type: ignore[operator]
    vocabulary, width = embedding.weight.shape

    def init() -> Tensor:
        if config.init == "random":
            return random_normal(seed, (config.tokens, width))
        with torch.no_grad():  # called, not indexed: Gemma's embedding scales what it looks up
            return embedding(random_tokens(seed, config.tokens, vocabulary).to(embedding.weight.device)).float()

    options = peft.PromptTuningConfig(
        num_virtual_tokens=config.tokens,
        num_transformer_submodules=1,  # two would hold a second half that PEFT never reads
        token_dim=width,
    )
    return Virtual(model, options, init, fresh)
