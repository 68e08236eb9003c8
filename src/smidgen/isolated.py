"""Runs in processes of their own, forked from one that has imported and rehearsed what every run needs.

A run then starts in no time, inherits no tensor, thread or generator state of another, and its peak memory is its own. Where
there is a CUDA device, which does not survive a fork, processes are spawned instead.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import io
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from smidgen import optim
from smidgen.config import RunConfig
from smidgen.run import finetune

Cases = Sequence[tuple[str, str]]  # (method, scheme)

_REHEARSED: Cases = (("adamw", "full"), ("zo_sgd", "lora"))


def populate() -> None:
    """Map the pages of the loaded libraries now: a forked process would count each that it touches as the run's memory."""
    if sys.platform != "linux":
        return
    libc, read = ctypes.CDLL(None, use_errno=True), 22  # MADV_POPULATE_READ, Linux 5.14; older kernels refuse it
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, access, *_, name = line.split(maxsplit=5)
        if ".so" in name and access.startswith("r"):
            first, last = (int(part, 16) for part in span.split("-"))
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), read)


def rehearse(threads: int, cases: Cases = _REHEARSED) -> None:
    """Import, compile and rehearse what every run needs, once, in the process that forks, and give the memory back.

    Without the rehearsal each run would count tens of MiB of imports and first uses as its own. The objects are then taken
    out of the garbage collector's sight: a run that collects would walk, and so copy, all of them.
    """
    import torch

    torch.set_num_threads(threads)
    for name in optim.names():
        optim.get(name)
    few: dict[str, Any] = {"task": "reviews", "train_rows": 8, "dev_rows": 8, "test_rows": 8, "threads": threads}
    few["train"] = {"max_steps": 2, "per_device_train_batch_size": 4, "train_sampling_strategy": "group_by_length"}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        for method, scheme in cases:
            config = RunConfig.model_validate(
                {**few, "method": method, "scheme": scheme, "output": f"{folder}/{method}-{scheme}"}
            )
            finetune(config, say=lambda line: None)
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else libraries complain about what is left at the end, a page long
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def start(target: Callable[..., None], arguments: Sequence[Any], method: str) -> Any:
    """Begin a process whose whole life is `target(*arguments)`; method: fork or spawn."""
    process = multiprocessing.get_context(method).Process(target=_quiet, args=(target, *arguments))  # type: ignore[attr-defined]
    process.start()
    return process


def _quiet(target: Callable[..., None], *arguments: Any) -> None:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        populate()
        target(*arguments)
    sys.stdout.flush()
    os._exit(0)
