"""Mismatch -> what the substitution does to the target's own answer.

In: mismatches. Out: one row for each substitution, with its label and all that training needs, as a `datasets`
dataset. No human label and no reference answer is used: the target finishes its answer after the substitution, and its
own first answer is the yardstick (SelfJudge, https://huggingface.co/papers/2510.02329).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import DynamicCache, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .features import SCALARS, candidate_scalars
from .hidden import HiddenTap
from .mismatches import (
    Answer,
    Mismatches,
    batched,
    eos_tokens,
    find_mismatches,
    greedy,
    left_pad,
    pad_token,
    target_answers,
    until_eos,
)
from .sources import Prompt, fingerprint, precision


NGRAM = 4  # tokens
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass
class Substitution:
    """
    One mismatch, with what the target says of it.

    Args:
        mismatches ([`Mismatches`]), index (`int`): Which one.
        logits (`torch.FloatTensor` of shape `(2, vocab_size)`): The target's, where it is chosen and after it.
        hidden (`torch.Tensor` of shape `(2, hidden_size)`): Its last hidden states *before* and *after* the token.
        rewrite (`torch.LongTensor` of shape `(rewrite_length,)`): How the target goes on after the substitute.
        finished (`bool`): Whether the rewrite ended by itself.
    """

    mismatches: Mismatches
    index: int
    logits: torch.Tensor
    hidden: torch.Tensor
    rewrite: torch.LongTensor
    finished: bool


def final_number(text: str) -> str | None:
    """The number an answer ends in: the last `\\boxed{}` if there is one, else the last number of the text."""
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", text)
    numbers = NUMBER.findall(boxed[-1] if boxed else text)
    if not numbers:
        return None
    number = numbers[-1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def reconvergence(original: list[int], rewritten: list[int]) -> float:
    """Share of the original suffix's 4-grams that the rewritten suffix has, counted with multiplicity; for a suffix
    shorter than that, of its tokens."""
    size = min(NGRAM, max(len(original), 1))
    grams = [tuple(original[i : i + size]) for i in range(len(original) - size + 1)]
    if not grams:
        return 1.0
    rest = [tuple(rewritten[i : i + size]) for i in range(len(rewritten) - size + 1)]
    found = 0
    for gram in grams:
        if gram in rest:
            rest.remove(gram)
            found += 1
    return found / len(grams)


def prefix_cache(answers: list[Answer], lengths: list[int]) -> DynamicCache | None:
    """
    One batch out of the first `lengths[j]` tokens of each answer's cache, right-aligned as `generate` expects of a
    left-padded batch. Keys carry their positions already, so where they lie does not matter.

    Returns:
        The batched cache, or `None` where an answer kept none: such prefixes are computed again.
    """
    if any(answer.cache is None for answer in answers):
        return None
    width, batch = max(lengths), DynamicCache()
    for index in range(len(answers[0].cache)):
        keys, values = (
            torch.stack([
                torch.nn.functional.pad(answer.cache[index][part][:, :n], (0, 0, width - n, 0))
                for answer, n in zip(answers, lengths, strict=True)
            ])
            for part in (0, 1)
        )  # fmt: skip
        batch.update(keys, values, index)
    return batch


@torch.no_grad()
def substitute(
    target: PreTrainedModel, batch: list[tuple[Mismatches, int]], max_new_tokens: int
) -> list[Substitution]:
    """
    Put the draft's token in the place of the target's, look at it as a verification would, and let the target finish
    by itself: one forward and one batch of greedy stock `generate`.

    Args:
        batch (`list[tuple[Mismatches, int]]`): Mismatches and an index into them.
        max_new_tokens (`int`): Limit of each rewrite, tokens.
    """
    prefixes = [m.answer.ids[: m.answer.prompt_length + int(m.positions[k])] for m, k in batch]
    ids, mask = left_pad(
        [torch.cat([p, m.substitutes[k : k + 1]]) for p, (m, k) in zip(prefixes, batch, strict=True)],
        pad_token(target),
    )
    # The state before the substitute belongs to the last token of the prefix: the verification runs over both.
    cache = prefix_cache([m.answer for m, _ in batch], [len(p) - 1 for p in prefixes])
    fed = ids if cache is None else ids[:, -2:]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -fed.shape[1] :]
    with HiddenTap(target, lambda hidden, logits: rows.append((hidden[:, -2:], logits[:, -2:].float()))):
        rows: list[tuple[torch.Tensor, torch.Tensor]] = []
        target(
            fed,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=2,
        )
    ((hidden, logits),) = rows
    if cache is not None:
        cache.crop(-1)  # `generate` wants at least one token that it has not seen
    output = target.generate(
        ids, attention_mask=mask, past_key_values=cache, generation_config=greedy(target, max_new_tokens)
    )
    rewrites = [until_eos(row, eos_tokens(target)) for row in output.sequences[:, ids.shape[1] :]]
    return [Substitution(m, k, logits[j], hidden[j], *rewrites[j]) for j, (m, k) in enumerate(batch)]


def label_row(tokenizer: PreTrainedTokenizerBase, new: Substitution) -> dict:
    """
    Compare the rewritten answer with the original.

    Returns:
        `dict` with `reconvergence` in [0, 1]; `flipped`, whether the final number changed (`None` where the prompt is
        not checked by number, or one of the two answers did not end); and `changed` in [0, 1], the label: `flipped`
        where it is known, else 1 − `reconvergence`.
    """
    m, position = new.mismatches, int(new.mismatches.positions[new.index])
    original, suffix = m.answer.tokens.tolist(), new.rewrite.tolist()
    rewritten = [*original[:position], int(m.substitutes[new.index]), *suffix]
    share = reconvergence(original[position + 1 :], suffix)
    flipped = None
    if m.answer.prompt.check == "number" and m.answer.finished and new.finished:
        before, after = (final_number(tokenizer.decode(t, skip_special_tokens=True)) for t in (original, rewritten))
        flipped = before != after
    return {
        "reconvergence": share,
        "flipped": flipped,
        "changed": float(flipped) if flipped is not None else 1.0 - share,
        "rewritten_ids": rewritten,
    }


def feature_row(new: Substitution) -> dict:
    """What the judge will see of a substitution, and the cheap scores that it is compared with."""
    m, k = new.mismatches, new.index
    token, position = m.substitutes[k], m.positions[k]
    scalars = candidate_scalars(new.logits[:1], token[None], new.logits[1:], position[None])
    logprobs, draft_logprobs = new.logits[0].log_softmax(-1), m.draft_logits[k].log_softmax(-1)
    return {
        "prompt_id": m.answer.prompt.id,
        "category": m.answer.prompt.category,
        "check": m.answer.prompt.check,
        "position": int(position),
        "token": int(m.answer.tokens[position]),
        "substitute": int(token),
        "answer_ids": m.answer.tokens.tolist(),
        "finished": m.answer.finished,
        "mismatches": m.total,
        "scalars": scalars[0].tolist(),
        "draft_logprob": float(draft_logprobs[token]),
        "kl_target_draft": float((logprobs.exp() * (logprobs - draft_logprobs)).sum()),
        "kl_draft_target": float((draft_logprobs.exp() * (draft_logprobs - logprobs)).sum()),
        "hidden_before": new.hidden[0].half().cpu().numpy(),
        "hidden_after": new.hidden[1].half().cpu().numpy(),
    }


def features_of(hidden_size: int) -> datasets.Features:
    """Column types of a labels dataset."""
    value, ids = datasets.Value, datasets.List(datasets.Value("int32"))
    return datasets.Features(
        {
            **dict.fromkeys(("prompt_id", "category", "check"), value("string")),
            **dict.fromkeys(("position", "token", "substitute", "mismatches"), value("int32")),
            "answer_ids": ids,
            "rewritten_ids": ids,
            "finished": value("bool"),
            "flipped": value("bool"),
            **dict.fromkeys(("reconvergence", "changed", "draft_logprob"), value("float32")),
            **dict.fromkeys(("kl_target_draft", "kl_draft_target"), value("float32")),
            "scalars": datasets.List(value("float32"), length=len(SCALARS)),
            **dict.fromkeys(("hidden_before", "hidden_after"), datasets.List(value("float16"), length=hidden_size)),
        }
    )


@dataclass(frozen=True)
class MiningConfig:
    """
    How labels are mined.

    Args:
        max_new_tokens (`int`): Limit of an answer, tokens.
        per_answer (`int`): Substitutions to rewrite in each answer.
        answer_batch (`int`): Prompts answered at once; their rewrites are pooled, so that a batch ends together.
        rewrite_batch (`int`): Rewrites generated at once.
        seed (`int`): Of the sample of mismatches.
    """

    max_new_tokens: int = 256
    per_answer: int = 8
    answer_batch: int = 32
    rewrite_batch: int = 32
    seed: int = 0


def mine(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    config: MiningConfig,
    folder: str | os.PathLike,
    prompts_name: str = "prompts",
) -> datasets.Dataset:
    """
    Prompts -> mismatches -> labels, with a progress bar. Each batch of prompts is written to `folder` as one Parquet
    shard as soon as it is done; started again with the same settings, mining goes on after the last one.

    Args:
        config ([`MiningConfig`]): How.
        folder (`str`): Where the shards go, with `mining.json` beside them.
        prompts_name (`str`, *optional*): What to call the prompts in `mining.json` and on a judge's card.

    Returns:
        `datasets.Dataset`, one row for each substitution; columns of [`features_of`].

    Raises:
        ValueError: If `folder` holds labels of other settings.
        OSError: If `folder` cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    never = special_tokens(target, tokenizer)
    _claim(folder, target, draft, never, prompts, prompts_name, config)
    features = features_of(target.config.get_text_config().hidden_size)
    chunks = list(batched(prompts, config.answer_batch))
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total} prompts"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        bar = progress.add_task("Mine labels", total=len(prompts))
        for number, chunk in enumerate(chunks):
            shard = folder / f"labels-{number:05d}-of-{len(chunks):05d}.parquet"
            if shard.is_file():
                progress.advance(bar, len(chunk))
                continue
            answers = target_answers(target, tokenizer, chunk, config.max_new_tokens)
            progress.advance(bar, len(chunk) * 0.2)  # the rewrites are most of the work
            found = [find_mismatches(draft, a, never, config.per_answer, config.seed) for a in answers]
            rows: list[dict] = []
            for labelled, of in _label([m for m in found if len(m)], target, tokenizer, config):
                rows += labelled
                progress.advance(bar, len(chunk) * 0.8 / of)
            incomplete = shard.with_suffix(".incomplete")
            datasets.Dataset.from_list(rows, features=features).to_parquet(incomplete)
            incomplete.rename(shard)
    return load_labels(folder)


