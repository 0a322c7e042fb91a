"""The job that turns prompts into labels: shard by shard, over several processes, resumed after a kill.

In: prompts, a pair and a folder. Out: a dataset of labels in that folder, with how they were mined beside it.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import PartialState
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedModel

from ..data.prompts import Prompt, Prompts, fingerprint_of, fitting
from ..decoding.judged_model import JudgedModel
from ..forward.branches import packs
from ..forward.lockstep import Tally, run_in_lockstep
from ..judge.features import STATES
from ..judge.layers import LayerStates
from ..models.cpu import precision
from ..models.load import fingerprint
from ..models.pair import LOOKUP, Pair
from ..models.tokens import decoding_greedily, eos_tokens, until_eos
from ..utils.files import check_or_write_settings, read_json
from ..utils.names import absolute_if_folder
from .answers import Answer, read_answers, target_answers
from .config import MiningConfig
from .label_files import FORMAT, load_labels, shard_path, shards_of, too_large, write_shard
from .labels import answers_at_once, label_answer


# Options that decide how much is computed at a time, not what: a run may be resumed with others.
PACE = ("answer_batch", "forward_tokens", "answers_at_once")
ANSWERING = 0.3  # share of the work, for the progress bar

# Writes answers: prompts of shape `(1, prompt_length)` and a limit in tokens -> answers of shape `(answer_length,)`.
Writer = Callable[[Sequence[torch.LongTensor], int], list[torch.LongTensor]]


def mine(
    pair: Pair,
    prompts: Sequence[Prompt],
    config: MiningConfig,
    folder: str | os.PathLike,
    prompts_name: str = "prompts",
    writer: Writer | None = None,
    writer_name: str | None = None,
) -> datasets.Dataset:
    """
    Mine labels: find where the draft disagrees with the target's answers, and label how substituting the draft's
    tokens would change them.
    Each batch of prompts is written to `folder` as soon as it is done; started again with the same settings, mining
    goes on after the last one. Under `accelerate launch` the processes share the batches; `folder` must be one that
    all of them see.

    Args:
        pair ([`Pair`]): Its `draft` is `None` with `config.lookup`.
        config ([`MiningConfig`]): `answer_batch`, `forward_tokens` and `answers_at_once`, set the use of memory and
            may change when mining goes on; labels then differ by rounding only.
        folder (`str`): Where the labels go, with `mining.json`, which says how they were mined.
        prompts_name (`str`, *optional*): What the prompts are called in `mining.json` and on a judge's card.
        writer (`Writer`, *optional*): Writes the answers instead of the target, to mine along text that was decoded
            with a judge ([`judged_writer`]). A prompt's own `answer` takes precedence.
        writer_name (`str`, *optional*): What it is called in `mining.json`.

    Returns:
        `datasets.Dataset`: what [`load_labels`] gives of the folder.

    Raises:
        ValueError: If `folder` holds labels of other settings, the target is recurrent or has no such layer, there is
            both a draft and prompt lookup, or neither, or a prompt cannot be encoded.
        TooLong: If no prompt fits into the context.
        OSError: If `folder` cannot be written.
    """
    _check(pair, prompts, config)
    state, folder = this_process(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    packed, count = packs(pair.target), -(-len(prompts) // config.shard)
    with state.main_process_first():
        settings = _settings(pair, prompts, config, prompts_name, writer_name)
        versions = {name: version(name) for name in ("hf-selfjudge", "transformers", "torch")}
        check_or_write_settings(folder / "mining.json", settings, {"versions": versions}, PACE)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total} prompts"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), disable=not state.is_main_process) as progress:
        bar = progress.add_task(f"Mine labels ({'packed' if packed else 'not packed'})", total=len(prompts))
        for number in range(count):
            begin, end = number * config.shard, min((number + 1) * config.shard, len(prompts))
            shard = shard_path(folder, number, count)
            if number % state.num_processes != state.process_index or shard.is_file():
                progress.advance(bar, end - begin)
                continue
            _mine_shard(pair, prompts[begin:end], config, writer, shard, begin, lambda n: progress.advance(bar, n))
    state.wait_for_everyone()
    return load_labels(folder)


def this_process() -> PartialState:
    """Which of several processes this is; on GPUs it takes its own. To be called before models are loaded."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=30))


