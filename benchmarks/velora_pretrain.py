"""Pre-training from random weights: full AdamW, VeLoRA, GaLore, LoRA and SinkGD; perplexity against steps, time and bytes.

The 9M configuration of GaLore and VeLoRA (width 128, 4 layers) on tiny_shakespeare, tinystories, wikitext2 and c4_demo, with a
byte-level BPE of 2,048 tokens made of the training text: with the published 32,000 tokens 91 % of the weights would be the two
embeddings, which no method here treats differently, and most of their rows would be seen a few times. Rates are searched on
one half of the validation text, the other is read once by each seed. Then the 60M configuration, with 32,000 tokens of the same
text and so 58M weights, makes 50 steps of 2 x 128 tokens by each method, for memory and speed. Grids: velora_pretrain.yaml,
velora_60m.yaml; a second start makes only what is missing. Goal: VeLoRA not below full AdamW by more than two standard errors
over seeds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import _made
from _record import emit
from _study import arguments, conduct, means
from _zo_grid import Cell, Grid, Record, Run
from velora_quality import against, prepare

TEXTS = ("tiny_shakespeare", "tinystories", "wikitext2", "c4_demo")
PAIRS = {"velora": "full", "velora_vd": "full"}
PIECE = 2000  # characters of a held-out document
HELD = 50  # held-out pieces of each half


def make(shared: Path, to: Path) -> None:
    """The text of the four sets in one folder, and tokenizers of it, unless they stand there."""
    from smidgen.splits import take

    folder = to / "text"
    if not (folder / "test.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        held = []
        with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
            for name in TEXTS:
                file.writelines(json.dumps({"text": text}) + "\n" for text in _texts(shared, name, "train"))
                for text in _texts(shared, name, "validation"):
                    held += [text[first : first + PIECE] for first in range(0, len(text), PIECE)]
        chosen = take(held, 2 * HELD)
        for split, texts in (("validation", chosen[::2]), ("test", chosen[1::2])):
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    for size in (2048, 32000):
        if not (to / f"tokenizer-{size}" / "tokenizer.json").exists():
            tokenizer(folder / "train.jsonl", size).save_pretrained(to / f"tokenizer-{size}")


def _texts(shared: Path, name: str, split: str) -> list[str]:
    lines = (shared / "data" / name / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines if line.strip()]


def tokenizer(text: Path, size: int) -> Any:
    """A byte-level BPE of the training text."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special, alphabet = ["<pad>", "<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    made.train_from_iterator((json.loads(line)["text"] for line in text.open(encoding="utf-8")), trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def saved(config: Any, run: Run) -> int:
    """Bytes that one training batch saves."""
    import torch

    made = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 2000, (run.settings["batch"], run.settings["max_length"]), generator=made)
    return _made.saved_bytes(config, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}, None)


class Once(Grid):
    """A grid whose cells run once, at the centre of their rates."""

    def stated(self, records: Mapping[str, Record], cells: Sequence[Cell] | None = None) -> Iterator[Run]:
        for cell in self.cells() if cells is None else cells:
            yield self.run(cell, "seed", self.raw["seeds"][0], self.centre(cell), self.steps(cell))


def main() -> None:
    args = arguments(__doc__, __file__, "velora")
    if not args.dry_run:
        make(args.shared, _made.MADE)
    grid = Grid.read(args.grid, args.scale)
    large = Once.read(args.grid.with_name("velora_60m.yaml"), args.scale)
    how = {"find": _made.cells, "prepare": prepare, "measure": _made.measure(_made.MADE, saved)}
    made = conduct(grid, args, **how)
    also = conduct(
        large, args, outline=lambda g, cells, *_: f"60M: {len(cells)} runs of {g.steps(cells[0])} steps" if cells else "", **how
    )
    if made is None or also is None:
        return
    records = {name: record for name, record in also[2].items() if record["place"] in grid.places}
    figures = means(grid, records)
    goals = against(grid, records, figures, PAIRS)
    for record in also[2].values():
        if record["place"] in large.places and record["status"] == "done":
            name = f"60m_{record['method']}"
            figures[f"{name}_peak_mib"] = record["peak_bytes"] / 2**20
            figures[f"{name}_saved_mib"] = record["saved_bytes"] / 2**20
            figures[f"{name}_state_mib"] = record["state_bytes"] / 2**20
            figures[f"{name}_cpu_seconds_a_step"] = record["cpu_seconds"] / record["steps_made"]
    emit("velora_pretrain", figures, goals, {"grid": args.grid.name, "scale": args.scale, "seeds": grid.raw["seeds"]})


if __name__ == "__main__":
    main()
