"""Each rule on rows made by hand, and what all rules must respect inside `generate`."""

import copy
import math

import pytest
import torch
from huggingface_hub import constants
from tokenizers import AddedToken
from transformers.utils import logging

from hf_selfjudge import JudgedModel
from hf_selfjudge.decoding.rules import JudgeRule
from hf_selfjudge.decoding.verification import Verified
from hf_selfjudge.judge.features import STATES, candidate_scalars
from hf_selfjudge.judge.threshold import Threshold
from hf_selfjudge.models.tokens import special_tokens
from hf_selfjudge.models.wheels import PINNED, PinnedWheels, wheels_folder
from hf_selfjudge.rules import Coin, KLGate, LookAhead, Lossless, Margin, Rule, TopK
from tests.builders import VOCAB, build, perturbed, random_judge, tiny_tokenizer


def mismatch(probabilities, token=1, draft=None, matches_after=0, position=0) -> Verified:
    """One mismatch over a small vocabulary; a probability of 0 is a masked token."""
    scores = torch.tensor([probabilities]).log()
    return Verified(
        tokens=torch.tensor([token]),
        positions=torch.tensor([position]),
        scores=scores,
        final_scores=scores,
        logits_after=scores,
        hidden=torch.zeros(1, len(STATES), 4),
        matches_after=torch.tensor([matches_after]),
        last=torch.tensor([True]),
        draft_logits=None if draft is None else torch.tensor([draft]).log(),
    )


def test_lossless():
    assert not Lossless().keep(mismatch([0.5, 0.5]))


@pytest.mark.parametrize(("k", "accepted"), [(1, False), (3, False), (4, True)])  # ties with the last
def test_top_k(k, accepted):
    assert TopK(k).keep(mismatch([0.5, 0.1, 0.3, 0.1])).tolist() == [accepted]


@pytest.mark.parametrize(("nats", "accepted"), [(0.0, False), (1.09, False), (1.1, True)])
def test_margin(nats, accepted):
    assert Margin(nats).keep(mismatch([0.6, 0.2, 0.2])).tolist() == [accepted]  # log 3 = 1.0986


@pytest.mark.parametrize(
    ("target", "draft", "accepted"),
    [
        ([0.5, 0.4, 0.1], [0.4, 0.5, 0.1], True),  # KL 0.022
        ([0.5, 0.4, 0.1], [0.1, 0.8, 0.1], False),  # KL 0.53
        ([0.95, 0.04, 0.01], [0.94, 0.05, 0.01], False),  # the target is sure
        ([0.6, 0.4, 0.0], [0.5, 0.5, 0.0], True),  # both have masked the same token
        ([0.5, 0.4, 0.1], [0.5, 0.5, 0.0], False),  # the draft cannot say what the target may
    ],
)
def test_kl_gate(target, draft, accepted):
    assert KLGate(0.1).keep(mismatch(target, draft=draft)).tolist() == [accepted]


@pytest.mark.parametrize(
    ("probabilities", "matches", "accepted"),
    [([0.5, 0.5], 2, True), ([0.5, 0.5], 1, False), ([0.99, 0.01], 2, False)],
)
def test_look_ahead(probabilities, matches, accepted):
    rule = LookAhead(window=2, unsure=0.3)  # entropy of (.99, .01) is 0.08 of log 2
    assert rule.keep(mismatch(probabilities, matches_after=matches)).tolist() == [accepted]


def test_coin_is_fair_and_always_falls_the_same_way():
    throws = [Coin(0.3).keep(mismatch([0.5, 0.5], position=i)).item() for i in range(2000)]
    assert abs(sum(throws) / 2000 - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 2000)
    assert throws == [Coin(0.3).keep(mismatch([0.5, 0.5], position=i)).item() for i in range(2000)]
    assert throws != [Coin(0.3, seed=1).keep(mismatch([0.5, 0.5], position=i)).item() for i in range(2000)]