def _check(pair: Pair, prompts: Sequence[Prompt], config: MiningConfig) -> None:
    """Refuse, before hours of work, what would fail at some shard."""
    if (pair.draft is None) != bool(config.lookup):
        raise ValueError(
            "`draft`: drafts come from a model or, with `lookup`, from prompt lookup. Give one of the two."
        )
    if pair.target._is_stateful:
        raise ValueError(
            f"`target`: {pair.target.config.name_or_path} keeps a state that cannot go back to an earlier token; "
            "mining, like decoding with a draft, needs a cache of keys and values. Choose another target."
        )
    if config.layer is not None:
        LayerStates(pair.target, config.layer)
    fitting(pair.tokenizer, prompts, pair.context, config.max_new_tokens)


def _settings(
    pair: Pair, prompts: Sequence[Prompt], config: MiningConfig, prompts_name: str, writer_name: str | None
) -> dict:
    """What decides the labels."""
    text_config = pair.target.config.get_text_config()
    return {
        "format": FORMAT,
        "target": absolute_if_folder(pair.target.config.name_or_path),
        "target_fingerprint": fingerprint(pair.target),
        "draft": LOOKUP if pair.draft is None else absolute_if_folder(pair.draft.config.name_or_path),
        "draft_fingerprint": None if pair.draft is None else fingerprint(pair.draft),
        "hidden_size": text_config.hidden_size,
        "vocab_size": text_config.vocab_size,
        "special_tokens": pair.special_tokens,
        "dtype": precision(pair.target),
        "packed": packs(pair.target),
        "prompts": len(prompts),
        "prompts_name": prompts_name,
        "prompts_sha256": fingerprint_of(prompts),
        "prompts_options": prompts.options if isinstance(prompts, Prompts) else {},
        "chat_template_sha256": hashlib.sha256(str(pair.tokenizer.chat_template).encode()).hexdigest(),
        "written_by": writer_name,
        **asdict(config),
    }


def _mine_shard(
    pair: Pair,
    prompts: list[Prompt],
    config: MiningConfig,
    writer: Writer | None,
    shard: Path,
    first: int,
    advance: Callable[[float], None],
) -> None:
    """Mine and write one shard, whose answers are numbered from `first` on. `advance` is called with the number of
    prompts that the work done is worth."""
    since, tally = time.monotonic(), Tally()
    limits = pair.context, config.max_new_tokens
    kept, ids, left_out = fitting(pair.tokenizer, prompts, *limits, may_be_empty=True)
    answers = _answers(pair, kept, [row.to(pair.target.device) for row in ids], config, writer, tally)
    advance(len(prompts) - (1 - ANSWERING) * len(answers))

    def label(model: PreTrainedModel, answer: Answer) -> list[dict]:
        rows = label_answer(model, pair, answer, config)
        answer.cache.clear()
        advance(1 - ANSWERING)
        return rows

    calls = [lambda model, answer=answer: label(model, answer) for answer in answers]
    at_once = answers_at_once(config, packs(pair.target))
    parts = run_in_lockstep([pair.target], calls, at_once=at_once, tally=tally)
    labels = [row | {"answer": number} for number, rows in enumerate(parts, start=first) for row in rows]
    if config.layer is not None and not all(np.isfinite(row[name]).all() for row in labels for name in STATES):
        raise too_large(config.layer)
    counts = {
        "prompts": len(kept),
        "too_long": len(left_out),
        "left_out": left_out,
        "answer_tokens": sum(len(answer.tokens) for answer in answers),
        "substitutions": len(labels),
        "rewrites": sum("rewritten_suffix" in row for row in labels),
        "target_tokens": tally.tokens,  # without those of a writer
        "target_forwards": tally.forwards,
        "seconds": round(time.monotonic() - since, 1),
    }
    hidden_size = pair.target.config.get_text_config().hidden_size
    write_shard(shard, hidden_size, [_row(*item) for item in enumerate(answers, start=first)], labels, counts)


