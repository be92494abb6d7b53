"""What a row of similarities is worth: one positive against its negatives.

All four losses take similarities over the temperature: `positive` (B,) of every row's own pair, and `logits` (B, N) of
which `negatives` (B, N) says what counts. A row's own column is never a negative.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def infonce_loss(positive: Tensor, logits: Tensor, negatives: Tensor) -> Tensor:
    """-mean_i log(exp p_i / (exp p_i + sum over negatives j of exp s_ij)) (van den Oord et al. 2018, eq. 4)."""
    return (torch.logaddexp(positive, _log_sum(logits, negatives)) - positive).mean()


def nce_loss(positive: Tensor, logits: Tensor, negatives: Tensor) -> Tensor:
    """mean_i softplus(-p_i) + mean over negative pairs of softplus(s_ij)."""
    negative = (softplus(logits) * negatives).sum() / negatives.sum().clamp(min=1)
    return softplus(-positive).mean() + negative


def dcl_loss(positive: Tensor, logits: Tensor, negatives: Tensor) -> Tensor:
    """-mean_i log(exp p_i / sum over negatives j of exp s_ij) (Yeh et al. 2022).

    A row without negatives counts its positive alone.
    """
    return (_log_sum(logits, negatives) * negatives.any(1) - positive).mean()


def debiased_loss(positive: Tensor, logits: Tensor, negatives: Tensor, prior: float, lowest: float) -> Tensor:
    """InfoNCE with the negatives' mean corrected for hidden positives (Chuang et al. 2020).

    -mean_i log(exp p_i / (exp p_i + n_i g_i)), where n_i counts the negatives of row i and g_i is their mean of
    exp s_ij, less `prior` times exp p_i, over 1 - `prior`, and at least exp(lowest).

    Args:
        prior: share of hidden positives among the negatives.
        lowest: smallest value that a similarity over the temperature can have.
    """
    chosen = logits.detach().masked_fill(~negatives, float("-inf"))
    top = torch.maximum(positive.detach(), chosen.amax(1))  # taken out of every exponential
    own = (positive - top).exp()
    count = negatives.sum(1)
    mean = (logits - top[:, None]).masked_fill(~negatives, float("-inf")).exp().sum(1) / count.clamp(min=1)
    corrected = ((mean - prior * own) / (1.0 - prior)).maximum((lowest - top).exp())
    return ((own + count * corrected).log() - positive + top).mean()


def _log_sum(logits: Tensor, chosen: Tensor) -> Tensor:
    """logsumexp of the chosen elements of each row (B,); of none, a large negative number and no gradient."""
    return logits.masked_fill(~chosen, torch.finfo(logits.dtype).min).logsumexp(1)
