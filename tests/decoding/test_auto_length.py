"""How many candidates are drafted, on machines and models that are simulated: time passes when the test says so."""

import random
from dataclasses import dataclass

import pytest
import torch

from hf_selfjudge import JudgedModel
from hf_selfjudge.decoding.auto_length import AutoLength
from hf_selfjudge.decoding.verification import JudgeCandidateGenerator
from hf_selfjudge.rules import Lossless
from tests.builders import build, perturbed


@dataclass(frozen=True)
class Machine:
    """Prices in forwards of the target with one token, and how often the draft is confident (and then right)."""

    draft: float
    verify: float
    row: float
    confident: float
    noise: float = 0.1

    def seconds(self, tokens: int, length: int | None = None, calls: int = 1, knows_confidence: bool = True) -> float:
        """Of `calls` answers of `tokens` tokens; `length` candidates in each round, or as many as [`AutoLength`]
        says."""
        chance, now = random.Random(0), [0.0]
        auto = AutoLength(clock=lambda: now[0]) if length is None else None

        def spend(seconds: float) -> None:
            now[0] += seconds * chance.lognormvariate(0, self.noise)

        for _ in range(calls):
            done, unread, prompt = 0, 50, 5.0
            if auto:
                auto.begin_call(ends_drafts=True, pauses=True)
            while done < tokens:
                drafted = kept = 0
                start, read = now[0], unread
                if auto.drafts(unread) if auto else length:
                    if auto:
                        auto.begin()
                    spend(0.15 * self.draft * unread)
                    unread, goes_on = 0, True
                    while goes_on:
                        confident = chance.random() < self.confident
                        right = chance.random() < (0.99 if confident else self.confident / 3)
                        spend(self.draft)
                        kept += right and kept == drafted
                        drafted += 1
                        confidence = (0.97 if confident else 0.4) if knows_confidence else None
                        goes_on = auto.goes_on(confidence) if auto else drafted < length
                draft_seconds, start = now[0] - start, now[0]
                spend(prompt + (self.verify + self.row * drafted if drafted else 1.0))
                prompt = 0.0
                if auto:
                    auto.observe(drafted, kept, draft_seconds, now[0] - start, read)
                unread += 1
                done += kept + 1
        return now[0]


MACHINES = {
    "two cores": Machine(draft=0.3, verify=1.15, row=0.05, confident=0.6),
    "two cores, easy text": Machine(draft=0.3, verify=1.15, row=0.05, confident=0.85),
    "two cores, hard text": Machine(draft=0.3, verify=1.15, row=0.05, confident=0.3),
    "a draft as large as the target": Machine(draft=0.8, verify=1.1, row=0.1, confident=0.6),
    "rows that cost as much as tokens": Machine(draft=0.5, verify=1.2, row=0.8, confident=0.85),
    "a GPU": Machine(draft=0.3, verify=1.02, row=0.001, confident=0.6),
    "layers on disk": Machine(draft=0.03, verify=1.0, row=0.01, confident=0.6),
    "layers on disk, easy text": Machine(draft=0.03, verify=1.0, row=0.01, confident=0.85),
}


@pytest.mark.parametrize("name", MACHINES)
def test_it_is_close_to_the_best_fixed_length_none_included(name):
    machine = MACHINES[name]
    best = min(machine.seconds(96, length, calls=16) for length in (0, 1, 2, 3, 4, 6, 8, 12, 16, 24))
    assert machine.seconds(96, calls=16) < 1.06 * best


@pytest.mark.parametrize("name", ["two cores, hard text", "a draft as large as the target"])
def test_a_draft_that_does_not_pay_costs_little_of_a_long_answer(name):
    machine = MACHINES[name]
    assert machine.seconds(2048) < 1.03 * machine.seconds(2048, 0)


def test_it_pays_to_know_the_confidence():
    machine = MACHINES["two cores"]
    assert machine.seconds(96, calls=16) < 0.95 * machine.seconds(96, calls=16, knows_confidence=False)


def test_a_length_chosen_beforehand():
    assert AutoLength().blind() == AutoLength.FIRST  # nothing measured yet
    for kept, lengths in ((0, {1}), (99, {AutoLength.longest})):
        length = AutoLength()
        for _ in range(60):
            drafted = length.blind()
            length.observe(drafted, min(kept, drafted), 0.1 * drafted, 1.0, 1)
        assert {length.blind()} == lengths
    length.observe(0, 0, 0.0, 1.0, 1)  # prompt lookup found nothing
    assert length.blind() == AutoLength.longest


def test_plain_rounds_are_measured_again_while_a_draft_pays():
    length, drafted = AutoLength(), []
    length.begin_call(pauses=True)
    for _ in range(200):
        drafted.append(length.drafts(1))
        if drafted[-1]:
            length.observe(length.blind(), 3, 0.1, 1.0, 1)
        else:
            length.observe(0, 0, 0.0, 1.0, 1)
    plain = [place for place, drafts in enumerate(drafted) if not drafts]
    pauses = [after - before for before, after in zip(plain, plain[1:], strict=False)]
    assert pauses[0] > AutoLength.CHECK
    assert pauses[1] > 1.5 * pauses[0]