def _row(number: int, answer: Answer) -> dict:
    return {
        "answer": number,
        "prompt_id": answer.prompt.id,
        "category": answer.prompt.category,
        "check": answer.prompt.check,
        "prompt_ids": answer.ids[: answer.prompt_length].tolist(),
        "answer_ids": answer.tokens.tolist(),
        "own": answer.own,
        "finished": answer.finished,
    }


def _answers(
    pair: Pair,
    prompts: list[Prompt],
    ids: list[torch.LongTensor],
    config: MiningConfig,
    writer: Writer | None,
    tally: Tally,
) -> list[Answer]:
    """For each prompt the answer that came with it, or else the writer's, or else the target's own."""
    texts, end = {}, torch.tensor(pair.end_tokens[:1], dtype=torch.long)
    for i, prompt in enumerate(prompts):
        if prompt.answer is not None:
            tokens = pair.tokenizer(prompt.answer, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
            texts[i] = torch.cat([tokens, end])
    unanswered = [i for i in range(len(prompts)) if i not in texts]
    if writer is not None:
        for start in range(0, len(unanswered), config.answer_batch):
            batch = unanswered[start : start + config.answer_batch]
            texts |= zip(batch, writer([ids[i] for i in batch], config.max_new_tokens), strict=True)
        unanswered = []
    own = target_answers(
        pair.target,
        [prompts[i] for i in unanswered],
        [ids[i] for i in unanswered],
        config.max_new_tokens,
        config.runners_up,
        config.answer_batch,
        tally,
    )
    cut = [text[: config.max_new_tokens].to(pair.target.device) for text in texts.values()]
    of_texts = ([prompts[i] for i in texts], [ids[i] for i in texts], cut)
    read = read_answers(pair.target, *of_texts, config.runners_up, tally)
    answers = dict(zip([*unanswered, *texts], [*own, *read], strict=True))
    return [answers[i] for i in range(len(prompts)) if len(answers[i].tokens)]


def counts_of(folder: str | os.PathLike) -> dict:
    """What was counted while mining, summed over the shards, and the ids of all prompts that were `left_out`."""
    shards = [read_json(shard.with_suffix(".json")) for shard in shards_of(folder)]
    left_out = [prompt_id for shard in shards for prompt_id in shard.pop("left_out")]
    return {key: sum(shard[key] for shard in shards) for key in shards[0]} | {"left_out": left_out} if shards else {}


def judged_writer(judged: JudgedModel, draft: PreTrainedModel | None, lookup: int) -> Writer:
    """
    A writer of answers that are decoded greedily with a judge.

    Args:
        draft ([`~transformers.PreTrainedModel`], *optional*): `None` for prompt lookup.
        lookup (`int`): Tokens that prompt lookup proposes in a round.
    """
    drafts = {} if draft is None else {"assistant_model": draft}

    def write(prompts: Sequence[torch.LongTensor], max_new_tokens: int) -> list[torch.LongTensor]:
        width, target = max(row.shape[1] for row in prompts), decoding_greedily(judged.target, max_new_tokens)
        target.generation_config.prompt_lookup_num_tokens = lookup or None
        # Prompts are padded on the left, with any token: the mask hides it.
        shifts = [(width - row.shape[1], 0) for row in prompts]
        ids, mask = (
            torch.cat([torch.nn.functional.pad(row, shift) for row, shift in zip(rows, shifts, strict=True)])
            for rows in (prompts, [torch.ones_like(row) for row in prompts])
        )
        rows = judged.on(target).generate(ids, attention_mask=mask, **drafts)
        return [until_eos(row[width:], eos_tokens(judged.target))[0] for row in rows]

    return write
