"""Which module reads each tuned tensor, and for how long its displaced copy must therefore live.

Every tensor starts with the module that owns it. `Readers.locate` runs one evaluation in which every tensor, outside its
reader's forward, is a zero-stride NaN view that raises when it is touched; what is read elsewhere, or handed out by its
reader as it is, moves to the parent of its reader, at last to the whole evaluation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.config import ConfigError
from smidgen.params import Entry, ParamView
from smidgen.placed import homes, wrapped

log = logging.getLogger("smidgen")

ALIGN = 64  # bytes; a cache line and an AVX-512 register

Key = tuple[int, str]  # id of the module that owns a tensor, and its attribute there


def aligned(size: int) -> int:
    """Bytes rounded up to the alignment."""
    return -(-size // ALIGN) * ALIGN


@dataclass
class Reader:
    """A module and the tuned tensors that it reads: (entry, owner module, attribute)."""

    module: nn.Module | None  # None: no module, the whole evaluation
    name: str
    tensors: list[tuple[Entry, nn.Module, str]] = field(default_factory=list)
    nested: bool = False  # other readers run inside it, so its scratch is its own

    def nbytes(self) -> int:
        """Bytes of its tensors that are displaced in scratch, each aligned."""
        return sum(aligned(e.tensor.numel() * e.tensor.element_size()) for e, _, _ in self.tensors if e.addend is None)


class _ReadOutsideError(RuntimeError):
    """A poisoned tensor was used."""

    def __init__(self, tensor: _Poison):
        super().__init__(f"{tensor.tensor_name} is read outside the forward of {tensor.reader_name}")
        self.key = tensor.key


class _Poison(Tensor):
    """A zero-stride NaN view that raises when an operation touches it; metadata may be read."""

    tensor_name: str
    reader_name: str
    key: tuple[int, str]  # id of the owner module, attribute

    _METADATA = frozenset(
        """shape dtype device ndim size dim requires_grad is_leaf layout numel is_cuda names is_floating_point element_size
        nelement is_sparse is_quantized is_meta grad_fn grad is_complex itemsize nbytes is_contiguous stride is_cpu
        is_nested""".split()  # noqa: SIM905 - a list of this length reads worse
    )

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        if name in cls._METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        flat = [*args, *(kwargs or {}).values()]
        flat += [x for a in flat if isinstance(a, (list, tuple)) for x in a]
        raise _ReadOutsideError(next(a for a in flat if isinstance(a, _Poison)))


def _poison(entry: Entry, key: Key, reader: Reader) -> _Poison:
    nan = torch.full((), torch.nan, dtype=entry.tensor.dtype, device=entry.tensor.device)
    view = torch.Tensor._make_subclass(_Poison, nan.expand(entry.tensor.shape))
    view.tensor_name, view.reader_name, view.key = entry.name, reader.name or "the model", key
    return view


class Readers:
    """The readers of a model's tuned tensors. Raises ValueError for a tensor that belongs to no module."""

    def __init__(self, model: nn.Module, view: ParamView):
        self._model = model
        self._modules = dict(model.named_modules())
        self._by_module: dict[int, Reader] = {}  # id of the module, 0 for the whole evaluation
        names = {id(m): n for n, m in self._modules.items()}
        for entry in view:
            if not entry.sites:
                raise ValueError(f"{entry.name!r} belongs to no module: probing a model needs ParamView.of_model")
            for owner, attribute in entry.sites:
                reader = self._by_module.setdefault(id(owner), Reader(owner, names[id(owner)]))
                reader.tensors.append((entry, owner, attribute))
        self._mark_nesting()

    def __iter__(self) -> Iterator[Reader]:
        return iter(self._by_module.values())

    def _mark_nesting(self) -> None:
        names = [r.name for r in self]
        for reader in self:
            prefix = "" if reader.module is None or not reader.name else reader.name + "."
            reader.nested = any(n != reader.name and n.startswith(prefix) for n in names)

    def _move_up(self, key: Key) -> str:
        """Move one tensor to the parent of its reader; returns the parent's name. Raises ConfigError for a quantised one."""
        reader, item = next((r, t) for r in self for t in r.tensors if (id(t[1]), t[2]) == key)
        if item[0].addend is not None:
            raise ConfigError(f"{item[0].name} is quantised and read outside its layer: leave it out with scheme_args.only")
        if reader.module is self._model:
            module, name = None, "the whole evaluation"
        else:
            name = reader.name.rpartition(".")[0]
            module = self._modules[name]
        reader.tensors.remove(item)
        if not reader.tensors:
            del self._by_module[id(reader.module)]
        self._by_module.setdefault(id(module) if module is not None else 0, Reader(module, name)).tensors.append(item)
        self._mark_nesting()
        return name

    def locate(self, run: Callable[[], Any]) -> None:
        """Call `run` (one evaluation) with poisoned tensors until none is read outside its reader.

        Cost: one call when every tensor is read by its owner, one more for each that is not. No copy of the model.
        """
        while True:
            try:
                found = self._poisoned(run)
            except _ReadOutsideError as error:
                found = {error.key: str(error)}
            if not found:
                return
            for key, reason in found.items():
                name = self._move_up(key)
                level = logging.WARNING if name == "the whole evaluation" else logging.INFO
                log.log(level, "%s: its scratch lives for the forward of %s", reason, name or "the whole model")

    def _poisoned(self, run: Callable[[], Any]) -> dict[Key, str]:
        """One evaluation with poison outside each reader; returns the tensors that a reader hands out as they are."""
        aliases: dict[Key, str] = {}
        saved: list[tuple[nn.Module, str, Any]] = []
        brought: dict[Key, Any] = {}  # what a layer that runs on copies holds now
        handles = []

        def poison(reader: Reader) -> None:
            for entry, owner, attribute in reader.tensors:
                owner._parameters[attribute] = _poison(entry, (id(owner), attribute), reader)  # type: ignore[assignment]

        def hooks(reader: Reader) -> tuple[Callable[..., None], Callable[..., None]]:
            real = [(owner, a, owner._parameters[a]) for _, owner, a in reader.tensors]
            saved.extend(real)

            def enter(*_: Any) -> None:
                for owner, attribute, tensor in real:
                    owner._parameters[attribute] = brought.get((id(owner), attribute), tensor)

            def leave(_: Any, __: Any, output: Any) -> None:
                storages = {t.untyped_storage().data_ptr() for t in _tensors(output)}
                for entry, owner, attribute in reader.tensors:
                    if entry.tensor.untyped_storage().data_ptr() in storages:
                        aliases[id(owner), attribute] = f"{entry.name} is handed out by {reader.name or 'the model'}"
                poison(reader)

            return enter, leave

        def copied(layer: nn.Module) -> tuple[Callable[..., None], Callable[..., None]]:
            """Poison over the copies that a layer shows, and over what it shows again afterwards."""
            inside = {id(m) for m in layer.modules()}
            readers = [r for r in self if r.module is not None and id(r.module) in inside]

            def enter(*_: Any) -> None:
                for reader in readers:
                    brought.update({(id(owner), a): owner._parameters[a] for _, owner, a in reader.tensors})
                    poison(reader)

            def leave(*_: Any) -> None:
                for reader in readers:
                    poison(reader)

            return enter, leave

        try:
            stream = getattr(unwrapped(self._model), "smidgen_stream", None)
            for layer in stream.stack if stream is not None and stream.near is not None else ():
                enter, leave = copied(layer)
                handles.append(layer.register_forward_pre_hook(enter))
                handles.append(layer.register_forward_hook(leave))
            for reader in self:
                if reader.module is not None and homes(reader.module) is None:  # else accelerate takes them away itself
                    enter, leave = hooks(reader)
                    poison(reader)
                    handles.append(reader.module.register_forward_pre_hook(enter))
                    handles.append(reader.module.register_forward_hook(leave))
            run()
        finally:
            for handle in handles:
                handle.remove()
            for owner, attribute, tensor in saved:
                owner._parameters[attribute] = tensor
        return aliases


