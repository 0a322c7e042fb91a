"""Mining on tiny random models, in fp32."""

import datasets
import pytest
import torch

from hf_selfjudge import MiningConfig, Prompt, labels, load_labels, mine
from hf_selfjudge.features import SCALARS, candidate_scalars
from hf_selfjudge.labels import final_number, label_row, reconvergence, special_tokens, substitute
from hf_selfjudge.mismatches import find_mismatches, target_answers


PROMPTS = [
    Prompt("a", "why is it so?"),
    Prompt("b", "how many?", check="number"),
    Prompt("c", "x + y = z, is it not?"),
]
CONFIG = MiningConfig(max_new_tokens=24, per_answer=4, answer_batch=2, rewrite_batch=3)


@pytest.fixture
def found(pair, tokenizer):
    target, draft = pair
    answers = target_answers(target, tokenizer, PROMPTS, 24)
    return [find_mismatches(draft, a, special_tokens(target, tokenizer), 4, seed=0) for a in answers]


def test_answers_are_plain_greedy(pair, tokenizer):
    target, _ = pair
    for answer in target_answers(target, tokenizer, PROMPTS, 24):
        ids = answer.ids[None, : answer.prompt_length]
        alone = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        assert torch.equal(alone[0], answer.ids)


def test_mismatches_are_the_drafts_other_choices(pair, found):
    _, draft = pair
    assert sum(len(m) for m in found) >= 3
    for m in found:
        choice = draft(m.answer.ids[None]).logits[0].argmax(-1)[m.answer.prompt_length - 1 : -1]
        assert m.total == sum((choice != m.answer.tokens) & (choice > 1) & (m.answer.tokens > 1))
        for position, token in zip(m.positions, m.substitutes, strict=True):
            assert choice[position] == token != m.answer.tokens[position]


def test_substitution_is_what_the_target_does_alone(pair, found):
    """Batched over shared prefixes, with the features of a verification: the same as one prompt at a time."""
    target, _ = pair
    pool = [(m, k) for m in found for k in range(len(m))]
    for new in substitute(target, pool, 20):
        m, k = new.mismatches, new.index
        prefix = m.answer.ids[: m.answer.prompt_length + m.positions[k]]
        ids = torch.cat([prefix, m.substitutes[k : k + 1]])[None]
        alone = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        assert torch.equal(alone[0, ids.shape[1] :], new.rewrite)
        forward = target(ids, output_hidden_states=True)
        torch.testing.assert_close(new.logits, forward.logits[0, -2:], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(new.hidden, forward.hidden_states[-1][0, -2:], atol=1e-4, rtol=1e-4)


def test_the_targets_own_token_changes_nothing(pair, found, tokenizer):
    """The control: substituting a token by itself gives the original answer back."""
    target, _ = pair
    for m in found:
        m.substitutes = m.answer.tokens[m.positions]
    pool = [(m, k) for m in found for k in range(len(m))]
    for new in substitute(target, pool, 24):
        left = len(new.mismatches.answer.tokens) - int(new.mismatches.positions[new.index]) - 1
        new.rewrite = new.rewrite[:left]
        row = label_row(tokenizer, new)
        assert row["rewritten_ids"] == new.mismatches.answer.tokens.tolist()
        assert row["changed"] == 0


def test_killed_and_started_again(llama, tokenizer, tmp_path, monkeypatch):
    target, draft = llama
    whole = mine(target, draft, tokenizer, PROMPTS, CONFIG, tmp_path / "whole")
    calls = []

    def die(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return target_answers(*arguments)

    monkeypatch.setattr(labels, "target_answers", die)
    with pytest.raises(KeyboardInterrupt):
        mine(target, draft, tokenizer, PROMPTS, CONFIG, tmp_path / "killed")
    again = mine(target, draft, tokenizer, PROMPTS, CONFIG, tmp_path / "killed")
    assert len(calls) == 3
    assert again.to_dict() == whole.to_dict()
    assert not list((tmp_path / "killed").glob("*.incomplete"))


def test_rows(llama, tokenizer, tmp_path):
    target, draft = llama
    rows = mine(target, draft, tokenizer, PROMPTS, CONFIG, tmp_path)
    assert len(rows) > 5
    assert set(rows["prompt_id"]) <= {"a", "b", "c"}
    for row in rows:
        assert len(row["scalars"]) == len(SCALARS)
        assert len(row["hidden_before"]) == len(row["hidden_after"]) == 32
        assert row["scalars"][0] >= 0
        assert row["token"] != row["substitute"] == row["rewritten_ids"][row["position"]]
        assert row["rewritten_ids"][: row["position"]] == row["answer_ids"][: row["position"]]
        label = 1 - row["reconvergence"] if row["flipped"] is None else row["flipped"]
        assert row["changed"] == pytest.approx(label)


def test_other_settings_are_refused(llama, tokenizer, tmp_path):
    target, draft = llama
    mine(target, draft, tokenizer, PROMPTS[:1], CONFIG, tmp_path)
    with pytest.raises(ValueError, match=r"labels of other settings \(prompts: 1 there, 2 now"):
        mine(target, draft, tokenizer, PROMPTS[:2], CONFIG, tmp_path)


def test_no_labels(tmp_path):
    with pytest.raises(FileNotFoundError, match="no labels"):
        load_labels(tmp_path)


def test_too_long_prompt_is_refused(llama, tokenizer, tmp_path):
    target, draft = llama
    with pytest.raises(ValueError, match="exceeds the target's context"):
        mine(target, draft, tokenizer, [Prompt("long", "a" * 300)], CONFIG, tmp_path)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7.", "7"),
        ("The total is $1,234.50 for 3 days: 1,234.50", "1234.5"),
        ("a \\boxed{12} b 13", "12"),
        ("it falls to -3", "-3"),
        ("no number", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number


def test_reconvergence():
    original = [1, 2, 3, 4, 5, 6]
    assert reconvergence(original, original) == 1
    assert reconvergence(original, [9, 1, 2, 3, 4]) == pytest.approx(1 / 3)
    assert reconvergence(original, [9] * 6) == 0
    assert reconvergence([1, 1, 1, 1, 1], [1, 1, 1, 1]) == 0.5  # with multiplicity
    assert reconvergence([1, 2], [2, 1, 2]) == 1
    assert reconvergence([], [1]) == 1


def test_scalars_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]]))
    after = torch.log(torch.tensor([[0.25, 0.75, 0.0]]))
    values = candidate_scalars(logits, torch.tensor([2]), after, torch.tensor([3]))[0]
    entropy = -sum(p * torch.tensor(p).log() for p in (0.5, 0.3, 0.2))
    entropy_after = -sum(p * torch.tensor(p).log() for p in (0.25, 0.75))
    expected = [torch.tensor(2.5).log(), torch.tensor(0.2).log(), entropy, torch.tensor(3.0).log(), entropy_after]
    expected += [torch.tensor(0.75).log(), torch.tensor(4.0).log()]
    torch.testing.assert_close(values, torch.stack(expected))


def test_dataset_types(llama, tokenizer, tmp_path):
    target, draft = llama
    rows = mine(target, draft, tokenizer, PROMPTS[:1], CONFIG, tmp_path)
    assert rows.features == labels.features_of(32)
    assert isinstance(rows, datasets.Dataset)
