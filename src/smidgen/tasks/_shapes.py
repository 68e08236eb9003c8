"""Shapes: what the published prompts do to a column before they show it."""

from __future__ import annotations

__all__ = ["asked", "lowered", "unended"]


def asked(question: str) -> str:
    """A question with its first letter upper-cased and a question mark at its end."""
    question = question if question.endswith("?") else question + "?"
    return question[:1].upper() + question[1:]


def unended(sentence: str) -> str:
    """A sentence without its last mark (one of . , ; : ! ?) and the spaces around it."""
    bare = sentence.strip()
    return bare[:-1].rstrip() if bare.endswith((".", ",", ";", ":", "!", "?")) else bare


def lowered(sentence: str) -> str:
    """A sentence with its first letter lower-cased."""
    bare = sentence.strip()
    return bare[:1].lower() + bare[1:]
