"""What a server is started with, and what a request may ask for."""

import pytest

from hf_selfjudge.decoding.rules import JudgeRule, LookAhead, Lossless, Margin
from hf_selfjudge.judge.threshold import Threshold
from hf_selfjudge.serving.settings import Rules, ServingConfig, asked_for
from tests.builders import adapted_judge, adapter, build, random_judge


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judges") / "judge"
    random_judge(build("llama")).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (None, "must have 'selfjudge' with keys among judge, threshold, rule, allow_other_weights"),
        ({}, "must have 'selfjudge'"),
        ({"selfjudge": "margin=0.5"}, "must have 'selfjudge'"),
        ({"selfjudge": {"jugde": "folder"}}, "must have 'selfjudge'.*'jugde'"),
        ({"selfjudge": {}}, "needs either a judge .* or a rule"),
        ({"selfjudge": {"judge": "folder", "rule": "margin=1"}}, "needs either a judge .* or a rule"),
        ({"selfjudge": {"rule": "margin=1", "threshold": 0.5}}, "a threshold is for a judge"),
        ({"selfjudge": {"judge": 3}}, "judge must be text, got 3"),
        (
            {"selfjudge": {"rule": "margin=1", "allow_other_weights": "yes"}},
            "allow_other_weights must be true or false",
        ),
    ],
)
def test_mistakes_in_the_configuration(config, found):
    with pytest.raises(ValueError, match=found):
        ServingConfig.read(config)


@pytest.mark.parametrize(
    ("text", "rule"),
    [("margin=0.5", Margin(0.5)), ("look-ahead=4:0.05", LookAhead(4, 0.05)), ("lossless", Lossless())],
)
def test_rules_without_a_judge(text, rule):
    rules = Rules(ServingConfig.read({"selfjudge": {"rule": text}}))
    assert (rules.default, rules.judge, rules.layer) == (rule, None, None)
    assert (rules.of(None), rules.of(0)) == (rule, Lossless())
    with pytest.raises(ValueError, match="can only be 0"):
        rules.of(0.5)


@pytest.mark.parametrize("text", ["margin", "margin=0.5,1", "margin=0.5@8", "kl=0.2", "greedy", "judge=0.5", "best"])
def test_rules_that_cannot_be_served(text):
    with pytest.raises(ValueError, match="`rule`"):
        Rules(ServingConfig(rule=text))


def test_requests_may_ask_for_a_threshold(judge):
    rules = Rules(ServingConfig(judge, "0.1/token"))
    assert isinstance(rules.default, JudgeRule)
    assert rules.of(None).threshold == Threshold(0.1, per_token=True)
    assert rules.of(0.4).threshold == Threshold(0.4)
    assert rules.of(0.4) is rules.of(0.4)  # requests with the same threshold are decided together
    assert rules.of("0.2/token").judge is rules.judge
    assert rules.of(0) == rules.of("0") == Lossless()


@pytest.mark.parametrize("extra", [None, {}, {"other": 3}])
def test_requests_that_ask_for_nothing(extra):
    assert asked_for(extra) is None


@pytest.mark.parametrize("asked", [-0.1, 1.5, "fast", [0.5], True, {"a": 1}, "2/token"])
def test_requests_that_ask_for_what_no_judge_has(asked):
    with pytest.raises(ValueError, match="`selfjudge` in the request: `threshold`"):
        asked_for({"selfjudge": asked})


def test_a_judge_with_an_adapter_is_refused(tmp_path):
    target = build("llama")
    adapted_judge(target, adapter(target)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has a LoRA adapter"):
        Rules(ServingConfig(str(tmp_path)))
