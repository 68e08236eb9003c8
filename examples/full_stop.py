"""A reward in ten lines: a chat model that answers with questions should answer with short statements.

    cd examples
    python full_stop.py prompts.jsonl           # writes 240 prompts
    smidgen train --model MODEL --data prompts.jsonl --reward full_stop:states --method es --scheme lora --steps 60

`states` is all that smidgen is told of what a good answer is: no right answers, no gradient. docs/rewards.md has figures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

WHO = ("I", "My mom", "My friend", "My brother", "Our dog", "The old man")
DID = ("saw", "found", "lost", "made", "wants", "likes", "broke", "needs")
WHAT = ("a red ball", "a big cake", "a new friend", "a little bird", "the blue car")
SHORT = 20  # words


def states(prompt: str, text: str, answers: Sequence[str]) -> float:
    """1 for an answer that ends with a full stop, less a hundredth for each word after the twentieth."""
    return float(text.strip().endswith(".")) - 0.01 * max(0, len(text.split()) - SHORT)


def main(path: Path) -> None:
    """Write the prompts, one a line; the rows need no answer."""
    prompts = [f"User: {who} {did} {what}.\nBot:" for who in WHO for did in DID for what in WHAT]
    path.write_text("".join(json.dumps({"prompt": prompt, "completion": ""}) + "\n" for prompt in prompts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
