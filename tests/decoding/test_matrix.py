"""Every architecture, decoding and drafter: a rule that never accepts is stock, one that always does keeps all drafts.

The results are printed as a table at the end of the run.
"""

import pytest
import torch

from hf_selfjudge import JudgedModel
from hf_selfjudge.rules import Coin, Lossless
from tests.architectures import CLASSES, KINDS, VOCAB, build
from tests.builders import perturbed


NEW = 24  # tokens
# One of each kind always; the others are heavy.
BRIEF = ("llama", "gemma3_text", "mixtral", "t5", "llava", "mamba")


def cells():
    for kind, names in KINDS.items():
        for name in names:
            yield pytest.param((kind, name), id=name, marks=[] if name in BRIEF else [pytest.mark.heavy])


@pytest.fixture(scope="module", params=cells())
def architecture(request):
    kind, name = request.param
    target = build(kind, name)
    return kind, name, target, perturbed(target)


def inputs_for(kind: str) -> dict:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, VOCAB - 1, (1, 6), generator=generator).repeat(1, 2)  # something to look up
    if kind == "vision-language":
        image = torch.full((1, 5), VOCAB - 1)
        return {
            "input_ids": torch.cat([image, ids], dim=1),
            "attention_mask": torch.ones(1, 17, dtype=torch.long),
            "pixel_values": torch.rand(1, 3, 8, 8, generator=generator),
        }
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("drafter", ["assistant", "prompt lookup"])
@pytest.mark.parametrize("decoding", ["greedy", "sample"])
def test_matrix(architecture, decoding, drafter, record_matrix):
    kind, name, target, draft = architecture
    inputs = inputs_for(kind)
    options = {"max_new_tokens": NEW, "do_sample": decoding == "sample", "top_k": 0}
    options |= {"assistant_model": draft} if drafter == "assistant" else {"prompt_lookup_num_tokens": 4}
    if target._is_stateful:
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            JudgedModel(target, Lossless()).generate(**inputs, **options)
        record_matrix(kind, name, decoding, drafter, "refused")
        return

    outputs = []
    for model in (target, never := JudgedModel(target, Lossless())):
        torch.manual_seed(0)
        outputs.append(model.generate(**inputs, **options))
    assert torch.equal(*outputs)
    assert never.stats.judged == 0
    if decoding == "greedy":
        assert torch.equal(outputs[1], target.generate(**inputs, max_new_tokens=NEW))

    torch.manual_seed(0)
    always = JudgedModel(target, Coin(share=1.0))
    output = always.generate(**inputs, **options)
    stats = always.stats
    # Whole drafts, each with one token of the target's own; a draft from the prompt may be cut at the limit.
    whole = stats.target == stats.rounds
    assert whole or (drafter == "prompt lookup" and stats.target == stats.rounds - 1 and stats.sources[-1] != "target")
    assert stats.drafted == stats.matched + stats.judged or not whole
    assert stats.tokens == NEW
    # (transformers gives drafts of the other kinds no image, and an encoder-decoder's another state of the encoder.)
    if drafter == "assistant" and decoding == "greedy" and kind not in CLASSES:
        assert torch.equal(output, draft_blocks(target, draft, inputs["input_ids"], len(stats.offered_at)))
    record_matrix(kind, name, decoding, drafter, f"{never.stats.tokens_per_round:.1f} → {stats.tokens_per_round:.1f}")


def draft_blocks(target, draft, ids: torch.LongTensor, block: int) -> torch.LongTensor:
    """What keeping whole drafts must give, the slow way: without a cache, a token at a time."""
    end = ids.shape[1] + NEW
    while ids.shape[1] < end:
        length = min(block, end - ids.shape[1] - 1)
        for model in [draft] * length + [target]:
            with torch.no_grad():
                ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids
