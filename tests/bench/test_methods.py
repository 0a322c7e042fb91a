"""What a bench is told to compare."""

import pytest

from hf_selfjudge.bench.methods import DEFAULT_RULES, Setting, parse_settings
from hf_selfjudge.rules import Coin, KLGate, LookAhead, Lossless, Margin, TopK


def names(*texts, **how):
    return [setting.name for setting in parse_settings(texts, **how)]


def test_thresholds():
    settings = {setting.name: setting for setting in parse_settings(["margin=0.3,1", "kl=.1:.8", "top-k=2"])}
    assert list(settings) == ["lossless", "margin=0.3", "margin=1", "kl=0.1:0.8", "top-k=2"]
    rules = [setting.rule({}) for setting in settings.values()]
    assert rules == [Lossless(), Margin(0.3), Margin(1), KLGate(0.1, 0.8), TopK(2)]
    (_, look) = parse_settings(["look-ahead=2:0.05"])
    assert look.rule({}) == LookAhead(2, 0.05)
    assert names(*DEFAULT_RULES)[:4] == ["lossless", "greedy", "stock", "draft"]


def test_judges():
    assert names("judge=0.2,0.4", "judge:some/where=0.3", shipped="s") == [
        "lossless", "judge=0.2", "judge=0.4", "judge:where=0.3",
    ]  # fmt: skip
    assert parse_settings(["judge"], shipped="s")[1] == Setting("judge", (), "s")
    assert parse_settings(["judge=strict"], shipped="s")[1] == Setting("judge", ("strict",), "s")
    assert names("judge:j=strict,0.5") == ["lossless", "judge:j=strict", "judge:j=0.5"]
    assert names("judge=0.2,0.03/token", shipped="s") == ["lossless", "judge=0.2", "judge=0.03/token"]
    with pytest.raises(ValueError, match=r"`rule` 'judge=3/token': `threshold` must be in \[0, 1\]"):
        parse_settings(["judge=3/token"], shipped="s")
    assert parse_settings(["judge:a=b=0.5"])[1] == Setting("judge:a=b", (0.5,), "a=b")
    with pytest.raises(ValueError, match="x/same and y/same have the same name"):
        parse_settings(["judge:x/same=0.1", "judge:y/same=0.1"])
    with pytest.raises(ValueError, match="`rule`: two thresholds are both margin=0.123457. Leave one out"):
        parse_settings(["margin=0.12345678,0.12345679"])
    with pytest.raises(ValueError, match="`rule`: two thresholds are both judge=0.123457. Leave one out"):
        parse_settings(["judge=0.12345678,0.12345679"], shipped="s")


def test_coins_like_judges():
    settings = parse_settings(["coin", "coin=0.5", "judge:j=0.1,0.2"])
    assert [s.name for s in settings][-2:] == ["coin like judge:j=0.1", "coin like judge:j=0.2"]
    assert settings[-1].rule({}, 0.25) == Coin(0.25)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("maximum=3", r"`rule` must be greedy, .* got 'maximum=3'"),
        ("greedy=1", "`rule` must be"),
        ("greedy=", "`rule` must be"),
        ("margin", "`rule` must be"),
        ("margin=", "`rule` must be"),
        ("margin:x=1", "`rule` must be"),
        ("margin=-1", "`rule` 'margin=-1': `nats` must be 0 or more nats"),
        ("margin=a", "`rule` 'margin=a': could not convert"),
        ("margin=1,,2", "could not convert"),
        ("margin=1:2", "takes 2 positional arguments"),
        ("ensemble=1", "weight must lie between 0 and 1"),
        ("judge:f=2", r"`threshold` must be in \[0, 1\]"),
        ("judge:f=", "`rule` must be"),
        ("judge=0.3", "no judge is shipped"),
        ("coin", "no judge is compared"),
    ],
)
def test_what_cannot_be_read_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_settings([text])


@pytest.mark.parametrize("text", ["draft", "kl=0.1", "ensemble=0.5"])
def test_prompt_lookup_has_no_draft(text):
    with pytest.raises(ValueError, match="with prompt lookup there is none"):
        parse_settings([text], lookup=True)
