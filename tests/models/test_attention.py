"""Attention where heads share keys and values."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_selfjudge.models.attention import NAME, share_keys
from tests.architectures import DENSE, MIXTURE, SLIDING_WINDOW, build


KINDS = {"dense": DENSE, "sliding window": SLIDING_WINDOW, "mixture of experts": MIXTURE}
NAMES = [(kind, name) for kind, names in KINDS.items() for name in names]


@pytest.mark.parametrize(("kind", "name"), NAMES, ids=[name for _, name in NAMES])
@torch.no_grad()
def test_it_changes_nothing(kind, name):
    """A padded batch, decoded; and several tokens behind a cache."""
    model = build(kind, name)
    ids = torch.randint(1, 60, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0

    def outputs():
        made = model.generate(
            ids, attention_mask=mask, max_new_tokens=8, do_sample=False, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
        again = model.generate(ids[:1], max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=4)
        return made.sequences, again, torch.stack(made.logits)

    stock = outputs()
    share_keys(model)
    for first, second in zip(stock, outputs(), strict=True):
        torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


def test_who_uses_it():
    def used(kind, name, **changes):
        model = build(kind, name)
        for key, value in changes.items():
            setattr(model.config, key, value)
        share_keys(model)
        return model.config._attn_implementation

    assert used("dense", "llama") == NAME
    assert used("dense", "gpt2") == "sdpa"
    assert used("dense", "llama", num_key_value_heads=4) == "sdpa"
    assert used("dense", "llama", _attn_implementation="eager") == "eager"


def test_keys_are_not_copied(monkeypatch):
    """Attention sees as many heads of keys as the model has."""
    model, heads = build("dense", "llama"), []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, **kwargs):
        heads.append((query.shape[1], key.shape[1]))
        return attention(query, key, value, **kwargs)

    share_keys(model)
    monkeypatch.setattr("hf_selfjudge.models.attention.scaled_dot_product_attention", spy)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    model(torch.ones(2, 4, dtype=torch.long), attention_mask=mask)
    assert heads == [(2, 2)] * 2


def test_saved_and_loaded_elsewhere(tmp_path):
    """A saved model does not ask for it."""
    model = build("dense", "llama")
    share_keys(model)
    model.save_pretrained(tmp_path)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), LlamaForCausalLM)
    assert NAME not in (tmp_path / "config.json").read_text()
