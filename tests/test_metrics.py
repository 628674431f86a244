"""AUC and user-grouped AUC against their definitions."""

import pytest
import torch

from recattn.metrics import auc, grouped_auc


def auc_by_pairs(labels: list[float], scores: list[float]) -> float:
    positive = [s for s, label in zip(scores, labels, strict=True) if label]
    negative = [s for s, label in zip(scores, labels, strict=True) if not label]
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    return wins / (len(positive) * len(negative))


def impressions(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(300, generator=generator) < 0.3).float()
    scores = torch.randint(-4, 5, (300,), generator=generator) / 4  # with ties
    users = torch.randint(0, 40, (300,), generator=generator) * 7  # some of one class only
    return labels, scores, users


@pytest.mark.parametrize("seed", range(4))
def test_grouped_auc_is_the_impression_weighted_mean_over_users_with_both_classes(seed: int) -> None:
    labels, scores, users = impressions(seed)
    total = weight = 0.0
    one_class = 0
    for user in users.unique():
        mine = users == user
        if labels[mine].unique().numel() == 2:
            total += int(mine.sum()) * auc_by_pairs(labels[mine].tolist(), scores[mine].tolist())
            weight += int(mine.sum())
        else:
            one_class += 1
    assert one_class > 0
    assert grouped_auc(labels, scores, users) == pytest.approx(total / weight, abs=1e-12)


def test_grouped_auc_of_one_user_is_the_auc() -> None:
    labels, scores, _ = impressions(9)
    expected = auc_by_pairs(labels.tolist(), scores.tolist())
    assert grouped_auc(labels, scores, torch.full((300,), 5)) == pytest.approx(expected, abs=1e-12)
    assert auc(labels, scores) == pytest.approx(expected, abs=1e-12)


def test_a_shift_per_user_moves_the_auc_but_not_the_grouped_one() -> None:
    labels, scores, users = impressions(2)
    shifted = scores + users
    assert grouped_auc(labels, shifted, users) == pytest.approx(grouped_auc(labels, scores, users))
    assert auc(labels, shifted) != pytest.approx(auc(labels, scores), abs=1e-3)


def test_what_has_no_auc_is_refused() -> None:
    ones, users = torch.ones(4), torch.arange(4)
    with pytest.raises(ValueError, match=r"labels: expected both 0 and 1, got \[1\.0\]"):
        auc(ones, ones)
    with pytest.raises(ValueError, match="at least one user with both"):
        grouped_auc(torch.tensor([0.0, 1, 0, 1]), ones, users)
    with pytest.raises(ValueError, match="expected one shape"):
        grouped_auc(ones, ones[:3], users)
    with pytest.raises(ValueError, match="scores: expected numbers, got 1 NaN"):
        grouped_auc(ones, torch.tensor([0, torch.nan, 1, 2]), users)
