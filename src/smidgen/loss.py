"""Losses that never build the batch x length x vocabulary tensor.

The trunk of the model runs as it is; its output head is applied here, only at positions that carry a label, in blocks
of the vocabulary with a running log-sum-exp. Logits are float32 before they enter a softmax. Each function returns
one negative log-likelihood (nats) per label together with the row of the batch that it belongs to; reduction is the
objective's business.

Does not do: label smoothing, z-loss, sampled softmax.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from smidgen.kinds import Kind
from smidgen.linear import linear

IGNORE = -100  # the label of a position without loss, as in transformers
# What of a batch is not for the model.
NOT_INPUTS = frozenset(
    {"labels", "choices", "criterion", "groups", "golds", "divisors", "accepted", "answers", "references", "real"}
)

MARGIN = 2.0  # of the hinge loss over label words, in logits: BBTv2's and DFO-LoRA's
BLOCK_ELEMENTS = 1 << 22  # elements of one vocabulary block of the head: 16 MB in float32; chosen
WIDE_BLOCK = 1 << 25  # the same on CUDA, where each block costs some fifteen launches
BLOCK_POSITIONS = 4096  # label positions per block of logits
KEPT_LOGITS = 1 << 22  # logits (16 MB in float32) of a block with gradients; fewer in all are kept for the backward; chosen


class Losses(NamedTuple):
    """Negative log-likelihoods of one micro-batch."""

    nll: Tensor  # [n] float32, nats
    rows: Tensor  # [n] int64, row in the micro-batch
    size: int  # rows of the micro-batch


class Targets(NamedTuple):
    """Where a batch has labels, in the coordinates of the hidden states."""

    keep: Tensor  # [B, T] bool: positions whose hidden state predicts a label
    tokens: Tensor  # [n] int64: the labels, row-major
    rows: Tensor  # [n] int64


class Head(Protocol):
    """An output embedding as seen at theta + probe."""

    rows: int  # vocabulary size
    width: int  # hidden size

    def block(self, first: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Weight rows [first:stop] and their bias; valid until the next call."""

    def gather(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight rows of some tokens and their bias."""


class PlainHead:
    """A head whose weight is read as it stands (differentiable)."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight, bias
        self.rows, self.width = weight.shape

    def block(self, first: int, stop: int) -> tuple[Tensor, Tensor | None]:
        return self.weight[first:stop], None if self.bias is None else self.bias[first:stop]

    def gather(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.weight[ids], None if self.bias is None else self.bias[ids]


def targets(labels: Tensor, kind: Kind) -> Targets:
    """Positions and tokens that carry loss. Causal labels are shifted: position t predicts the label at t + 1."""
    keep = labels != IGNORE
    if kind == "causal":
        keep = torch.cat([keep[:, 1:], torch.zeros_like(keep[:, :1])], dim=1)
        shifted = torch.cat([labels[:, 1:], labels[:, :1]], dim=1)
        return Targets(keep, shifted[keep], keep.nonzero()[:, 0])
    return Targets(keep, labels[keep], keep.nonzero()[:, 0])


def head_nll(hidden: Tensor, tokens: Tensor, head: Head, blocks: int | None = None) -> Tensor:
    """-log softmax(hidden @ W.T + b)[tokens], without gradient. hidden [n, H], tokens [n] -> [n] float32.

    Vocabulary blocks are the outer loop, so that a displaced weight is generated once; positions the inner one. Peak:
    one block of the weight and one block of logits. `blocks`: how many are made, for what is interested in memory alone.
    """
    elements = WIDE_BLOCK if hidden.device.type == "cuda" else BLOCK_ELEMENTS
    total, picked = _log_sums(hidden, tokens, head, max(1, elements // head.width), blocks)
    return total - picked


def _starts(rows: int, size: int, blocks: int | None) -> range:
    """First rows of vocabulary blocks, all or the first `blocks`."""
    return range(0, rows, size)[:blocks]


def _log_sums(
    hidden: Tensor, tokens: Tensor, head: Head, size: int, blocks: int | None, mean: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(log-sum-exp of all logits, logit of the token) at each position, from `size` rows of the vocabulary at a time.

    mean: [n, H] float32 zeros; becomes the mean of the head's rows under each position's softmax."""
    n = hidden.shape[0]
    high = torch.full((n,), -torch.inf, device=hidden.device)
    total = torch.zeros(n, device=hidden.device)
    picked = torch.zeros(n, device=hidden.device)
    for first in _starts(head.rows, size, blocks):
        stop = min(first + size, head.rows)
        weight, bias = head.block(first, stop)
        for lo in range(0, n, BLOCK_POSITIONS):
            at = slice(lo, lo + BLOCK_POSITIONS)
            logits = linear(hidden[at], weight, bias).float()
            index = tokens[at] - first
            inside = (index >= 0) & (index < stop - first)
            value = logits.gather(1, index.clamp(0, stop - first - 1)[:, None])[:, 0]
            picked[at] = torch.where(inside, value, picked[at])
            top = torch.maximum(high[at], logits.amax(1))
            fall = (high[at] - top).exp()
            total[at] = total[at] * fall + logits.sub_(top[:, None]).exp_().sum(1)
            high[at] = top
            if mean is not None:
                mean[at].mul_(fall[:, None]).add_(linear(logits.to(weight.dtype), weight.t(), None))
    if mean is not None:
        mean.div_(total[:, None])
    return high + total.log(), picked


def head_nll_differentiable(hidden: Tensor, tokens: Tensor, head: PlainHead, blocks: int | None = None) -> Tensor:
    """The same value with gradients; where logits would be many, one block of them lives at a time, in both passes."""
    n = hidden.shape[0]
    if n * head.rows <= KEPT_LOGITS:
        return F.cross_entropy(F.linear(hidden, head.weight, head.bias).float(), tokens, reduction="none")
    size = max(1, min(head.rows, KEPT_LOGITS // min(n, BLOCK_POSITIONS)))
    return _HeadNLL.apply(hidden, tokens, head.weight, head.bias, size, blocks)  # type: ignore[no-any-return]


class _HeadNLL(Function):
    """head_nll whose backward makes each block of logits z again: dz = g (softmax(z) - onehot(tokens)).

    Saved: the hidden states, a number a position, the weight by reference. Its gradient is the only tensor of its size. Of a
    frozen head the forward makes the gradient too, softmax(z) W - W[tokens] but for g, and saves that alone: two products with
    the head instead of three.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor | None, size: int, blocks: int | None
    ) -> Tensor:
        head = PlainHead(weight, bias)
        _, _, wants_w, wants_b, *_ = ctx.needs_input_grad
        ctx.ahead, ctx.kind = not wants_w and not wants_b, hidden.dtype
        if ctx.ahead:
            slope = torch.zeros_like(hidden, dtype=torch.float32)
            total, picked = _log_sums(hidden, tokens, head, size, blocks, slope)
            ctx.save_for_backward(slope.sub_(weight[tokens]))
            return total - picked
        total, picked = _log_sums(hidden, tokens, head, size, blocks)
        ctx.save_for_backward(hidden, tokens, weight, bias, total)
        device = hidden.device.type
        ctx.cast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.size, ctx.blocks = size, blocks
        return total - picked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.ahead:
            (slope,) = ctx.saved_tensors
            return (slope * g[:, None]).to(ctx.kind), None, None, None, None, None
        hidden, tokens, weight, bias, total = ctx.saved_tensors
        wants_x, _, wants_w, wants_b, *_ = ctx.needs_input_grad
        dx = torch.zeros_like(hidden, dtype=torch.float32) if wants_x else None
        dw, db = torch.zeros_like(weight) if wants_w else None, torch.zeros_like(bias) if wants_b else None
        device, kind, enabled = ctx.cast
        for first in _starts(len(weight), ctx.size, ctx.blocks):
            rows = slice(first, min(first + ctx.size, len(weight)))
            for lo in range(0, len(hidden), BLOCK_POSITIONS):
                at = slice(lo, lo + BLOCK_POSITIONS)
                x, w, own = hidden[at], weight[rows], g[at]
                with torch.autocast(device, kind, enabled):
                    z = linear(x, w, None if bias is None else bias[rows]).float()
                z.sub_(total[at, None]).exp_().mul_(own[:, None])
                index = tokens[at] - first
                inside = (index >= 0) & (index < len(w))
                z.scatter_add_(1, index.clamp(0, len(w) - 1)[:, None], torch.where(inside, -own, 0.0)[:, None])
                dz = z.to(weight.dtype)
                if dx is not None:
                    dx[at] += linear(dz, w.t(), None)
                if dw is not None:
                    dw[rows].addmm_(dz.t(), x.to(weight.dtype))
                if db is not None:
                    db[rows] += z.sum(0).to(db.dtype)
        return None if dx is None else dx.to(hidden.dtype), None, dw, db, None, None


def choice_logits(hidden: Tensor, choices: Tensor, head: Head) -> Tensor:
    """Logits of a few tokens only. hidden [n, H], choices [C] token ids -> [n, C] float32."""
    weight, bias = head.gather(choices)
    return linear(hidden, weight, bias).float()


def choice_index(tokens: Tensor, choices: Tensor) -> Tensor:
    """Index in `choices` of each label token. Raises ValueError where a label is not among the choices."""
    match = tokens[:, None] == choices[None, :]
    if not bool(match.any(1).all()):
        missing = tokens[~match.any(1)][0].item()
        raise ValueError(f"label token {missing} is not among the choices {choices.tolist()}")
    return match.int().argmax(1)


def logits_nll(logits: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood from logits [n, V] that the model computed itself."""
    return F.cross_entropy(logits.float(), tokens, reduction="none")


def criterion_loss(logits: Tensor, tokens: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Loss of each row from its logits over the choices or classes [n, C], by the batch's `criterion`: cross-entropy where it
    has none; hinge, the sum over the wrong ones of max(0, 2 + logit - right logit); accuracy, -1 where the right one is
    highest, else 0, NaN where a logit is."""
    criterion = batch.get("criterion")
    if criterion is None:
        return logits_nll(logits, tokens)
    logits = logits.float()
    if criterion == "hinge":
        right = logits.gather(1, tokens[:, None])
        return (logits - right + MARGIN).clamp(min=0).sum(1) - MARGIN  # the right one itself counts MARGIN
    assert criterion == "accuracy", criterion
    return -(logits.argmax(1) == tokens).float().masked_fill(logits.isnan().any(1), torch.nan)


def row_scores(losses: Losses, divisors: Tensor, references: Tensor | None = None) -> Tensor:
    """Score of each row: the log-likelihood of its labels over its divisor [R], which is 1 or its count of labels.

    references [R] float64: log-likelihoods that are subtracted first. The sums are then float64: a difference of two
    numbers of some hundred nats, of which a step of size eps changes the last digits.
    """
    nll = losses.nll if references is None else losses.nll.double()
    total = torch.zeros(losses.size, dtype=nll.dtype, device=nll.device).index_add(0, losses.rows, nll)
    return -total / divisors if references is None else (-total - references) / divisors


def group_nll(scores: Tensor, groups: Tensor, golds: Tensor) -> Tensor:
    """-log softmax of scores [R] within each group, at its right row: groups [R] in 0..B-1, golds [B] rows -> [B]."""
    high = torch.full_like(scores[: golds.shape[0]], -torch.inf).scatter_reduce(0, groups, scores.detach(), "amax")
    total = torch.zeros_like(high).index_add(0, groups, (scores - high[groups]).exp())
    return high + total.log() - scores[golds]


def grouped(losses: Losses, batch: Mapping[str, Any]) -> Losses:
    """The losses as they are, or, of a batch that stacks all options of each example, one loss an example.

    The latter is MeZO's classification by candidates: the softmax cross-entropy over the scores of its options. With
    references and divisors 1/beta it is the loss of direct preference optimisation: over two options, -log sigmoid of the
    difference of their scores.
    """
    if "groups" not in batch:
        return losses
    golds = batch["golds"]
    nll = group_nll(row_scores(losses, batch["divisors"], batch.get("references")), batch["groups"], golds)
    return Losses(nll, torch.arange(golds.shape[0], device=golds.device), golds.shape[0])
