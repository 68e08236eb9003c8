"""Output heads that stop sharing tensors with the trunk, so that tuning them leaves the model's input alone."""

from __future__ import annotations

from typing import Any

from torch import nn


def untied_head(model: nn.Module) -> list[nn.Module]:
    """The modules of the head: those outside the trunk; where the model is its own trunk, the output embedding.

    Tensors that they share with the trunk become copies of their own, in place; no modules where there is no head.
    """
    modules = _head(model)
    head = {id(m) for m in modules}
    trunk = {id(p) for m in model.modules() if id(m) not in head for p in m._parameters.values()}
    untied: dict[int, nn.Parameter] = {}
    for module in modules:
        for attribute, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in trunk:
                own = untied.setdefault(id(parameter), nn.Parameter(parameter.detach().clone()))
                module._parameters[attribute] = own
    held = [id(p) for m in modules for p in m._parameters.values() if p is not None]
    if untied and len(held) == len(set(held)):
        _say_untied(model.config)
    return modules


def _head(model: nn.Module) -> list[nn.Module]:
    trunk = model.base_model
    if trunk is model:
        output = model.get_output_embeddings()  # type: ignore[operator]
        return [] if output is None else list(output.modules())
    inside = {id(m) for m in trunk.modules()}  # type: ignore[union-attr,operator]
    return [m for m in model.modules() if id(m) not in inside]


def _say_untied(config: Any) -> None:
    """Note in the configuration that the head has its own tensor, for everything that reads a saved model.

    The flag stays where it says more: that BERT's head has one bias in two places, or how T5 scales its decoder's output.
    transformers ties no tensors that differ in the file, whatever the flag says.
    """
    for part in (config, config.get_text_config()):
        if part.model_type not in ("t5", "mt5", "umt5", "longt5", "switch_transformers"):
            part.tie_word_embeddings = False
