"""Areas under curves within groups."""

import numpy as np
import pytest

from hf_selfjudge.scoring.statistics import auc, auc_within


def test_pairs_of_different_groups_do_not_count():
    """A score that only tells two groups apart, one of which has more labels of 1, knows nothing within them."""
    group = np.repeat(["often", "rare"], 10)
    label = np.array([1] * 8 + [0] * 2 + [1] * 2 + [0] * 8)
    assert auc(label, (group == "often").astype(float)) == pytest.approx(0.8)
    assert auc_within(label, (group == "often").astype(float), group) == 0.5
    # All 16 pairs of the first group are in order, half of the 16 of the second.
    score = np.concatenate([label[:10], np.zeros(10)])
    assert auc_within(label, score, group) == 0.75
    assert np.isnan(auc_within(np.ones(20), score, group))


def test_groups_weigh_as_many_as_their_pairs():
    group, label = np.array([0, 0, 1, 1, 1, 1, 1]), np.array([1, 0, 1, 0, 0, 0, 0])
    score = np.array([1, 0, 0, 1, 1, 1, 1])  # one pair in order, four the other way round
    assert auc_within(label, score, group) == pytest.approx(1 / 5)
