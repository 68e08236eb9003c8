"""A plan confronted with reality: two steps of a case with random weights in a process of their own, and their peak memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from smidgen import adapt, memory, optim, simulate
from smidgen.batched import BatchedEngine
from smidgen.loss import IGNORE
from smidgen.objective import ModelObjective
from smidgen.planner import Case, Model, Planner, compress
from smidgen.simulate import Rows


def measured(planner: Planner, case: Case, threads: int | None = None) -> int | str:
    """Peak bytes over a process that has loaded its libraries, weights included; or why the steps failed, one line."""
    m, b = planner.model, planner.rows
    with tempfile.TemporaryDirectory() as folder:
        m.config.save_pretrained(folder)
        asked = {
            "folder": folder,
            "model": {"kind": m.kind, "dtype": str(m.dtype).removeprefix("torch."), "device": m.device, "classes": m.classes},
            "rows": vars(b),
            "case": {key: dict(value) if isinstance(value, Mapping) else value for key, value in vars(case).items()},
            "threads": threads or torch.get_num_threads(),
        }
        command = [sys.executable, "-W", "ignore", "-m", "smidgen.measure"]
        made = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
    if made.returncode:
        return (made.stderr.strip().splitlines() or [f"ended with {made.returncode}"])[-1]
    return int(made.stdout.splitlines()[-1])


def steps(model: Model, batch: Rows, case: Case) -> None:
    """Two steps of a case, from a model made of its configuration."""
    net = simulate.build(model.config, model.kind, model.dtype, model.classes, device=model.device)
    module = adapt.get(case.scheme)
    adapted = module.build(net, module.Config(**dict(case.scheme_options or {})), seed=0, fresh=[])
    if case.keep == "checkpointing":
        simulate.checkpoint(adapted.model)
    if case.keep == "velora":
        compress(adapted, case.activations_options or {})
    engine = BatchedEngine(adapted.model, adapted.view, model.kind)
    method = optim.get(case.method)
    optimizer = method.build(adapted.view, method.Config(**{"lr": 1e-6, **(case.options or {})}))
    data = made_up(model, batch)
    for _ in range(2):
        optimizer.step(ModelObjective(engine, [data]))


def made_up(model: Model, batch: Rows) -> dict[str, torch.Tensor]:
    """A batch of random tokens, labelled at the last positions of each row."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(min(4, vocabulary - 1), vocabulary, (batch.rows, batch.length), generator=generator).to(model.device)
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.kind == "classification":
        return {**rows, "labels": ids[:, 0] % max(2, model.classes or 2)}
    labels = ids.clone()
    if batch.labels is not None:
        labels[:, : batch.length - batch.labels] = IGNORE
    return {**rows, "labels": labels}


def main() -> None:
    """The process of a measurement: a question as JSON on standard input, bytes on standard output."""
    from transformers import AutoConfig, LlamaConfig

    asked: dict[str, Any] = json.load(sys.stdin)
    torch.set_num_threads(asked["threads"])
    config = AutoConfig.from_pretrained(Path(asked["folder"]), local_files_only=True)
    of = asked["model"]
    model = Model(config, of["kind"], getattr(torch, of["dtype"]), of["device"], of["classes"])
    batch, case = Rows(**asked["rows"]), Case(**asked["case"])
    memory.warm_up()
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 99,
    }
    small = Model(LlamaConfig(**sizes), "causal", model.dtype, model.device)
    steps(small, Rows(2, 8), Case(case.method, case.scheme, case.keep))  # what is loaded on first use
    before = memory.resident()
    memory.reset_peak()
    steps(model, batch, case)
    print(memory.peak() - before)


if __name__ == "__main__":
    main()
