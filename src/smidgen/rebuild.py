"""Rebuild the weights of a run from its base model and its journal: the same steps with recorded numbers, no forward."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import transformers

from smidgen import config_file as configuration
from smidgen import folder as folders
from smidgen import journal, optim
from smidgen.config import ConfigError, notice
from smidgen.objective import Replayed
from smidgen.provenance import base_sha256, check_header, header, load_init, weights_sha256
from smidgen.run import environment, load
from smidgen.settings import options_of
from smidgen.trainer import method_config


def replay(base: str, run: Path, to: Path, *, at: int | None = None) -> dict[str, Any]:
    """Write the tuned model after `at` steps (all when None) and result.json with `weights_sha256` into `to`.

    Cost: one pass of the noise generator and one write of the weights for each step. Raises ConfigError when `run` is no
    run with a journal, `base` is not its base model or `to` is occupied; JournalError for a damaged journal.
    """
    if not (run / folders.RESOLVED).exists():
        raise ConfigError(f"{run} is no run folder: it has no {folders.RESOLVED}")
    if not (run / folders.JOURNAL).exists():
        raise ConfigError(f"{run} has no journal: its method, with these options, resumes from checkpoints only")
    folders.refuse_occupied(to, force=False)
    transcript = journal.read(run / folders.JOURNAL, stop=at)
    records = transcript.steps()
    if at is not None and at > len(records):
        raise ConfigError(f"the journal ends after step {len(records)}, before --at {at}")
    if at is None and (line := transcript.cut_notice()) is not None:
        notice(line)
    head = transcript.header
    config = configuration.with_values(folders.opened(run), {"model": base})
    if config.threads is None:
        torch.set_num_threads(int(head["threads"]))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    loaded = load(config, head["classes"])
    model, view = loaded.adapted.model, loaded.adapted.view
    init = load_init(view, run)
    options = method_config(config.method, config.preset, options_of(config))
    place = next(model.parameters()).device
    ours = header(config.method, options, view, base_sha256(model), init, place)
    check_header(head, ours, run / folders.JOURNAL)
    optimizer = optim.get(config.method).build(view, options)
    started = time.perf_counter()
    for record in records:
        for group, lr in zip(optimizer.param_groups, record.lrs, strict=True):
            group["lr"] = lr
        optimizer.step(Replayed(record.values))
    optimizer.merge_()
    seconds = time.perf_counter() - started
    with folders.locked(to):
        folders.publish(loaded.adapted, loaded.tokenizer, to)
        result = {
            "status": "replayed",
            "steps": len(records),
            "seconds": seconds,
            "weights_sha256": weights_sha256(view),
            "run": str(run),
            "base": base,
            "versions": environment()["versions"],
            "output": str(to),
        }
        folders.write_json(to / folders.RESULT, result)
    return result
