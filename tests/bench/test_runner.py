"""What a bench decodes is what `generate` gives, and what it records of it is true."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_selfjudge import JudgedModel
from hf_selfjudge.bench.answers import AnswerRecord, accepted_share
from hf_selfjudge.bench.methods import parse_methods
from hf_selfjudge.bench.quickstart import answer_logprob
from hf_selfjudge.bench.runner import BenchConfig, decode
from hf_selfjudge.data.prompts import Prompt, TooLong, encode
from hf_selfjudge.decoding.rules import JudgeRule
from hf_selfjudge.decoding.stats import Stats
from hf_selfjudge.models.load import load_model
from hf_selfjudge.models.pair import Pair
from hf_selfjudge.rules import Coin
from tests.builders import VOCAB, adapted_judge, adapter, build, in_processes, midway_judge, perturbed, random_judge


PROMPTS = [Prompt(f"p{i}", text, "some") for i, text in enumerate(["abc", "what is this", "a", "to be or not"])]
RULES = ["greedy", "stock", "draft", "ensemble=0.5", "top-k=3", "margin=1", "kl=2:1", "look-ahead=1:0", "coin=0.5:1",
         "judge:j=0.5,0.9", "coin"]  # fmt: skip
WITHOUT_DRAFT = [rule for rule in RULES if not rule.startswith(("draft", "ensemble", "kl"))]
CONFIG = BenchConfig(max_new_tokens=24, at_once=7)


def build_pair(architecture, tokenizer):
    target = build(architecture)
    target.generation_config.eos_token_id = 5
    draft = perturbed(target, 0.03)
    draft.generation_config.eos_token_id = 5
    return Pair(target, draft, tokenizer)


@pytest.fixture(scope="module")
def pair(tokenizer):
    return build_pair("llama", tokenizer)


def bench(pair, folder, rules=RULES, config=CONFIG, prompts=PROMPTS):
    methods = parse_methods(rules, lookup=pair.draft is None)
    judges = {"j": random_judge(pair.target)}
    return methods, judges, decode(pair, prompts, methods, judges, config, folder)


@pytest.mark.parametrize("mode", ["quality", "timing"])
@pytest.mark.parametrize("kind", ["adapter", "midway"])
def test_a_judge_that_sees_more_than_last_states(pair, tmp_path, kind, mode):
    """An adapter has to see the prompt, even if its cache is shared; a judge that reads a layer midway does not."""
    target = pair.target
    judge = midway_judge(target) if kind == "midway" else adapted_judge(target, adapter(target))
    methods, config = parse_methods(["judge:j=0.5"]), BenchConfig(mode, max_new_tokens=24, at_once=3)
    records = decode(pair, PROMPTS, methods, {"j": judge}, config, tmp_path)
    judged = JudgedModel(target, JudgeRule(judge, 0.5), 5, pair.tokenizer)
    for prompt in PROMPTS:
        ids = encode(pair.tokenizer, prompt.conversation, 256, 24)
        alone = judged.generate(ids, assistant_model=pair.draft, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        (record,) = (each for each in records if (each.method, each.prompt) == ("judge:j=0.5", prompt.id))
        assert record.tokens == alone[: len(record.tokens)].tolist()
        assert record.stats.judged == judged.stats.judged


@pytest.mark.parametrize(
    ("architecture", "lookup"),
    [
        ("llama", False),
        ("llama", True),
        pytest.param("gemma3", False, marks=pytest.mark.heavy),
        pytest.param("gpt2", True, marks=pytest.mark.heavy),
    ],
)
def test_quality_gives_the_text_that_each_method_gives_alone(architecture, tokenizer, tmp_path, lookup):
    pair = build_pair(architecture, tokenizer)
    target, draft = pair.target, pair.draft
    pair = Pair(target, None, tokenizer) if lookup else pair
    methods, judges, records = bench(pair, tmp_path, WITHOUT_DRAFT if lookup else RULES)
    assert len(records) == len(methods) * len(PROMPTS)
    methods = {method.name: method for method in methods}
    for record in records:
        method = methods[record.method]
        ids = encode(tokenizer, PROMPTS[int(record.prompt[1:])].text, 256, 24)
        options = {"prompt_lookup_num_tokens": 5} if lookup else {"assistant_model": draft}
        model = {"greedy": target, "stock": target, "draft": draft, "ensemble": target}.get(method.family)
        if method.family in ("greedy", "draft"):
            options = {}
        elif method.family == "ensemble":
            options["assistant_ensemble_weight"] = 0.5
        elif model is None:
            model = JudgedModel(target, method.rule(judges, record.share), 5, pair.tokenizer)
        forwards = count(target)
        how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False}
        output = model.generate(ids, **how, **options)
        forwards, tokens = forwards(), output[0, ids.shape[1] :].tolist()
        assert record.tokens == tokens, record
        assert record.finished == (tokens[-1] == 5)
        assert record.logprob == pytest.approx(answer_logprob(pair, PROMPTS[int(record.prompt[1:])], tokens), abs=1e-3)
        if method.family == "draft":
            assert record.lengths == []
        else:
            assert len(record.lengths) == forwards
            assert sum(record.lengths) == len(tokens)
            assert min(record.lengths) >= 1
        if isinstance(model, JudgedModel):
            for name in ("drafted", "matched", "asked", "judged", "target", "bonus", "sources"):
                assert getattr(record.stats, name) == getattr(model.stats, name), name
    assert any(record.stats.judged for record in records)


def count(target):
    """Counts the forwards of a model until the returned function is called."""
    seen = []
    handle = target.register_forward_hook(lambda *_: seen.append(None))

    def stop():
        handle.remove()
        return len(seen)

    return stop


def test_a_coin_like_a_judge_accepts_as_often(pair, tmp_path):
    methods, judges, records = bench(pair, tmp_path, ["judge:j=0.5,0.9", "coin"])
    by_method = {method.name: [record for record in records if record.method == method.name] for method in methods}
    for threshold in ("0.5", "0.9"):
        share = accepted_share(by_method[f"judge:j={threshold}"])
        assert {record.share for record in by_method[f"coin like judge:j={threshold}"]} == {round(share, 4)}
    assert methods[-1].rule(judges, 0.3) == Coin(0.3)


@pytest.mark.heavy
def test_two_processes_share_the_prompts(pair_folders, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt.text}) + "\n" for prompt in PROMPTS))
    command = ["bench", "--pair", pair_folders, "--prompts", tmp_path / "prompts.jsonl", "--max-new-tokens", "12"]
    command += ["--dtype", "float32", "--rule", "lossless", "--rule", "margin=1", "--rule", "coin=0.5:1"]
    judge = random_judge(load_model(pair_folders.split(",")[0], torch.float32)[0])
    judge.save_pretrained(tmp_path / "j")
    command += ["--rule", f"judge:{tmp_path / 'j'}=0.6", "--rule", "coin"]  # a coin needs the judge's answers
    answers = []
    for count in (1, 2):
        done = in_processes(count, [*command, "--output", tmp_path / str(count)])
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Written to") == 1
        assert all(f"process {index} of {count}" in done.stdout for index in range(count))
        rows = [json.loads(line) for line in (tmp_path / str(count) / "quality.jsonl").read_text().splitlines()]
        same = ("prompt", "method", "share", "tokens", "lengths")  # sums of log-probabilities differ by rounding
        answers.append(sorted([row[name] for name in same] for row in rows))
        assert len(rows) == 5 * len(PROMPTS)
    assert answers[0] == answers[1]
    done = in_processes(2, [*command, "--mode", "timing", "--output", tmp_path / "t"])
    assert done.returncode != 0
    assert "`mode` timing: 2 processes would slow each other down" in " ".join(done.stderr.split())


def with_counts(**counts):
    return AnswerRecord("margin=1", "p", 0, None, [1], True, None, -1.0, [1], 1, Stats(**counts))


def test_accepted_share():
    assert accepted_share([with_counts(judged=0, asked=1), with_counts(judged=2, asked=3)]) == 2 / 4
    assert accepted_share([with_counts(judged=0, asked=0)]) == 0


@pytest.mark.parametrize("lookup", [False, pytest.param(True, marks=pytest.mark.heavy)])
def test_a_coin_that_always_says_yes_accepts_all_it_is_asked(pair, tmp_path, lookup):
    """Mismatches with a special token and rounds without a draft do not count: the rule is not asked there."""
    pair = Pair(pair.target, None, pair.tokenizer) if lookup else pair
    _, _, records = bench(pair, tmp_path, ["coin=1"])
    assert accepted_share([record for record in records if record.method == "coin=1"]) == 1


def test_a_bench_goes_on(pair, tmp_path):
    rules = ["greedy", "draft", "margin=1", "judge:j=0.5", "coin"]
    _, _, whole = bench(pair, tmp_path / "whole", rules)
    path = tmp_path / "cut" / "quality.jsonl"
    bench(pair, tmp_path / "cut", rules[:3], prompts=PROMPTS[:2])
    written = path.read_text().splitlines(keepends=True)
    path.write_text("".join(written[:3]) + written[3][:20])
    _, _, resumed = bench(pair, tmp_path / "cut", rules)
    for record, other in zip(resumed, whole, strict=True):  # others shared the forwards
        assert record.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert record.stats.logprob_given_up == pytest.approx(other.stats.logprob_given_up, abs=1e-4)
        record.logprob, record.stats.logprob_given_up = other.logprob, other.stats.logprob_given_up
    assert resumed == whole
    assert path.read_text().startswith("".join(written[:3]))
    assert len(path.read_text().splitlines()) == len(whole)


def test_more_prompts_may_follow(pair, tmp_path):
    """A coin that is like a judge keeps its share."""
    _, _, before = bench(pair, tmp_path, ["judge:j=0.5", "coin"], prompts=PROMPTS[:2])
    _, _, after = bench(pair, tmp_path, ["judge:j=0.5", "coin"])
    assert [record for record in after if record.prompt in ("p0", "p1")] == before
    assert len({record.share for record in after if record.method == "coin like judge:j=0.5"}) == 1


def test_answers_of_others_are_refused(pair, tmp_path):
    bench(pair, tmp_path, ["judge:j=0.5"])
    with pytest.raises(ValueError, match="max_new_tokens: 24 there, 8 now"):
        bench(pair, tmp_path, ["judge:j=0.5"], BenchConfig(max_new_tokens=8))
    changed = [Prompt("p0", "another text", "some")]
    with pytest.raises(ValueError, match=r"has an answer of '.*' to prompt 'p0', but the prompt or the judge"):
        bench(pair, tmp_path, ["judge:j=0.5"], prompts=changed)
    methods, other = parse_methods(["judge:j=0.5"]), {"j": random_judge(pair.target, seed=1)}
    with pytest.raises(ValueError, match="'judge:j=0.5' to prompt"):
        decode(pair, PROMPTS, methods, other, CONFIG, tmp_path)
    methods, stricter = parse_methods(["judge:j"]), {"j": random_judge(pair.target)}
    decode(pair, PROMPTS[:1], methods, stricter, CONFIG, tmp_path)
    stricter["j"].info = replace(stricter["j"].info, threshold=0.1)
    with pytest.raises(ValueError, match="'judge:j' to prompt"):
        decode(pair, PROMPTS[:1], methods, stricter, CONFIG, tmp_path)
    (tmp_path / "quality.jsonl").write_text('{"setting": "lossless", "prompt": "p0", "repeat": 0}\n')
    with pytest.raises(ValueError, match=r"quality.jsonl was written by another version. Choose another folder."):
        bench(pair, tmp_path)


def test_timing(pair, tmp_path):
    config, rules = (
        BenchConfig("timing", max_new_tokens=24, repeats=2),
        ["draft", "ensemble=0.5", "judge:j=0.5", "coin"],
    )
    with pytest.raises(ValueError, match="how often judge:j=0.5 accepts is not known here yet"):
        bench(pair, tmp_path, rules, config)
    methods, _, quality = bench(pair, tmp_path, rules)
    _, _, records = bench(pair, tmp_path, rules, config)
    assert len(records) == 2 * len(quality)
    assert all(record.seconds > 0 for record in records)

    def measured(record):
        return record.method, record.prompt, record.tokens, record.lengths, record.draft_forwards, record.share

    assert [measured(record) for record in records] == [measured(record) for record in quality] * 2
    assert [record.stats.judged for record in records] == [record.stats.judged for record in quality] * 2
    order = [json.loads(line)["method"] for line in (tmp_path / "timing.jsonl").read_text().splitlines()]
    first, second = (order[i * len(methods) : (i + 1) * len(methods)] for i in (0, 1))
    assert second == [*first[1:], first[0]]


@pytest.mark.parametrize("mode", ["quality", "timing"])
def test_rules_have_draft_lengths_of_their_own(pair, tmp_path, mode):
    config = replace(CONFIG, mode=mode, draft_length=5)
    rules = ["lossless@1", "lossless@8", "stock", "stock@2", "stock@default"]
    before = pair.draft.generation_config.to_dict()
    _, _, records = bench(pair, tmp_path, rules, config)
    of = {name: [record for record in records if record.method == name] for name in ("lossless", *rules)}
    texts = {name: [record.tokens for record in answers] for name, answers in of.items()}
    assert all(answers == texts["lossless"] for answers in texts.values())
    drafted, forwards, rounds = (
        {name: sum(map(count, answers)) for name, answers in of.items()}
        for count in (lambda r: r.stats.drafted, lambda r: r.draft_forwards, lambda r: r.stats.rounds)
    )
    assert drafted["lossless@1"] <= rounds["lossless@1"] < drafted["lossless"] < drafted["lossless@8"]
    assert forwards["stock@2"] < forwards["stock"] != forwards["stock@default"]
    assert pair.draft.generation_config.to_dict() == before


@pytest.mark.parametrize("mode", ["quality", "timing"])
def test_lookup_beside_the_draft(pair, tmp_path, mode):
    config = replace(CONFIG, mode=mode, draft_length=3, max_new_tokens=60)
    _, _, records = bench(pair, tmp_path, ["lossless@3+4"], config)
    draft, both = ([record for record in records if record.method == name] for name in ("lossless", "lossless@3+4"))
    assert [record.tokens for record in draft] == [record.tokens for record in both]
    forwards = [sum(record.draft_forwards for record in answers) for answers in (draft, both)]
    assert 0 < forwards[1] < forwards[0]


def test_a_length_by_the_clock_needs_the_clock(pair, tmp_path):
    with pytest.raises(ValueError, match="`rule` 'lossless@auto': 'auto' goes by the clock"):
        bench(pair, tmp_path, ["lossless@auto"])
    assert not [*tmp_path.iterdir()]


def test_timing_may_let_the_clock_choose(pair, tmp_path):
    config = BenchConfig("timing", max_new_tokens=24, draft_length="auto")
    _, _, records = bench(pair, tmp_path, ["stock"], config)
    lossless, stock = ([r.tokens for r in records if r.method == name] for name in ("lossless", "stock"))
    assert lossless == stock


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "speed"}, "`mode` must be one of quality, timing"),
        ({"draft_length": "auto"}, "`draft_length` 'auto' goes by the clock"),
        ({"repeats": 2}, "`repeats` in `mode` quality"),
    ],
)
def test_wrong_options_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        BenchConfig(**wrong)


@pytest.mark.parametrize("mode", ["quality", "timing"])
def test_the_models_are_left_as_they_were(pair, tmp_path, mode):
    before = [copy.copy(vars(model)) for model in pair.models]
    bench(pair, tmp_path, ["draft", "judge:j=0.5"], BenchConfig(mode, max_new_tokens=8))
    assert [vars(model) for model in pair.models] == before


@pytest.mark.parametrize("mode", ["quality", "timing"])
def test_prompts_that_are_too_long_are_left_out(pair, tmp_path, mode):
    """The answers to the others do not change, and a bench that is started again finds them."""
    config, rules = BenchConfig(mode, max_new_tokens=24), ["lossless", "stock"]
    prompts = [PROMPTS[0], Prompt("long", "a" * 233), PROMPTS[1]]
    _, _, records = bench(pair, tmp_path, rules, config, prompts)
    assert [record.prompt for record in records] == ["p0", "p0", "p1", "p1"]
    assert bench(pair, tmp_path, rules, config, prompts)[2] == records
    fits = Prompt("fits", "a" * 232)
    _, _, records = bench(pair, tmp_path, rules, config, [fits])
    assert [len(record.tokens) for record in records] == [24, 24]
    with pytest.raises(TooLong, match="all 1 are too long: with `max_new_tokens`=24 each exceeds the context of 256"):
        bench(pair, tmp_path, rules, config, prompts[1:2])


def test_the_context_of_a_draft_that_answers_alone_counts_too(pair, tmp_path):
    # Its positions are learned: there is none after the last one.
    draft = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    pair = Pair(pair.target, draft, pair.tokenizer)
    prompts = [Prompt("fits", "a" * 40), Prompt("long", "a" * 41), Prompt("longer", "a" * 65)]
    for rules, answered in ((["draft", "greedy"], {"fits"}), (["greedy"], {"fits", "long", "longer"})):
        methods = [method for method in parse_methods(rules) if method.name in rules]  # without lossless
        records = decode(pair, prompts, methods, {}, CONFIG, tmp_path / rules[0])
        assert {record.prompt for record in records} == answered
        assert len(records) == len(answered) * len(methods)


@pytest.mark.parametrize("mode", ["quality", pytest.param("timing", marks=pytest.mark.heavy)])
def test_answers_are_greedy_whatever_the_models_own_config_says(pair, tmp_path, mode):
    target = copy.copy(pair.target)
    target.generation_config = copy.deepcopy(target.generation_config)
    target.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, min_new_tokens=9)
    config, rules = BenchConfig(mode, max_new_tokens=16), ["greedy", "stock"]
    _, _, plain = bench(pair, tmp_path / "plain", rules, config)
    _, _, records = bench(Pair(target, pair.draft, pair.tokenizer), tmp_path / "own", rules, config)
    assert [record.tokens for record in records] == [record.tokens for record in plain]
