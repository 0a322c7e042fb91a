"""Labels made twice, on tiny random models in fp32, where rounding changes nothing."""

from dataclasses import replace

import numpy as np
import pandas
import pytest

from hf_selfjudge import mine
from hf_selfjudge.data.prompts import Prompt
from hf_selfjudge.mining.ceiling import agreement, label_again
from hf_selfjudge.mining.compact import compact_labels
from hf_selfjudge.models.pair import Pair
from hf_selfjudge.scoring import checks
from tests.builders import MINING, perturbed


NUMBERS = [Prompt(f"p{i}", f"why is {i} so?", "odd" if i % 2 else "even", check="number") for i in range(6)]


@pytest.fixture
def target(llama, monkeypatch):
    """A target whose answers end, and have numbers that differ."""
    monkeypatch.setattr(llama[0].generation_config, "eos_token_id", [*range(40, 64)])
    monkeypatch.setattr(checks, "final_number", lambda text: len(text) % 3)
    return llama[0]


@pytest.mark.parametrize("rounds", [0, 2])
def test_without_rounding_labels_stay(target, tokenizer, tmp_path, rounds):
    config = replace(MINING, max_new_tokens=40, rewrites=8, per_answer=8, rounds=rounds)
    labels = mine(Pair(target, perturbed(target, 0.05), tokenizer), NUMBERS, config, tmp_path / "labels")
    compact_labels(tmp_path / "labels", tmp_path / "small")
    known = labels.select_columns(["category", "prompt_id", "flipped"]).to_pandas().dropna()
    every = label_again(target, tokenizer, tmp_path / "labels", NUMBERS, 1000, at_once=5)
    assert every["prompt_id"].tolist() == known["prompt_id"].tolist()
    assert every["again"].tolist() == every["first"].tolist() == known["flipped"].astype(float).tolist()
    assert {*every["first"]} == {0.0, 1.0}
    some = label_again(target, tokenizer, tmp_path / "small", NUMBERS, 3)
    assert some["again"].tolist() == some["first"].tolist()
    assert len(some) == known.groupby("category").head(3).shape[0] < len(every)
    measured = agreement(some)
    assert [row["category"] for row in measured] == [*sorted({*known["category"]}), "all"]
    assert measured[-1]["same_label"] == (1, 1, 1)


def test_what_cannot_be_labelled_again_is_refused(llama, tokenizer, tmp_path):
    target, draft = llama
    mine(Pair(target, draft, tokenizer), NUMBERS, MINING, tmp_path / "a")
    with pytest.raises(ValueError, match="`target` has other weights than the one of the labels"):
        label_again(draft, tokenizer, tmp_path / "a", NUMBERS, 3)
    with pytest.raises(ValueError, match="`prompts`: 1 of those that the labels were mined on are not given"):
        label_again(target, tokenizer, tmp_path / "a", NUMBERS[1:], 3)
    with pytest.raises(FileNotFoundError, match="has no mining.json"):
        label_again(target, tokenizer, tmp_path / "none", NUMBERS, 3)
    texts = [replace(prompt, check="text") for prompt in NUMBERS]
    mine(Pair(target, draft, tokenizer), texts, MINING, tmp_path / "b")
    with pytest.raises(ValueError, match="`folder`: no label in .* compares final answers"):
        label_again(target, tokenizer, tmp_path / "b", texts, 3)


def test_agreement_by_hand():
    first, again = [1, 1, 0, 0, 0, 1], [1, 0, 0, 0, 0, np.nan]
    labels = pandas.DataFrame({"category": "c", "prompt_id": [*"abcdef"], "first": first, "again": again})
    _, row = agreement(labels)
    assert (row["category"], row["substitutions"], row["unknown"]) == ("all", 6, 1)
    values = {name: interval.value for name, interval in row.items() if isinstance(interval, tuple)}
    # Of the pairs of a changed and an unchanged answer, 3 are ordered by the first label and 1 is a tie.
    assert values == pytest.approx(
        {"changed": 2 / 5, "changed_again": 1 / 5, "same_label": 4 / 5, "auc_of_a_label": 3.5 / 4}
    )
