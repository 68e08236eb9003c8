"""Random Llamas whose linear layers are nf4 from the start, made layer by layer: no copy in 16 or 32 bits ever exists. And
the sides that tune them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SHAPES: dict[str, dict[str, int]] = {
    "7b": {},  # transformers' defaults are Llama-7B's
    "110m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}

Step = Callable[[dict[str, Tensor]], object]


def llama(shape: str, device: str = "cpu", dtype: torch.dtype = torch.float32, layers: int | None = None) -> nn.Module:
    """A random nf4 Llama (double quantisation) of a named shape, in evaluation mode; its output head is plain."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import LlamaConfig, LlamaForCausalLM

    from smidgen import quantised

    config = LlamaConfig(**{**SHAPES[shape], **({} if layers is None else {"num_hidden_layers": layers})})
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    codec = {"quant_type": "nf4", "compress_statistics": True}
    for name, plain in list(model.named_modules()):
        if isinstance(plain, nn.Linear) and plain is not model.lm_head:
            made = Linear4bit(plain.in_features, plain.out_features, bias=False, compute_dtype=dtype, device="meta", **codec)
            weight = torch.randn(plain.out_features, plain.in_features, device=device).mul_(0.02).to(dtype)
            made.weight = Params4bit(weight, requires_grad=False, **codec).to(device)
            model.set_submodule(name, made)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                drawn = (
                    torch.randn(parameter.shape, device=device).mul_(0.02)
                    if parameter.ndim == 2
                    else torch.ones(parameter.shape)
                )
                module._parameters[key] = nn.Parameter(drawn.to(device, dtype), requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.is_quantized = True
    quantised.steady(model)
    return model.eval()


def zeroth(model: nn.Module, method: str, memory: int, **options: Any) -> tuple[Step, Any]:
    """Steps of a low-rank method over the base, and its optimizer. `memory`: bytes that probes may take to share a forward;
    with 0 each has its own."""
    from smidgen import optim
    from smidgen.adapt import full
    from smidgen.batched import BatchedEngine
    from smidgen.objective import ModelObjective

    view = full.build(model, full.Config()).view
    module = optim.get(method)
    optimizer = module.build(view, module.Config(**options))
    engine = BatchedEngine(model, view, "causal", memory=memory)
    return lambda data: optimizer.step(ModelObjective(engine, [data])), optimizer


def first_order(model: nn.Module, scheme: str, method: str, **options: Any) -> tuple[Step, Any]:
    """Steps of a method with back-propagation on a scheme over the base, with activation checkpointing; and its optimizer."""
    from smidgen import adapt, optim
    from smidgen.objective import ModelObjective
    from smidgen.probing import Engine

    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    made = adapt.get(scheme)
    adapted = made.build(model, made.Config(**options), seed=0)
    module = optim.get(method)
    optimizer = module.build(adapted.view, module.Config())
    engine = Engine(adapted.model, adapted.view, "causal")
    adapted.model.train()
    return lambda data: optimizer.step(ModelObjective(engine, [data])), optimizer
