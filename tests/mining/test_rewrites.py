"""Following substitutions against stock `generate` and plain forwards, in fp32."""

from dataclasses import replace

import pytest
import torch

from hf_selfjudge.data.prompts import Prompt
from hf_selfjudge.forward.lockstep import Tally, run_in_lockstep
from hf_selfjudge.mining.answers import read_answers, target_answers
from hf_selfjudge.mining.rewrites import continue_substitutions
from hf_selfjudge.mining.substitutions import find_substitutions, sample
from hf_selfjudge.models.attention import share_keys, takes_end_to_end
from hf_selfjudge.models.tokens import eos_tokens
from tests.builders import VOCAB, build, greedy, perturbed


NEW, TOP, FLOOR, RUNNERS = 40, 3, 0.01, 2
PROMPTS = [Prompt(name, name) for name in "abc"]


def ids_of(seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCAB, (1, length), generator=generator) for length in (7, 12, 3)]


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3", "gpt2", "qwen2, end to end", "gemma3, end to end"])
def case(request):
    """Target, draft, three answers, and substitutions of each; texts end early at some tokens."""
    name, *end_to_end = request.param.split(", ")
    target = build(name)
    if end_to_end:
        share_keys(target)
        assert takes_end_to_end(target)
    target.generation_config.eos_token_id = [1, 30, 45]
    draft = perturbed(target, 0.05)
    answers = target_answers(target, PROMPTS, ids_of(), NEW, RUNNERS)
    found = [sample(find_substitutions(draft, a, [0, 1], TOP, FLOOR, RUNNERS), 12, 0, a.prompt.id) for a in answers]
    return target, draft, answers, found


def test_answers_are_plain_greedy(case):
    target, _, answers, _ = case
    for answer, ids in zip(answers, ids_of(), strict=True):
        assert answer.tokens.tolist() == greedy(target, ids[0], NEW)
        assert answer.finished == (int(answer.tokens[-1]) in eos_tokens(target))
        logits = target(answer.ids[None]).logits[0, answer.prompt_length - 1 : -1]
        scores = logits.log_softmax(-1)
        assert answer.choices.tolist() == scores.topk(1 + RUNNERS).indices.tolist()
        torch.testing.assert_close(answer.logprobs, scores.amax(-1), atol=1e-4, rtol=1e-4)


def test_answers_read_are_what_answers_written_are(case):
    target, _, answers, _ = case
    read = read_answers(target, PROMPTS, ids_of(), [a.tokens for a in answers], RUNNERS)
    for a, b in zip(answers, read, strict=True):
        assert not b.own
        assert (a.ids.tolist(), a.finished, a.choices.tolist()) == (b.ids.tolist(), b.finished, b.choices.tolist())
        torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(a.cache, b.cache, atol=1e-4, rtol=1e-4)


def test_substitutions_are_other_choices(case):
    target, draft, answers, _ = case
    kinds = set()
    for answer in answers:
        logits = draft(answer.ids[None]).logits[0, answer.prompt_length - 1 : -1]
        scores = logits.softmax(-1)
        found = find_substitutions(draft, answer, [0, 1], TOP, FLOOR, RUNNERS)
        assert len({(s.position, s.token) for s in found}) == len(found)
        assert [s.position for s in found] == sorted(s.position for s in found)
        for s in found:
            kinds.add(s.kind)
            assert s.choice == answer.tokens[s.position] != s.token
            assert s.token not in (0, 1)
            assert s.choice not in (0, 1)
            assert s.draft_rank == int((scores[s.position] > scores[s.position, s.token]).sum())
            if s.kind == "mismatch":
                assert s.draft_rank == 0
            elif s.kind == "alternative":
                assert 0 < s.draft_rank < TOP
                assert scores[s.position, s.token] >= FLOOR
            else:
                assert s.token in answer.choices[s.position, 1:]
        first = (scores.argmax(-1) != answer.tokens) & (scores.argmax(-1) > 1) & (answer.tokens > 1)
        assert [s.position for s in found if s.kind == "mismatch"] == first.nonzero().flatten().tolist()
    assert kinds == {"mismatch", "alternative", "runner-up"}


