"""Judged generation against stock `generate`, in fp32 on tiny random models."""

import pytest
import torch

from hf_selfjudge import JudgedModel
from hf_selfjudge.decoding.rules import JudgeRule
from hf_selfjudge.judge.threshold import Threshold
from hf_selfjudge.rules import Coin, Lossless
from tests.builders import VOCAB, Collect, build, perturbed, random_judge


NEW = 40  # tokens


def draft_blocks(target, draft, ids, new_tokens, block):
    """The slow way to say what a judge that always accepts must give: blocks of the draft, each followed by the
    target's own next token."""
    end = ids.shape[1] + new_tokens
    while ids.shape[1] < end:
        length = min(block, end - ids.shape[1] - 1)
        if length > 0:
            mask = torch.ones_like(ids)  # the padding token may well be generated
            ids = draft.generate(ids, attention_mask=mask, max_new_tokens=length, do_sample=False)
        ids = torch.cat([ids, target(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=-1)
    return ids


def test_never_is_stock_assisted_is_greedy(pair, prompt):
    target, draft = pair
    judged = JudgedModel(target, JudgeRule(random_judge(target), 0.0))
    output = judged.generate(prompt, assistant_model=draft, max_new_tokens=NEW)
    assert torch.equal(output, target.generate(prompt, assistant_model=draft, max_new_tokens=NEW))
    assert torch.equal(output, target.generate(prompt, max_new_tokens=NEW))
    assert judged.stats.judged == 0
    assert judged.stats.matched > 0


def test_always_is_draft_blocks_and_bonus(pair, prompt):
    target, draft = pair
    judged = JudgedModel(target, JudgeRule(random_judge(target), 1.0))
    output = judged.generate(prompt, assistant_model=draft, max_new_tokens=NEW)
    assert torch.equal(output, draft_blocks(target, draft, prompt, NEW, block=5))
    assert judged.stats.judged > 0
    assert judged.stats.target == judged.stats.rounds


def test_plain_generate_is_unchanged(pair, prompt):
    target, _ = pair
    judged = JudgedModel(target, JudgeRule(random_judge(target), 1.0))
    assert torch.equal(judged.generate(prompt, max_new_tokens=NEW), target.generate(prompt, max_new_tokens=NEW))
    sampled = []
    for model in (judged, target):
        torch.manual_seed(0)
        sampled.append(model.generate(prompt, max_new_tokens=NEW, do_sample=True, top_k=5))
    assert torch.equal(*sampled)
    assert judged.stats.rounds == 0


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_stats_add_up(pair, prompt, threshold):
    target, draft = pair
    judged = JudgedModel(target, JudgeRule(random_judge(target), threshold))
    output = judged.generate(prompt, assistant_model=draft, max_new_tokens=NEW)
    stats, new = judged.stats, output.shape[1] - prompt.shape[1]
    assert stats.tokens == len(stats.sources) == new
    assert stats.tokens_per_round == new / stats.rounds
    assert stats.drafted >= stats.matched + stats.judged
    assert [stats.sources.count(s) for s in ("matched", "judged", "target")] == [
        stats.matched,
        stats.judged,
        stats.target,
    ]
    assert stats.logprob_given_up >= 0


def test_judge_sees_rows_around_the_candidate(pair, prompt):
    """The features of a judged row are those of a plain forward over the text up to the candidate."""
    target, draft = pair
    judge = random_judge(target)
    seen = []
    judge.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    judged = JudgedModel(target, JudgeRule(judge, 1.0))
    output = judged.generate(prompt, assistant_model=draft, max_new_tokens=NEW)
    first = prompt.shape[1] + judged.stats.sources.index("judged")
    full = target(output[:, : first + 1], output_hidden_states=True)
    scalars, hidden = seen[0]
    torch.testing.assert_close(hidden[0, :2], full.hidden_states[-1][0, -2:], atol=1e-4, rtol=1e-4)
    # All candidates are kept, up to the bonus token.
    end = prompt.shape[1] + judged.stats.sources.index("target", first - prompt.shape[1])
    ahead = target(output[:, :end], output_hidden_states=True).hidden_states[-1][0, first + 1 :]
    expected = ahead.mean(0) if len(ahead) else hidden[0, 1]
    torch.testing.assert_close(hidden[0, 2], expected, atol=1e-4, rtol=1e-4)
    logprobs = full.logits[0, -2].log_softmax(-1)
    torch.testing.assert_close(scalars[0, 0], logprobs.max() - logprobs[output[0, first]], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(scalars[0, -1], torch.tensor(first - prompt.shape[1]).float().log1p())


def test_special_and_masked_tokens_are_never_judged(llama, prompt):
    target, draft = llama
    free = JudgedModel(target, JudgeRule(random_judge(target), 1.0))
    output = free.generate(prompt, assistant_model=draft, max_new_tokens=NEW)[0, prompt.shape[1] :]
    banned = int(output[free.stats.sources.index("judged")])

    special = JudgedModel(target, JudgeRule(random_judge(target, special_tokens=(banned,)), 1.0))
    output = special.generate(prompt, assistant_model=draft, max_new_tokens=NEW)[0, prompt.shape[1] :]
    assert banned not in {int(t) for t, s in zip(output, special.stats.sources, strict=True) if s == "judged"}

    output = free.generate(prompt, assistant_model=draft, max_new_tokens=NEW, bad_words_ids=[[banned]])
    assert banned not in output[0, prompt.shape[1] :].tolist()

    free.generate(prompt, assistant_model=draft, max_new_tokens=NEW, eos_token_id=banned)
    sources = free.stats.sources
    assert sources[-1] != "judged" or len(sources) == NEW


def test_sampling_with_never_is_stock_sampling(llama, prompt):
    target, draft = llama
    judged = JudgedModel(target, JudgeRule(random_judge(target), 0.0))
    outputs = []
    for model in (judged, target):
        torch.manual_seed(0)
        outputs.append(
            model.generate(prompt, assistant_model=draft, max_new_tokens=NEW, do_sample=True, temperature=0.8)
        )
    assert torch.equal(*outputs)


def test_sampling_judged_keeps_more(llama, prompt):
    target, draft = llama
    rounds = []
    for threshold in (0.0, 1.0):
        judged = JudgedModel(target, JudgeRule(random_judge(target), threshold))
        torch.manual_seed(0)
        judged.generate(prompt, assistant_model=draft, max_new_tokens=120, do_sample=True, top_k=0)
        rounds.append(judged.stats.rounds)
    assert rounds[1] < rounds[0]


def test_prompt_lookup(llama, prompt):
    target, _ = llama
    repeated = prompt.repeat(1, 4)
    judged = JudgedModel(target, JudgeRule(random_judge(target), 0.0))
    output = judged.generate(repeated, prompt_lookup_num_tokens=4, max_new_tokens=NEW)
    assert torch.equal(output, target.generate(repeated, max_new_tokens=NEW))
    assert judged.stats.drafted > 0
    judged.threshold = 1.0
    judged.generate(repeated, prompt_lookup_num_tokens=4, max_new_tokens=NEW)
    assert judged.stats.judged > 0


def test_outputs_streamer_and_config(llama, prompt):
    target, draft = llama

    streamer = Collect()
    judged = JudgedModel(target, JudgeRule(random_judge(target), 1.0))
    output = judged.generate(
        prompt, assistant_model=draft, max_new_tokens=NEW, streamer=streamer,
        return_dict_in_generate=True, output_scores=True, output_logits=True,
    )  # fmt: skip
    assert streamer.ended
    assert streamer.tokens == output.sequences[0].tolist()
    assert len(output.scores) == len(output.logits) == NEW
    assert all(torch.isfinite(row).all() for row in output.logits)
    # The logits stay the target's own: a judged token is not their argmax.
    for token, row, source in zip(
        output.sequences[0, prompt.shape[1] :], output.logits, judged.stats.sources, strict=True
    ):
        assert (row.argmax() == token) == (source != "judged")
    # Nothing processes them here, and what transformers makes of scores is of the target.
    assert all(torch.equal(scores, logits) for scores, logits in zip(output.scores, output.logits, strict=True))


def test_scores_of_tokens_judged_after_a_rejection(llama, prompt):
    """Under sampling the rule is also asked after a rejected candidate; what it accepts there is not kept."""
    target, draft = llama
    how = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    judged = JudgedModel(target, Coin(0.5))
    torch.manual_seed(0)
    output = judged.generate(prompt, assistant_model=draft, max_new_tokens=120, do_sample=True, top_k=0, **how)
    assert {"judged", "target"} <= set(judged.stats.sources)
    assert all(torch.equal(scores, logits) for scores, logits in zip(output.scores, output.logits, strict=True))


def test_the_target_is_left_as_it_was(llama, prompt):
    target, draft = llama
    before = set(vars(target))
    judged = JudgedModel(target, JudgeRule(random_judge(target), 1.0))
    judged.generate(prompt, assistant_model=draft, max_new_tokens=NEW)
    with pytest.raises(ZeroDivisionError):
        judged.generate(
            prompt, assistant_model=draft, max_new_tokens=NEW, stopping_criteria=[lambda ids, scores: 1 / 0]
        )
    assert set(vars(target)) == before
    assert not target._forward_hooks
    assert not target.lm_head._forward_pre_hooks


def test_delegation(llama, prompt):
    target, _ = llama
    judged = JudgedModel(target, JudgeRule(random_judge(target)))
    assert judged.config is target.config
    assert torch.equal(judged(prompt).logits, target(prompt).logits)
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = judged.nothing_like_this
    assert judged.eval() is judged.to("cpu") is judged
    for write in (judged.save_pretrained, judged.push_to_hub):
        with pytest.raises(NotImplementedError, match=r"the judge \(`judged.rule.judge`\) or the target"):
            write("folder")


def test_errors(llama, prompt):
    target, draft = llama
    judged = JudgedModel(target, JudgeRule(random_judge(target)))
    with pytest.raises(ValueError, match="`input_ids` is empty"):
        judged.generate(prompt[:, :0], assistant_model=draft)
    with pytest.raises(ValueError, match=r"`input_ids` has 300 tokens, the target's context is 256"):
        judged.generate(torch.ones(1, 300, dtype=torch.long), assistant_model=draft)
    gpt2 = build("gpt2")  # its config has another name for it
    with pytest.raises(ValueError, match=r"`input_ids` has 300 tokens, the target's context is 256"):
        JudgedModel(gpt2, Lossless()).generate(torch.ones(1, 300, dtype=torch.long), assistant_model=gpt2)
    with pytest.raises(ValueError, match=r"`threshold` must be in \[0, 1\]"):
        judged.threshold = 1.5
    with pytest.raises(ValueError, match=r"`threshold` 'fast' is none of the judge's operating points \(none\)"):
        judged.threshold = "fast"
    judged.rule.judge.info.operating_points.update(strict={"threshold": 0.25})
    judged.threshold = "strict"
    assert judged.threshold == Threshold(0.25)
    with pytest.raises(ValueError, match=r"'fast' is none of the judge's operating points \(strict\)"):
        judged.threshold = "fast"
    assert not hasattr(JudgedModel(target, Lossless()), "threshold")
    with pytest.raises(AttributeError, match=r"`threshold` is a judge's, and the rule is Lossless\(\)"):
        JudgedModel(target, Lossless()).threshold = 0.5
    with pytest.raises(TypeError, match="`target` must be a transformers model, got Linear"):
        JudgedModel(torch.nn.Linear(2, 2), judged.rule)
    other = perturbed(build("llama"))
    other.resize_token_embeddings(VOCAB + 8)
    with pytest.raises(
        ValueError, match=f"`assistant_model` has a vocabulary of {VOCAB + 8} tokens, the target one of {VOCAB}"
    ):
        judged.generate(prompt, assistant_model=other)
