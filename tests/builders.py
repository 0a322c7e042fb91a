"""Tiny random models, tokenizers and judges, built from a config and a seed: nothing is downloaded."""

import copy
import json
import os
import string
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hf_selfjudge import Judge, JudgeConfig, JudgeTrainer
from hf_selfjudge.data.prompts import Prompt
from hf_selfjudge.judge.card import write_card
from hf_selfjudge.judge.features import SCALARS, STATES
from hf_selfjudge.judge.info import JudgeInfo
from hf_selfjudge.judge.lora import Adapter
from hf_selfjudge.mining.config import MiningConfig
from hf_selfjudge.mining.label_files import (
    ANSWER_FEATURES,
    FORMAT,
    join_answers,
    labels_features,
    write_shard,
)
from hf_selfjudge.models.load import fingerprint
from hf_selfjudge.training.model import adapter_of


VOCAB, HIDDEN = 64, 32
SIZES = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
NO_EOS = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}


def build(architecture: str, **sizes) -> torch.nn.Module:
    torch.manual_seed(0)
    if architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES | sizes, **HEADS, **NO_EOS))
    elif architecture == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES, **HEADS, **NO_EOS))
    elif architecture == "gemma3":
        layers = ["sliding_attention", "full_attention"]
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(**SIZES, **HEADS, **NO_EOS, head_dim=8, sliding_window=8, layer_types=layers)
        )
    else:
        sizes = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 256, **sizes}
        model = GPT2LMHeadModel(GPT2Config(**sizes, **NO_EOS))
    model.config.name_or_path = f"tiny/{architecture}"
    # Sharper than at initialisation, so that choices are clear and the draft's noise flips only some of them.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.eval()


def perturbed(model: torch.nn.Module, noise: float = 0.02, seed: int = 1) -> torch.nn.Module:
    """A draft that agrees with the target most of the time."""
    draft = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    draft.config.name_or_path = f"{model.config.name_or_path}-draft"
    draft.generation_config.num_assistant_tokens = 5
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    return draft


def shortened(model: GPT2LMHeadModel, context: int) -> GPT2LMHeadModel:
    """A draft that is the same model with fewer positions, and cannot read beyond them."""
    short = build("gpt2", n_positions=context)
    with torch.no_grad():
        for own, other in zip(short.parameters(), model.parameters(), strict=True):
            own.copy_(other[: len(own)])
    short.config.name_or_path = f"{model.config.name_or_path}-draft"
    short.generation_config.assistant_confidence_threshold = 0.0
    return short