@pytest.fixture
def undecided():
    """A draft whose generation config says nothing of lengths."""
    target = build("llama")
    draft = perturbed(target)
    config = draft.generation_config
    config.num_assistant_tokens = config.num_assistant_tokens_schedule = config.assistant_confidence_threshold = None
    return target, draft


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_any_round_may_go_without_a_draft(undecided, prompt, rows, seed, monkeypatch):
    target, draft = undecided
    chance = random.Random(seed)
    monkeypatch.setattr(AutoLength, "_drafts", lambda self, unread: chance.random() < 0.5)
    judged = JudgedModel(target, Lossless())
    output = judged.generate(prompt.repeat(rows, 1), assistant_model=draft, max_new_tokens=40, do_sample=False)
    expected = target.generate(prompt, max_new_tokens=40, do_sample=False)
    assert torch.equal(output, expected.repeat(rows, 1))
    assert judged.stats.drafted > 0
    assert judged.stats.offered_at[0] < judged.stats.rounds


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_draft_after_a_pause_is_what_the_draft_says(architecture, prompt, monkeypatch):
    """Its cache holds no candidates that were rejected before the pause."""
    target = build(architecture)
    draft, chance, drafted = perturbed(target, 0.05), random.Random(1), []
    monkeypatch.setattr(AutoLength, "_drafts", lambda self, unread: chance.random() < 0.3)
    monkeypatch.setattr(AutoLength, "goes_on", lambda self, confidence: False)
    get_candidates = JudgeCandidateGenerator.get_candidates

    def noted(self, ids, **kwargs):
        candidates, logits = get_candidates(self, ids, **kwargs)
        if candidates.shape[1] > ids.shape[1]:
            drafted.append((ids, candidates[0, -1].item()))
        return candidates, logits

    monkeypatch.setattr(JudgeCandidateGenerator, "get_candidates", noted)
    judged = JudgedModel(target, Lossless(), "auto")
    judged.generate(prompt, assistant_model=draft, max_new_tokens=80, do_sample=False)
    assert len(drafted) > 10
    for ids, token in drafted:
        assert draft(ids).logits[0, -1].argmax() == token


def test_a_trial_goes_on_until_it_is_measured():
    """In its first round the draft reads what it missed, which says nothing of later rounds."""
    length, unread, trials = AutoLength(), 1, []
    length.begin_call(pauses=True)
    for number in range(2000):
        if length.drafts(unread):
            trials.append((number, unread > length.longest))
            length.observe(length.blind(), 0, 0.5, 1.3, unread)
            unread = 1
        else:
            length.observe(0, 0, 0.0, 1.0, unread)
            unread += 1
    late = [trial for trial in trials if trial[0] > 20]
    assert len(late) >= 4
    assert [missed for _, missed in late] == [True, False] * (len(late) // 2)
    assert all(second - first == 1 for (first, _), (second, _) in zip(late[::2], late[1::2], strict=True))


def measurements(judged: JudgedModel) -> list[AutoLength]:
    return [measured for of_draft in judged._measured.values() for measured in of_draft.values()]


@pytest.mark.parametrize(
    ("options", "chosen"),
    [({}, True), ({"do_sample": True}, False), ({"num_assistant_tokens": 4}, False), ({"draft_length": 4}, False)],
)
def test_where_the_length_is_chosen_without_being_asked_for(undecided, prompt, options, chosen):
    target, draft = undecided
    options = dict(options)
    draft.generation_config.num_assistant_tokens = options.pop("num_assistant_tokens", None)
    judged = JudgedModel(target, Lossless(), draft_length=options.pop("draft_length", None))
    torch.manual_seed(0)
    output = judged.generate(prompt, assistant_model=draft, max_new_tokens=40, **options)
    if not options.get("do_sample"):
        assert torch.equal(output, target.generate(prompt, max_new_tokens=40))
    (measured,) = measurements(judged)
    assert bool(measured.steps[0]) is chosen


def test_measurements_are_kept_for_each_draft_and_number_of_rows(undecided, prompt):
    target, draft = undecided
    judged, other = JudgedModel(target, Lossless()), perturbed(target, seed=2)
    options = {"max_new_tokens": 40, "do_sample": False}
    for assistant, rows in ((draft, 1), (draft, 1), (draft, 3), (other, 1)):
        expected = target.generate(prompt, **options).repeat(rows, 1)
        assert torch.equal(judged.generate(prompt.repeat(rows, 1), assistant_model=assistant, **options), expected)
    assert [*judged._measured[draft.base_model]] == [("assistant_model", 1), ("assistant_model", 3)]
    first, batch = judged._measured[draft.base_model].values()
    assert first.steps[0] > 0
    assert batch.steps[0] > 0
    assert judged.on(target)._measured is judged._measured  # the weights are the same


def test_an_ensemble_is_decided_at_candidates_so_its_length_is_not_chosen(undecided, prompt):
    target, draft = undecided
    judged = JudgedModel(target, Lossless())
    options = {"max_new_tokens": 40, "do_sample": False, "assistant_ensemble_weight": 0.4}
    texts = [judged.generate(prompt, assistant_model=draft, **options) for _ in range(3)]
    assert all(torch.equal(text, texts[0]) for text in texts)
    (measured,) = measurements(judged)
    assert not measured.steps[0]


def test_early_exit_does_not_start_from_the_prices_of_lookup(undecided, prompt):
    target, _ = undecided
    judged = JudgedModel(target, Lossless(), "auto")
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}):
        judged.generate(prompt.repeat(1, 3), max_new_tokens=20, do_sample=False, **options)
    assert [*judged._measured[target.base_model]] == [("prompt_lookup_num_tokens", 1), ("assistant_early_exit", 1)]