def load_labels(folder: str | os.PathLike) -> datasets.Dataset:
    """
    Read the shards that [`mine`] wrote.

    Raises:
        FileNotFoundError: If there are none.
    """
    shards = sorted(str(path) for path in Path(folder).glob("labels-*.parquet"))
    if not shards:
        raise FileNotFoundError(f"`labels`: no labels-*.parquet in {folder}. Make them with `hf-selfjudge mine`.")
    return datasets.Dataset.from_parquet(shards)


def special_tokens(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that no rule may accept against the target, nor overrule: EOS and every other special token."""
    return sorted({*tokenizer.all_special_ids, *eos_tokens(target)})


def _claim(
    folder: Path,
    target: PreTrainedModel,
    draft: PreTrainedModel,
    never: list[int],
    prompts: list[Prompt],
    prompts_name: str,
    config: MiningConfig,
) -> None:
    """Write the settings beside the shards, or compare with those that are there."""
    settings = {
        "target": target.config.name_or_path,
        "target_fingerprint": fingerprint(target),
        "draft": draft.config.name_or_path,
        "draft_fingerprint": fingerprint(draft),
        "hidden_size": target.config.get_text_config().hidden_size,
        "vocab_size": target.config.get_text_config().vocab_size,
        "special_tokens": never,
        "dtype": precision(target),
        "prompts": len(prompts),
        "prompts_name": prompts_name,
        "prompts_sha256": hashlib.sha256(json.dumps([asdict(p) for p in prompts]).encode()).hexdigest(),
        **asdict(config),
    }
    path = folder / "mining.json"
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if other := [
            f"{key}: {before.get(key)!r} there, {value!r} now"
            for key, value in settings.items()
            if before.get(key) != value
        ]:
            raise ValueError(
                f"`output` {folder} holds labels of other settings ({'; '.join(other)}). Choose another folder or "
                "remove it."
            )
        return
    incomplete = path.with_suffix(".incomplete")
    incomplete.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    incomplete.rename(path)


def _label(
    found: list[Mismatches], target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: MiningConfig
) -> Iterator[tuple[list[dict], int]]:
    """Rewrite all substitutions, longest first so that a batch ends together; yield rows and the number of batches."""

    def left(item: tuple[Mismatches, int]) -> int:
        return len(item[0].answer.tokens) - int(item[0].positions[item[1]]) - 1

    pool = sorted(((m, k) for m in found for k in range(len(m))), key=left, reverse=True)
    batches = list(batched(pool, config.rewrite_batch))
    for batch in batches:
        # A rewrite may take a quarter longer than what it replaces; one that runs on keeps the whole batch waiting.
        limit = min(left(batch[0]) * 5 // 4 + 16, config.max_new_tokens)
        done = substitute(target, batch, limit)
        yield [feature_row(new) | label_row(tokenizer, new) for new in done], len(batches)