def random_judge(target: torch.nn.Module, special_tokens: tuple[int, ...] = (), seed: int = 3) -> Judge:
    config = target.config.get_text_config()
    judge = Judge(
        JudgeInfo(
            target=target.config.name_or_path,
            target_fingerprint=fingerprint(target),
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            draft=f"{target.config.name_or_path}-draft",
            special_tokens=list(special_tokens),
            components=4,
            threshold=0.5,
        )
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        judge.projection.copy_(torch.randn(judge.projection.shape, generator=generator) / config.hidden_size**0.5)
        judge.head.weight.copy_(torch.randn(judge.head.weight.shape, generator=generator))
        judge.head.weight[:, : len(SCALARS)] *= 0.1
        judge.head.bias.zero_()
    return judge


def adapter(model: torch.nn.Module, layers: tuple[int, ...] = (1,), seed: int = 0) -> Adapter:
    """A random LoRA adapter that changes what a model computes."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], layers_to_transform=list(layers))
    config.layers_pattern = "layers"
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    lora = adapter_of(adapted)
    adapted.unload()
    return lora


def adapted_judge(target: torch.nn.Module, lora: Adapter) -> Judge:
    """A random judge with an adapter."""
    judge = random_judge(target)
    judge.adapter, judge.info = lora, replace(judge.info, adapter=True)
    return judge


def card_of(judge: Judge, folder: Path) -> Path:
    """Write the judge's card into a folder."""
    return write_card(folder, judge.info, fingerprint(judge))


class Collect:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


class Pace:
    """A target whose forwards wait at a gate from the `first` on, and are counted."""

    def __init__(self, model):
        self.model, self.calls, self.first, self.gate = copy.copy(model), 0, 1, threading.Event()
        self.gate.set()
        forward = model.forward

        def paced(*args, **kwargs):
            self.calls += 1
            if self.calls >= self.first:
                assert self.gate.wait(60)
                time.sleep(0.02)
            return forward(*args, **kwargs)

        self.model.forward = paced

    def hold_from(self, first: int) -> None:
        self.calls, self.first = 0, first
        self.gate.clear()


CHARACTERS = string.ascii_lowercase + string.digits + " .,?!:;-+*/()=\n"


def tiny_tokenizer(characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """One token a character; 0 is unknown, 1 ends the text."""
    vocabulary = {"<unk>": 0, "<eos>": 1} | {c: i for i, c in enumerate(characters, start=2)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>")


WORDS = ("the", "sky", "looks", "blue", "because")


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Decodes as Llama's does: `▁` is a space, dropped where a text begins, and characters may come as bytes."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *string.ascii_letters]
    vocabulary += [f"▁{word}" for word in WORDS]
    index = {token: i for i, token in enumerate(vocabulary)}
    core = Tokenizer(models.BPE(index, [], unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Decodes as GPT-2's does: a token is some bytes."""
    vocabulary = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"Ġ{word}" for word in WORDS)]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


# Small enough to mine in a second.
MINING = MiningConfig(
    max_new_tokens=24, top=2, floor=0.0, per_answer=8, rewrites=3, window=5, shard=2, answer_batch=2,
    answers_at_once=2, forward_tokens=16,
)  # fmt: skip
PROMPTS = [Prompt("a", "why is it so?"), Prompt("b", "how many?", check="number"), Prompt("c", "x + y = z, is it?")]


def midway_judge(target: torch.nn.Module, layer: int = 1) -> Judge:
    """A judge of what enters a layer."""
    judge = random_judge(target)
    judge.info = replace(judge.info, layer=layer)
    return judge


def greedy(target: torch.nn.Module, ids: torch.LongTensor, limit: int) -> list[int]:
    """How stock `generate` goes on behind tokens of shape `(length,)`."""
    if limit == 0:
        return []
    out = target.generate(
        ids[None], attention_mask=torch.ones_like(ids[None]), max_new_tokens=limit, do_sample=False, pad_token_id=0
    )
    return out[0, len(ids) :].tolist()


def labels_dataset(answers: list[dict], rows: list[dict], hidden_size: int, **record) -> datasets.Dataset:
    """Labels as `load_labels` gives them, of rows of answers and of substitutions, and how they were mined."""
    tables = []
    for part, features in ((rows, labels_features(hidden_size)), (answers, ANSWER_FEATURES)):
        columns = {name: [row.get(name) for row in part] for name in features}
        tables.append(datasets.Dataset.from_dict(columns, features=features))
    pair = {"target": "tiny/llama", "target_fingerprint": "f" * 16, "draft": "tiny/llama-draft", "layer": None}
    sizes = {"hidden_size": hidden_size, "vocab_size": VOCAB, "special_tokens": [1], "end_tokens": [1]}
    return join_answers(tables[0], tables[1].data.table, {"source": "labels", **pair, **sizes, **record})


# Labels and judges trained on them -------------------------------------------------------------------------------

LABELS_HIDDEN = 24  # of `write_labels`
MINING_RECORD = {
    **{"format": FORMAT, "target": "tiny/llama", "target_fingerprint": "f" * 16, "draft": "tiny/draft"},
    **{"draft_fingerprint": "e" * 16, "layer": None, "hidden_size": LABELS_HIDDEN, "vocab_size": VOCAB},
    **{"special_tokens": [1], "end_tokens": [1], "dtype": "float32", "max_new_tokens": 8},
    **{"prompts": 40, "prompts_sha256": "0" * 64},
    **{"per_answer": 6, "seed": 0, "prompts_name": "prompts.jsonl", "answer_batch": 4, "rewrite_batch": 8},
}


def write_labels(folder: Path, prompts: int = 40, target: str = "tiny/llama", seed: int = 0) -> Path:
    """Meaning changes where the hidden state *before* the token points one way; the margin has no influence."""
    rng = np.random.default_rng(seed)
    answers, rows = [], []
    for prompt in range(prompts):
        checked = prompt % 2 == 0
        answers.append(
            {
                **{"answer": prompt, "prompt_id": f"{seed}-{prompt}", "category": "-", "own": True, "finished": True},
                **{"check": "number" if checked else "text", "prompt_ids": [7, 8, 9], "answer_ids": [3, 5]},
            }
        )
        for position in range(6):
            before, after = rng.normal(size=(2, LABELS_HIDDEN)) * np.linspace(3, 0.1, LABELS_HIDDEN)
            changed = bool(before[0] + 0.3 * rng.normal() > 3)
            rows.append(
                {
                    **{"answer": prompt, "kind": "mismatch", "draft_rank": 0, "rewrite_finished": True},
                    **{"margin": 0.0, "likelihood": float(before[0]), "confidence": float(after[0])},
                    **{"position": position, "token": 3, "substitute": 4, "mismatches": 6},
                    **{"rewritten_suffix": [5], "flipped": changed if checked else None},
                    **{"reconvergence": 1 - 0.8 * changed, "changed": float(changed) if checked else 0.8 * changed},
                    **dict.fromkeys(("draft_logprob", "kl_target_draft", "kl_draft_target"), 0.0),
                    "scalars": rng.normal(size=len(SCALARS)).tolist(),
                    "hidden_before": before.astype(np.float16),
                    "hidden_after": after.astype(np.float16),
                }
            )
    return labels_folder(folder, answers, rows, target=target, prompts=prompts, seed=seed)


def labels_folder(folder: Path, answers: list[dict], rows: list[dict], **record) -> Path:
    """A folder of labels of rows of answers and of substitutions, with `record` in its `mining.json`."""
    folder.mkdir()
    write_shard(folder / "labels-00000-of-00001.parquet", LABELS_HIDDEN, answers, rows, {})
    (folder / "mining.json").write_text(json.dumps(MINING_RECORD | record))
    return folder


def write_answer_labels(folder: Path, target: torch.nn.Module) -> Path:
    """Labels of a tiny target whose answers differ, for training through it."""
    rng, answers, rows = np.random.default_rng(0), [], []
    for prompt in range(12):
        tokens = rng.integers(10, 60, 9).tolist()
        answers.append(
            {
                **{"answer": prompt, "prompt_id": str(prompt), "category": "-", "check": "number"},
                **{"prompt_ids": [7, 8, 9], "answer_ids": tokens[: 7 + prompt % 3]},
            }
        )
        for position in (1, 4, 6):
            rows.append(
                {
                    **{"answer": prompt, "kind": "mismatch", "position": position},
                    **{"substitute": int(rng.integers(10, 60)), "changed": float(rng.random() < 0.5)},
                    "scalars": rng.normal(size=len(SCALARS)).tolist(),
                    **{name: rng.normal(size=HIDDEN).astype(np.float16) for name in STATES},
                }
            )
    folder.mkdir()
    write_shard(folder / "labels-00000-of-00001.parquet", HIDDEN, answers, rows, {})
    record = MINING_RECORD | {"hidden_size": HIDDEN, "target_fingerprint": fingerprint(target), "prompts": 12}
    (folder / "mining.json").write_text(json.dumps(record))
    return folder


# What the command does, and which process did it.
COMMAND = """
from accelerate import PartialState
from hf_selfjudge.cli.app import main
try:
    main()
finally:
    state = PartialState()
    print(f"process {state.process_index} of {state.num_processes}\\n", end="")  # one write: others print too
"""


def in_processes(count: int, words: list) -> subprocess.CompletedProcess:
    """The console script in several processes of one thread each, as a launcher starts them."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "run.py")
        script.write_text(COMMAND)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        return subprocess.run(
            [sys.executable, *(launcher if count > 1 else []), script, *map(str, words)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
        )


TRAINING = {
    **{"components": 20, "max_steps": 200, "learning_rate": 0.03, "prior": 1.0},
    **{"disable_tqdm": True, "use_cpu": True},
}


def training_config(folder: Path, **options) -> JudgeConfig:
    """Options with which training takes a second."""
    return JudgeConfig(str(folder), **TRAINING | options)


class Padding:
    """What the trainer reads of a tokenizer."""

    pad_token_id, eos_token_id, all_special_ids, added_tokens_decoder = 0, None, [1], {}
    model_input_names = ("input_ids",)


def lora(**options) -> LoraConfig:
    modules = ["q_proj", "v_proj"]
    return LoraConfig(r=4, target_modules=modules, layers_to_transform=[2], layers_pattern="layers", **options)


def through(
    target: torch.nn.Module, answers: datasets.Dataset, folder: Path, peft_config=None, eval_dataset=None, **options
) -> JudgeTrainer:
    """A trainer of a judge through a tiny target."""
    options = {"components": 4, "max_steps": 6, "per_device_train_batch_size": 4} | options
    return JudgeTrainer(
        target,
        training_config(folder, **options),
        train_dataset=answers,
        eval_dataset=eval_dataset,
        processing_class=Padding(),
        peft_config=peft_config,
    )


# What `hf-selfjudge quickstart --json` writes.
RESULTS = {
    **{"pair": "tiny", "prompts": 2, "max_new_tokens": 8, "draft_length": 5, "threshold": 0.3},
    **{"dtype": "float32", "device": "cpu", "judged_against_lossless": [1.1, 1.0, 1.2]},
    "runs": [
        {"decoding": name, "judged_share": 0.1, "speed_against_greedy": [2.0, 1.5, 2.5], "final_answers": [3, 4]}
        | dict.fromkeys(("tokens_per_second", "seconds_per_answer", "tokens_per_answer"), 2.0)
        | dict.fromkeys(("tokens_per_round", "agreement", "logprob_per_token"), 1.0)
        for name in ("greedy", "assisted", "lossless", "judged")
    ],
}
