"""A model whose weights do not fit: on disk (CPU), or in host memory beside a CUDA device. Peak memory and speed of a step.

CPU part: a random Llama-shaped model in files, steps of zo_sgd with 8 probes, each side in its own process: all weights in
memory; on disk, layer by layer for all probes (`smidgen.layerwise`); on disk through accelerate's dispatch, one probe after
the other. Peak resident memory above what the process held before the model, in layers and as a share of the model. The
disk's pages are in the system's cache, so reading is no slower than memory allows.

CUDA part (--device cuda): a 7B-shaped bfloat16 random model, 16 x 256 tokens, 8 probes: layers in pinned host memory against
all on the device; goals 0.70 of its speed under 4 GB of device memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _models import peak_over
from _record import emit

SHAPES = {
    "small": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 512},
    "cpu": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "vocab_size": 4096},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000},
}
QUERIES = 4


def shape(name: str) -> Any:
    from transformers import LlamaConfig

    heads = max(1, SHAPES[name]["hidden_size"] // 128)
    return LlamaConfig(**SHAPES[name], num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=1024)


def write(name: str, folder: Path) -> None:
    """A random model as a checkpoint, made layer by layer."""
    import torch
    from accelerate import init_empty_weights
    from transformers import LlamaForCausalLM

    from smidgen.reuse import stacks
    from smidgen.shelves import Shelves, publish

    with init_empty_weights():
        model = LlamaForCausalLM(shape(name))
    shelves = Shelves(folder / "made", model, next(iter(stacks(model))))
    generator = torch.Generator().manual_seed(0)

    def draw(name: str) -> torch.Tensor:
        size = model.get_parameter(name).shape
        return torch.ones(size) if len(size) == 1 else torch.empty(size).normal_(0, 0.02, generator=generator)

    shelves.fill(draw)
    model.smidgen_shelves = shelves
    (folder / "model").mkdir()
    publish(model, folder / "model")


def opened(side: str, folder: Path) -> Any:
    import torch
    from transformers import LlamaForCausalLM

    from smidgen import placed
    from smidgen.layerwise import from_disk

    source = folder / "model"
    if side == "resident":
        return LlamaForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    options = {"device_map": {"": "disk"}, "offload_folder": str(folder / f"loading-{side}")}
    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32, **options).eval()
    if side == "disk":
        from_disk(model, folder / "weights-disk")
    else:
        placed.settle(model, folder / "weights-accelerate")
    return model


def cpu_side(side: str, folder: Path, rows: int, length: int, steps: int) -> None:
    """Load and step in this process; prints peak and median seconds, and the hash of the weights."""
    import torch
    import transformers

    from smidgen import memory, optim
    from smidgen.layerwise import engine_of
    from smidgen.objective import ModelObjective
    from smidgen.params import ParamView
    from smidgen.provenance import weights_sha256

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    def run(folder: Path, steps: int) -> dict[str, Any]:
        model = opened(side, folder)
        view = ParamView.of_model(model)
        engine = engine_of(model, view, "causal")
        opt = optim.get("zo_sgd").build(view, optim.get("zo_sgd").Config(queries=QUERIES))
        ids = torch.randint(3, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))
        labels = ids.clone()
        labels[:, : length // 2] = -100
        data = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        times = []
        for _ in range(steps):
            begun = time.perf_counter()
            opt.step(ModelObjective(engine, [data]))
            times.append(time.perf_counter() - begun)
        return {"seconds": statistics.median(times[1:] or times), "sha256": weights_sha256(view)}

    memory.warm_up()
    with tempfile.TemporaryDirectory(dir=folder) as tiny:  # what is imported and compiled is no model's memory
        write("small", Path(tiny))
        run(Path(tiny), 1)
    found: dict[str, Any] = {}
    peak, before = peak_over(lambda: found.update(run(folder, steps)))
    print(json.dumps({"peak": peak - before, **found}))


def on_cpu(args: argparse.Namespace) -> None:
    name = "small" if args.small else "cpu"
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        write(name, folder)
        total = sum(p.stat().st_size for p in (folder / "model").glob("*.safetensors"))
        layer = (folder / "model" / f"model-00001-of-{SHAPES[name]['num_hidden_layers'] + 1:05d}.safetensors").stat().st_size
        sides = {}
        for side in ("resident", "disk", "accelerate"):
            command = [sys.executable, __file__, "--side", side, "--at", str(folder), "--steps", str(args.steps)]
            sizes = ["--rows", str(args.rows), "--length", str(args.length)]
            run = subprocess.run(
                [*command, *sizes], env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
            )
            if run.returncode:
                raise SystemExit(run.stderr)
            sides[side] = json.loads(run.stdout.splitlines()[-1])
    disk = sides["disk"]
    figures = {
        "disk_peak_over_model": disk["peak"] / total,
        "disk_peak_in_layers": disk["peak"] / layer,
        "resident_peak_over_model": sides["resident"]["peak"] / total,
        "disk_speed_over_resident": sides["resident"]["seconds"] / disk["seconds"],
        "disk_speed_over_accelerate": sides["accelerate"]["seconds"] / disk["seconds"],
        "accelerate_peak_over_model": sides["accelerate"]["peak"] / total,
        "equal": int(disk["sha256"] == sides["resident"]["sha256"]),
        "model_bytes": total,
        "layer_bytes": layer,
    }
    goals = {"equal": (">=", 1.0), "disk_peak_in_layers": ("<=", 6.0)}
    setting = {"model": SHAPES[name], "dtype": "float32", "rows": args.rows, "tokens": args.length, "probes": 2 * QUERIES}
    emit("offload", figures, goals, {**setting, "steps": args.steps})


def on_cuda(args: argparse.Namespace) -> None:
    import torch
    from transformers import LlamaForCausalLM

    from smidgen import optim
    from smidgen.layerwise import engine_of, from_host
    from smidgen.objective import ModelObjective
    from smidgen.params import ParamView

    device, name = torch.device("cuda"), "small" if args.small else "7b"
    found = {}
    for side in ("resident", "host"):
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with device:  # drawn there, which is quicker
            model = LlamaForCausalLM(shape(name)).eval()
        torch.set_default_dtype(torch.float32)
        if side == "host":
            from_host(model.cpu(), device)
            torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        view = ParamView.of_model(model)
        engine = engine_of(model, view, "causal")
        opt = optim.get("zo_sgd").build(view, optim.get("zo_sgd").Config(queries=QUERIES))
        ids = torch.randint(3, model.config.vocab_size, (16, 256), device=device)
        data = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        data["labels"][:, :128] = -100
        times = []
        for _ in range(args.steps):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            opt.step(ModelObjective(engine, [data]))
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
        found[side] = statistics.median(times[1:]), torch.cuda.max_memory_allocated()
        del model, view, engine, opt
        torch.cuda.empty_cache()
    figures = {"host_speed_over_resident": found["resident"][0] / found["host"][0], "host_device_gb": found["host"][1] / 1e9}
    goals = {"host_speed_over_resident": (">=", 0.7), "host_device_gb": ("<=", 4.0)}
    emit(
        "offload",
        figures,
        goals,
        {"model": SHAPES[name], "dtype": "bfloat16", "rows": 16, "tokens": 256, "probes": 2 * QUERIES},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--folder", help="where the model's files are made; default: the system's temporary folder")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--at", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        cpu_side(args.side, args.at, args.rows, args.length, args.steps)
    elif args.device == "cuda":
        on_cuda(args)
    else:
        on_cpu(args)


if __name__ == "__main__":
    main()
