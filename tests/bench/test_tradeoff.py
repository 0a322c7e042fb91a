"""Speed against quality, with answers that are known."""

import io

import numpy as np
import pytest
from markdown_it import MarkdownIt
from matplotlib.axes import Axes
from rich.console import Console
from rich.markdown import Markdown

from hf_selfjudge.bench.answers import AnswerRecord
from hf_selfjudge.bench.methods import Method
from hf_selfjudge.bench.report import plot_tradeoff, quality_tables
from hf_selfjudge.bench.summary import fastest_within, operating_points, summarise_quality
from hf_selfjudge.bench.tradeoff import Grid, area_between, compare_rules, falling, separation, speed_at
from hf_selfjudge.judge.threshold import Threshold
from hf_selfjudge.scoring.statistics import Interval, draws, risk_bound
from tests.builders import build, random_judge


METHODS = ["lossless", "margin=1", "margin=2", "coin=0.5", "draft"]
CURVES = ["lossless", "margin", "margin", "coin", "draft"]


def grid(prompts=4, **scores):
    shape = (len(METHODS), prompts)
    rounds = np.array([10.0, 8, 5, 8, np.nan])[:, None] * np.ones(shape)
    categories = np.array(["a", "b"]).repeat(prompts // 2)
    return Grid(METHODS, CURVES, categories, np.full(shape, 40.0), rounds, scores, resamples=200)


def grid_of_methods(methods, categories, rounds, scores):
    names, curves = [method.name for method in methods], [method.curve for method in methods]
    return Grid(names, curves, np.array(categories), np.full(rounds.shape, 40.0), rounds, scores, resamples=50)


def of_categories(a, b):
    """Scores of each setting, the same for both prompts of a category."""
    return np.array([[x, x, y, y] for x, y in zip(a, b, strict=True)], float)


TASK = of_categories([0.5, 0.5, 0.4, 0.25, 0.1], [np.nan] * 5)
SAME = of_categories([1, 0.9, 0.9, 0.9, 0], [1, 0.8, 0.7, 0.5, 0])


def test_speed():
    speed = grid().speed()
    assert speed.shape == (201, 5)
    assert speed[:, :4] == pytest.approx(np.array([[1, 1.25, 2, 1.25]] * 201))
    assert np.isnan(speed[:, 4]).all()


def test_retention_is_the_mean_of_categories_each_by_its_first_measure():
    made = grid(task=TASK, same=SAME)
    assert [made.measure_of(name, ["task", "same"]) for name in "ab"] == ["task", "same"]
    assert made.measure_of("b", ["task"]) is None
    by_a, by_b = [1, 1, 0.8, 0.5, 0.2], [1, 0.8, 0.7, 0.5, 0]
    assert made.retention(["task", "same"], "a")[0] == pytest.approx(by_a)
    assert made.retention(["task", "same"])[0] == pytest.approx(np.mean([by_a, by_b], axis=0))
    assert made.retention(["task"])[0] == pytest.approx(by_a)  # b has none and is left out
    assert np.isnan(grid(task=np.zeros((5, 4))).retention(["task"])).all()


def test_a_category_that_the_target_fails_is_measured_by_something_else():
    rare = np.zeros((5, 4))
    rare[:, 0] = 1  # one of two answers is right: in a quarter of the samples none is
    made = grid(task=rare, same=SAME)
    assert [made.measure_of(name, ["task", "same"]) for name in "ab"] == ["same", "same"]
    assert made.retention(["task", "same"])[0] == pytest.approx(SAME[:, [0, 2]].mean(1))


def test_the_bootstrap_draws_prompts_within_categories():
    weights = draws(np.array(["a", "a", "b"]), 1000, 0)
    assert (weights[0] == 1).all()
    assert (weights[:, :2].sum(1) == 2).all()
    assert (weights[:, 2] == 1).all()
    assert 0.2 < (weights[1:, 0] == 2).mean() < 0.3


def test_prompts_that_are_alone_in_their_category_have_a_spread():
    weights = draws(np.array(["a", "b", "c", "d", "d"]), 4000, 0)
    assert (weights[:, :3].sum(1) == 3).all()
    assert (weights[:, 3:].sum(1) == 2).all()
    assert weights[1:, :3].std(0) == pytest.approx((2 / 3) ** 0.5, rel=0.05)  # multinomial: n p (1 − p)
    scores = np.array([[1.0, 1, 1], [0.9, 0.6, 0.3]])
    shape = np.ones((2, 3))
    alone = Grid(["lossless", "margin=1"], ["lossless", "margin"], np.array(list("abc")), shape, shape, {"s": scores})
    kept = alone.retention(["s"])[:, 1]
    low, high = Interval.of(kept)[1:]
    assert kept[0] == pytest.approx(0.6)
    assert (low, high) == (pytest.approx(0.3), pytest.approx(0.9))  # the same prompt three times: 1 of 27 each


def test_interval():
    # A mean of n values of spread 1 has a 95 % interval of about ±1.96 / √n.
    rng = np.random.default_rng(0)
    values = rng.normal(3, 1, 400)
    mean = draws(np.zeros(400), 2000, 1) @ values / 400
    value, low, high = Interval.of(mean)
    assert value == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.96 / 20, rel=0.1)
    assert Interval.of(np.array([np.nan, 1.0])) is None


