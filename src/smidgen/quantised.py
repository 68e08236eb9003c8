"""Linear layers whose weights are held in 4 or 8 bits by another library: what kind they are, their values, their product.

    nf4, fp4      bitsandbytes Linear4bit    a code of 4 bits a weight, a scale for each block of 64
    int8          bitsandbytes Linear8bitLt  row-wise int8, W = CB * SCB / 127
    torchao-int8  nn.Linear whose weight is torchao's int8 weight-only tensor

The codecs are the libraries'; nothing here quantises, and nothing writes. The libraries are imported on use. What is no
such layer is left alone, or refused by `refuse_unknown`: quantised embeddings, int8 weights kept in 16 bits, torchao's
other layouts, layers of other libraries.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smidgen.config import ConfigError
from smidgen.linear import linear

Kind = Literal["nf4", "fp4", "int8", "torchao-int8"]


def kind(module: nn.Module) -> Kind | None:
    """How a linear layer holds its weights; None for anything that is not supported, quantised or not."""
    library = type(module).__module__.partition(".")[0]
    weight = module._parameters.get("weight")
    if library == "bitsandbytes":
        name = type(module).__name__
        if name in ("Linear4bit", "LinearNF4", "LinearFP4") and getattr(weight, "quant_state", None) is not None:
            return weight.quant_state.quant_type  # type: ignore[union-attr]
        if name == "Linear8bitLt" and weight is not None and weight.dtype == torch.int8:
            return "int8"
    elif isinstance(module, nn.Linear) and _is_int8_tensor(weight):
        return "torchao-int8"
    return None


def _is_int8_tensor(weight: Any) -> bool:
    """Whether a weight is torchao's int8 tensor without quantised activations."""
    known = type(weight).__module__.startswith("torchao.") and type(weight).__name__ == "Int8Tensor"
    return known and weight.act_quant_kwargs is None


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The quantised linear layers of a model by name, in its order."""
    return {name: module for name, module in model.named_modules() if kind(module) is not None}


def shape(module: Any) -> tuple[int, int]:
    """(out_features, in_features) of a quantised layer; its storage has another shape."""
    return module.out_features, module.in_features


def numel(model: nn.Module) -> int:
    """Weights of a model, those of quantised layers counted as what they stand for."""
    held = layers(model).values()
    packed = sum(module.weight.numel() for module in held)  # type: ignore[union-attr,operator,misc]
    return sum(p.numel() for p in model.parameters()) - packed + sum(a * b for a, b in map(shape, held))


def compute_dtype(module: Any) -> torch.dtype:
    """The dtype in which a quantised layer multiplies: what it was made for; of int8, whose inputs decide, that of its
    bias, float32 where there is none."""
    found = kind(module)
    if found == "torchao-int8":
        return module.weight.dtype
    if found == "int8":
        return torch.float32 if module.bias is None else module.bias.dtype
    return module.compute_dtype or module.weight.quant_state.dtype


def dequantise(module: Any, out: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
    """The weights of a quantised layer, [out_features, in_features], contiguous, in `dtype` or the layer's compute dtype.

    `out`: a contiguous tensor of that shape to write them to; its dtype counts. The values are those that the library
    multiplies with in that dtype. Cost: one pass over the codes. No gradient. Raises ConfigError for a layer that is not
    supported.
    """
    found = kind(module)
    if found is None:
        raise ConfigError(f"{type(module).__name__} is no quantised linear layer that is known: nf4, fp4, int8, torchao's int8")
    wanted = out.dtype if out is not None else dtype or compute_dtype(module)
    with torch.no_grad():
        values = {"int8": _int8, "torchao-int8": _torchao}.get(found, _four_bits)(module, wanted)
        return values if out is None else out.copy_(values)


def _four_bits(module: Any, dtype: torch.dtype) -> Tensor:
    weight, state = module.weight, module.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        raise ConfigError(
            "bitsandbytes has repacked these 4-bit weights for a CPU, with scales rounded to 16 bits: load the model again and "
            "call smidgen.quantised.steady(model) before its first forward"
        )
    scales = state.absmax
    if state.nested:
        from bitsandbytes.functional import dequantize_blockwise

        scales = (dequantize_blockwise(scales, state.state2) + state.offset).float()
    codec = torch.ops.bitsandbytes.dequantize_4bit.default
    return codec(weight.detach().as_subclass(Tensor), scales, state.blocksize, state.quant_type, state.shape, dtype)


def _int8(module: Any, dtype: torch.dtype) -> Tensor:
    codes, scales = module.weight, module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    return codes.detach().as_subclass(Tensor).to(dtype).mul_(scales[:, None] * (1.0 / 127.0))


def _torchao(module: Any, dtype: torch.dtype) -> Tensor:
    return module.weight.detach().dequantize().to(dtype)


def stored(module: Any) -> dict[str, Tensor]:
    """What a quantised layer holds for its weights, sharing memory: codes, and scales by name. For hashes."""
    found = kind(module)
    if found == "torchao-int8":
        return {"weight": module.weight.qdata, "weight.scale": module.weight.scale}
    codes = {"weight": module.weight.detach().as_subclass(Tensor)}
    if found == "int8":
        return codes | {"weight.scale": module.weight.SCB if module.weight.SCB is not None else module.state.SCB}
    state = module.weight.quant_state
    scales = {"weight.scale": state.absmax}
    if state.nested:
        scales |= {"weight.scale.scale": state.state2.absmax, "weight.scale.offset": state.offset}
    return codes | scales


# ------------------------------------------------------------------------------------------------------------ product


class _Product(torch.autograd.Function):
    """x W^T with W dequantised for the product and let go of: again in the backward pass, never saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        ctx.module = module
        return linear(x, dequantise(module, dtype=x.dtype), None)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient @ dequantise(ctx.module, dtype=gradient.dtype), None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, _: None) -> Tensor:  # type: ignore[override]
        return F.linear(dx, dequantise(ctx.module, dtype=dx.dtype))


