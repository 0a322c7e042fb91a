"""Every kind of architecture that decoding with a draft knows, as a tiny random model."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

from tests.builders import NO_EOS


VOCAB = 64  # tokens

TEXT = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, **NO_EOS}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, **NO_EOS}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
ENDS = {"pad_token_id": 0, "eos_token_id": None, "decoder_start_token_id": 0}

DENSE = {
    "llama": TEXT,
    "mistral": TEXT | {"sliding_window": None},
    "qwen2": TEXT,
    "qwen3": TEXT | {"head_dim": 8},
    "gemma": TEXT | {"head_dim": 8},
    "phi": TEXT,
    "phi3": TEXT,
    "gpt2": GPT2,
    "gpt_neox": TEXT,
    "opt": TEXT | {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": True, "pad_token_id": 0},
    "bloom": {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4, **NO_EOS},
    "falcon": TEXT | {"alibi": False},
    "starcoder2": TEXT | {"sliding_window": None},
    "stablelm": TEXT,
    "olmo2": TEXT,
    "granite": TEXT,
    "smollm3": TEXT | {"pad_token_id": 0},
}
SLIDING_WINDOW = {
    "mistral-sliding": TEXT | {"model_type": "mistral", "sliding_window": 8},
    "gemma2": TEXT | SLIDING | {"head_dim": 8},
    "gemma3_text": TEXT | SLIDING | {"head_dim": 8},
    "cohere2": TEXT | SLIDING,
}
MIXTURE = {
    "mixtral": TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": TEXT | EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": TEXT | EXPERTS | {"head_dim": 8},
    "olmoe": TEXT | EXPERTS,
    "gpt_oss": TEXT | SLIDING | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
}
ENCODER_DECODER = {
    "t5": {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, **ENDS},
    "bart": {
        **{"vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48},
        **{"decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4, **ENDS},
        **{"max_position_embeddings": 128, "bos_token_id": None, "forced_eos_token_id": None},
    },
}
VISION_LANGUAGE = {
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4},
        **{"image_token_index": VOCAB - 1, "vision_feature_select_strategy": "full", "image_seq_length": 5},
    },
}
RECURRENT = {
    "mamba": {"vocab_size": VOCAB, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, **NO_EOS},
    "recurrent_gemma": TEXT | {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8, "head_dim": 8},
}
KINDS = {
    "dense": DENSE,
    "sliding window": SLIDING_WINDOW,
    "mixture of experts": MIXTURE,
    "encoder-decoder": ENCODER_DECODER,
    "vision-language": VISION_LANGUAGE,
    "recurrent": RECURRENT,
}
CLASSES = {"encoder-decoder": AutoModelForSeq2SeqLM, "vision-language": AutoModelForImageTextToText}


def build(kind: str, name: str) -> torch.nn.Module:
    """A tiny random model, sharper than at initialisation."""
    settings = dict(KINDS[kind][name])
    torch.manual_seed(0)
    config = AutoConfig.for_model(settings.pop("model_type", name), **settings)
    model = CLASSES.get(kind, AutoModelForCausalLM).from_config(config, dtype=torch.float32)
    model.config.name_or_path = f"tiny/{name}"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.eval()