@pytest.mark.parametrize(
    ("level", "speed"),
    [(1.0, 1.0), (0.95, 1 / 0.875), (0.9, 1 / 0.75), (0.8, 2.0), (0.7, 2.0)],
)
def test_speed_at(level, speed):
    # The point at .9 needs more rounds than a mix of the others, and is not used.
    retention, speeds = np.array([[1, 0.9, 0.8]]), np.array([[1, 1.1, 2.0]])
    assert speed_at(level, retention, speeds) == pytest.approx(speed)


def test_area_between():
    level = np.array([[1.0, 0.9]])
    # With t from 0 to 1 the first needs 1 - t / 2 of the rounds, the second 1 - t / 3.
    t = np.linspace(0, 1, 21)
    area = area_between((level, np.array([[1, 2.0]])), (level, np.array([[1, 1.5]])), 0.9)
    assert area == pytest.approx((1 / (1 - t / 2) - 1 / (1 - t / 3)).mean())
    assert area == pytest.approx(2 * np.log(2) - 3 * np.log(1.5), abs=0.01)


def test_no_setting_keeps_more_than_a_slower_one():
    retention = np.array([[1, 0.8, 0.9, 0.5], [1, 0.5, 1.2, 0.9], [1, 0.9, 0.8, 0.7]])
    speed = np.array([[1, 1.1, 1.2, 1.3], [1, 1.3, 1.1, 1.2], [1, 1.1, 1.2, 1.3]])
    assert falling(retention, speed) == pytest.approx(
        np.array([[1, 0.85, 0.85, 0.5], [1, 0.5, 1, 0.9], [1, 0.9, 0.8, 0.7]])
    )


def test_noise_does_not_make_a_rule_look_better():
    """Of rules with the same true curve, one with more thresholds must not look much better."""
    rng, speed = np.random.default_rng(0), np.linspace(1, 2, 10)[None].repeat(2000, 0)
    true = 1 - 0.2 * (speed - 1)
    noisy = np.where(speed == 1, 1, true + rng.normal(scale=0.05, size=true.shape))
    best, fitted = (speed_at(0.95, values, speed).mean() for values in (noisy, falling(noisy, speed)))
    assert 1.2 < fitted < best - 0.1


def test_rules_are_compared_where_they_keep_the_same():
    made = grid(same=SAME)
    kept, levels = made.retention(["same"]), (0.99, 0.9)
    # Overall the margin keeps .85 at 1.25 and .8 at 2, the coin .7 at 1.25: at .9 they need 1 - .5 / 2 and 1 - .2 / 3
    # of the rounds.
    found = compare_rules(made, kept, levels, "margin", "coin")
    assert found["speed_ratio"]["0.9"] == pytest.approx([(1 - 0.2 / 3) / 0.75] * 3)
    assert found["speed_ratio"]["0.99"] == pytest.approx([(1 - 0.2 / 30) / (1 - 0.5 / 20)] * 3)
    assert found["thresholds"] == [2, 1]
    same = compare_rules(made, kept, levels, "margin", "margin")
    assert same["area_between"] == (0, 0, 0)


