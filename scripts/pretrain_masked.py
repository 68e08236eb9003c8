"""Pre-train a masked language model of 2 to 4 million weights on text, for the prompt route of the derivative-free study.

    python scripts/pretrain_masked.py --text ../shared/data --to runs/masked

Text: every long string of the `train.jsonl` files of SETS below --text, each once. So that a model of this size follows a
prompt at all, labelled rows of PROMPTED, which the study does not measure on, are put in the words of DFO-LoRA's prompts and
their label words always predicted; no label of a task of the study is read. (Some sentences of rotten_tomatoes are also
training sentences of SST-2, none is one of its test rows.)
RoBERTa's architecture, byte-level BPE made of the same text with the label words counted in so that each is one token; 15 % of
the other tokens are predicted, 80 % of them masked, 10 % replaced, 10 % kept. The size is chosen for about 8 minutes on one
core; a second start goes on where the first stopped. The folder loads with `--model FOLDER`; it is not shipped.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

WORDS = [
    "terrible", "great", "bad", "negative", "positive", "World", "Sports", "Business", "Tech", "Yes", "Maybe", "No",
    "Company", "Education", "Artist", "Athlete", "Office", "Transportation", "Building", "Natural", "Village",
    "Animal", "Plant", "Album", "Film", "Written",
]  # fmt: skip
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # RoBERTa's numbers
SETS = [
    "ag_news", "c4_demo", "dbpedia_14", "emotion", "imdb", "mrpc", "rotten_tomatoes", "snli", "squad", "sst2", "sst5",
    "wikitext2", "yelp_polarity",
]  # fmt: skip
PROMPTED = {  # file, template up to the label word and after it, label words
    "rotten_tomatoes/train.jsonl": ("{text} . It was", " .", ("bad", "great")),
    "imdb/train.jsonl": ("{text} . It was", " .", ("bad", "great")),
    "cb/train.jsonl": ("{premise} ?", " , {hypothesis}", ("Yes", "No", "Maybe")),
    "mnli/validation.jsonl": ("{premise} ?", " , {hypothesis}", ("Yes", "Maybe", "No")),
}
COPIES = 4  # of each prompted row; chosen: about a tenth of all tokens


def texts(folder: Path) -> Iterator[str]:
    """Training texts, one record at a time, none twice."""
    seen: set[str] = set()
    for name in SETS:
        for line in (folder / name / "train.jsonl").read_text(encoding="utf-8").strip().split("\n"):
            strings = [v for v in json.loads(line).values() if isinstance(v, str) and len(v) > 20 and v not in seen]
            seen.update(strings)
            if strings:
                yield " ".join(strings)


def prompted(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(before, label word, after) of every labelled row outside the study."""
    for name, (before, after, words) in PROMPTED.items():
        for line in (folder / name).read_text(encoding="utf-8").strip().split("\n"):
            row = json.loads(line)
            yield before.format(**row), f" {words[row['label']]}", after.format(**row)


