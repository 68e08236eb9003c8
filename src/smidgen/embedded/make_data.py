"""The text that this project generates: pre-training documents and the two labelled sets, from one grammar.

Source: own work; the grammar is ``grammar.txt`` beside this file. Same seed, same bytes, on every machine:
only ``random.Random(seed)`` and string operations are used.

Reviews (0 negative, 1 positive) are decided by one clause: a negated word, the main clause of a contrast, the
writer's view against other people's, or something that happened; some end with the opposite opinion of something
else. Topics (0 world, 1 sports, 2 business, 3 science) are decided by the main event; another event often stands
beside it. The deciding pair (what is judged and the word that judges it) of a validation or test row never occurs
in a training row.

Cost: 1 to 3 MB of pre-training text a second. Does not check that the text makes sense.

    python -m smidgen.embedded.make_data --to FOLDER    # writes FOLDER/{reviews,topics}/{train,validation,test}.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).parent
SIZES = {"train": 1000, "validation": 500, "test": 500}
TOPICS = ("world", "sports", "business", "science")
DOMAINS = ("film", "book", "food", "hotel", "goods", "show", "game")
DATA_SEED = 20260  # of the labelled sets
TEXT_SEED = 20261  # of the pre-training text
ASIDE = {"reviews": 0.25, "topics": 0.7}  # shares of rows that end with something beside the point
HELD_OUT = 4  # one deciding pair in HELD_OUT is kept for validation and test

FLIPPED = {"+": "-", "-": "+"}
SLOT = re.compile(r"\{(@?)([\w.]*)([!?+-]?)(?::(\w+))?\}")
Memo = dict[str, str]


class Grammar:
    """Rules with slots, expanded under a tone ("+", "-", ".world", ...) and a domain ("film", ...).

    The notation is described at the top of ``grammar.txt``. An unknown rule raises KeyError.
    """

    def __init__(self, text: str) -> None:
        self.rules: dict[str, list[list]] = {}
        for line in text.splitlines():
            if not line.strip() or line.startswith("#"):
                continue
            if not line[0].isspace():
                name, _, line = line.partition(":")
                self.rules[name] = []
            self.rules[name] += [self._parts(alternative) for alternative in line.split("|") if alternative.strip()]

    @staticmethod
    def _parts(alternative: str) -> list:
        """Literal strings and (at domain, name, mark, key) slots, in order."""
        parts: list = []
        end = 0
        alternative = alternative.strip().replace(r"\n", "\n")
        for slot in SLOT.finditer(alternative):
            parts += [alternative[end : slot.start()], slot.groups(default="")]
            end = slot.end()
        return [part for part in [*parts, alternative[end:]] if part and part != ("", "", "", "")]

    def expand(self, name: str, rng: random.Random, tone: str = "", domain: str = "", memo: Memo | None = None) -> str:
        """One random text of rule `name`; remembered slots are added to `memo`."""
        memo = {} if memo is None else memo
        out = []
        for part in rng.choice(self.rules.get(name + tone) or self.rules[name]):
            if isinstance(part, str):
                out.append(part)
                continue
            at, slot, mark, key = part
            if not key and slot in memo:
                key = slot
            if key not in memo:
                inner = {"!": FLIPPED.get(tone, tone), "?": rng.choice("+-"), "": tone}.get(mark, mark)
                text = self.expand(f"{domain}.{slot}" if at else slot, rng, inner, domain, memo)
                if not key:
                    out.append(text)
                    continue
                memo[key] = text
            out.append(memo[key])
        return "".join(out)


def grammar() -> Grammar:
    return Grammar((HERE / "grammar.txt").read_text(encoding="utf-8"))


def tidy(text: str) -> str:
    """Articles before vowels and capitals at the start of sentences."""
    text = re.sub(r"\b(a) (?=[aeio]|u(?!n[it]|s))", r"\1n ", text)
    text = re.sub(r"  +", " ", text)
    return re.sub(r"(^|[.!?] |\n|User: |Assistant: |\.\" |(?:^|\s)\")([a-z])", lambda found: found[1] + found[2].upper(), text)


def sentences(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+", text) if part.strip()]


# ---------------------------------------------------------------- labelled sets


def review(rules: Grammar, rng: random.Random, label: int) -> tuple[str, str]:
    """(text, deciding pair) of one labelled review."""
    memo: Memo = {}
    domain, tone = rng.choice(DOMAINS), "-+"[label]
    core = rules.expand("lab.core", rng, tone, domain, memo)
    pair = f"{memo.get('s')}|{memo.get('w', '')}"
    lead = rules.expand("lab.lead", rng, tone, domain, memo)
    return tidy(f"{lead} {core}".strip()), pair


def topic(rules: Grammar, rng: random.Random, label: int) -> tuple[str, str]:
    """(text, deciding event) of one labelled news item."""
    memo: Memo = {}
    text = rules.expand("lab.news", rng, "." + TOPICS[label], memo=memo)
    return tidy(text), memo["s"]


def kept_out(pair: str) -> bool:
    """Whether a deciding pair belongs to validation and test, and so never to training."""
    return zlib.crc32(pair.encode()) % HELD_OUT == 0


def split_rows(make: Callable, rules: Grammar, classes: int, seed: int) -> dict[str, list[dict]]:
    """Balanced, shuffled, disjoint splits {"train": [{"text", "label"}, ...], ...}."""
    rng = random.Random(seed)
    seen: set[str] = set()
    splits: dict[str, list[dict]] = {}
    for split, size in SIZES.items():
        rows: list[dict] = []
        while len(rows) < size:
            label = len(rows) % classes
            text, pair = make(rules, rng, label)
            if text not in seen and kept_out(pair) == (split != "train"):
                seen.add(text)
                rows.append({"text": text, "label": label})
        rng.shuffle(rows)
        splits[split] = rows
    return splits


def extend(name: str, rules: Grammar, rows: list[dict], rng: random.Random) -> list[dict]:
    """Make the share ASIDE[name] of every class harder with a last sentence beside the point.

    A review ends with the opposite opinion of something else, a news item with other news of any topic.
    """
    seen = dict.fromkeys({row["label"] for row in rows}, 0)
    extended = []
    for row in rows:
        text, label = row["text"], row["label"]
        seen[label] += 1
        if seen[label] <= ASIDE[name] * len(rows) / len(seen):
            aside = rules.expand("lab.rival", rng, "-+"[label]) if name == "reviews" else rules.expand("lab.aside", rng)
            text += " " + tidy(aside)
        extended.append({"text": text, "label": label})
    rng.shuffle(extended)
    return extended


def labelled_sets(seed: int = DATA_SEED) -> dict[str, dict[str, list[dict]]]:
    """{"reviews": splits, "topics": splits}, each {"train": rows, "validation": rows, "test": rows}."""
    rules, rng = grammar(), random.Random(seed + 2)
    plain = {"reviews": split_rows(review, rules, 2, seed), "topics": split_rows(topic, rules, len(TOPICS), seed + 1)}
    return {name: {split: extend(name, rules, rows, rng) for split, rows in splits.items()} for name, splits in plain.items()}


def write_sets(folder: Path) -> None:
    """One JSON Lines file a split, at ``folder/<set>/<split>.jsonl``."""
    for name, splits in labelled_sets().items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / name / f"{split}.jsonl").write_text(lines, encoding="utf-8")


# ---------------------------------------------------------------- pre-training text

# Shares of documents (chosen). Over half is opinion, because that is what the labelled reviews need. SIMPLE comes first in
# pre-training, so that single words of praise and blame are told apart before negation and contrast are.
KINDS = {"plain": 15, "note": 25, "review": 20, "news": 20, "story": 10, "talk": 5, "qa": 5, "chat": 5, "know": 3}
SIMPLE = {"plain": 80, "know": 10, "news": 20, "qa": 5}


def document(rules: Grammar, rng: random.Random, kind: str) -> str:
    """One pre-training document of a kind in KINDS."""
    tone, domain = rng.choice("+-"), rng.choice(DOMAINS)
    girl = rng.random() < 0.5
    memo: Memo = {"he": "she" if girl else "he"}
    if kind in ("story", "talk", "qa", "chat"):
        memo["h"], memo["f"] = (rules.expand(name, rng) for name in (("girl", "boy") if girl else ("boy", "girl")))
    if kind == "plain":  # one to four plain opinions of one tone
        parts = [rules.expand("plain", rng, tone, domain, memo) + "." for _ in range(rng.randint(1, 4))]
        return tidy(" ".join(parts) + " " + rules.expand("verdict", rng, tone, domain, memo))
    if kind == "note":  # the shortest review: one thought and what follows from it
        return tidy(rules.expand("body", rng, tone, domain, memo) + " " + rules.expand("verdict", rng, tone, domain, memo))
    if kind == "review":
        parts = [rules.expand("body", rng, tone, domain, memo) for _ in range(rng.choice((1, 1, 2, 2, 3)))]
        parts += [tidy(rules.expand("verdict", rng, tone, domain, memo)) for _ in range(rng.choice((1, 1, 2)))]
        if rng.random() < 0.3:
            parts.insert(0, rules.expand("header", rng, tone, domain, memo))
        return tidy(" ".join(parts))
    if kind == "news":
        tone = "." + rng.choice(TOPICS)
    if kind == "qa" and rng.random() < 0.2:
        tone = "." + rng.choice(TOPICS)
        return tidy(rules.expand("qa.news", rng, tone, domain, memo))
    return tidy(rules.expand(kind, rng, tone, domain, memo))


def corpus(characters: int, shares: dict[str, int] = KINDS, seed: int = TEXT_SEED) -> Iterator[str]:
    """Generated documents, at least `characters` of them in all; none holds a sentence of a labelled set."""
    banned = {
        sentence
        for splits in labelled_sets().values()
        for rows in splits.values()
        for row in rows
        for sentence in sentences(row["text"])
    }
    rules, rng = grammar(), random.Random(seed)
    made = 0
    while made < characters:
        text = document(rules, rng, rng.choices(list(shares), list(shares.values()))[0])
        if banned.isdisjoint(sentences(text)):
            made += len(text)
            yield text


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the labelled sets, or show generated documents.")
    parser.add_argument("--to", type=Path, help="folder that gets reviews/ and topics/")
    parser.add_argument("--show", type=int, default=0, help="print this many generated documents")
    arguments = parser.parse_args()
    if arguments.to:
        write_sets(arguments.to)
    for text in corpus(10**9) if arguments.show else ():
        print(text, end="\n\n")
        arguments.show -= 1
        if not arguments.show:
            break


if __name__ == "__main__":
    main()