def test_each_category_has_figures_of_its_own(tmp_path, monkeypatch):
    """In `a` the judge leaves all answers unchanged and the margin half of them, in `b` the other way round."""
    methods = [Method("lossless"), Method("margin", (1,)), Method("judge", (Threshold(0.5),), "j")]
    unchanged = np.array([[1.0] * 6, [1, 0, 1, 1, np.nan, np.nan], [1, 1, 1, 0, np.nan, np.nan]])
    task = np.array([[1.0] * 6, [1, 0, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1]])
    rounds = np.array([[10.0] * 6, [5] * 6, [5] * 6])
    scores = {"unchanged": unchanged, "task": task, "lost": 1 - task}
    made = grid_of_methods(methods, list("aabbcc"), rounds, scores)
    records = [AnswerRecord(method.name, "p", 0, None, [1], True, None, -1.0, [1], 1) for method in methods]
    found = summarise_quality(made, records, methods, {"j": random_judge(build("llama"))})
    margin = found["settings"][1]["by_category"]
    assert [margin[name]["unchanged"] and margin[name]["unchanged"][0] for name in "abc"] == [0.5, 1, None]
    assert [margin[name]["lost"][0] for name in "abc"] == [0.5, 0, 0]
    of_category = {name: rows for name, (rows,) in found["comparisons_by_category"].items()}
    # At 0.9 a rule that keeps half at twice the speed is used for a fifth of the prompts: 0.9 of the rounds.
    assert of_category["a"]["speed_ratio"]["0.9"][0] == pytest.approx(0.9 / 0.5)
    assert of_category["b"]["speed_ratio"]["0.9"][0] == pytest.approx(0.5 / 0.9)
    assert list(of_category) == ["a", "b"]
    tables = quality_tables(found)
    assert "| a | × lossless | retention | unchanged | task | lost |" in tables
    assert "tokens a round (thresholds) at unchanged final answers, b |" in tables
    assert "at unchanged final answers, c |" not in tables
    drawn = []
    monkeypatch.setattr(Axes, "set_xlabel", lambda axis, label: drawn.append(label))
    plot_tradeoff(found, tmp_path / "curve.png")
    assert drawn == ["retention (lossless = 1)", "final answers unchanged", "unchanged, a", "unchanged, b"]


def test_rules_are_compared_at_equal_shares_of_unchanged_numbers_too(tmp_path, monkeypatch):
    """Both rules keep the wording; the judge leaves all numbers unchanged, the margin half of them. On prompts without
    numbers the margin is ten times as fast, which must not change the comparison of numbers."""
    methods = [Method("lossless"), Method("margin", (1,)), Method("judge", (Threshold(0.5),), "j")]
    judges = {"j": random_judge(build("llama"))}
    numbers = np.array([[1, 1, np.nan, np.nan], [1, 0, np.nan, np.nan], [1, 1, np.nan, np.nan]])
    rounds = np.array([[10.0] * 4, [5, 5, 1, 1], [5, 5, 10, 10]])
    scores = {"agreement": np.ones((3, 4)), "unchanged": numbers}
    made = grid_of_methods(methods, list("aabb"), rounds, scores)
    records = [AnswerRecord(method.name, "p", 0, None, [1], True, None, -1.0, [1], 1) for method in methods]
    found = summarise_quality(made, records, methods, judges)
    (kept,), (unchanged,) = found["comparisons"], found["comparisons_unchanged"]
    assert [value[0] for value in kept["speed_ratio"].values()] == pytest.approx([12 / 30] * 4)
    # Of the margin, which keeps half of them at twice the speed, a mixture with lossless decoding.
    assert [value[0] for value in unchanged["speed_ratio"].values()] == pytest.approx([1.9, 1.8, 1.6, 1.4])
    assert "| judge (1) ÷ margin (1) | 1.90 [" in quality_tables(found)
    (pair,) = found["paired"]  # the margin is faster on prompts without final answers
    assert (pair["first"], pair["second"], pair["unchanged"][0]) == ("judge=0.5", "margin=1", 0.5)
    assert pair["speed"][0] == pytest.approx(12 / 30)
    assert "prompt by prompt" not in quality_tables(found)
    pair["speed"] = [1.05, 1.0, 1.1]
    assert "| judge=0.5 and margin=1 | 1.05 [1.00, 1.10] | 0.500 [" in quality_tables(found)
    drawn, draw = [], Axes.errorbar

    def watched(axis, x, y, **options):
        drawn.append((options["label"], *x, *y))
        return draw(axis, x, y, **options)

    monkeypatch.setattr(Axes, "errorbar", watched)
    plot_tradeoff(found, tmp_path / "both.png")
    assert [line[0] for line in drawn] == ["margin", "judge"] * 2
    assert drawn[0][1:] == pytest.approx((1, 1, 1, 40 / 12))
    assert drawn[2][1:] == pytest.approx((1, 0.5, 1, 2))
    assert drawn[3][1:] == pytest.approx((1, 1, 1, 2))
    alone = grid_of_methods(methods[:1], made.categories, rounds[:1], {name: row[:1] for name, row in scores.items()})
    found = summarise_quality(alone, records[:1], methods[:1], {})
    assert found["settings"][0]["final_answers"] == {"unchanged": (1, 1, 1), "speed": (1, 1, 1)}
    assert found["comparisons_unchanged"] == []
    for nowhere in (True, False):  # known of no prompt, or not asked for
        made.scores["unchanged"][0] = np.nan
        if not nowhere:
            del made.scores["unchanged"]
        found = summarise_quality(made, records, methods, judges)
        assert found["comparisons_unchanged"] == []
        assert "unchanged final answers" not in quality_tables(found)
        drawn.clear()
        plot_tradeoff(found, tmp_path / "one.png")
        assert len(drawn) == 2


