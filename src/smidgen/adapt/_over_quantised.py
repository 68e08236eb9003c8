"""Full fine-tuning over a quantised base: every quantised matrix has an addend, nothing is ever written to the base.

Theta of a quantised matrix is W + A B^T, see `smidgen.addend`: methods with low-rank steps displace it by thin products, and
what they would merge into a plain weight becomes columns of A and B. Tuned: all quantised linear layers (narrowed by
`only`), and new heads, which are no part of the base. All other tensors (embeddings, norms, biases, the output head) are
frozen: a LoRA adapter cannot hold them.

Saved as PEFT's LoRA adapter: lora_B = A, lora_A = B^T, lora_alpha = rank, float32, exactly what is held. R grows by the
method's rank at each refresh of its subspace: a longer `interval` keeps the adapter small. It is never merged: export with
`--base`, the unquantised model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from smidgen import quantised
from smidgen.adapt._peft import new_modules
from smidgen.addend import Addend, refusal
from smidgen.config import ConfigError
from smidgen.params import Entry, ParamView, canonical, tensor_id

ADAPTER = "adapter_model.safetensors"
_PREFIX = "base_model.model."


class OverQuantised:
    """A quantised model whose matrices have addends; a `Moving` scheme, since a checkpoint must hold them."""

    EXPORTS = {
        "adapter": "PEFT's adapter_model.safetensors and adapter_config.json",
        "peft-lora": "the same as adapter",
        "merged": "the unquantised model (--base) with the products added in, for stock transformers",
    }

    def __init__(self, model: nn.Module, only: str | None, fresh: Sequence[str]):
        quantised.refuse_unknown(model)
        self.model = model
        self.heads = new_modules(model, set(fresh))
        wanted = None if only is None else re.compile(only)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.is_floating_point() and canonical(name) in set(fresh))
        entries = []
        for prefix, module in quantised.layers(model).items():
            name = canonical(f"{prefix}.weight")
            if wanted is None or wanted.search(name):
                addend = Addend(module, quantised.shape(module), module.weight.device)  # type: ignore[arg-type]
                stand_in = addend.stand_in(quantised.compute_dtype(module))
                entries.append(Entry(name, tensor_id(name), stand_in, [(module, "weight")], addend=addend))
        if not entries:
            raise ConfigError(
                f"scheme_args.only = {only!r} matches no quantised matrix of the model: only these are tuned here"
            )
        whole = ParamView.of_model(model) if any(p.requires_grad for p in model.parameters()) else ()
        self.view = ParamView([*entries, *whole])
        self.fresh = [name for name in fresh if name in self.view.entries]

    # -- while it trains (`Moving`) -----------------------------------------------------------------------------------

    def begin(self, optimizer: Any) -> None:
        if not optimizer.lazy:
            raise refusal(next(iter(self.view)).name)
        if getattr(optimizer.config, "weight_decay", 0.0):
            raise ConfigError("quantised weights cannot decay: set weight_decay to 0")

    def after_step(self, optimizer: Any, steps: int) -> None:
        pass

    def save_state(self, folder: Path) -> None:
        self.save(folder)

    def load_state(self, folder: Path) -> None:
        self.load(folder)

    # -- files --------------------------------------------------------------------------------------------------------

    def _addends(self) -> dict[str, Addend]:
        return {e.name.removesuffix(".weight"): e.addend for e in self.view if e.addend is not None}

    def save(self, folder: Path) -> None:
        """PEFT's LoRA adapter files. A matrix that has not moved is saved with rank 1, at zero."""
        import peft
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {_PREFIX + name: self.view[name].storage.contiguous() for name in self.fresh}
        ranks = {}
        for name, addend in self._addends().items():
            A, B = addend.left, addend.right
            if not addend.rank:
                A, B = A.new_zeros(A.shape[0], 1), B.new_zeros(B.shape[0], 1)
            tensors |= {f"{_PREFIX}{name}.lora_A.weight": B.T.contiguous(), f"{_PREFIX}{name}.lora_B.weight": A.contiguous()}
            ranks[name] = A.shape[1]
        most = max(ranks.values())
        other = {"^" + re.escape(name) + "$": rank for name, rank in ranks.items() if rank != most}
        config = peft.LoraConfig(
            r=most,
            lora_alpha=most,
            rank_pattern=dict(other),
            alpha_pattern=dict(other),
            target_modules=list(ranks),
            modules_to_save=self.heads or None,
            auto_mapping={"base_model_class": type(self.model).__name__, "parent_library": type(self.model).__module__},
            base_model_name_or_path=getattr(self.model, "name_or_path", None),
            inference_mode=True,
        )
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(folder))
        save_file(tensors, folder / ADAPTER)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Raises ConfigError where it belongs to another model or other matrices."""
        from safetensors.torch import load_file

        tensors = load_file(folder / ADAPTER)
        for name, addend in self._addends().items():
            B, A = (tensors.pop(f"{_PREFIX}{name}.{part}.weight", None) for part in ("lora_A", "lora_B"))
            if A is None or B is None or (A.shape[0], B.shape[1]) != addend.shape:
                raise ConfigError(f"{folder} holds no adapter of {name} in this model: load it on the base of its run")
            if not A.any():
                A, B = A[:, :0], B[:0]
            addend.set(A.to(addend.left), B.T.to(addend.right))
        whole = {name.removeprefix(_PREFIX): value for name, value in tensors.items()}
        if strange := sorted(whole.keys() - set(self.fresh)):
            raise ConfigError(f"{folder} tunes {strange[0]}, this run does not: load it with the options of its run")
        self.view.restore({name: value.to(self.view[name].tensor.device) for name, value in whole.items()})
        for entry in self.view:
            entry.version += 1

    def merged(self) -> nn.Module:
        raise quantised.unmerged()
