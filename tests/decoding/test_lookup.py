"""Prompt lookup beside a draft model: which is chosen, and that the text stays right."""

import pytest
import torch
from transformers.generation import AssistedCandidateGenerator
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from hf_selfjudge import JudgedModel
from hf_selfjudge.decoding.lookup import LookupBeside, repeated
from hf_selfjudge.rules import Coin, KLGate, Lossless
from tests.architectures import build as build_any
from tests.builders import perturbed
from tests.drafters import dflash, other_tokenizer


NEW = 60  # tokens; random models repeat themselves after a few


@pytest.fixture
def rounds(monkeypatch):
    """What proposed the candidates of each round, and the text with them."""
    seen = []
    for name, kind in (("drafted", AssistedCandidateGenerator), ("found", PromptLookupCandidateGenerator)):
        own = kind.get_candidates

        def spy(self, input_ids, own=own, name=name, **kwargs):
            ids, logits = own(self, input_ids, **kwargs)
            seen.append((name, input_ids, ids))
            return ids, logits

        monkeypatch.setattr(kind, "get_candidates", spy)
    return seen


def chosen(rounds):
    """The rounds without what was found and not used: a draft follows it."""
    return [
        this for this, after in zip(rounds, [*rounds[1:], None], strict=True)
        if this[0] == "drafted" or after is None or after[0] == "found"
    ]  # fmt: skip


@pytest.mark.parametrize("length", [None, 3, "auto"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [("dense", "qwen2"), ("dense", "gpt2"), ("sliding window", "gemma3_text"), ("encoder-decoder", "bart")],
)
def test_greedy_text_stays(kind, name, rounds, prompt, length):
    target = build_any(kind, name)
    draft = perturbed(target, 0.02)
    for _ in range(2):  # again: nothing is left of the first call
        judged = JudgedModel(target, Lossless(), length)
        output = judged.generate(prompt, assistant_model=draft, prompt_lookup_num_tokens=4, max_new_tokens=NEW)
        assert torch.equal(output, target.generate(prompt, max_new_tokens=NEW))
    assert {name for name, *_ in chosen(rounds)} == {"drafted", "found"}


@torch.no_grad()
def test_drafts_after_found_candidates_are_those_of_the_draft(llama, prompt, rounds, monkeypatch):
    """The draft's cache follows the text through rounds in which it was not asked."""
    target, draft = llama[0], perturbed(llama[0], 0.02)
    monkeypatch.setattr(LookupBeside, "_expected", lambda self: 1.0 if len(self.open) % 2 else 9.0)
    JudgedModel(target, Lossless(), 3).generate(
        prompt, assistant_model=draft, prompt_lookup_num_tokens=4, max_new_tokens=NEW
    )
    names = [name for name, *_ in chosen(rounds)]
    assert "found drafted" in " ".join(names)
    for name, text, ids in rounds:
        if name == "drafted" and ids.shape[1] > text.shape[1]:
            alone = draft.generate(text, max_new_tokens=ids.shape[1] - text.shape[1], do_sample=False)
            assert torch.equal(ids, alone)


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sample"])
def test_calls_do_not_depend_on_earlier_ones(llama, prompt, do_sample):
    target, draft = llama[0], perturbed(llama[0], 0.02)
    judged, how = JudgedModel(target, Coin(0.5), 3), {"max_new_tokens": NEW, "do_sample": do_sample}
    texts, stats = [], []
    for _ in range(2):
        torch.manual_seed(0)
        texts.append(judged.generate(prompt, assistant_model=draft, prompt_lookup_num_tokens=4, **how))
        stats.append((judged.stats.rounds, judged.stats.drafted, judged.stats.judged))
    assert torch.equal(*texts)
    assert stats[0] == stats[1]


def test_rows_of_a_batch_are_the_prompts_alone(llama, prompt):
    target, draft = llama[0], perturbed(llama[0], 0.02)
    judged = JudgedModel(target, Coin(0.5), 3)
    how = {"assistant_model": draft, "prompt_lookup_num_tokens": 4, "max_new_tokens": NEW, "pad_token_id": 0}
    prompts = [prompt, prompt.flip(1)]
    alone = [judged.generate(each, **how) for each in prompts]
    together = judged.generate(torch.cat(prompts), attention_mask=torch.ones(2, prompt.shape[1]), **how)
    for row, own in zip(together, alone, strict=True):
        assert torch.equal(row[: own.shape[1]], own[0])


def test_what_cannot_be_combined_is_refused(llama, tokenizer, prompt, monkeypatch):
    target, draft = llama
    both = {"assistant_model": draft, "prompt_lookup_num_tokens": 4, "max_new_tokens": 8}
    with pytest.raises(ValueError, match="`rule` KLGate .* drafts of PromptLookupCandidateGenerator come without"):
        JudgedModel(target, KLGate(1.0)).generate(prompt, **both)
    with pytest.raises(ValueError, match="`assistant_ensemble_weight` requires candidate logits"):
        JudgedModel(target, Lossless()).generate(prompt, **both, assistant_ensemble_weight=0.5)
    for drafter in (other_tokenizer, dflash):
        target, options = drafter(llama[0], tokenizer, monkeypatch)
        with pytest.raises(ValueError, match="`prompt_lookup_num_tokens` beside drafts of .* is not possible"):
            JudgedModel(target, Lossless()).generate(
                prompt, **options, prompt_lookup_num_tokens=4, max_new_tokens=8, do_sample=False
            )


# The choice ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found", "count"),
    [
        ([1, 2, 3, 1, 2], [3, 1], 2),
        ([9, 1, 2, 3, 8, 1, 2], [3], 2),
        ([1, 2, 3, 4, 2], [3], 1),
        ([1, 2, 1, 2, 1, 2], [1, 2], 4),
        ([1, 2, 3], [9], 0),
        ([5] * 50, [5], 32),
    ],
)
def test_repeated_tokens_by_hand(text, found, count):
    assert repeated(text, found) == count


class Copies:
    """Finds what follows the last token where it stands first."""

    def get_candidates(self, input_ids):
        text = input_ids[0].tolist()
        start = text.index(text[-1]) + 1
        return torch.tensor([text + text[start : min(start + 4, len(text) - 1)]]), None


def test_found_candidates_are_used_once_they_are_as_good():
    """Counted also where they were not used; and no more once they fail."""
    beside = LookupBeside(Copies())
    source = [*range(100, 140)]
    used = []
    text = [*source, 100]
    for place in range(1, 40):  # one token in each round: the text copies the source
        used.append(beside.candidates(torch.tensor([text])) is not None)
        text.append(source[place])
        beside.observe(1)  # the draft keeps one candidate
    assert not used[0]
    assert used[-5:] == [True] * 5
    assert used == sorted(used)
    beside.observe(9)
    for _ in range(60):
        beside.observe(9)
    assert beside.candidates(torch.tensor([[*source, *source[:5]]])) is None


def test_candidates_that_the_text_has_not_passed_wait():
    beside = LookupBeside(Copies())
    before = beside.found.copy()
    beside.candidates(torch.tensor([[1, 2, 3, 4, 5, 6, 1]]))
    assert beside.open == [(0, 7, [2, 3, 4, 5])]
    beside.candidates(torch.tensor([[1, 2, 3, 4, 5, 6, 1, 2, 3]]))
    assert (beside.found == before).all()
    beside.candidates(torch.tensor([[1, 2, 3, 4, 5, 6, 1, 2, 3, 9]]))  # two of the four were right
    assert beside.found[0].tolist() == pytest.approx(0.95 * before[0] + [1, 2])