def test_names_are_text_in_tables_and_plots(tmp_path, monkeypatch):
    """The names of a judge's folder and of a category."""
    judge, category = r"judge:$\frac$ | *x*", "a | <b>"
    folder = judge.partition(":")[2]
    methods = [Method("lossless"), Method("margin", (1,)), Method("judge", (Threshold(0.5),), folder, named=True)]
    made = grid_of_methods(
        methods,
        np.array([category, "[x](y)"]).repeat(2),
        np.array([[10.0] * 4, [5] * 4, [4] * 4]),
        {"agreement": np.ones((3, 4))},
    )
    records = [AnswerRecord(method.name, "p", 0, None, [1], True, None, -1.0, [1], 1) for method in methods]
    found = summarise_quality(made, records, methods, {folder: random_judge(build("llama"))})
    text = quality_tables(found)
    html = MarkdownIt("gfm-like", {"linkify": False}).render(text)
    assert f"<td>{judge}=0.5</td>" in html
    assert "<th>a | &lt;b&gt;</th>" in html
    assert "[x](y) by agreement (2), a | &lt;b&gt; by agreement (2)" in html
    assert "compared with the lossless answer itself" in html.partition("<p>* ")[2]
    shown = io.StringIO()
    Console(file=shown, width=250).print(Markdown(text))
    assert f"{judge}=0.5" in shown.getvalue()
    plot_tradeoff(found, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000


def row(family, threshold, speed, changed):
    measured = {"speed": [speed] * 3, "tokens_per_round": [4 * speed] * 3, "changed": [changed] * 3}
    of = {"setting": f"{family}={threshold}", "family": family, "threshold": threshold}
    return of | {"accepted_share": 0.5, "changes": measured}


def test_operating_points_are_the_fastest_that_change_few_answers():
    lucky, slow = row("judge:j", 0.2, 1.2, 0.02), row("judge:j", 0.1, 1.1, 0.04)
    fast, faster = row("judge:j", 0.3, 1.5, 0.1), row("judge:j", 0.5, 1.8, 0.3)
    others = [row("lossless", None, 1, 0), row("judge:k", 0.4, 2, 0), row("margin", None, 2, 0)]
    found = {"settings": [faster, fast, slow, lucky, *others], "changes": {"by": "unchanged", "answers": 199}}
    points = operating_points(found, "judge:j")
    # Of 199 answers 0.04 are 8; one more of 200 is 0.045. The faster one is not taken to change less.
    assert {name: point["threshold"] for name, point in points.items()} == {"changes_5": 0.2, "changes_20": 0.3}
    assert points["changes_5"] == {"threshold": 0.2, "risk": 0.05, "accepted_share": 0.5, **lucky["changes"]}
    assert [*operating_points(found, "judge:j", [0.125, 0.044])] == ["changes_12_5"]  # 0.045 is more than 0.044
    assert [*operating_points(found, "judge:j", [0.1, 0.05])] == ["changes_5"]  # one threshold has one name
    assert fastest_within(found, "judge:j", 0.1)["threshold"] == 0.2
    assert fastest_within(found, "judge:j", 0.044) is None
    assert operating_points(found, "judge:other") == {}
    with pytest.raises(ValueError, match="no answer has a result that could be compared"):
        operating_points(found | {"changes": None}, "judge:j")


def test_an_operating_point_that_is_hardly_faster_has_no_name():
    slow, fast = row("judge:j", 0.1, 1.1, 0), row("judge:j", 0.2, 1.2, 0.08)
    found = {"settings": [slow, fast], "changes": {"by": "unchanged", "answers": 199}}
    for interval, names in (([1.2, 1.05, 1.3], ["changes_5"]), ([1.2, 1.15, 1.3], ["changes_5", "changes_10"])):
        fast["changes"]["speed"] = interval
        assert [*operating_points(found, "judge:j")] == names
    slow["changes"]["speed"] = [1.1, 1.0, 1.25]  # not told from lossless decoding
    assert [*operating_points(found, "judge:j")] == ["changes_10"]


def test_the_promise_holds_for_new_answers():
    """Answers that change at and above a threshold of their own: the risk of the chosen threshold, over many sets of
    answers that it was chosen on, is at most what was allowed, and not much less."""
    rng, grid, allowed = np.random.default_rng(0), np.linspace(0, 1, 101), 0.1
    risks = []
    for _ in range(4000):
        changes_at = rng.beta(2, 1, size=60)  # the share that changes at a threshold t is t²
        able = [t for t in grid if risk_bound((changes_at < t).mean(), 60) <= allowed]
        risks.append(max(able, default=0) ** 2)
    assert 0.06 < np.mean(risks) <= allowed


def test_what_says_that_an_answer_was_changed():
    """What is known of more answers; speed is that on the prompts of these."""
    methods = [Method("lossless"), Method("judge", (Threshold(0.5),), "j"), Method("judge", (0.5,), "j", length=9)]
    records = [AnswerRecord(method.name, "p", 0, None, [1], True, None, -1.0, [1], 1) for method in methods]
    rounds = np.array([[4.0] * 4, [2, 2, 1, 2], [2, 2, 1, 2]])
    same = np.array([[1, 1, 1, 1], [1, 0.5, 0.2, 0.3], [1, 1, 1, 1]])
    unchanged = np.array([[1, 1, np.nan, 1], [1, 0, np.nan, 1], [1, 1, np.nan, 1]])
    none, one = np.full((3, 4), np.nan), np.where([True, False, False, False], same, np.nan)
    for scores, changes, share, speed in (
        ({"unchanged": unchanged}, {"by": "unchanged", "answers": 3}, 1 / 3, 2),
        ({"unchanged": unchanged, "same": one}, {"by": "unchanged", "answers": 3}, 1 / 3, 2),
        ({"unchanged": unchanged, "same": same}, {"by": "same", "answers": 4}, 0.5, 16 / 7),
        ({"unchanged": none}, None, None, None),
        ({}, None, None, None),
    ):
        scores["agreement"] = np.ones((3, 4))
        made = grid_of_methods(methods, np.array(["a"] * 4), rounds, scores)
        judges = {"j": random_judge(build("llama"))}
        found = summarise_quality(made, records, methods, judges)
        assert found["changes"] == changes
        assert [*found["judges"]] == ["judge"]  # another draft length is another curve, and no operating point
        judged = found["settings"][1]["changes"]
        if changes is None:
            assert judged is None
        else:
            assert (judged["changed"][0], judged["speed"][0]) == pytest.approx((share, speed))


def test_a_measure_that_does_not_separate_has_an_interval_around_zero():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(5, 200))
    good = np.array([1, 0.8, 0.6, 0.5, 0])[:, None] + rng.normal(scale=0.5, size=(5, 200))
    made = grid(200, good=good, noise=noise, task=np.full((5, 200), np.nan))
    by = {row["measure"]: row for row in separation(made, ["coin=0.5", "draft"])}
    assert by["good"]["coin=0.5"][1] > 0
    assert by["good"]["draft, standardised"] == pytest.approx(2, abs=0.3)
    assert by["noise"]["coin=0.5"][1] < 0 < by["noise"]["coin=0.5"][2]
    assert by["task"] == {
        "measure": "task", "prompts": 0, "coin=0.5": None, "draft": None, "coin=0.5, standardised": None,
        "draft, standardised": None,
    }  # fmt: skip