def of_layers(readers: Iterable[Reader], layers: Sequence[nn.Module], run: Callable[[], Any]) -> list[Reader]:
    """The readers, with those inside one layer as one: its tensors live for its whole forward, so that they can be displaced
    at once. Left alone: what one call of `run` does not find inside its layer's forward, embeddings, which are displaced row
    by row, and what accelerate or a quantised base holds."""
    home = {id(m): layer for layer in layers for m in layer.modules()}
    candidates = [r for r in readers if r.module is not None and id(r.module) in home and _mergeable(r, r.module)]
    inside: list[nn.Module] = []
    strays: set[int] = set()

    def begin(layer: nn.Module, _: Any) -> None:
        inside.append(layer)

    def end(*_: Any) -> None:
        inside.pop()

    def look(module: nn.Module, _: Any) -> None:
        if not inside or inside[-1] is not home[id(module)]:
            strays.add(id(module))

    handles = [h for x in layers for h in (x.register_forward_pre_hook(begin), x.register_forward_hook(end))]
    handles += [r.module.register_forward_pre_hook(look) for r in candidates if r.module is not None]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    merged: dict[int, Reader] = {}
    joined = {id(r) for r in candidates if id(r.module) not in strays}
    for reader in (r for r in candidates if id(r) in joined):
        layer = home[id(reader.module)]
        merged.setdefault(id(layer), Reader(layer, "layers", nested=True)).tensors.extend(reader.tensors)
    return [*(r for r in readers if id(r) not in joined), *merged.values()]


def _mergeable(reader: Reader, module: nn.Module) -> bool:
    rows = isinstance(module, nn.Embedding)
    return not rows and not wrapped(module) and all(entry.addend is None for entry, _, _ in reader.tensors)


def _tensors(output: Any) -> Iterator[Tensor]:
    """All tensors in a module's output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model under PEFT's and accelerate's wrappers."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()  # type: ignore[operator]
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module  # type: ignore[assignment]
        else:
            return model


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that makes logits over the vocabulary, or None."""
    getter = getattr(unwrapped(model), "get_output_embeddings", None)
    return getter() if getter is not None else None
