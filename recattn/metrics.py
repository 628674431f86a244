"""How well scores rank: over all impressions, and within each user."""

from __future__ import annotations

import torch
from torch import Tensor


def auc(labels: Tensor, scores: Tensor) -> float:
    """The area under the ROC curve: how often a positive scores above a negative, ties counted half.

    Args:
        labels: `[N]`, 0 or 1.
        scores: `[N]`.

    Raises:
        ImportError: without scikit-learn.
        ValueError: if only one class is there.
    """
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError as error:
        raise ImportError('auc: needs scikit-learn; pip install "recattn[bench]"') from error
    classes = labels.unique().tolist()
    if classes != [0, 1]:
        raise ValueError(f"labels: expected both 0 and 1, got {classes}")
    return float(roc_auc_score(labels.cpu().numpy(), scores.cpu().numpy()))


def grouped_auc(labels: Tensor, scores: Tensor, users: Tensor) -> float:
    r"""The AUC within each user, averaged by how many impressions the user has.

    .. math::
        GAUC = \frac{\sum_u n_u AUC_u}{\sum_u n_u},\qquad
        AUC_u = \frac{R_u - P_u (P_u + 1) / 2}{P_u (n_u - P_u)}

    with :math:`R_u` the sum of the ranks of the user's :math:`P_u` positives, ties sharing their mean rank.
    Users whose :math:`n_u` impressions are all of one class have no AUC and are left out. It asks for the
    right order of what one user sees, and gives nothing for telling generous users from strict ones.

    Args:
        labels: `[N]`, 0 or 1.
        scores: `[N]`.
        users: `[N]` integers.

    Raises:
        ValueError: if the shapes differ, a score is NaN, or no user has both classes.

    Source: Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, section 6.2.
    """
    if not labels.shape == scores.shape == users.shape or labels.dim() != 1:
        got = [list(t.shape) for t in (labels, scores, users)]
        raise ValueError(f"labels, scores, users: expected one shape [N], got {got}")
    if bool(scores.isnan().any()):
        raise ValueError(f"scores: expected numbers, got {int(scores.isnan().sum())} NaN")
    _, user = users.unique(return_inverse=True)
    _, level = scores.unique(return_inverse=True)
    # One number per user and score; in its order, equal pairs are ties.
    _, tie, size = (user * scores.numel() + level).unique(return_inverse=True, return_counts=True)
    total = torch.bincount(user).double()
    before = (total.cumsum(0) - total)[user]
    rank = (size.cumsum(0) - (size - 1) / 2.0).double()[tie] - before
    positive = labels.double()
    positives = torch.zeros_like(total).index_add_(0, user, positive)
    ranks = torch.zeros_like(total).index_add_(0, user, positive * rank)
    mixed = (positives > 0) & (positives < total)
    if not bool(mixed.any()):
        raise ValueError("labels: expected at least one user with both a 0 and a 1")
    n, p, r = total[mixed], positives[mixed], ranks[mixed]
    return float((n * (r - p * (p + 1) / 2) / (p * (n - p))).sum() / n.sum())
