"""Prefix tuning: m tuned keys and values before those of every row, in each layer. The implementation is PEFT's.

Source: Li and Liang, "Prefix-Tuning", 2021 (arXiv 2101.00190), without the reparametrisation; as in MeZO (arXiv 2305.17333,
table 17) the prefix starts from real activations: the keys and values of m random tokens run through the model,

    Attn(q, [P_K; K], [P_V; V]),  P_K, P_V in R^(m x h_kv) tuned for each of L layers

Its probes want a larger eps than weights do: 1e-1 in the papers. Bytes: 2 L m h_kv weights in float32 (h_kv: key heads times
head size), cast to the model's dtype in the forward; m positions of the context, but no longer input.
Encoder-decoders get a prefix in the decoder's self-attention. Saved in PEFT's own format; cannot be merged.

It does not: work with activation checkpointing, which drops cached keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NoReturn

import torch
from pydantic import Field
from torch import Tensor, nn

from smidgen.adapt._adapted import SchemeConfig
from smidgen.adapt._virtual import Virtual, kind_of, random_normal, random_tokens
from smidgen.config import ConfigError

status = "experimental"

EXPORTS = {"adapter": "PEFT's adapter_model.safetensors and adapter_config.json"}
REFUSED = {"merged": "the tuned keys and values are inputs of the attention, not weights"}


class Config(SchemeConfig):
    """Options of prefix tuning."""

    tokens: int = Field(5, ge=1, description="virtual tokens m")
    init: Literal["activations", "random"] = Field(
        "activations", description="start from keys and values of random real tokens, or from standard normal numbers"
    )

    @property
    def positions(self) -> int:
        return self.tokens


def build(model: nn.Module, config: Config, *, seed: int = 0, fresh: Sequence[str] = ()) -> Virtual:
    """Freeze `model` and put keys and values before those of its layers; their values are addressed by `seed`.

    Raises ConfigError where the model has no keys and values that PEFT can put a prefix before.
    """
    import peft

    table = model.get_input_embeddings().weight  # type: ignore[operator]
    tokens = random_tokens(seed, config.tokens, table.shape[0])[None].to(table.device)
    pairs = _keys_and_values(model, tokens)
    L, (_, heads, _, width) = len(pairs), pairs[0][0].shape
    two = kind_of(model) == "seq2seq"  # PEFT gives decoder layer i the pair 2 i modulo the number of pairs ...
    N = L | 1 if two else L  # ... so that an odd number keeps them apart; for even L one pair is not read

    def init() -> Tensor:
        if config.init == "random":
            return random_normal(seed, (config.tokens, 2 * N * heads * width))
        out = torch.zeros(config.tokens, 2 * N, heads, width)
        for i, pair in enumerate(pairs):
            at = 2 * ((2 * i if two else i) % N)
            for k, value in enumerate(pair):
                out[:, at + k] = value[0].transpose(0, 1)
        return out.flatten(1)

    options = peft.PrefixTuningConfig(
        num_virtual_tokens=config.tokens,
        num_layers=N,
        num_attention_heads=heads,
        token_dim=heads * width,
        num_transformer_submodules=2 if two else 1,
    )
    adapted = Virtual(model, options, init, fresh)

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise ConfigError("activation checkpointing drops the prefix's keys and values: use scheme prompt or lora with it")

    model.gradient_checkpointing_enable = refuse  # type: ignore[assignment]
    return adapted


def _keys_and_values(model: nn.Module, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(keys, values) of each layer for one row of tokens [1, m], each [1, heads, m, width]. Cost: one forward of m tokens."""
    from transformers import DynamicCache

    name = type(model).__name__
    cache: Any = DynamicCache()
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            if kind_of(model) == "seq2seq":
                cache = model(input_ids=tokens, decoder_input_ids=tokens, use_cache=True).past_key_values.self_attention_cache
            else:
                model.base_model(input_ids=tokens, past_key_values=cache, use_cache=True)  # type: ignore[operator]
        pairs = [(layer.keys, layer.values) for layer in cache.layers]
        if not pairs or {t.shape for pair in pairs for t in pair} != {pairs[0][0].shape}:
            raise ValueError("its layers have keys and values of different shapes, or none")
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ConfigError(
            f"prefix tuning needs the keys and values of all layers, which {name} does not give ({str(error)[:200]}): "
            "use scheme prompt or lora"
        ) from None
    finally:
        model.train(mode)
    return pairs
