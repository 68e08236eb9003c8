"""Free-text answers against accepted ones: token F1 and exact match, as SQuAD (Rajpurkar et al. 2016) normalises them.

Both sides are lower-cased, lose punctuation and the words a, an, the, and are split at white space. The best of the
accepted answers counts. Numbers get no treatment of their own, in DROP neither.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

__all__ = ["exact_match", "f1", "measures", "normalised"]

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> list[str]:
    """The words of an answer that are compared."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def f1(prediction: str, golds: Sequence[str]) -> float:
    """2 x shared words / (words of both), the best over the accepted answers; two empty answers are equal."""
    return max(_f1(normalised(prediction), normalised(gold)) for gold in golds)


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """1.0 where the answer equals an accepted one, else 0.0."""
    return float(any(normalised(prediction) == normalised(gold) for gold in golds))


def measures(predictions: Sequence[str], golds: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean F1 and exact match of answers, each against its accepted ones."""
    if len(predictions) != len(golds) or not golds:
        raise ValueError(f"{len(predictions)} predictions for {len(golds)} golds: as many of both, at least one")
    pairs = list(zip(predictions, golds, strict=True))
    return {
        name: sum(score(*pair) for pair in pairs) / len(pairs) for name, score in (("f1", f1), ("exact_match", exact_match))
    }


def _f1(prediction: list[str], gold: list[str]) -> float:
    if not prediction or not gold:
        return float(prediction == gold)
    shared = sum((Counter(prediction) & Counter(gold)).values())
    return 2 * shared / (len(prediction) + len(gold))
