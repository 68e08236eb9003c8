"""A trainer on several ranks: which rows each gets, what all must agree on before the first step and every so often after.

Rows go out as accelerate does it, one micro-batch a group of ranks in turn, so that a step's rows are those of one process
whose batch is as many times larger; an epoch's last step is filled up with rows from its beginning.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from smidgen import world
from smidgen.config import ConfigError, UserError, notice
from smidgen.journal import Witness
from smidgen.params import ParamView
from smidgen.provenance import base_sha256, weights_sha256
from smidgen.ranks import Reduced

_ROWS = 10_000  # rows of a data set that are hashed, evenly spread; chosen: seconds


class RanksDiffer(UserError):  # noqa: N818 - what was found
    """Ranks that should be equal are not."""


class Parallel:
    """The ranks of one trainer. `probe_ranks`: so many in a row see the same rows and share the probes; `every`: steps
    between two comparisons of weights and transcripts, 0: none. Raises ConfigError where the ranks cannot be split so."""

    def __init__(self, probe_ranks: int = 1, every: int = 100):
        self.count = world.count()
        if self.count % probe_ranks:
            sizes = ", ".join(str(n) for n in range(1, self.count + 1) if self.count % n == 0)
            raise ConfigError(f"probe_ranks = {probe_ranks} does not divide the {self.count} ranks: one of {sizes}")
        self.probe_ranks, self.every = probe_ranks, every
        self.groups = self.count // probe_ranks
        self._equal = 0  # the last step after which all were equal
        self._said: set[str] = set()

    def objective(self, inner: Any) -> Any:
        """A rank's objective as that of all ranks."""
        return inner if self.count == 1 else _Told(inner, self)

    def begin(self, trainer: Any) -> None:
        """Give ranks that share probes the same rows; without such ranks accelerate does what it always does. Raises
        ConfigError for what several ranks cannot do."""
        if self.count == 1:
            return
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ConfigError(
                "FSDP and DeepSpeed split each weight over ranks, and updates here are of whole weights: leave train.fsdp and "
                "train.deepspeed out; methods that only run forwards need no wrapper, others run under DistributedDataParallel"
            )
        if trainer.backward and getattr(trainer.method_config, "fused", False):
            raise ConfigError("fused = true updates a tensor before the gradients of other ranks are there: leave it out")
        if trainer.backward and self.probe_ranks > 1:
            raise ConfigError(
                f"probe_ranks = {self.probe_ranks}: {trainer.method} back-propagates, its ranks share out rows only"
            )
        if self.probe_ranks > 1:
            self._share_rows(trainer.accelerator)

    def _share_rows(self, accelerator: Any) -> None:
        from accelerate.data_loader import prepare_data_loader

        def prepare(loader: Any, device_placement: bool | None = None, slice_fn_for_dispatch: Any = None) -> Any:
            found = prepare_data_loader(
                loader,
                accelerator.device,
                num_processes=self.groups,
                process_index=world.index() // self.probe_ranks,
                put_on_device=accelerator.device_placement if device_placement is None else device_placement,
                rng_types=accelerator.rng_types.copy(),
                dispatch_batches=False,
                even_batches=accelerator.even_batches,
                use_seedable_sampler=accelerator.use_seedable_sampler,
            )
            accelerator._dataloaders.append(found)
            return found

        accelerator.prepare_data_loader = prepare

    def agree_on(self, trainer: Any, init: str | None, *more: tuple[str, str]) -> str:
        """The hash of a trainer's base, known to be that of all ranks, as is all else that they must share."""
        config, arguments, base = trainer.method_config, trainer.args, base_sha256(trainer.model)
        asked = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs", "data_seed")
        training = {key: getattr(arguments, key) for key in asked} | {"schedule": str(arguments.lr_scheduler_type)}
        facts = {
            "model": base,
            "drawn tensors": str(init),
            "seed": f"{arguments.seed} / {getattr(config, 'seed', 0)}",
            "method": f"{trainer.method} {json.dumps(config.model_dump(mode='json'), sort_keys=True)}",
            "training": json.dumps(training),
            **dict(more),
        }
        rows = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        self.agree(facts, trainer.train_dataset, rows)
        return base

    def agree(self, facts: Mapping[str, str], rows: Any, batch: int) -> None:
        """Raise ConfigError unless code, data and `facts` are the same on all ranks; say what does not come out even.
        batch: rows of a rank's step."""
        if self.count == 1:
            return
        world.agree({**facts, "data": rows_sha256(rows), "probe_ranks": str(self.probe_ranks)})
        size = len(rows) if hasattr(rows, "__len__") else 0
        if over := size % (batch * self.groups):
            self.say(
                f"{size} rows are no multiple of the {batch * self.groups} of a step: an epoch's last step is filled up with "
                f"{batch * self.groups - over} rows from its beginning"
            )

    def say(self, line: str) -> None:
        """One line, once, by rank 0."""
        if line not in self._said:
            self._said.add(line)
            notice(line)

    def check(self, step: int, view: ParamView, witness: Witness | None, *, last: bool = False) -> None:
        """After `step` steps: every so many, compare weights and transcript by hash. Raises RanksDiffer on every rank."""
        if self.count == 1 or not self.every or (step % self.every and not last):
            return
        digests = {"weights": weights_sha256(view), "transcript": "" if witness is None else witness.sha256}
        mine = torch.frombuffer(
            bytearray(b"".join(hashlib.sha256(d.encode()).digest() for d in digests.values())), dtype=torch.uint8
        )
        table = world.everywhere(mine)
        for at, name in enumerate(digests):
            part = slice(32 * at, 32 * at + 32)
            for rank, other in enumerate(table):
                if not torch.equal(other[part], table[0][part]):
                    raise RanksDiffer(
                        f"ranks 0 and {rank} hold different {name} after step {step}, and were equal after step {self._equal}: "
                        "memory or a library of one of them is at fault; `smidgen replay` with "
                        f"--at {self._equal} rebuilds the last state that they shared"
                    )
        self._equal = step