@pytest.mark.parametrize(
    ("window", "room", "packed"),
    [
        (20, 32, True),
        (6, 4, False),
        *(pytest.param(*case, marks=pytest.mark.heavy) for case in ((0, 5, True), (3, 1, True), (20, 300, True))),
    ],
)
def test_followed_is_what_the_target_does_alone(case, window, room, packed):
    """Packed or not, in pieces of any size, side by side with other answers."""
    target, _, answers, found = case
    eos = eos_tokens(target)

    def run(model, answer, substitutions):
        half = [replace(s, to_rewrite=i % 2 == 0) for i, s in enumerate(substitutions)]
        return list(continue_substitutions(model, answer, half, window, room, packed))

    tally = Tally()
    calls = [lambda model, item=item: run(model, *item) for item in zip(answers, found, strict=True)]
    followed = [new for part in run_in_lockstep([target], calls, at_once=2, tally=tally) for new in part]
    assert len(followed) == sum(map(len, found)) > 20
    assert not any(new.logits.requires_grad for new in followed)
    places = {(new.answer.prompt.id, new.substitution.position, new.substitution.token) for new in followed}
    assert places == {(a.prompt.id, s.position, s.token) for a, part in zip(answers, found, strict=True) for s in part}
    for new in followed:
        s, answer = new.substitution, new.answer
        place = answer.prompt_length + s.position
        prefix = torch.cat([answer.ids[:place], torch.tensor([s.token])])
        suffix = answer.ids[place + 1 :][:window]
        output = target(torch.cat([prefix, suffix])[None], output_hidden_states=True)
        torch.testing.assert_close(new.logits, output.logits[0, place - 1 : place + 1], atol=2e-4, rtol=1e-3)
        states = output.hidden_states[-1][0, place - 1 : place + 1]
        torch.testing.assert_close(new.hidden, states, atol=2e-4, rtol=1e-3)
        scores = output.logits[0, place : place + len(suffix)].log_softmax(-1)
        logprobs = scores.gather(-1, suffix[:, None]).squeeze(-1)
        torch.testing.assert_close(new.logprobs, logprobs, atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(new.best, scores.amax(-1), atol=2e-4, rtol=1e-3)
        if new.rewrite is not None:
            limit = (len(answer.ids) - place - 1) * 5 // 4 + 16
            assert new.rewrite == greedy(target, prefix, limit)
            assert new.finished == (new.rewrite[-1] in eos)
    rewritten = [new for new in followed if new.rewrite is not None]
    assert len(rewritten) == sum(-(-len(part) // 2) for part in found)
    assert tally.forwards > 0
    if room == 32 and packed:
        alone = sum(len(new.rewrite) for new in rewritten)
        assert tally.forwards < alone / 2


def test_the_targets_own_token_changes_nothing(case):
    """The control: substituting a token by itself gives the original answer back."""
    target, _, answers, found = case
    for answer, substitutions in zip(answers, found, strict=True):
        own = [replace(s, token=s.choice, to_rewrite=True) for s in substitutions]
        for new in continue_substitutions(target, answer, own, 8, 16):
            left = answer.tokens[new.substitution.position + 1 :].tolist()
            assert new.rewrite[: len(left)] == left
            torch.testing.assert_close(new.best, new.logprobs)


def test_a_rewrite_ends_with_the_context():
    target = build("gpt2")
    target.config.n_positions = 24
    (answer,) = target_answers(target, PROMPTS[:1], ids_of()[:1], 16)
    found = find_substitutions(perturbed(target, 0.3), answer, [], 2, 0.0, 0)
    for new in continue_substitutions(target, answer, [replace(s, to_rewrite=True) for s in found], 4, 16):
        assert answer.prompt_length + new.substitution.position + 1 + len(new.rewrite) <= 24


def test_samples():
    items = list(range(50))
    assert sample(items, 9, 0, "a") == sample(items, 9, 0, "a") == sorted(sample(items, 9, 0, "a"))
    assert sample(items, 9, 0, "a") != sample(items, 9, 0, "b")
    assert sample(items, 99, 0, "a") == items