@pytest.mark.parametrize(
    ("threshold", "accepted"),
    [
        *((0.39, False), (0.41, True), (0, False), (1, True)),
        *(("0.13/token", False), ("0.14/token", True), ("0/token", False), ("1/token", True)),
    ],
)
def test_a_threshold_for_each_token_gained(llama, threshold, accepted):
    """The candidate and the two after it that match: a probability of 0.4 is 0.133 for each."""
    judge = random_judge(llama[0])
    judge.forward = lambda scalars, hidden: torch.tensor([0.4]).logit()
    assert JudgeRule(judge, threshold).keep(mismatch([0.5, 0.5], matches_after=2)).tolist() == [accepted]


class KeepAll(Rule):
    """Notes the mismatches that it is asked about, and how often."""

    def __init__(self):
        self.calls = []

    def keep(self, mismatches):
        self.calls.append(list(zip(mismatches.positions.tolist(), mismatches.tokens.tolist(), strict=True)))
        return torch.ones_like(mismatches.tokens, dtype=torch.bool)


@pytest.mark.parametrize("changed", [False, True], ids=["raw logits", "a processor changes rows"])
def test_a_round_is_decided_at_once(llama, prompt, changed):
    """Greedy decoding asks once about all mismatches of a round, and again about the rest where a row turned out to be
    another than the rule was told."""
    target, rule = llama[0], KeepAll()
    judged = JudgedModel(target, rule, draft_length=8)
    processors = [lambda ids, scores: scores + 1e-3 * (torch.arange(VOCAB) == ids.shape[1] % VOCAB)] if changed else []
    draft = perturbed(target, 0.1)
    how = {"assistant_model": draft, "max_new_tokens": 40, "do_sample": False, "logits_processor": processors}
    output = judged.generate(prompt, **how)[0, prompt.shape[1] :].tolist()
    stats = judged.stats
    assert stats.judged == sum(source == "judged" for source in stats.sources) > stats.rounds
    if not changed:
        assert len(rule.calls) <= stats.rounds
        places = [place for call in rule.calls for place in call]
        assert len(places) == len({*places})  # none is asked about twice
    else:
        assert len(rule.calls) == stats.asked  # each row was changed
    judged_places = [place for place, source in enumerate(stats.sources) if source == "judged"]
    asked = {position: token for call in rule.calls for position, token in call}
    assert all(asked[place] == output[place] for place in judged_places)


@pytest.mark.parametrize(
    ("costs", "matches_after", "kept"),
    [
        ([0.05, 0.05], [1, 2], [True, True]),
        ([0.05, 0.50], [1, 2], [True, False]),
        ([0.10, 0.01], [1, 2], [True, True]),  # loses 0.02, but opens the way to 0.11
        ([0.10, 0.11], [1, 2], [False, True]),  # loses 0.02, opens the way to 0.01 only
        ([0.15, 0.05, 0.20], [0, 0, 9], [True, True, True]),  # 0.04 - 0.15 + 0.04 - 0.05 + 0.4 - 0.2
        ([], [], []),
    ],
)
def test_a_round_is_worth_what_follows(costs, matches_after, kept):
    """At 0.04 for each token."""
    last = [place == len(costs) - 1 for place in range(len(costs))]
    # Rounds side by side do not touch each other.
    for rounds in (1, 3):
        inputs = [torch.tensor(column * rounds) for column in (costs, matches_after, last)]
        odds = inputs[0].logit(), *inputs[1:]
        assert Threshold(0.04, per_token=True).keeps(*odds).tolist() == kept * rounds
        assert Threshold(0.1).keeps(*odds).tolist() == [cost < 0.1 for cost in costs] * rounds


@pytest.mark.parametrize("threshold", ["1.5/token", "x/token", "/token", "slow", -0.1, float("nan"), True])
def test_thresholds_that_are_invalid(llama, threshold):
    with pytest.raises(
        ValueError, match=r"`threshold` must be in \[0, 1\].*, got|none of the judge's operating points"
    ):
        JudgeRule(random_judge(llama[0]), threshold)


