"""An adapter in the last layers, replayed beside the target, gives what the adapted target would give."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from transformers import DynamicCache

from hf_selfjudge import Judge, JudgedModel, load_labels
from hf_selfjudge.decoding.rules import JudgeRule
from hf_selfjudge.forward.tap import ForwardTap
from hf_selfjudge.judge.lora import Adapter, Replay
from tests.builders import adapted_judge, adapter, build, lora, perturbed, through, write_answer_labels


@pytest.fixture
def answers(tmp_path):
    return load_labels(write_answer_labels(tmp_path / "labels", build("llama", num_hidden_layers=3)))


WITH_LAYERS = ["llama", "qwen2", "gemma3"]


def with_peft(architecture, lora_adapter):
    """The adapted target, as PEFT makes it."""
    shape = ("r", "target_modules", "lora_alpha", "layers_to_transform", "layers_pattern")
    adapted = get_peft_model(build(architecture), LoraConfig(**{name: lora_adapter.config[name] for name in shape}))
    set_peft_model_state_dict(adapted, lora_adapter.tensors)
    return adapted.get_base_model()


def last_hidden(model, ids):
    seen = []
    with ForwardTap(model, lambda hidden, logits: seen.append(hidden)):
        model(input_ids=ids)
    return seen[0]


@pytest.mark.parametrize("architecture", WITH_LAYERS)
def test_replayed_in_parts_equals_the_adapted_forward(architecture):
    target, ids = build(architecture), torch.randint(64, (1, 40), generator=torch.Generator().manual_seed(1))
    plain, lora_adapter, seen, cache = last_hidden(target, ids), adapter(target), [], DynamicCache()
    replay = Replay(target, lora_adapter)
    # A prompt; a round of which two tokens are dropped; another round.
    starts, texts = (0, 20, 24), (ids[:, :20], torch.cat([ids[:, 20:24], ids[:, :2]], 1), ids[:, 24:])
    with ForwardTap(target, lambda hidden, logits, entered: seen.append(entered), replay.entering):
        for start, text in zip(starts, texts, strict=True):
            if start:
                cache.crop(start - cache.get_seq_length())
            target(input_ids=text, past_key_values=cache)
    replaying = replay.start()
    first, second, third = (replaying(entered, start) for entered, start in zip(seen, starts, strict=True))
    expected = last_hidden(with_peft(architecture, lora_adapter), ids)
    assert (expected - plain).norm() > 0.1 * plain.norm()
    torch.testing.assert_close(torch.cat([first, second[:, :4], third], 1), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(last_hidden(target, ids), plain)  # the target is as it was


@pytest.mark.parametrize("architecture", WITH_LAYERS)
def test_the_judge_sees_the_adapted_states_of_the_text(architecture, prompt):
    """In every round, whatever was dropped before: the states that are judged are those of the adapted target."""
    target, seen = build(architecture), []
    lora_adapter = adapter(target)

    class Noting(JudgeRule):
        def keep(self, mismatches):
            kept = super().keep(mismatches)
            reached = int(kept.cumprod(0).sum()) + 1  # what comes after a rejected one is not in the text
            rows = zip(mismatches.positions.tolist(), mismatches.tokens.tolist(), mismatches.hidden, strict=True)
            seen.extend([*rows][:reached])
            return kept

    judged = JudgedModel(target, Noting(adapted_judge(target, lora_adapter), 0.5))
    output = judged.generate(prompt, assistant_model=perturbed(target, 0.05), max_new_tokens=40, do_sample=False)
    assert judged.stats.judged
    assert len(seen) > 5
    adapted = with_peft(architecture, lora_adapter)
    for position, candidate, hidden in seen:
        text = torch.cat([output[:, : prompt.shape[1] + position], torch.tensor([[candidate]])], 1)
        expected = last_hidden(adapted, text)[0, -2:]
        torch.testing.assert_close(hidden[:2], expected, atol=1e-4, rtol=1e-4)


def test_batches_and_threads_of_text_give_what_each_gives_alone(llama, prompt):
    target, draft = llama
    judged = JudgedModel(target, JudgeRule(adapted_judge(target, adapter(target)), 0.5))
    ids = torch.cat([prompt, prompt.roll(3, 1), prompt.flip(1)])
    options = {"assistant_model": draft, "max_new_tokens": 30, "do_sample": False}
    together = judged.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert judged.stats.judged
    for row, answer in zip(ids, together, strict=True):
        assert torch.equal(judged.generate(row[None], **options)[0], answer)
    lossless = JudgedModel(target, JudgeRule(adapted_judge(target, adapter(target)), 0.0)).generate(prompt, **options)
    assert torch.equal(lossless, target.generate(prompt, **options))


def test_padding_on_the_left(llama, prompt):
    target, draft = llama
    judged = JudgedModel(target, JudgeRule(adapted_judge(target, adapter(target)), 0.5))
    options = {"assistant_model": draft, "max_new_tokens": 30, "do_sample": False}
    alone = judged.generate(prompt, **options)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), prompt], 1)
    mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), torch.ones_like(prompt)], 1)
    assert torch.equal(judged.generate(padded, attention_mask=mask, **options)[:, 5:], alone)


def test_only_the_last_layers_run_again():
    target = build("llama", num_hidden_layers=4)
    replay = Replay(target, adapter(target, (3,)))
    assert replay.entering is target.model.layers[3]
    assert len(replay.decoder.layers) == 1
    assert replay.decoder.layers[0].self_attn.q_proj.weight is target.model.layers[3].self_attn.q_proj.weight


def test_a_trained_adapter_is_an_ordinary_one(answers, tmp_path, prompt):
    trainer = through(build("llama", num_hidden_layers=3), answers, tmp_path, lora())
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    judge = Judge.from_pretrained(tmp_path)
    assert judge.info.adapter
    target = build("llama", num_hidden_layers=3)
    replay, seen = Replay(target, judge.adapter), []
    with ForwardTap(target, lambda hidden, logits, entered: seen.append(replay.start()(entered, 0)), replay.entering):
        target(input_ids=prompt)
    plain = last_hidden(target, prompt)
    target.load_adapter(str(tmp_path), adapter_name="judge")
    torch.testing.assert_close(seen[0], last_hidden(target, prompt), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(seen[0], plain)
    assert trainer.judge.head.weight.any()


def test_what_cannot_be_replayed_is_refused(answers, tmp_path):
    target = build("llama")
    lora_adapter = adapter(target)
    for change, message in (
        ({"peft_type": "IA3"}, "only LoRA can be replayed, got 'IA3'"),
        ({"use_dora": True}, "use_dora cannot be replayed"),
        ({"bias": "all"}, "bias cannot be replayed"),
        ({"layer_replication": [[0, 1]]}, "layer_replication cannot be replayed"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights` changes the target's own weights"),
        ({"r": None}, "r must be a number above 0, got None"),
    ):
        with pytest.raises(ValueError, match=message):
            Adapter(lora_adapter.config | change, lora_adapter.tensors)
    with pytest.raises(ValueError, match="'lm_head.weight' is not a weight of LoRA"):
        Adapter(lora_adapter.config, lora_adapter.tensors | {"lm_head.weight": torch.zeros(1)})
    name, tensor = next(iter(lora_adapter.tensors.items()))
    with pytest.raises(ValueError, match="does not have both matrices of each module"):
        Adapter(lora_adapter.config, {name: tensor})
    with pytest.raises(ValueError, match="in the layers of several parts of a model"):
        Adapter(
            lora_adapter.config,
            lora_adapter.tensors
            | {n.replace("model.layers", "vision.layers"): t for n, t in lora_adapter.tensors.items()},
        )
    with pytest.raises(ValueError, match="which fit no linear layer of `target` there"):
        Replay(
            target,
            Adapter(
                lora_adapter.config, {n: t[:, :3] if "lora_A" in n else t for n, t in lora_adapter.tensors.items()}
            ),
        )
    with pytest.raises(ValueError, match="has layers beyond the 1 of `target`"):
        Replay(build("llama", num_hidden_layers=1), lora_adapter)
    with pytest.raises(ValueError, match=r"`target` \(GPT2LMHeadModel\) is not a decoder with `layers`"):
        JudgedModel(build("gpt2"), JudgeRule(adapted_judge(build("gpt2"), lora_adapter)))
    replay, seen = Replay(target, lora_adapter), []
    with ForwardTap(target, lambda hidden, logits, entered: seen.append(entered), replay.entering):
        target(input_ids=torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="The judge's adapter has seen 0 of 7 tokens"):
        replay.start()(seen[0], 7)
    with pytest.raises(ValueError, match="use_dora cannot be replayed"):
        through(build("llama", num_hidden_layers=3), answers, tmp_path, lora(use_dora=True))
