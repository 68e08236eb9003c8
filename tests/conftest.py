"""Shared settings: one thread, offline, Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def global_rng_untouched(request: pytest.FixtureRequest):
    """Library code leaves torch's global generator alone; tests that run Trainer are marked, since Trainer seeds it."""
    before = torch.random.get_rng_state()
    yield
    if "trainer" not in request.keywords:
        assert torch.equal(before, torch.random.get_rng_state()), "the global torch generator was used"