class _Told(Reduced):
    """A Reduced that says once where ranks are left without work."""

    def __init__(self, inner: Any, parallel: Parallel):
        super().__init__(inner, parallel.probe_ranks)
        self.parallel = parallel

    def losses(self, probes: Any, *, each: bool = False) -> Tensor:
        used = -(-len(probes) // -(-len(probes) // self.width)) if probes else 0
        if used < self.width:
            self.parallel.say(
                f"{len(probes)} probes on {self.width} ranks: {used} of them have work, in parts of up to "
                f"{-(-len(probes) // self.width)}, the others wait"
            )
        return super().losses(probes, each=each)


def rows_sha256(rows: Any) -> str:
    """Hash of a data set: of all its rows, or of 10,000 evenly spread; of a data set that may draw when a row is read,
    its number of rows only."""
    digest = hashlib.sha256()
    size = len(rows) if hasattr(rows, "__len__") else 0
    digest.update(str(size).encode())
    home = type(rows).__module__.partition(".")[0]
    if home in ("smidgen", "builtins") or (home == "datasets" and size and getattr(rows, "_format_type", None) is None):
        step = max(1, size // _ROWS)
        for at in [*range(0, size, step), size - 1] if size else ():
            _feed(digest, rows[at])
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(
            f"{value.dtype}{tuple(value.shape)}".encode()
            + value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        )
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"{key}:".encode())
            _feed(digest, value[key])
    elif isinstance(value, (list, tuple)) and value and isinstance(value[0], (Mapping, list, tuple, Tensor)):
        for item in value:
            _feed(digest, item)
    elif isinstance(value, (set, frozenset)):
        digest.update(repr(sorted(value, key=repr)).encode())
    elif value is None or isinstance(value, (str, int, float, bool, bytes, list, tuple)):
        digest.update(repr(value).encode() + b";")
    else:
        digest.update(type(value).__name__.encode())
