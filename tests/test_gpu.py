"""On a GPU everything is decided as on the CPU. These tests need one: `pytest -m gpu`.

`HF_SELFJUDGE_TEST_DEVICE=cpu pytest -m gpu` runs them on the CPU, which tests the tests.
"""

import copy
import gc
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import dispatch_model

from hf_selfjudge import JudgedModel, load_labels, mine
from hf_selfjudge.mining import labels as labels_module
from hf_selfjudge.models.compiled import compile_step, shared_cache
from hf_selfjudge.models.pair import Pair
from hf_selfjudge.rules import Coin, JudgeRule, KLGate, LookAhead, Lossless, Margin, TopK
from tests.builders import (
    MINING,
    PROMPTS,
    adapted_judge,
    adapter,
    build,
    lora,
    midway_judge,
    perturbed,
    random_judge,
    through,
    write_answer_labels,
)


pytestmark = pytest.mark.gpu
DEVICE = os.environ.get("HF_SELFJUDGE_TEST_DEVICE", "cuda")
NEW = 40  # tokens
DRAFTERS = ["model", "lookup", "both"]


@pytest.fixture(autouse=True)
def device():
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


def drafts(draft, drafter):
    options = {} if drafter == "lookup" else {"assistant_model": draft}
    return options if drafter == "model" else options | {"prompt_lookup_num_tokens": 4}


def there(*models):
    """Copies on the device."""
    return [copy.deepcopy(model).to(DEVICE) for model in models]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3", "gpt2"])
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("length", [None, 3, "auto"])
def test_lossless_is_stock_is_greedy(architecture, drafter, length, prompt):
    here = build(architecture)
    target, draft = there(here, perturbed(here))
    ids, how = prompt.to(DEVICE), {"max_new_tokens": NEW, "do_sample": False}
    output = JudgedModel(target, Lossless(), length).generate(ids, **drafts(draft, drafter), **how)
    assert torch.equal(output, target.generate(ids, **how))
    assert torch.equal(output, target.generate(ids, **drafts(draft, drafter), **how))
    assert torch.equal(output.cpu(), here.generate(prompt, **how))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3", "gpt2"])
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sample"])
def test_a_compiled_draft(architecture, do_sample, prompt):
    here = build(architecture)
    target, draft, plain = there(here, perturbed(here), perturbed(here))
    compile_step(draft)
    assert shared_cache(draft) is not None
    judged = JudgedModel(target, Lossless(), 5)
    for ids in (prompt.to(DEVICE), prompt.repeat(1, 12).to(DEVICE)):
        outputs = []
        for model in (draft, plain):
            torch.manual_seed(0)
            outputs.append(judged.generate(ids, assistant_model=model, max_new_tokens=NEW, do_sample=do_sample))
            outputs.append(torch.tensor([judged.stats.rounds, judged.stats.matched]))
        assert torch.equal(outputs[0], outputs[2])
        assert torch.equal(outputs[1], outputs[3])


def rules(target):
    judges = [random_judge(target), midway_judge(target), adapted_judge(target, adapter(target))]
    plain = [Margin(1.0), TopK(3), LookAhead(1, 0.0), Coin(0.5), KLGate(5.0, 1.0)]
    return plain + [JudgeRule(judge, threshold) for judge in judges for threshold in (0.5, "0.3/token")]


@pytest.mark.parametrize("number", range(11))
def test_rules_decide_as_on_the_cpu(llama, prompt, number):
    outputs, counts = [], []
    for device in ("cpu", DEVICE):
        target, draft = (copy.deepcopy(model).to(device) for model in llama)
        judged = JudgedModel(target, rules(target)[number], 5)
        outputs.append(judged.generate(prompt.to(device), assistant_model=draft, max_new_tokens=NEW).cpu())
        counts.append((judged.stats.rounds, judged.stats.drafted, judged.stats.judged, judged.stats.asked))
    assert torch.equal(*outputs)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sample"])
def test_rows_of_a_batch_are_the_prompts_alone(llama, prompt, drafter, do_sample):
    target, draft = there(*llama)
    judged = JudgedModel(target, JudgeRule(random_judge(target), 0.5), 3)
    how = {"max_new_tokens": NEW, "do_sample": do_sample, "pad_token_id": 0, **drafts(draft, drafter)}
    prompts = [prompt.to(DEVICE), prompt.flip(1).to(DEVICE)]
    alone = [judged.generate(ids, seeds=[seed], **how)[0] for seed, ids in enumerate(prompts)]
    together = judged.generate(torch.cat(prompts), seeds=[0, 1], **how)
    for row, own in zip(together, alone, strict=True):
        assert torch.equal(row[: len(own)], own)


