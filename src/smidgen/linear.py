"""float32 linear layers on a CPU with AVX512 through oneDNN, for evaluations without gradient.

torch multiplies float32 matrices on a CPU with MKL, which leaves AVX512 alone on processors that are not Intel's: 180 GFLOP/s
on two Zen 5 cores, where oneDNN, which torch carries as well, reaches 400. With AVX2 only, oneDNN takes 1.1 to 1.4 times as
long as MKL, and is left alone (docs/decisions.md). Both are float32 throughout; the last bits differ. The rule depends on the
processor, on shapes and on dtypes alone, so the same model evaluated twice uses the same kernels.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

# Multiplications below which F.linear is kept. oneDNN is faster from 2^21 on, but compiles a primitive for every shape, and the
# ragged batches of a small model have hundreds of shapes: 64 MiB for the embedded model, ten times its weights (measured).
SMALLEST = 1 << 27


@functools.cache
def _available() -> bool:
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias, as F.linear; x [..., D], weight [O, D]. Tangents are carried along."""
    if (
        x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= SMALLEST
        and x.device.type == "cpu"
        and (weight.is_contiguous() or weight.t().is_contiguous())
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and _available()
    ):
        return _onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = x W^T + b through oneDNN; where an argument has a tangent, y has dx W^T + x dW^T + db, which oneDNN would drop."""
    multiply = functools.partial(torch.ops.mkldnn._linear_pointwise, attr="none", scalars=[], algorithm="")
    (x, dx), (weight, dw) = forward_ad.unpack_dual(x), forward_ad.unpack_dual(weight)
    bias, db = (None, None) if bias is None else forward_ad.unpack_dual(bias)
    y = multiply(x, weight, bias)
    parts = []
    if dx is not None:
        parts.append(multiply(dx, weight, None))
    if dw is not None:
        parts.append(multiply(x, dw, db))
    elif db is not None:
        parts.append(db.expand_as(y))
    return forward_ad.make_dual(y, sum(parts[1:], start=parts[0])) if parts else y


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)


def layers(model: nn.Module) -> list[tuple[nn.Linear, str]]:
    """The plain linear layers of a model that compute on a CPU, and the attribute that holds their forward: accelerate's
    wrapper, while it is there, calls another. Layers whose forward somebody else has replaced are left out."""
    found = []
    for module in model.modules():
        if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter or module.weight.device.type == "cuda":
            continue
        attribute = "_old_forward" if hasattr(module, "_old_forward") else "forward"
        if getattr(getattr(module, attribute), "__func__", None) is nn.Linear.forward:
            found.append((module, attribute))
    return found


@contextlib.contextmanager
def fast(modules: Sequence[tuple[nn.Linear, str]]) -> Iterator[None]:
    """Inside this context the given layers multiply with `linear`."""
    try:
        for module, attribute in modules:
            module.__dict__[attribute] = functools.partial(_forward, module)
        yield
    finally:
        for module, attribute in modules:
            if attribute == "forward":
                module.__dict__.pop("forward", None)
            else:
                module.__dict__[attribute] = types.MethodType(nn.Linear.forward, module)
