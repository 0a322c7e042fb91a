"""
What the steps of decoding cost on this machine, with random weights of real shapes:

    python tests/gpu_speed.py --shapes 1.5b/0.5b 7b/0.5b 8b/1b --dtype bfloat16

Random models agree on nothing, so a coin accepts 80 % of the draft's tokens; the text is meaningless. It prints
a table in Markdown for each pair. Figures of decoding are the median of three answers, after one that is not counted.
"""

import argparse
import itertools
import time
from collections.abc import Iterator

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_selfjudge import JudgedModel
from hf_selfjudge.bench.quickstart import forward_seconds
from hf_selfjudge.cli.options import DTYPES
from hf_selfjudge.models.compiled import compile_step
from hf_selfjudge.models.pair import with_lengths
from hf_selfjudge.rules import Coin, Lossless


# Heads are not tied to the embeddings: random models with tied ones repeat their last token, and agree on that.
QWEN = {"model_type": "qwen2", "vocab_size": 151_936, "num_key_value_heads": 2, "tie_word_embeddings": False}
LLAMA = {"model_type": "llama", "vocab_size": 128_256, "num_key_value_heads": 8, "rope_theta": 5e5}


def sizes(hidden: int, between: int, layers: int, heads: int) -> dict:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(names, (hidden, between, layers, heads), strict=True))


SHAPES = {
    "0.5b": QWEN | sizes(896, 4864, 24, 14),
    "1.5b": QWEN | sizes(1536, 8960, 28, 12),
    "7b": QWEN | sizes(3584, 18_944, 28, 28) | {"num_key_value_heads": 4},
    "1b": LLAMA | sizes(2048, 8192, 16, 32),
    "8b": LLAMA | sizes(4096, 14_336, 32, 32),
    "tiny": QWEN | sizes(64, 128, 2, 4) | {"vocab_size": 512},
    "tinier": QWEN | sizes(32, 64, 2, 4) | {"vocab_size": 512},
}
KEPT = 0.8  # share of the draft's tokens that the coin accepts
RULES = {"lossless": Lossless(), f"coin, {KEPT:.0%} accepted": Coin(KEPT)}
VERIFIED = (5, 17)  # tokens of a forward


def build(name: str, dtype: torch.dtype, device: str) -> torch.nn.Module:
    config = AutoConfig.for_model(**SHAPES[name])
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.config.name_or_path = f"random/{name}"
    model.generation_config.eos_token_id = None
    return model


def seconds(call, tokens: int) -> float:
    """Of one token, in the median of three answers."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        call().tolist()  # waits for a GPU, too
        times.append((time.perf_counter() - start) / tokens)
    return float(np.median(times[1:]))


def measure(target: torch.nn.Module, draft: torch.nn.Module, tokens: int) -> Iterator[tuple[str, str]]:
    """Rows of the table: what was measured, and the result."""
    step = forward_seconds(target, 1)
    yield "target, 1 token", f"{1000 * step:.1f} ms"
    for n in VERIFIED:
        yield f"target, {n} tokens", f"{forward_seconds(target, n) / step:.2f} × that"
    yield "draft, 1 token", f"{forward_seconds(draft, 1) / step:.2f} × that"
    ids = torch.randint(0, 512, (1, 64), device=target.device)
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    greedy = seconds(lambda: target.generate(ids, **how), tokens)
    yield "greedy", f"{1 / greedy:.1f} tokens/s"
    compiled = seconds(lambda: target.generate(ids, **how, cache_implementation="static"), tokens)
    yield "greedy, static cache (compiled on a GPU)", f"{greedy / compiled:.2f} × greedy"
    for length in (5, 16):
        draft.generation_config = with_lengths(draft.generation_config, length)
        stock = seconds(lambda: target.generate(ids, assistant_model=draft, **how), tokens)
        yield f"stock, draft length {length}", f"{greedy / stock:.2f} × greedy (nothing is accepted)"
    for compiles in (False, True):
        if compiles:
            compile_step(draft)
        for length, (name, rule) in itertools.product((5, 16, "auto"), RULES.items()):
            judged = JudgedModel(target, rule, length)
            took = seconds(lambda judged=judged: judged.generate(ids, assistant_model=draft, **how), tokens)
            share, total = judged.total.rule_seconds / (4 * tokens * took), judged.total
            drafted = f"{1000 * total.draft_seconds / max(1, total.drafted):.1f} ms a drafted token"
            shown = f"{greedy / took:.2f} × greedy, {total.tokens_per_round:.1f} tokens a round, {drafted}"
            name += f", draft length {length}{', compiled draft' if compiles else ''}"
            yield name, f"{shown}, rule {share:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1.5b/0.5b", "7b/0.5b", "8b/1b"], metavar="TARGET/DRAFT")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer")
    options = parser.parse_args()
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    for shapes in options.shapes:
        models = [build(shape, DTYPES[options.dtype], options.device) for shape in shapes.split("/")]
        print(f"\n{shapes}, {options.dtype}, {name}, torch {torch.__version__}\n\n| | |\n|---|---|")  # noqa: T201
        for row in measure(*models, options.tokens):
            print(f"| {row[0]} | {row[1]} |", flush=True)  # noqa: T201
        del models


if __name__ == "__main__":
    main()
