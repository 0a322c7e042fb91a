"""What the bench decodes is what `generate` gives, and what it notes of it is true."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_selfjudge import JudgedModel, JudgeRule
from hf_selfjudge.bench.methods import parse_settings
from hf_selfjudge.bench.quick import answer_logprob
from hf_selfjudge.bench.runner import BenchConfig, accepted_share, decode
from hf_selfjudge.data.prompts import Prompt, TooLong, encode
from hf_selfjudge.rules import Coin
from tests.builders import VOCAB, build, perturbed, random_judge
from tests.judge.test_replay import adapted_judge, adapter
from tests.mining.test_layers import midway_judge


PROMPTS = [Prompt(f"p{i}", text, "some") for i, text in enumerate(["abc", "what is this", "a", "to be or not"])]
RULES = ["greedy", "stock", "draft", "ensemble=0.5", "top-k=3", "margin=1", "kl=2:1", "look-ahead=1:0", "coin=0.5:1",
         "judge:j=0.5,0.9", "coin"]  # fmt: skip
WITHOUT_DRAFT = [rule for rule in RULES if not rule.startswith(("draft", "ensemble", "kl"))]
CONFIG = BenchConfig(max_new_tokens=24, at_once=7)


def build_pair(architecture):
    target = build(architecture)
    target.generation_config.eos_token_id = 5
    draft = perturbed(target, 0.03)
    draft.generation_config.eos_token_id = 5
    draft.generation_config.num_assistant_tokens = 5
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    return target, draft


@pytest.fixture(scope="module")
def models():
    return build_pair("llama")


def bench(models, tokenizer, folder, rules=RULES, config=CONFIG, prompts=PROMPTS):
    target, draft = models
    settings = parse_settings(rules, lookup=config.lookup)
    judges = {"j": random_judge(target)}
    draft = None if config.lookup else draft
    return settings, judges, decode(target, draft, tokenizer, prompts, settings, judges, config, folder)


@pytest.mark.parametrize("mode", ["quality", "timing"])
@pytest.mark.parametrize("kind", ["adapter", "midway"])
def test_a_judge_that_sees_more_than_last_states(models, tokenizer, tmp_path, kind, mode):
    """An adapter sees the prompt too, whatever else is shared; a judge that looks midway need not."""
    target, draft = models
    judge = midway_judge(target) if kind == "midway" else adapted_judge(target, adapter(target))
    settings, config = parse_settings(["judge:j=0.5"]), BenchConfig(mode, max_new_tokens=24, at_once=3)
    lines = decode(target, draft, tokenizer, PROMPTS, settings, {"j": judge}, config, tmp_path)
    judged = JudgedModel(target, JudgeRule(judge, 0.5), 5, tokenizer)
    for prompt in PROMPTS:
        ids = encode(tokenizer, prompt.said, 256, 24)
        alone = judged.generate(ids, assistant_model=draft, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        (line,) = (x for x in lines if (x["setting"], x["prompt"]) == ("judge:j=0.5", prompt.id))
        assert line["tokens"] == alone[: len(line["tokens"])].tolist()
        assert line["judged"] == judged.stats.judged


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("lookup", [False, True])
def test_quality_gives_the_text_that_each_setting_gives_alone(architecture, tokenizer, tmp_path, lookup):
    models = target, draft = build_pair(architecture)
    config = BenchConfig(max_new_tokens=24, at_once=7, lookup=lookup)
    settings, judges, lines = bench(models, tokenizer, tmp_path, WITHOUT_DRAFT if lookup else RULES, config)
    assert len(lines) == len(settings) * len(PROMPTS)
    settings = {setting.name: setting for setting in settings}
    for line in lines:
        setting = settings[line["setting"]]
        ids = encode(tokenizer, PROMPTS[int(line["prompt"][1:])].text, 256, 24)
        options = {"prompt_lookup_num_tokens": 5} if lookup else {"assistant_model": draft}
        model = {"greedy": target, "stock": target, "draft": draft, "ensemble": target}.get(setting.family)
        if setting.family in ("greedy", "draft"):
            options = {}
        elif setting.family == "ensemble":
            options["assistant_ensemble_weight"] = 0.5
        elif model is None:
            rule = setting.rule(judges, line["share"])
            model = JudgedModel(target, rule, 5, tokenizer)
        forwards = count(target)
        how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False}
        output = model.generate(ids, **how, **options)
        forwards, tokens = forwards(), output[0, ids.shape[1] :].tolist()
        assert line["tokens"] == tokens, line
        assert line["finished"] == (tokens[-1] == 5)
        assert line["logprob"] == pytest.approx(answer_logprob(target, ids, tokens), abs=1e-3)
        if setting.family == "draft":
            assert line["lengths"] == []
        else:
            assert len(line["lengths"]) == forwards
            assert sum(line["lengths"]) == len(tokens)
            assert min(line["lengths"]) >= 1
        if isinstance(model, JudgedModel):
            for name in ("drafted", "matched", "asked", "judged", "target", "bonus"):
                assert line[name] == getattr(model.stats, name), name
    assert any(line["judged"] for line in lines)


def count(target):
    """Counts the forwards of a model from now on, until it is asked."""
    seen = []
    handle = target.register_forward_hook(lambda *_: seen.append(None))

    def stop():
        handle.remove()
        return len(seen)

    return stop


def test_a_coin_like_a_judge_accepts_as_often(models, tokenizer, tmp_path):
    settings, judges, lines = bench(models, tokenizer, tmp_path)
    of = {name: [line for line in lines if line["setting"] == name] for name in {line["setting"] for line in lines}}
    for threshold in ("0.5", "0.9"):
        share = accepted_share(of[f"judge:j={threshold}"])
        assert {line["share"] for line in of[f"coin like judge:j={threshold}"]} == {round(share, 4)}
    assert settings[-1].rule(judges, 0.3) == Coin(0.3)


def test_accepted_share():
    lines = [{"judged": 0, "asked": 1}, {"judged": 2, "asked": 3}]
    assert accepted_share(lines) == 2 / 4
    assert accepted_share([{"judged": 0, "asked": 0}]) == 0


@pytest.mark.parametrize("lookup", [False, True])
def test_a_coin_that_always_says_yes_accepts_all_it_is_asked(models, tokenizer, tmp_path, lookup):
    """Mismatches with a special token and rounds without a draft do not count: the rule has no say there."""
    config = BenchConfig(max_new_tokens=24, lookup=lookup)
    _, _, lines = bench(models, tokenizer, tmp_path, ["coin=1"], config)
    assert accepted_share([line for line in lines if line["setting"] == "coin=1"]) == 1


def test_a_bench_goes_on(models, tokenizer, tmp_path, monkeypatch):
    _, _, whole = bench(models, tokenizer, tmp_path / "whole")
    path = tmp_path / "cut" / "quality.jsonl"
    bench(models, tokenizer, tmp_path / "cut", RULES[:3], prompts=PROMPTS[:2])
    written = path.read_text().splitlines(keepends=True)
    path.write_text("".join(written[:3]) + written[3][:20])
    _, _, resumed = bench(models, tokenizer, tmp_path / "cut")
    close = [pytest.approx(line.pop("logprob"), abs=1e-4) for line in whole]  # others shared the forwards
    assert [line.pop("logprob") for line in resumed] == close
    assert resumed == whole
    assert path.read_text().startswith("".join(written[:3]))
    assert len(path.read_text().splitlines()) == len(whole)


def test_more_prompts_may_follow(models, tokenizer, tmp_path):
    """A coin that is like a judge stays the one it was."""
    _, _, before = bench(models, tokenizer, tmp_path, ["judge:j=0.5", "coin"], prompts=PROMPTS[:2])
    _, _, after = bench(models, tokenizer, tmp_path, ["judge:j=0.5", "coin"])
    assert [line for line in after if line["prompt"] in ("p0", "p1")] == before
    assert len({line["share"] for line in after if line["setting"] == "coin like judge:j=0.5"}) == 1


def test_answers_of_others_are_refused(models, tokenizer, tmp_path):
    target, draft = models
    bench(models, tokenizer, tmp_path, ["judge:j=0.5"])
    with pytest.raises(ValueError, match="max_new_tokens: 24 there, 8 now"):
        bench(models, tokenizer, tmp_path, ["judge:j=0.5"], BenchConfig(max_new_tokens=8))
    changed = [Prompt("p0", "another text", "some")]
    with pytest.raises(ValueError, match=r"has an answer of '.*' to prompt 'p0', but the prompt or the judge"):
        bench(models, tokenizer, tmp_path, ["judge:j=0.5"], prompts=changed)
    settings, other = parse_settings(["judge:j=0.5"]), {"j": random_judge(target, seed=1)}
    with pytest.raises(ValueError, match="'judge:j=0.5' to prompt"):
        decode(target, draft, tokenizer, PROMPTS, settings, other, CONFIG, tmp_path)
    settings, stricter = parse_settings(["judge:j"]), {"j": random_judge(target)}
    decode(target, draft, tokenizer, PROMPTS[:1], settings, stricter, CONFIG, tmp_path)
    stricter["j"].info = replace(stricter["j"].info, threshold=0.1)
    with pytest.raises(ValueError, match="'judge:j' to prompt"):
        decode(target, draft, tokenizer, PROMPTS[:1], settings, stricter, CONFIG, tmp_path)


def test_timing(models, tokenizer, tmp_path):
    config = BenchConfig("timing", max_new_tokens=24, repeats=2)
    with pytest.raises(ValueError, match="how often judge:j=0.5 accepts is not known here yet"):
        bench(models, tokenizer, tmp_path, RULES, config)
    _, _, quality = bench(models, tokenizer, tmp_path)
    _, _, lines = bench(models, tokenizer, tmp_path, RULES, config)
    assert len(lines) == 2 * len(quality)
    assert all(line["seconds"] > 0 for line in lines)
    same = ("setting", "prompt", "tokens", "lengths", "draft_forwards", "judged", "share")
    texts = [{name: line[name] for name in same} for line in quality]
    assert [{name: line[name] for name in same} for line in lines] == texts + texts
    order = [json.loads(line)["setting"] for line in (tmp_path / "timing.jsonl").read_text().splitlines()]
    first, second = (order[i * 14 : i * 14 + 14] for i in (0, 1))
    assert second == [*first[1:], first[0]]


def test_timing_may_let_the_clock_choose(models, tokenizer, tmp_path):
    config = BenchConfig("timing", max_new_tokens=24, draft_length="auto")
    _, _, lines = bench(models, tokenizer, tmp_path, ["stock"], config)
    of = {
        line["setting"]: [other["tokens"] for other in lines if other["setting"] == line["setting"]] for line in lines
    }
    assert of["stock"] == of["lossless"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "speed"}, "`mode` must be one of quality, timing"),
        ({"draft_length": "auto"}, "`draft_length` 'auto' goes by the clock"),
        ({"repeats": 2}, "`repeats`: in `mode` quality"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        BenchConfig(**wrong)


def test_the_models_are_left_as_they_were(models, tokenizer, tmp_path):
    before = [copy.copy(vars(model)) for model in models]
    bench(models, tokenizer, tmp_path)
    assert [vars(model) for model in models] == before


@pytest.mark.parametrize("mode", ["quality", "timing"])
def test_prompts_that_are_too_long_are_left_out(models, tokenizer, tmp_path, mode):
    """The others are answered as without them, and a bench that is started again finds them so."""
    config, rules = BenchConfig(mode, max_new_tokens=24), ["lossless", "stock"]
    asked = [PROMPTS[0], Prompt("long", "a" * 233), PROMPTS[1]]
    _, _, lines = bench(models, tokenizer, tmp_path, rules, config, asked)
    assert [line["prompt"] for line in lines] == ["p0", "p0", "p1", "p1"]
    assert bench(models, tokenizer, tmp_path, rules, config, asked)[2] == lines
    fits = Prompt("fits", "a" * 232)
    _, _, lines = bench(models, tokenizer, tmp_path, rules, config, [fits])
    assert [len(line["tokens"]) for line in lines] == [24, 24]
    with pytest.raises(TooLong, match="all 1 are too long: with `max_new_tokens`=24 each exceeds the context of 256"):
        bench(models, tokenizer, tmp_path, rules, config, asked[1:2])


def test_the_context_of_a_draft_that_answers_alone_counts_too(tokenizer, tmp_path):
    target, _ = build_pair("llama")
    # Its positions are learned: behind the last one there is nothing.
    draft = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    asked = [Prompt("fits", "a" * 40), Prompt("long", "a" * 41), Prompt("longer", "a" * 65)]
    for rules, answered in ((["draft", "greedy"], {"fits"}), (["greedy"], {"fits", "long", "longer"})):
        settings = [setting for setting in parse_settings(rules) if setting.name in rules]  # without lossless
        lines = decode(target, draft, tokenizer, asked, settings, {}, CONFIG, tmp_path / rules[0])
        assert {line["prompt"] for line in lines} == answered
        assert len(lines) == len(answered) * len(settings)
