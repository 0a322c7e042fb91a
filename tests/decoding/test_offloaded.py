"""Targets whose layers are not in memory: the text, statistics and labels are those of the same target in memory."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import attach_align_device_hook

from hf_selfjudge import JudgedModel, load_model, mine
from hf_selfjudge.models.load import fingerprint
from hf_selfjudge.models.pair import Pair
from hf_selfjudge.rules import JudgeRule, Lossless, Margin
from tests.builders import MINING, PROMPTS, adapted_judge, adapter, build, midway_judge, perturbed, random_judge


JUDGES = {"head": random_judge, "layer": midway_judge, "adapter": lambda t: adapted_judge(t, adapter(t))}


def layers_on_disk(folder, target):
    return load_model(folder, torch.float32, device_map="disk")[0]


def layers_behind_hooks(folder, target):
    """As accelerate has layers, and a head of its own, in the memory of the CPU that do not fit on a GPU."""
    target = copy.deepcopy(target)
    for module in target.modules():
        if type(module).__name__ in target._no_split_modules:
            cpu_offload(module, execution_device="cpu")
    head = target.get_output_embeddings()
    if head.weight is not target.get_input_embeddings().weight:
        weights = {"weight": head.weight.detach().clone()}
        attach_align_device_hook(head, torch.device("cpu"), offload=True, weights_map=weights)
    return target


@pytest.fixture(scope="module", params=["qwen2", "gemma3", "gpt2"])
def folder(request, tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("offloaded") / request.param
    build(request.param).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def in_memory(folder):
    return load_model(folder, torch.float32)[0]


@pytest.fixture(scope="module", params=[layers_on_disk, layers_behind_hooks])
def offloaded(request, folder, in_memory):
    model = request.param(folder, in_memory)
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    return model


def both(in_memory, offloaded, rule, prompt, rows=1, **options):
    """What a target in memory and the same target offloaded generate, with statistics."""
    results = []
    for target in (in_memory, offloaded):
        judged = JudgedModel(target, rule)
        torch.manual_seed(0)
        output = judged.generate(prompt.repeat(rows, 1), max_new_tokens=24, **options)
        counts = {name: value for name, value in vars(judged.stats).items() if not isinstance(value, float)}
        results.append((output.tolist(), {**counts, "rows": len(judged.stats.rows)}))
    return results


def test_the_fingerprint_is_that_of_the_target_in_memory(in_memory, offloaded):
    assert fingerprint(offloaded) == fingerprint(in_memory)


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("kind", JUDGES)
def test_a_judge_decodes_as_in_memory(in_memory, offloaded, prompt, kind, sample):
    if kind != "head" and in_memory.config.model_type == "gpt2":
        pytest.skip("its layers are not called `layers`")
    rule = JudgeRule(JUDGES[kind](in_memory), 0.5)
    draft = perturbed(in_memory)
    own, other = both(in_memory, offloaded, rule, prompt, assistant_model=draft, do_sample=sample)
    assert own == other
    assert own[1]["asked"] > 0


@pytest.mark.parametrize("rule", [Lossless(), Margin(1.0)])
@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}])
def test_drafts_without_a_draft_model(in_memory, offloaded, prompt, rule, options):
    if "assistant_early_exit" in options and in_memory.config.model_type == "gpt2":
        pytest.skip("transformers cannot leave GPT-2 early")
    prompt = prompt.repeat(1, 3)
    own, other = both(in_memory, offloaded, rule, prompt, **options)
    assert own == other
    assert own[1]["drafted"] > 0


def test_a_batch_decodes_as_in_memory(in_memory, offloaded, prompt):
    rule, draft = JudgeRule(random_judge(in_memory), 0.5), perturbed(in_memory)
    own, other = both(in_memory, offloaded, rule, prompt, rows=3, assistant_model=draft)
    assert own == other
    assert own[1]["rows"] == 3


@pytest.mark.heavy
def test_labels_are_those_of_the_target_in_memory(in_memory, offloaded, tokenizer, tmp_path):
    mined = []
    for name, target in (("memory", in_memory), ("offloaded", offloaded)):
        rows = mine(Pair(target, perturbed(in_memory), tokenizer), PROMPTS, MINING, tmp_path / name)
        mined.append(rows.remove_columns("source"))
    assert mined[0].column_names == mined[1].column_names
    assert all(close(values, mined[1][column][:]) for column, values in mined[0].to_dict().items())


def close(value, other):
    """Whether labels are equal, numbers up to rounding."""
    if isinstance(value, list):
        return all(close(*pair) for pair in zip(value, other, strict=True))
    return abs(value - other) < 1e-4 if isinstance(value, float) else value == other


def test_a_changed_target_on_disk_is_refused(offloaded, in_memory):
    judge = random_judge(perturbed(in_memory))
    with pytest.raises(ValueError, match="fingerprint"):
        JudgedModel(offloaded, JudgeRule(judge))


def test_threads_that_share_an_offloaded_target_take_turns(in_memory, offloaded, prompt):
    judged, draft = JudgedModel(offloaded, Lossless(), draft_length=4), perturbed(in_memory)
    expected = in_memory.generate(prompt, max_new_tokens=24, do_sample=False)

    def generate(_):
        return judged.generate(prompt, assistant_model=draft, max_new_tokens=24, do_sample=False)

    with ThreadPoolExecutor(3) as pool:
        assert all(torch.equal(output, expected) for output in pool.map(generate, range(6)))
