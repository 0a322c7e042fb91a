"""What fits into a budget."""

import pytest

from hf_selfjudge.planning import plan, planned
from hf_selfjudge.settings import parse_settings


RULES_TO_PLAN = ["greedy", "margin=1,2,3,4,5", "judge:j=0.1,0.2,0.3", "coin"]


@pytest.mark.parametrize(
    ("answers", "per_category", "settings"),
    [
        (10**6, 40, 13),  # everything fits; no more than there are
        (6 * 13 * 7, 7, 13),
        (6 * 12 * 5, 5, 12),  # four thresholds of the margin instead of five
        (6 * 8 * 5, 5, 8),  # two of each rule
        (6 * 7 * 5, 7, 5),  # one
        (6 * 5, 1, 5),
        (1, 1, 5),  # the least there is
    ],
)
def test_a_plan_fits_its_budget(answers, per_category, settings):
    made = plan((answers + 0.5) * 2 / 60, 2.0, 6, 40, parse_settings(RULES_TO_PLAN))
    assert (made.per_category, len(made.settings)) == (per_category, settings)
    families = {name.partition("=")[0] for name in made.settings}
    assert families == {"lossless", "greedy", "margin", "judge:j", "coin like judge:j"}


def test_a_plan_is_kept(tmp_path):
    asked, made = {"minutes": 10, "settings": ["lossless"], "categories": {"a": 3}}, []

    def pilot():
        made.append(plan(10, 2.0, 6, 40, parse_settings(RULES_TO_PLAN)))
        return made[-1]

    path = tmp_path / "plan.json"
    first = planned(path, asked, pilot)
    assert planned(path, asked, pilot) == first
    assert len(made) == 1
    planned(path, asked | {"categories": {"a": 4}}, pilot)
    assert len(made) == 2
