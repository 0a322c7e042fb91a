"""The rounds of many requests at once: what is decided there is what `generate` decides."""

import pytest
import torch

from hf_selfjudge import JudgedModel
from hf_selfjudge.decoding.rules import Coin, JudgeRule, LookAhead, Lossless, Margin, TopK
from hf_selfjudge.decoding.verification import Call
from hf_selfjudge.serving.rounds import Rounds
from tests.builders import VOCAB, midway_judge, random_judge


SPECIAL = (0, 4, 9, 11)
RULES = {
    "judge": lambda target: JudgeRule(random_judge(target), 0.5),
    "judge of a layer": lambda target: JudgeRule(midway_judge(target), 0.5),
    "judge, for each token": lambda target: JudgeRule(random_judge(target), "0.15/token"),
    "margin": lambda target: Margin(0.1),
    "top-k": lambda target: TopK(3),
    "look-ahead": lambda target: LookAhead(1, 0.02),
    "coin": lambda target: Coin(0.5),
}


class Recorder:
    """What the rule of a call was asked in `generate`, and what it said."""

    def __init__(self, monkeypatch):
        self.rounds, original = {}, Call.accepts

        def accepts(call, row, final_scores):
            if id(call.round) not in self.rounds:  # stock writes into the logits
                self.rounds[id(call.round)] = call.round, call.round.logits.clone(), {}
            accepted = original(call, row, final_scores)
            *_, rows = self.rounds[id(call.round)]
            rows[row] = (call.round.scores.clone(), final_scores.clone(), accepted)
            return accepted

        monkeypatch.setattr(Call, "accepts", accepts)


def joined(recorded: list, do_sample: bool) -> Rounds:
    """Recorded rounds as if they were the requests of one step."""
    scores, final_scores = [], []
    for round, logits, rows in recorded:
        for row in range(len(round.candidates)):
            own, final, _ = rows.get(row, (logits[row], logits[row], None))
            scores.append(own.float())
            final_scores.append(final.float())
    special = torch.zeros(VOCAB, dtype=torch.bool)
    special[list(SPECIAL)] = True
    return Rounds(
        counts=[len(round.candidates) for round, *_ in recorded],
        tokens=torch.cat([round.candidates for round, *_ in recorded]),
        prompt_lengths=[round.prompt_length for round, *_ in recorded],
        places=torch.cat([torch.arange(len(logits)) + round.start - 1 for round, logits, _ in recorded]),
        scores=torch.stack(scores),
        final_scores=torch.stack(final_scores),
        logits=torch.cat([logits for _, logits, _ in recorded]),
        hidden=torch.cat([round.hidden for round, *_ in recorded]),
        special=special,
        stops=[set()] * len(recorded),
        sampled=[do_sample] * len(recorded),
    )


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", RULES)
def test_many_requests_are_decided_as_in_generate(name, do_sample, llama, monkeypatch):
    target, draft = llama
    rule, recorder = RULES[name](target), Recorder(monkeypatch)
    judged = JudgedModel(target, rule)
    judged.special_tokens = {*SPECIAL}
    options = {"do_sample": True, "temperature": 0.8, "top_k": 12} if do_sample else {"do_sample": False}
    for seed, length in enumerate((3, 5, 8)):
        torch.manual_seed(seed)
        ids = torch.randint(12, VOCAB, (1, length))
        judged.generate(ids, assistant_model=draft, max_new_tokens=30, pad_token_id=0, **options)
    recorded = [*recorder.rounds.values()]
    kept, asked = joined(recorded, do_sample).decide([rule] * len(recorded))
    start, seen = 0, set()
    for round, logits, rows in recorded:
        for row, (_, _, accepted) in rows.items():
            assert kept[start + row] == accepted
            assert asked[start + row] == (row in round.asked)
            seen.add((row in round.asked, accepted))
            if not do_sample and not accepted and round.tokens[row] != logits[row].argmax():
                break  # rejected: the rows after it count no more
        start += len(round.candidates)
    assert len(recorded) > 15
    assert seen >= {(True, True), (True, False), (False, False)}


def rounds(**changed) -> Rounds:
    """Three requests with 2, 0 and 3 candidates over 6 tokens. Each candidate is a mismatch: token 1 instead of 0."""
    scores = torch.tensor([[0.4, 0.3, 0.1, 0.1, 0.05, 0.05]]).log()
    arguments = {
        "counts": [2, 0, 3],
        "tokens": torch.ones(5, dtype=torch.long),
        "prompt_lengths": [4, 4, 4],
        "places": torch.arange(8),
        "scores": scores.repeat(5, 1),
        "final_scores": scores.repeat(5, 1),
        "logits": scores.repeat(8, 1),
        "hidden": torch.zeros(8, 4),
        "special": torch.zeros(6, dtype=torch.bool),
        "stops": [set(), set(), set()],
        "sampled": [False, False, False],
    }
    return Rounds(**arguments | changed)