def test_an_operating_point_for_each_token_gained(llama):
    judge = random_judge(llama[0])
    judge.info.operating_points["fast"] = {"threshold": "0.03/token"}
    rule = JudgeRule(judge, "fast")
    assert (rule.threshold, rule.threshold.name) == (Threshold(0.03, per_token=True), "fast")
    rule.threshold = Threshold(0.5)
    assert rule.threshold.limit == 0.5


def test_the_judge_gets_the_features_of_the_mismatch():
    target = build("llama", vocab_size=3, hidden_size=4, intermediate_size=4)
    rule = JudgeRule(random_judge(target), 0.5)
    one = mismatch([0.4, 0.35, 0.25], matches_after=3, position=1)
    inputs = one.scores, torch.tensor([1]), one.logits_after, torch.tensor([1])
    expected = rule.judge(candidate_scalars(*inputs), one.hidden)
    assert torch.equal(rule.log_odds(one), expected)
    assert rule.keep(one).tolist() == [expected.sigmoid().item() < 0.5]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(0), "`k` must be a number of tokens, 1 or more, got 0"),
        (lambda: Margin(-1), "`nats` must be 0 or more nats, got -1"),
        (lambda: KLGate(0.1, sure=2), "`sure` must be a probability, got 2"),
        (lambda: LookAhead(-1), "`window` must be a number of tokens, 0 or more, got -1"),
        (lambda: Coin(1.5), r"`share` must be a share, in \[0, 1\], got 1.5"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Inside generate -----------------------------------------------------------------------------------------------------

NEVER = [Lossless(), TopK(1), Margin(0.0), KLGate(0.0), LookAhead(99), Coin(0.0)]
SOME = [TopK(3), Margin(1.0), KLGate(0.5), LookAhead(1, 0.0), Coin(0.5)]


@pytest.mark.parametrize("rule", NEVER, ids=lambda rule: type(rule).__name__)
def test_strictest_setting_is_lossless(llama, prompt, rule):
    target, draft = llama
    judged = JudgedModel(target, rule)
    output = judged.generate(prompt, assistant_model=draft, max_new_tokens=40)
    assert torch.equal(output, target.generate(prompt, max_new_tokens=40))


@pytest.mark.parametrize("rule", SOME, ids=lambda rule: type(rule).__name__)
def test_every_rule_keeps_mismatches(llama, rule):
    target, draft = llama
    judged = JudgedModel(target, rule)
    for seed in range(4):
        prompt = torch.randint(1, VOCAB, (1, 9), generator=torch.Generator().manual_seed(seed))
        judged.generate(prompt, assistant_model=draft, max_new_tokens=60)
    assert judged.total.judged > 0
    assert judged.total.calls == 4


def test_margin_keeps_what_a_plain_forward_says(llama, prompt):
    """Every judged token lies within the margin of the target's choice, every correction was outside."""
    target, draft = llama
    judged = JudgedModel(target, Margin(1.5))
    output = judged.generate(prompt, assistant_model=draft, max_new_tokens=60)
    logprobs = target(output).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
    margins = logprobs.amax(-1) - logprobs.gather(-1, output[0, prompt.shape[1] :, None]).squeeze(-1)
    judged_margins = margins[[source == "judged" for source in judged.stats.sources]]
    assert len(judged_margins)
    assert (judged_margins > 0).all()
    assert (judged_margins <= 1.5).all()
    torch.testing.assert_close(judged_margins.sum().item(), judged.stats.logprob_given_up, atol=1e-3, rtol=1e-3)


def judged_tokens(model: JudgedModel, prompt, draft) -> set[int]:
    output = model.generate(prompt, assistant_model=draft, max_new_tokens=40)[0, prompt.shape[1] :]
    return {int(token) for token, source in zip(output, model.stats.sources, strict=True) if source == "judged"}


def test_special_tokens_of_a_rule_that_knows_none(llama, prompt, tmp_path):
    """They are the tokenizer's: the one that is passed, or that of the target's folder."""
    target, draft = copy.copy(llama[0]), llama[1]
    tokenizer = tiny_tokenizer()
    free = judged_tokens(JudgedModel(target, Coin(1.0), tokenizer=tokenizer), prompt, draft)
    token = max(token for token in free if token < len(tokenizer))
    tokenizer.add_special_tokens({"additional_special_tokens": [tokenizer.convert_ids_to_tokens(token)]})
    assert token not in judged_tokens(JudgedModel(target, Coin(1.0), tokenizer=tokenizer), prompt, draft)
    tokenizer.save_pretrained(tmp_path)
    target.config = copy.deepcopy(target.config)
    target.config.name_or_path = str(tmp_path)
    model = JudgedModel(target, Coin(1.0))
    assert model.special_tokens == {0, 1, token}
    assert token not in judged_tokens(model, prompt, draft)
    # Beside those of a judge only if a tokenizer is passed.
    rule = JudgeRule(random_judge(llama[0], special_tokens=(7,)), allow_other_weights=True)
    assert JudgedModel(llama[0], rule).special_tokens == {7}
    assert JudgedModel(llama[0], rule, tokenizer=tokenizer).special_tokens == {0, 1, 7, token}


def test_special_tokens_of_a_target_from_wheels(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setitem(PINNED, "tests/pinned", PinnedWheels((), "1.0", "0" * 64))
    target = copy.copy(llama[0])
    target.config = copy.deepcopy(target.config)
    target.config.name_or_path = "tests/pinned"
    assert JudgedModel(target, Margin(1.0)).special_tokens == set()
    tiny_tokenizer().save_pretrained(wheels_folder("tests/pinned"))
    assert JudgedModel(target, Margin(1.0)).special_tokens == {0, 1}


def test_a_target_without_tokenizer_is_warned_of(llama, caplog, monkeypatch):
    monkeypatch.setattr(logging.get_logger("hf_selfjudge"), "propagate", True)
    logging.get_logger("hf_selfjudge").warning_once.cache_clear()
    for _ in range(2):
        assert JudgedModel(llama[0], Margin(1.0)).special_tokens == set()
    JudgedModel(llama[0], Lossless())  # accepts nothing
    JudgedModel(llama[0], Margin(1.0), tokenizer=tiny_tokenizer())
    assert caplog.text.count("Pass `tokenizer=`") == 1


def test_special_tokens_without_a_role(llama):
    """Such as `<|im_start|>`, which `all_special_ids` does not name."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<tool_call>")])
    start, call = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<tool_call>"])
    assert start not in tokenizer.all_special_ids
    assert {start, *tokenizer.all_special_ids} == set(special_tokens(llama[0], tokenizer))
    assert call not in special_tokens(llama[0], tokenizer)


def test_a_rule_that_compares_with_the_draft_needs_its_logits(llama, prompt):
    target, _ = llama
    judged = JudgedModel(target, KLGate(0.1))
    with pytest.raises(ValueError, match=r"`rule` KLGate .* drafts of PromptLookupCandidateGenerator come without"):
        judged.generate(prompt, prompt_lookup_num_tokens=3, max_new_tokens=8)


def test_what_is_no_rule(llama):
    target, _ = llama
    with pytest.raises(TypeError, match=r"`rule` must be a Rule, got Judge. Wrap it: `JudgeRule\(judge\)`"):
        JudgedModel(target, random_judge(target))
    with pytest.raises(TypeError, match="`rule` must be a Rule, got str"):
        JudgedModel(target, "margin")
    with pytest.raises(ValueError, match="`draft_length` must be a number of tokens, 'auto' or None, got 0"):
        JudgedModel(target, Lossless(), draft_length=0)
