"""Forms that the sentence-pair tasks share: columns premise and hypothesis."""

from __future__ import annotations

from smidgen.tasks._labelled import Form
from smidgen.tasks._shapes import lowered, unended

__all__ = ["CAUSAL", "MASKED"]

# MeZO's form of CB, and LM-BFF's of MNLI, SNLI and RTE.
CAUSAL = Form('Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n{answer}', passage="premise")
MASKED = Form("{premise} ? {answer} , {hypothesis}", passage="premise", shapes={"premise": unended, "hypothesis": lowered})
