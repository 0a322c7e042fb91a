"""Every candidate generator of transformers: functions that give a target, and options of `generate` that draft."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_layers import MtpModel

from tests.builders import HEADS, NO_EOS, SIZES, build, perturbed


def assistant(target, tokenizer, monkeypatch):
    return target, {"assistant_model": perturbed(target)}


def other_tokenizer(target, tokenizer, monkeypatch):
    """A draft whose vocabulary has the same characters in another order, and a few more."""
    vocabulary = sorted(tokenizer.get_vocab(), key=lambda token: (token != "<unk>", token != "<eos>", token[::-1]))
    vocabulary = {token: i for i, token in enumerate([*vocabulary, "ä", "ö", "ü"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    other = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>")
    other.clean_up_tokenization_spaces = tokenizer.clean_up_tokenization_spaces = False
    target = build("llama", vocab_size=len(tokenizer))
    draft = perturbed(build("llama", vocab_size=len(other)))
    return target, {"assistant_model": draft, "tokenizer": tokenizer, "assistant_tokenizer": other}


def prompt_lookup(target, tokenizer, monkeypatch):
    return target, {"prompt_lookup_num_tokens": 4}


def early_exit(target, tokenizer, monkeypatch):
    return target, {"assistant_early_exit": 1}


def dflash(target, tokenizer, monkeypatch):
    torch.manual_seed(1)
    sizes = {name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    config = AutoConfig.for_model(
        "muse_glimmer_assistant", **sizes, **HEADS, **NO_EOS, head_dim=8, sliding_window=8, block_size=4,
        layer_types=["sliding_attention", "full_attention"], mask_token_id=0, target_layer_ids=[0, 1],
    )  # fmt: skip
    return target, {"assistant_model": AutoModel.from_config(config).eval(), "speculation_type": "dflash"}


def mtp(target, tokenizer, monkeypatch):
    torch.manual_seed(0)
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = AutoConfig.for_model(
        "glm4_moe", **SIZES, **HEADS, **NO_EOS, **experts, head_dim=8, first_k_dense_replace=1, num_mtp_layers=2,
        n_group=1, topk_group=1,
    )  # fmt: skip
    target = AutoModelForCausalLM.from_config(config).eval()

    def random_weights(main_model, device_map=None):
        model, generator = MtpModel(main_model, 2).eval(), torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if name.startswith("layers"):
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + ("norm" in name))
        return model

    monkeypatch.setattr(MtpModel, "from_pretrained", random_weights)
    return target, {"use_mtp": True}


DRAFTERS = [assistant, other_tokenizer, prompt_lookup, early_exit, dflash, mtp]
