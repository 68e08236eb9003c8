"""What a journal belongs to: hashes of base and tuned weights, the header that names them, the tensors made for a run."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smidgen import noise, quantised
from smidgen.config import ConfigError, notice
from smidgen.fingerprint import state_sha256
from smidgen.folder import INIT
from smidgen.params import ParamView, canonical
from smidgen.placed import weights
from smidgen.untrusted import read_tensors


def header(
    method: str,
    config: Any,
    view: ParamView,
    base: str,
    init: str | None,
    device: torch.device,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a journal must know to be replayed, and to be refused on another base."""
    return {
        **(facts or {}),
        "method": method,
        "method_config": config.model_dump(mode="json"),
        "groups": 1,
        "base_sha256": base,
        "init_sha256": init,
        "noise": noise.VERSION,
        "backend": noise.backend(device),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "positional": view.positional,
        "tensors": {e.name: [e.id, str(e.tensor.dtype).removeprefix("torch."), list(e.tensor.shape)] for e in view},
    }


def check_header(found: dict[str, Any], ours: dict[str, Any], where: Path) -> None:
    """Refuse a journal of another base, method, configuration or noise; warn of another machine."""
    options = found.get("method_config")
    options = options if isinstance(options, dict) else {}
    reasons = {
        "base_sha256": "it belongs to another base model (weights differ)",
        "method": f"it was written by method {found.get('method')!r}, this run uses {ours['method']!r}",
        "tensors": "the tuned tensors differ (scheme or model changed)",
        "noise": f"it was written with noise version {found.get('noise')}, this smidgen has {ours['noise']}",
        "method_config": "the method's options differ: "
        + ", ".join(
            f"{k}: {options.get(k)} -> {v}" for k, v in ours["method_config"].items() if found["method_config"].get(k) != v
        ),
        "init_sha256": "its init.safetensors differs",
    }
    for key, reason in reasons.items():
        if found.get(key) != ours[key]:
            raise ConfigError(f"{where} does not fit this run: {reason}; use the original settings or another --output")
    changed = [k for k in ("backend", "threads", "machine", "torch") if found.get(k) != ours[k]]
    if changed:
        pairs = ", ".join(f"{k} {found.get(k)} -> {ours[k]}" for k in changed)
        notice(f"{where.name} was written elsewhere ({pairs}): results may differ in the last bits")


def base_sha256(model: nn.Module) -> str:
    """Hash of all weights of a model under canonical names, tuned or not; of quantised ones, codes and scales."""
    state: dict[str, torch.Tensor] = {canonical(n): p for n, p in weights(model)}
    for prefix, module in quantised.layers(model).items():
        state |= {canonical(f"{prefix}.{n}"): t for n, t in quantised.stored(module).items()}
    return state_sha256(state)


def weights_sha256(view: ParamView) -> str:
    """Hash of the tuned tensors' bytes in name order; of a weight that cannot be written, of its addend's."""
    state: dict[str, torch.Tensor] = {}
    for e in view:
        held = {"": e.tensor} if e.addend is None else {".left": e.addend.left, ".right": e.addend.right}
        state |= {e.name + part: t for part, t in held.items()}
    return state_sha256(state)


def init_sha256(view: ParamView, fresh: Sequence[str]) -> str:
    """Hash of the tensors that are not in the base model."""
    return state_sha256({name: view[name].storage for name in fresh})


def save_init(view: ParamView, fresh: Sequence[str], folder: Path) -> None:
    """Write the tensors that are not in the base model to init.safetensors."""
    from safetensors.torch import save_file

    part = folder / (INIT + ".part")
    save_file({name: view[name].storage.contiguous().cpu() for name in fresh}, part)
    part.rename(folder / INIT)


def load_init(view: ParamView, folder: Path) -> str | None:
    """Put the tensors of init.safetensors into the view; returns their hash, None where there is no such file."""
    path = folder / INIT
    if not path.exists():
        return None
    tensors = read_tensors(path)
    for name, value in tensors.items():
        if name not in view.entries or view[name].tensor.shape != value.shape:
            raise ConfigError(f"{path}: tensor {name!r} does not fit this model and scheme")
        view[name].storage.copy_(value)
    return state_sha256(tensors)