def _forward(module: Any, x: Tensor) -> Tensor:
    y = _Product.apply(x, module)
    return y if module.bias is None else y + module.bias.to(y.dtype)


def steady(model: nn.Module) -> None:
    """Let the bitsandbytes layers of a model multiply with the values of `dequantise`, in every mode alike.

    By itself bitsandbytes rounds the inputs of int8 layers to 8 bits when evaluating, by columns that depend on the other
    rows of the batch, and not when training on a CPU; and on some CPUs it rewrites 4-bit weights in place at the first
    evaluation, with scales rounded to bfloat16, after which they carry no gradient and odd shapes fail. Neither is a function
    whose differences can be measured. 4-bit layers on a GPU keep bitsandbytes' kernel. Cost of a product: the weights of
    one layer in the dtype of its input, for its duration, and its gradient the same; no input is saved for it.
    """
    for module in layers(model).values():
        found = kind(module)
        if found == "int8" or (found in ("nf4", "fp4") and module.weight.device.type == "cpu"):
            module.forward = functools.partial(_forward, module)  # type: ignore[method-assign,assignment]


def refuse_unknown(model: nn.Module) -> None:
    """Raise ConfigError where a model holds weights in a form that `dequantise` does not read."""
    name = next(_unknown(model), None)
    if name is not None:
        module = model.get_submodule(name)
        raise ConfigError(
            f"{name} ({type(module).__name__}) holds quantised weights of a kind that is not supported: load the model with "
            "quantise: nf4 or int8, or unquantised"
        )


def unmerged() -> ConfigError:
    """What is said where an adapter would be merged into quantised weights."""
    return ConfigError(
        "quantised weights cannot take an adapter up without being rounded to other codes: export with --format peft-lora, or "
        "--format merged --base MODEL, the unquantised model"
    )


def refuse_backward(method: str, model: Any) -> None:
    """Raise ConfigError where back-propagation would have to tune the weights of a quantised model."""
    base = getattr(model, "is_quantized", False) or getattr(getattr(model, "base_model", None), "is_quantized", False)
    if base and not hasattr(model, "peft_config"):
        raise ConfigError(
            f"{method} back-propagates, and the weights of this base are quantised and have no gradient: tune an adapter "
            "(--scheme lora), or take a method without back-propagation"
        )


@contextlib.contextmanager
def admitted(model: Any) -> Iterator[None]:
    """Inside this context transformers' Trainer takes a quantised model without an adapter of PEFT's: it asks this flag."""
    if not getattr(model, "is_quantized", False):
        yield
        return
    before = model._hf_peft_config_loaded
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        model._hf_peft_config_loaded = before


def _unknown(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if kind(module) is not None:
            continue
        own = {**module._parameters, **module._buffers}
        weight = own.get("weight")
        foreign = any(type(t).__module__.startswith(("torchao", "bitsandbytes")) for t in own.values())
        narrow = weight is not None and (not weight.is_floating_point() or weight.element_size() == 1)
        if foreign or narrow or "qweight" in own:
            yield name
