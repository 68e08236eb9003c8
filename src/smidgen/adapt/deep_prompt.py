"""Deep prompt tuning: m virtual tokens before every row, which every layer moves anew; the model itself is frozen.

Source: Sun et al., "BBTv2: Towards a Gradient-Free Future with Large Language Models", 2022 (arXiv 2205.11200), which searches
the prompts of one layer after another. Let h_l be the hidden states that enter layer l, those of the m virtual tokens first:

    h_0 = [P_0; E(x)],  h_l[:m] <- h_l[:m] + P_l for l >= 1,  P_0, ..., P_(L-1) in R^(m x h) tuned

P_0 starts as in scheme prompt, all others at zero: a fresh model is that of scheme prompt. Ours: prompts are added to what the
layer below made of the virtual tokens, so that a search moves around a model that works; each P_l belongs to its layer by name,
so that `cma_es` and `fireworks` optimise layer by layer, and layers below the searched one are not run again.

Bytes: L m h weights in float32, added in the model's dtype; m positions of the context and of every forward. Saved as the tuned
tensors alone. It does not: encoder-decoders; an export, since PEFT has no such prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from smidgen.adapt._adapted import SchemeConfig
from smidgen.adapt._attention import attentions
from smidgen.adapt._chosen import Chosen
from smidgen.adapt._place import Place
from smidgen.adapt._virtual import Virtual, input_prompt, kind_of
from smidgen.config import ConfigError
from smidgen.params import ParamView

status = "experimental"

EXPORTS: dict[str, str] = {}
REFUSED = {
    "adapter": "PEFT has no prompt that every layer moves",
    "merged": "the tuned prompts are added to hidden states, they are no weights",
}


class Config(SchemeConfig):
    """Options of deep prompt tuning."""

    tokens: int = Field(50, ge=1, description="virtual tokens m; 50 in BBT and BBTv2")
    init: Literal["tokens", "random"] = Field(
        "tokens", description="start from embeddings of random real tokens, or from standard normal numbers"
    )

    @property
    def positions(self) -> int:
        return self.tokens


class DeepPrompt(Virtual):
    """A model with virtual tokens before every row, moved by every layer but the first."""

    scheme = "deep_prompt"
    save = Chosen.save  # type: ignore[assignment] # PEFT's files hold the first layer's alone
    load = Chosen.load  # type: ignore[assignment]
    _frozen_sha256 = Chosen._frozen_sha256

    def __init__(self, model: nn.Module, config: Config, seed: int, fresh: Sequence[str]):
        layers = _layers(model)
        options, init = input_prompt(model, config.tokens, config.init, seed)
        super().__init__(model, options, init, fresh, Place(config.tokens))
        self._shown = False  # whether the rows of the forward in progress begin with virtual tokens
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        table = model.get_input_embeddings().weight  # type: ignore[operator]
        for layer in layers[1:]:
            matrix = torch.zeros(config.tokens, table.shape[1], device=table.device)
            layer.deep_prompt = nn.Embedding.from_pretrained(matrix, freeze=False)
            layer.register_forward_pre_hook(self._move, with_kwargs=True)
        self.view = ParamView.of_model(self.model)
        self.fresh = list(self.view.entries)

    def _begin(self, _: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        self._shown = given.get("inputs_embeds") is not None  # PEFT embeds the rows where it puts virtual tokens before them

    def _move(self, layer: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        if not self._shown:
            return None
        hidden: Tensor = args[0] if args else given["hidden_states"]
        table = layer.deep_prompt
        m = table.num_embeddings
        ids = torch.arange(m, device=hidden.device).expand(len(hidden), m)  # a row each: in a batch of probes rows differ
        moved = torch.cat([hidden[:, :m] + table(ids).to(hidden.dtype), hidden[:, m:]], 1)
        return ((moved, *args[1:]), given) if args else (args, {**given, "hidden_states": moved})


def build(model: nn.Module, config: Config, *, seed: int = 0, fresh: Sequence[str] = ()) -> DeepPrompt:
    """Freeze `model` and put virtual tokens before its input and into its layers; their first values are addressed by `seed`.

    Raises ConfigError for an encoder-decoder, and where the layers are not known.
    """
    if kind_of(model) == "seq2seq":
        raise ConfigError(
            f"{type(model).__name__} has two stacks of layers, deep_prompt is for models with one: use scheme prompt or prefix"
        )
    return DeepPrompt(model, config, seed, fresh)


def _layers(model: nn.Module) -> list[nn.Module]:
    """The layers that hold the self-attention, in order: the outermost numbered modules around it."""
    paths = []
    for attention in attentions(model):
        parts = attention.path.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if at is not None:
            paths.append(".".join(parts[: at + 1]))
    if not paths:
        raise ConfigError(f"{type(model).__name__} has no numbered layers with self-attention: use scheme prompt")
    return [model.get_submodule(path) for path in dict.fromkeys(paths)]