def test_the_draft_may_be_elsewhere(llama, prompt):
    """The target on the device and the draft on the CPU, or in two places itself."""
    here, draft = llama
    how = {"max_new_tokens": NEW, "do_sample": False}
    expected = here.generate(prompt, **how)
    (target,) = there(here)
    judged = JudgedModel(target, Lossless(), 3)
    assert torch.equal(judged.generate(prompt.to(DEVICE), assistant_model=draft, **how).cpu(), expected)
    place = 0 if DEVICE == "cuda" else "cpu"
    parts = {"model.embed_tokens": place, "model.layers.0": place, "model.rotary_emb": place}
    parts |= {"model.layers.1": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    split = dispatch_model(copy.deepcopy(here), parts, main_device=place, force_hooks=True)
    for judge in (random_judge(split), midway_judge(split)):
        texts = []
        for target, device in ((split, DEVICE), (here, "cpu")):
            judged = JudgedModel(target, JudgeRule(judge, 0.5, allow_other_weights=True), 3)
            texts.append(judged.generate(prompt.to(device), assistant_model=draft, **how).cpu())
        assert torch.equal(*texts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(llama, prompt, dtype):
    target, draft = (model.to(dtype) for model in there(*llama))
    for judge in (random_judge(target), midway_judge(target), adapted_judge(target, adapter(target))):
        judged = JudgedModel(target, JudgeRule(judge, 0.5), 4)
        judged.generate(prompt.to(DEVICE), assistant_model=draft, max_new_tokens=NEW)
        assert judged.stats.tokens == NEW
        assert np.isfinite(judged.stats.logprob_given_up)


@pytest.mark.parametrize("options", [{}, {"rounds": 2, "round_length": 4}, {"layer": 1}], ids=str)
def test_labels_are_those_of_the_cpu(llama, tokenizer, tmp_path, options, monkeypatch):
    rows = []
    for name, device, packed in (("a", "cpu", True), ("b", DEVICE, True), ("c", DEVICE, False)):
        target, draft = (copy.deepcopy(model).to(device) for model in llama)
        monkeypatch.setattr(labels_module, "packs", lambda model, packed=packed: packed)
        labels = mine(Pair(target, draft, tokenizer), PROMPTS, replace(MINING, **options), tmp_path / name)
        rows.append(labels.to_pandas())
    for other in rows[1:]:
        for name in ("prompt_id", "position", "token", "substitute", "changed", "flipped"):
            assert rows[0][name].equals(other[name])
        for name in ("margin", "likelihood", "hidden_before", "hidden_after"):
            first, second = (np.stack(table[name].to_numpy()) for table in (rows[0], other))
            np.testing.assert_allclose(first, second, atol=5e-3, rtol=1e-2)


def test_training_through_the_model(tmp_path):
    """A LoRA judge gets the weights that it gets on the CPU."""
    weights = []
    for name, device in (("here", "cpu"), ("there", DEVICE)):
        target = build("llama", num_hidden_layers=3)
        labels = load_labels(write_answer_labels(tmp_path / name, target))
        options = {"max_steps": 3, "use_cpu": device == "cpu", "peft_config": lora()}
        trainer = through(target, labels, tmp_path / f"judge-{name}", **options)
        trainer.train()
        assert trainer.judge.head.weight.device.type == device
        weights.append([trainer.judge.head.weight.detach().cpu(), *trainer.judge.adapter.tensors.values()])
    for first, second in zip(*weights, strict=True):
        torch.testing.assert_close(first, second, atol=1e-3, rtol=1e-2)


def test_each_verification_is_waited_for(llama, prompt, monkeypatch):
    """Once: `"auto"` and the statistics need its time."""
    target, draft = there(*llama)
    waits = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waits.append)
    judged = JudgedModel(target, Lossless(), 3)
    judged.generate(prompt.to(DEVICE), assistant_model=draft, max_new_tokens=NEW)
    assert len(waits) == (judged.stats.rounds if DEVICE == "cuda" else 0)


def test_memory_is_flat(llama, prompt):
    target, draft = there(*llama)
    judged, ids = JudgedModel(target, JudgeRule(midway_judge(target), 0.5), 4), prompt.to(DEVICE)
    used = []
    for call in range(200):
        judged.generate(ids, assistant_model=draft, max_new_tokens=12)
        if call in (20, 199):
            gc.collect()
            tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
            used.append((torch.cuda.memory_allocated() if DEVICE == "cuda" else 0, tensors))
    assert used[0] == used[1]
