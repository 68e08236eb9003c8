"""Readout: the model is frozen, and a linear classifier reads the hidden states of all its layers; fitted, not trained.

Source: linear probing of all layers (Alain and Bengio, 2016, arXiv 1610.01644), here with one probe over the layers
together. With h_l the output of layer l of L (the last one after the final norm), at the T tokens of a row:

    phi(x) = [mean_t h_1, h_1 at the last token, ..., mean_t h_L, h_L at the last token],  logits = W phi(x) + b

W and b are the minimum of a convex loss on the first `rows` training rows of an order drawn by seed, which a forward each
has turned into features (`smidgen.head_start`); layers and penalty are chosen on a quarter of them. There is no learning rate
and no step: `train.max_steps` is 0 unless it is given, and `method` tunes W and b further where it is.
A causal or seq2seq model reads the task's prompt (seq2seq: its encoder), every other model the raw text. Label words may be
of any length, they are not used.

Bytes: C (2 L h + 1) weights in float32 for C classes and width h; 2 L h more a row while it is fitted, and
`smidgen.convex`. Layers are reduced to two vectors as they leave: no hidden states are kept.
It does not: stop at the highest layer that was chosen, read padding, generate text, change the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from smidgen.adapt._adapted import SchemeConfig
from smidgen.adapt._chosen import Chosen
from smidgen.config import ConfigError

status = "experimental"

FITTED = True  # tensors come from the training rows before the first step; `build` is told the number of classes

EXPORTS: dict[str, str] = {}
_WHY = "no class of transformers or PEFT reads all layers; kind=classification scheme=head head_start=readout can be exported"
REFUSED = {"merged": _WHY, "adapter": _WHY}


class Config(SchemeConfig):
    """Options of the readout."""

    rows: int = Field(1000, ge=8, description="training rows that are read, drawn by seed; one forward each")
    fit: Literal["logistic", "ridge"] = Field("logistic", description="logistic regression, or ridge regression")
    layers: Literal["auto", "all", "last"] = Field(
        "auto",
        description="layers that are read: all, the last one, or whichever of all and each one does best on held-out rows",
    )


class ReadoutModel(nn.Module):
    """A frozen trunk with a linear classifier over its layers, called like a sequence classifier."""

    def __init__(self, trunk: nn.Module, classes: int):
        super().__init__()
        self.trunk, self.config = trunk, trunk.config
        config: Any = self.config.get_text_config()  # type: ignore[union-attr,operator]
        self.depth = len(_layers(trunk))
        self.width = config.hidden_size
        place = next(trunk.parameters()).device
        columns = 2 * self.depth * self.width
        self.classifier = nn.utils.skip_init(nn.Linear, columns, classes, device=place)  # draws no random number
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        accepted = inspect.signature(trunk.forward).parameters
        self._options = {"use_cache": False} if "use_cache" in accepted else {}
        self._takes_types = "token_type_ids" in accepted

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        """Logits [B, C], float32. Cost: one forward of the trunk."""
        given = {"token_type_ids": token_type_ids} if self._takes_types and token_type_ids is not None else {}
        pooled: list[Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda _, __, out: pooled.append(_pooled(_first(out), attention_mask)))
            for layer in _layers(self.trunk)[:-1]
        ]
        try:
            last = self.trunk(input_ids=input_ids, attention_mask=attention_mask, **given, **self._options).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        pooled.append(_pooled(last, attention_mask))
        return SequenceClassifierOutput(logits=self.classifier(torch.cat(pooled, 1)))  # type: ignore[arg-type]


class Readout(Chosen):
    """A model under its readout; `blocks`: the columns of the classifier's weight from which the fit chooses."""

    model: ReadoutModel

    def __init__(self, model: ReadoutModel, config: Config):
        super().__init__(model, "readout", lambda name, _: name.startswith("classifier."), ())
        self.fresh = list(self.view.entries)
        self.options = config
        each = {f"layer {i + 1}": slice(2 * i * model.width, 2 * (i + 1) * model.width) for i in range(model.depth)}
        last = list(each)[-1]
        whole = {"all layers": slice(0, 2 * model.depth * model.width)}
        self.blocks = {"auto": whole | each, "all": whole, "last": {last: each[last]}}[config.layers]

    def merged(self) -> NoReturn:
        raise ConfigError(f"a readout is no part of the model: {_WHY}")


def _layers(trunk: nn.Module) -> list[nn.Module]:
    """The layers of a trunk, in order. Raises ConfigError where no list of modules is as long as it is deep."""
    config: Any = trunk.config.get_text_config()  # type: ignore[union-attr,operator]
    for module in trunk.modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return list(module)
    raise ConfigError(
        f"scheme readout finds no list of {config.num_hidden_layers} layers in {type(trunk).__name__}: use scheme head"
    )


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """[mean over the tokens of a row, its last token], [B, 2 h] float32, of hidden states [B, T, h]."""
    shown = mask.to(hidden.device)
    mean = torch.einsum("bth,bt->bh", hidden.float(), shown.float()) / shown.sum(1, keepdim=True)
    last = (shown * torch.arange(shown.shape[1], device=shown.device)).argmax(1)
    return torch.cat([mean, hidden[torch.arange(len(hidden), device=hidden.device), last].float()], 1)


def build(model: nn.Module, config: Config, *, seed: int = 0, fresh: Sequence[str] = (), classes: int | None = None) -> Readout:
    """Freeze the trunk of `model` and put a classifier over its layers, zero until it is fitted; its own head is dropped."""
    if classes is None:
        raise ConfigError(
            "scheme readout predicts one of the same classes for every row: give a labelled task, or columns text and label"
        )
    whole: Any = model
    trunk = whole.get_encoder() if whole.config.is_encoder_decoder else whole.base_model
    return Readout(ReadoutModel(trunk, classes).train(model.training), config)
