"""Methods that a bench compares, read from text."""

import pytest

from hf_selfjudge.bench.methods import FAMILIES, Method, parse_methods
from hf_selfjudge.judge.threshold import Threshold
from hf_selfjudge.rules import Coin, KLGate, LookAhead, Lossless, Margin, TopK


def names(*texts, **how):
    return [method.name for method in parse_methods(texts, **how)]


def test_thresholds():
    methods = {method.name: method for method in parse_methods(["margin=0.3,1", "kl=.1:.8", "top-k=2"])}
    assert list(methods) == ["lossless", "margin=0.3", "margin=1", "kl=0.1:0.8", "top-k=2"]
    rules = [method.rule({}) for method in methods.values()]
    assert rules == [Lossless(), Margin(0.3), Margin(1), KLGate(0.1, 0.8), TopK(2)]
    (_, look) = parse_methods(["look-ahead=2:0.05"])
    assert look.rule({}) == LookAhead(2, 0.05)


def test_defaults():
    plain = ["lossless", "greedy", "stock", "draft"]
    assert names()[:5] == [*plain, "ensemble=0.25"]
    assert {method.family for method in parse_methods([])} == {*FAMILIES} - {"judge"}
    assert {method.family for method in parse_methods(None, lookup=True)} == {
        "lossless", "greedy", "stock", "top-k", "margin", "look-ahead", "coin",
    }  # fmt: skip
    assert names(shipped="s")[-6:] == [
        "judge=0.2", "judge=0.35", "judge=0.5", "coin like judge=0.2", "coin like judge=0.35", "coin like judge=0.5",
    ]  # fmt: skip


def test_judges():
    assert names("judge=0.2,0.4", "judge:some/where=0.3", shipped="s") == [
        "lossless", "judge=0.2", "judge=0.4", "judge:where=0.3",
    ]  # fmt: skip
    assert parse_methods(["judge"], shipped="s")[1] == Method("judge", (), "s")
    assert parse_methods(["judge=strict"], shipped="s")[1] == Method("judge", ("strict",), "s")
    assert names("judge:j=strict,0.5") == ["lossless", "judge:j=strict", "judge:j=0.5"]
    assert names("judge=0.2,0.03/token", shipped="s") == ["lossless", "judge=0.2", "judge=0.03/token"]
    with pytest.raises(ValueError, match=r"`rule` 'judge=3/token': `threshold` must be in \[0, 1\]"):
        parse_methods(["judge=3/token"], shipped="s")
    assert parse_methods(["judge:a=b=0.5"])[1] == Method("judge", (Threshold(0.5),), "a=b", named=True)
    assert names("judge:x/a=b=0.5")[1:] == ["judge:a=b=0.5"]
    with pytest.raises(ValueError, match="x/same and y/same have the same name"):
        parse_methods(["judge:x/same=0.1", "judge:y/same=0.1"])
    with pytest.raises(ValueError, match="`rule`: two thresholds are both margin=0.123457. Leave one out"):
        parse_methods(["margin=0.12345678,0.12345679"])
    with pytest.raises(ValueError, match="`rule`: two thresholds are both judge=0.123457. Leave one out"):
        parse_methods(["judge=0.12345678,0.12345679"], shipped="s")


def test_draft_lengths():
    assert names("lossless@16", "margin=0.5,1@auto", "stock@default", "stock@3", "ensemble=0.5@2") == [
        "lossless", "lossless@16", "margin=0.5@auto", "margin=1@auto", "stock@default", "stock@3", "ensemble=0.5@2",
    ]  # fmt: skip
    _, judge, coin = parse_methods(["judge:a@b/c=0.03/token@8", "coin"])
    assert (judge.name, judge.curve, judge.judge, judge.length) == ("judge:c=0.03/token@8", "judge:c@8", "a@b/c", 8)
    assert (coin.name, coin.length) == ("coin like judge:c=0.03/token@8", 8)
    assert parse_methods(["judge@4"], shipped="s")[1] == Method("judge", (), "s", length=4)
    assert [method.curve for method in parse_methods(["margin=1", "margin=1@4"])] == ["lossless", "margin", "margin@4"]


def test_lookup_beside_a_draft_model():
    _, margin, judge, coin = parse_methods(["margin=1@16+10", "judge:j=0.1@auto+4", "coin"])
    assert (margin.name, margin.curve) == ("margin=1@16+10", "margin@16+10")
    assert [(method.length, method.lookup) for method in (margin, judge, coin)] == [(16, 10), ("auto", 4), ("auto", 4)]
    with pytest.raises(ValueError, match="tokens are looked up beside a draft model"):
        parse_methods(["lossless@3+4"], lookup=True)


def test_prompt_lookup_has_no_default_length():
    assert names("stock@3", lookup=True)[1] == "stock@3"
    with pytest.raises(ValueError, match="`rule` 'stock@default': prompt lookup has no default length"):
        parse_methods(["stock@default"], lookup=True)


def test_coins_like_judges():
    methods = parse_methods(["coin", "coin=0.5", "judge:j=0.1,0.2"])
    assert [method.name for method in methods][-2:] == ["coin like judge:j=0.1", "coin like judge:j=0.2"]
    assert (methods[-1].curve, methods[-1].judge_curve) == ("coin like judge:j", "judge:j")
    assert methods[-1].rule({}, 0.25) == Coin(0.25)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("maximum=3", r"`rule` must be lossless, greedy, .* got 'maximum=3'"),
        ("greedy=1", "`rule` must be"),
        ("greedy=", "`rule` must be"),
        ("margin", "`rule` must be"),
        ("margin=", "`rule` must be"),
        ("margin:x=1", "`rule` must be"),
        ("margin=-1", "`rule` 'margin=-1': `nats` must be 0 or more"),
        ("margin=a", "`rule` 'margin=a': could not convert"),
        ("margin=1,,2", "could not convert"),
        ("margin=1:2", "takes 2 positional arguments"),
        ("ensemble=1", "weight must lie between 0 and 1"),
        ("judge:f=2", r"`threshold` must be in \[0, 1\]"),
        ("judge:f=", "`rule` must be"),
        ("judge=0.3", "no judge is shipped"),
        ("coin", "no judge is compared"),
        ("greedy@4", "`rule` 'greedy@4': greedy decodes without drafts. Leave out @4"),
        ("stock@auto", "stock drafts a number of tokens, 1 or more, or 'default', got @auto"),
        ("lossless@default", "lossless drafts a number of tokens, 1 or more, or 'auto', got @default"),
        ("margin=1@0", "margin drafts a number of tokens, 1 or more, or 'auto', got @0"),
        ("margin=1@x", "`rule` 'margin=1@x': @ is followed by the length of drafts"),
        ("stock@3+4", "`rule` 'stock@3[+]4': tokens are looked up beside a draft model, by a rule .* Leave out [+]4"),
        ("kl=0.1@3+4", "Leave out [+]4"),
        ("lossless@3+0", "Leave out [+]0"),
    ],
)
def test_what_cannot_be_read_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_methods([text])


@pytest.mark.parametrize("text", ["draft", "kl=0.1", "ensemble=0.5"])
def test_prompt_lookup_has_no_draft(text):
    with pytest.raises(ValueError, match="with prompt lookup there is none"):
        parse_methods([text], lookup=True)
