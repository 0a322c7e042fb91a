"""What labels say, on rows written by hand."""

import io

import numpy as np
import pytest
from rich.console import Console

from hf_selfjudge.mining.label_files import CHEAP_SCORES
from hf_selfjudge.mining.report import (
    as_table,
    change_rates,
    examples,
    in_context,
    score_predictions,
    short_columns,
    token_kind,
)
from tests.builders import labels_dataset


RESAMPLES = 50


def row(number, prompt, *, flipped=None, lost=None, score=0.0, token=2, category="maths", kind="mismatch"):
    changed = None if lost is None else lost if flipped is None else float(flipped)
    rng = np.random.default_rng(number)
    hidden = rng.normal(size=(2, 4)).astype(np.float16) + np.float16(score)
    return {
        "prompt_id": prompt, "category": category, "check": "number" if flipped is not None else "text",
        "kind": kind, "position": 1, "token": token, "substitute": 3, "draft_rank": 0, "mismatches": 1,
        "prompt_ids": [2, 3], "answer_ids": [4, token, 5], "own": True, "finished": True,
        "rewritten_suffix": [6] if lost is not None else None, "rewrite_finished": lost is not None or None,
        "flipped": flipped, "changed": changed, "says_no": None, "draft_logprob": -1.0,
        "reconvergence": None if lost is None else 1 - lost,
        **dict.fromkeys(CHEAP_SCORES, score), "scalars": [score] * 7, "hidden_before": hidden[0],
        "hidden_after": hidden[1],
    }  # fmt: skip


def labels_of(rows):
    rows = [row | {"answer": number} for number, row in enumerate(rows)]
    return labels_dataset(rows, rows, 4)


@pytest.fixture
def mixed(tokenizer):
    """Maths whose answers change exactly where the score is high, and text whose score is higher still."""
    rows = [row(i, f"m{i // 4}", flipped=i % 4 == 3, lost=(i % 4) / 4, score=float(i % 4)) for i in range(80)]
    rows += [
        row(100 + i, f"t{i // 4}", lost=(i % 4) / 4, score=10.0 + i % 4, category="text", token=9) for i in range(80)
    ]
    return labels_of([*rows, row(999, "t1", category="text", kind="alternative")])


@pytest.fixture
def columns(mixed, tokenizer):
    return short_columns(mixed, tokenizer)


def test_rates(columns):
    maths, text = change_rates(columns, "category", RESAMPLES)
    assert (maths["category"], maths["substitutions"], maths["rewritten"], maths["checked"]) == ("maths", 80, 80, 80)
    assert maths["changed"] == (0.25, 0.25, 0.25)
    assert maths["lost"][0] == pytest.approx(0.375)
    assert (text["substitutions"], text["rewritten"], text["checked"], text["changed"]) == (81, 80, 0, None)
    assert [r["kind"] for r in change_rates(columns, "kind", RESAMPLES)] == ["alternative", "mismatch"]


def test_predictors(columns):
    """Higher is worse; what is accepted is counted among the rows where the answer is known."""
    for found in score_predictions(columns, RESAMPLES):
        if found["score"] in CHEAP_SCORES:
            assert found["auc"][0] == 1.0
            assert found["changed_among_accepted"] == 0.0
            assert found["lost_among_accepted"] < 0.375
            assert found["correlation"][0] > 0


def test_one_change_and_none(tokenizer):
    rows = [row(i, f"m{i}", flipped=i == 0, lost=float(i == 0), score=float(i)) for i in range(12)]
    found = score_predictions(short_columns(labels_of(rows), tokenizer), RESAMPLES)
    assert found[0]["auc"][0] == 0.0  # the one that changed has the lowest score
    assert score_predictions(short_columns(labels_of([row(0, "m")]), tokenizer), RESAMPLES) == []


def test_examples_in_context(mixed, columns, tokenizer):
    for harmful in (False, True):
        chosen = columns.loc[examples(columns, harmful, 6, 0)]
        assert len(chosen) == chosen["prompt_id"].nunique() == 6
        assert ((chosen["changed"] > 0.5) == harmful).all()
    index = examples(columns, True, 1, 0)[0]
    text = in_context(mixed[index], tokenizer).plain
    assert "the answer changed" in text
    first, second = text.splitlines()[-2:]
    assert first.split()[1] == tokenizer.decode([2]) + tokenizer.decode([5])
    assert second.split()[1] == tokenizer.decode([3]) + tokenizer.decode([6])


def test_tables(columns):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(as_table(change_rates(columns, "category", RESAMPLES), "by category"))
    console.print(as_table(change_rates(columns, "replaced", RESAMPLES), "by token replaced"))
    console.print(as_table(score_predictions(columns, RESAMPLES), "scores"))
    text = console.export_text()
    assert "0.250 [0.250, 0.250]" in text
    for word in ("token replaced", "AUC, changed answer", "0.000", "–"):
        assert word in text


def test_pieces_in_context(byte_decoder):
    """They are parts of the answers, whatever their tokens are alone."""
    ids = byte_decoder("the sky 😀 is blue")["input_ids"]
    place = len(byte_decoder("the sky 😀")["input_ids"]) - 1  # the last part of the character
    other = byte_decoder("the sky 😁 was")["input_ids"]
    made = row(0, "p", flipped=True, lost=1.0, token=ids[place]) | {
        "answer_ids": ids, "rewritten_suffix": other[place + 1 :], "position": place, "substitute": other[place],
    }  # fmt: skip
    labels = labels_of([made])
    text = in_context(labels[0], byte_decoder).plain
    assert text.splitlines()[1:] == ["  … the sky  ", "  target 😀 is blue …", "  other  😁 was …"]
    assert short_columns(labels, byte_decoder)["replaced"].tolist() == ["part of a character"]


def test_long_answers_in_context(tokenizer):
    answer = tokenizer("x" * 30 + "abc" + "y" * 30)["input_ids"]
    made = row(0, "p", lost=1.0) | {
        "answer_ids": answer, "rewritten_suffix": answer[32:], "position": 31, "token": answer[31],
        "substitute": answer[31],
    }  # fmt: skip
    lines = in_context(labels_of([made])[0], tokenizer).plain.splitlines()
    assert lines[1] == "  … " + "x" * 23 + "a "
    assert lines[2] == "  target bc" + "y" * 23 + " …"


def test_categories_are_text(tokenizer):
    """They are shown as they are, and not taken for markup or emoji."""
    names = ["[/INST] follow", "[math]", ":smile:", "\x1b[31mred"]
    made = labels_of([row(i, f"p{i}-[b]", lost=0.5, category=name) for name in names for i in range(30)])
    for console in (Console(width=300, file=io.StringIO()), Console(width=300, file=io.StringIO(), markup=False)):
        rates = change_rates(short_columns(made, tokenizer), "category", RESAMPLES)
        console.print(as_table(rates, "by category"))
        console.print(in_context(made[0], tokenizer))
        text = console.file.getvalue()
        assert "[/INST] follow, p0-[b]" in text
        assert all(name in text for name in names[:-1])
        assert text.count("␛[31mred") == 1
        assert "\x1b" not in text


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" 12", "number"), ("x1", "number"), (".\n", "punctuation"), ("\n", "space"), (" the", "function word"),
        (" Paris", "name"), (" walk", "word"), ("\ufffd", "part of a character"),
    ],
)  # fmt: skip
def test_kinds_of_token(text, kind):
    assert token_kind(text) == kind
