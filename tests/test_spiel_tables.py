"""The page of SpIEL's records says what they hold, and leaves out what is not there."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
spec = importlib.util.spec_from_file_location("spiel_tables", SCRIPTS / "spiel_tables.py")
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)


def write(folder, method, role, seed, lr, value, metric="loss"):
    record = {"place": "stories-alpaca", "scheme": "lora" if method == "lora" else "spiel", "method": method, "role": role}
    record |= {"seed": seed, "lr": lr, "status": "done", "metric": metric, "dev": {"loss": value + 0.1}, "cpu_seconds": 7.0}
    record |= {"peak_bytes": 3 << 20, "tuned_weights": 1234, "batch": 16, "budget": 3600.0, "model": "shared:m/tiny"}
    record |= {"task": "instruct", "rows": {"train": 10, "validation": 4, "test": 5}, "test": {metric: value}}
    path = folder / "stories-alpaca" / f"{method}-{role}-{seed}-{lr}.json"
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(record))


def test_the_page_says_who_is_better(tmp_path):
    for seed in range(3):
        write(tmp_path, "lora", "seed", seed, 0.004, 3.0 + 0.01 * seed)
        write(tmp_path, "spiel_ag", "seed", seed, 0.004, 2.5 + 0.01 * seed)
    for lr in (0.001, 0.004):
        write(tmp_path, "spiel_ag", "search", 0, lr, 4.0)
    write(tmp_path, "zero_shot", "zero_shot", 0, 1e-30, 8.0)
    text = tables.page(tmp_path, tmp_path / "nothing")
    assert "| SpIEL-AG | 1,234 | 0.004* | 2.5100 ± 0.0100 | 2.6100 | 7 | 3 |" in text
    assert "| LoRA | 1,234 | 0.004 | 3.0100 ± 0.0100 | 3.1100 | 7 | 3 |" in text and "| untrained |  |  | 8.0000 |" in text
    assert "by two standard errors over seeds: SpIEL-AG below." in text and "## Step and memory" not in text


def test_speed_and_memory_come_from_their_records(tmp_path):
    others = ("lora", "lora_dropout", "shira", "supertuning", "qlora", "spiel_run", "lora_run")
    sides = [*(side for *_, side, _ in tables.STATES), *others]
    figures = {f"{side}_{part}": 2.0 for side in sides for part in ("peak_mib", "seconds")} | {"spiel_peak_over_lora": 0.97}
    step = {"figures": figures, "goals": {"spiel_peak_over_lora": ["<=", 0.95]}, "met": {"spiel_peak_over_lora": False}}
    step["setting"] = {"model": "12 layers", "threads": 2, "cpu": "some"}
    (tmp_path / "spiel_step.json").write_text(json.dumps(step))
    shape = {"96x64_128_tokens_10_per_mille_sampled": 0.25, "96x64_128_tokens_10_per_mille_gathered": 1.5}
    ways = {"figures": {**shape, "crossover_per_mille": 10, "products_over_best": 1.0}, "setting": {"threads": 2}}
    (tmp_path / "sparse_gradient.json").write_text(json.dumps(ways))
    text = tables.page(tmp_path / "nothing", tmp_path)
    assert "| 8-bit AdamW | nf4 | 2 | 2.00 | - |" in text and "| spiel_peak_over_lora | 0.970 | <= 0.95 | no |" in text
    assert "| 96x64 | 128 | sampled | 0.25 |" in text and "up to 10 per mille" in text