def make_tokenizer(corpus: list[str], vocabulary: int) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE whose label words, after a space, are single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    counted = "".join(f" {word}" for word in WORDS)
    tokenizer.train_from_iterator([*corpus, *[counted] * max(1000, len(corpus) // 10)], trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=ends
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
    names |= {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **names)
    split = [word for word in WORDS if len(made.encode(f" {word}", add_special_tokens=False)) != 1]
    if split:
        raise SystemExit(f"label words of several tokens: {', '.join(split)}: raise --vocabulary")
    return made


def streams(
    corpus: list[str], rows: list[tuple[str, str, str]], tokenizer: transformers.PreTrainedTokenizerFast, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pieces of at most `length` tokens [n, length], shortest first, and which of them are label words. Every text begins its
    own piece."""
    pieces: list[list[int]] = []
    for ids in tokenizer(corpus)["input_ids"]:
        pieces += [ids[i : i + length] for i in range(0, len(ids), length)]
    pieces = [ids for ids in pieces if len(ids) >= 8]
    answers: list[int | None] = [None] * len(pieces)
    for before, word, after in rows:
        left, middle, right = (tokenizer.encode(part, add_special_tokens=False) for part in (before, word, after))
        room = length - len(middle) - 2 - min(len(right), length // 2)
        left, right = left[-room:], right[: length // 2]
        pieces += [[tokenizer.bos_token_id, *left, *middle, *right, tokenizer.eos_token_id]] * COPIES
        answers += [1 + len(left)] * COPIES
    out = torch.full((len(pieces), length), tokenizer.pad_token_id)
    label = torch.zeros(len(pieces), length, dtype=torch.bool)
    for i, (ids, answer) in enumerate(zip(pieces, answers, strict=True)):
        out[i, : len(ids)] = torch.tensor(ids)
        if answer is not None:
            label[i, answer] = True
    order = torch.tensor([len(ids) for ids in pieces]).argsort(stable=True)
    return out[order], label[order]


def masked(
    ids: torch.Tensor, answers: torch.Tensor, tokenizer: transformers.PreTrainedTokenizerFast, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs, and where a token is predicted."""
    chance = torch.rand(ids.shape, generator=generator).masked_fill(answers, 0.0)
    chosen = (chance < 0.15) & (ids >= len(SPECIAL))
    random = torch.randint(len(SPECIAL), len(tokenizer), ids.shape, generator=generator)
    inputs = torch.where(chosen & (chance < 0.12), tokenizer.mask_token_id, ids)
    return torch.where(chosen & (chance >= 0.12) & (chance < 0.135), random, inputs), chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--vocabulary", type=int, default=9000)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--rows", type=int, default=None, help="texts to read at most, for a trial")
    options = parser.parse_args()
    corpus = list(texts(options.text))[: options.rows]
    tokenizer = make_tokenizer(corpus, options.vocabulary)
    pieces, answers = streams(corpus, list(prompted(options.text))[: options.rows], tokenizer, options.length)
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=options.hidden, num_hidden_layers=options.layers, num_attention_heads=4,
        intermediate_size=4 * options.hidden, max_position_embeddings=256 + 2, type_vocab_size=1, pad_token_id=1,
        bos_token_id=0, eos_token_id=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.RobertaForMaskedLM(config)
    weights, tokens = sum(p.numel() for p in model.parameters()), int((pieces != tokenizer.pad_token_id).sum())
    print(f"{len(corpus)} texts, {tokens} tokens in {len(pieces)} pieces, {weights:,} weights", flush=True)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.01, betas=(0.9, 0.98))
    begun, losses, hits, first = time.monotonic(), list[float](), list[float](), 0
    state = options.to / "state.pt"
    if state.exists():
        held = torch.load(state)
        model.load_state_dict(held["model"])
        optimizer.load_state_dict(held["optimizer"])
        generator.set_state(held["generator"])
        first = held["step"]
        print(f"goes on after step {first}", flush=True)
    options.to.mkdir(parents=True, exist_ok=True)
    for step in range(first, options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * (1.0 - step / options.steps))
        start = int(torch.randint(0, len(pieces) - options.batch, (), generator=generator))
        rows = slice(start, start + options.batch)  # of about one length
        width = int((pieces[rows] != tokenizer.pad_token_id).sum(1).max())
        ids, where = pieces[rows, :width], answers[rows, :width]
        inputs, chosen = masked(ids, where, tokenizer, generator)
        hidden = model.roberta(input_ids=inputs, attention_mask=(ids != tokenizer.pad_token_id).long()).last_hidden_state
        logits = model.lm_head(hidden[chosen])
        loss = torch.nn.functional.cross_entropy(logits, ids[chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        asked = where[chosen]
        if asked.any():
            hits.append((logits[asked].argmax(-1) == ids[chosen][asked]).float().mean().item())
        if (step + 1) % 200 == 0:
            passed = time.monotonic() - begun
            print(
                f"step {step + 1}  loss {sum(losses[-200:]) / 200:.3f}  label words {sum(hits[-200:]) / len(hits[-200:]):.2f}  "
                f"{passed:.0f} s",
                flush=True,
            )
        if (step + 1) % 100 == 0:
            held = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save({**held, "generator": generator.get_state()}, state.with_suffix(".part"))
            state.with_suffix(".part").replace(state)
    state.unlink(missing_ok=True)
    model.eval().save_pretrained(options.to)
    tokenizer.save_pretrained(options.to)
    last = sum(losses[-200:]) / max(1, len(losses[-200:]))
    about = {"weights": weights, "tokens": tokens, "steps": options.steps, "loss": last, "perplexity": math.exp(last)}
    about |= {key: getattr(options, key) for key in ("vocabulary", "hidden", "layers", "batch", "length", "lr")}
    (options.to / "pretraining.json").write_text(json.dumps(about, indent=2) + "\n")
    print(json.dumps(about))


if __name__ == "__main__":
    main()