MASKED = rounds().scores
MASKED[3, 1] = -torch.inf


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ({}, [1, 1, 1, 1, 1]),
        # What nobody decides ends the decisions of its own request.
        ({"tokens": torch.tensor([1, 1, 1, -1, 1])}, [1, 1, 1, 0, 0]),
        ({"tokens": torch.tensor([1, 1, 1, 3, 1]), "stops": [{3}, set(), {3}]}, [1, 1, 1, 0, 0]),
        ({"tokens": torch.tensor([1, 3, 1, 3, 1]), "stops": [{3}, set(), set()]}, [1, 0, 1, 1, 1]),
        ({"stops": [{0}, set(), set()]}, [0, 0, 1, 1, 1]),  # the target chooses a stop token
        ({"special": torch.tensor([False, True, False, False, False, False])}, [0, 0, 0, 0, 0]),
        ({"final_scores": MASKED}, [1, 1, 1, 0, 0]),
        # A sampled request is asked about each candidate by itself.
        ({"final_scores": MASKED, "sampled": [False, False, True]}, [1, 1, 1, 0, 1]),
        ({"tokens": torch.tensor([1, 1, 0, 1, 1])}, [1, 1, 0, 1, 1]),  # a match needs no rule
        ({"tokens": torch.tensor([1, 1, 0, 1, 1]), "sampled": [False, False, True]}, [1, 1, 1, 1, 1]),
    ],
)
def test_what_is_decided(changed, kept):
    found, asked = rounds(**changed).decide([TopK(6)] * 3)
    assert found.tolist() == [bool(value) for value in kept]
    matches = rounds(**changed).tokens == 0
    assert asked.tolist() == (found & ~matches).tolist()


def test_each_request_has_its_own_rule():
    kept, asked = rounds().decide([TopK(1), Lossless(), TopK(2)])
    assert kept.tolist() == [False, False, True, True, True]
    assert asked.tolist() == [True, True, True, True, True]
    kept, asked = rounds().decide([Lossless(), TopK(2), Lossless()])
    assert not kept.any()
    assert not asked.any()


def test_what_the_rules_see(monkeypatch):
    """Rows of the forward, positions in the answer, and matches that end with the request."""
    seen = []
    monkeypatch.setattr(TopK, "keep", lambda rule, mismatches: seen.append(mismatches) or mismatches.ranks <= rule.k)
    hidden = torch.arange(8.0)[:, None]
    logits = torch.arange(8.0)[:, None].repeat(1, 6)
    rounds(tokens=torch.tensor([1, 0, 1, 0, 0]), hidden=hidden, logits=logits).decide([TopK(2)] * 3)
    (one,) = seen
    assert one.positions.tolist() == [0 + 1 - 4, 4 + 1 - 4]  # the third request begins in row 4
    assert one.matches_after.tolist() == [1, 2]
    assert one.last.tolist() == [True, True]
    assert one.hidden.flatten(1).tolist() == [[0, 1, 2], [4, 5, 6.5]]
    assert one.logits_after[:, 0].tolist() == [1, 5]


def test_padding_of_zeros():
    """vLLM's drafts where a text is too long for the draft model."""
    changed = {"tokens": torch.tensor([0, 0, 0, 1, 0]), "scores": rounds().scores.roll(1, -1)}  # the choice is 1
    kept, asked = rounds(**changed).decide([TopK(6)] * 3)
    assert kept.tolist() == [False, False, True, False, True]
    assert asked.tolist() == kept.tolist()


def test_forced_tokens():
    scores = rounds().scores.clone()
    scores[3, 4] = 1e9
    assert rounds(scores=scores).decide([TopK(6)] * 3)[0].tolist() == [True, True, True, False, False]


def test_tokens_without_probability():
    """As in transformers, what underflows to 0 counts as masked."""
    kept, _ = rounds(final_scores=rounds().scores * 1000).decide([TopK(6)] * 3)
    assert not kept.any()


def test_many_mismatches_are_asked_about_in_slices(monkeypatch):
    sizes = []
    monkeypatch.setattr(TopK, "keep", lambda rule, mismatches: sizes.append(len(mismatches.tokens)) or mismatches.last)
    one = rounds().decide([TopK(2)] * 3)
    assert sizes == [5]
    monkeypatch.setattr("hf_selfjudge.serving.rounds.ROWS", 4)
    several = rounds().decide([TopK(2)] * 3)
    assert sizes == [5, 2, 3]
    assert all(map(torch.equal, one, several))
