"""The job that turns prompts into labels: shard by shard, over processes, and on after a kill.

In: prompts, a pair, a folder. Out: a dataset of labels in that folder, and how it was made beside it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..data.prompts import Prompt, Prompts, fingerprint_of, fitting, none_fits
from ..decoding.judged_model import JudgedModel
from ..forward.branches import packs
from ..forward.lockstep import Tally, run_in_lockstep
from ..models.cpu import precision
from ..models.load import fingerprint
from ..models.pair import LOOKUP
from ..models.tokens import context_of, decoding_greedily, eos_tokens, special_tokens, until_eos
from ..utils.files import atomic_write, check_or_write_settings, read_json, write_json
from ..utils.names import lasting
from .labels import MiningConfig, features_of, label_answer, load_labels, shards_of
from .substitutions import Answer, batched, read_answers, target_answers


# Settings that decide how much is computed at a time, and not what: a run may go on with others.
PACE = ("answer_batch", "forward_tokens", "answers_at_once")

# Writes answers: prompts of shape `(1, prompt_length)` and a limit in tokens -> answers of shape `(answer_length,)`.
Writer = Callable[[Sequence[torch.LongTensor], int], list[torch.LongTensor]]


def mine(
    target: PreTrainedModel,
    draft: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    config: MiningConfig,
    folder: str | os.PathLike,
    prompts_name: str = "prompts",
    writer: Writer | None = None,
    writer_name: str | None = None,
) -> datasets.Dataset:
    """
    Prompts -> mismatches -> labels, with a progress bar. Each batch of prompts is written to `folder` as one Parquet
    shard as soon as it is done; started again with the same settings, mining goes on after the last one. Under
    `accelerate launch` the processes share the shards; `folder` must be one that all of them see.

    Args:
        draft ([`~transformers.PreTrainedModel`], *optional*): `None` with `config.lookup`.
        config ([`MiningConfig`]): How. What decides the need of memory (`answer_batch`, `forward_tokens`,
            `answers_at_once`) may differ from the start; what is computed stays the same, to rounding.
        folder (`str`): Where the shards go, with `mining.json` beside them, and for each shard what was counted.
        prompts_name (`str`, *optional*): What to call the prompts in `mining.json` and on a judge's card.
        writer (`Writer`, *optional*): Who answers, if not the target: a judged model, for labels along its own text.
            A prompt's own `answer` goes before both.
        writer_name (`str`, *optional*): What to call it in `mining.json`.

    Returns:
        `datasets.Dataset`, one row for each substitution; columns of [`features_of`].

    Raises:
        ValueError: If `folder` holds labels of other settings, the target is recurrent, the draft has another
            vocabulary, there is both a draft and prompt lookup, or neither, or a prompt cannot be encoded.
        TooLong: If no prompt fits.
        OSError: If `folder` cannot be written.
    """
    if (draft is None) != bool(config.lookup):
        raise ValueError(
            "`draft`: drafts come from a model or, with `lookup`, from prompt lookup. Give one of the two."
        )
    sizes = [model.config.get_text_config().vocab_size for model in (target, draft) if model is not None]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"`draft` has a vocabulary of {sizes[1]} tokens, the target one of {sizes[0]}. Mining compares them token "
            "by token: use a draft with the target's tokenizer; `fit_vocabulary` gives it as many embeddings."
        )
    if target._is_stateful:
        raise ValueError(
            f"`target`: {target.config.name_or_path} keeps a state that cannot go back to an earlier token; mining, "
            "like decoding with a draft, needs a cache of keys and values. Choose another target."
        )
    # All of them, before hours of work on those that come first.
    fit, _, left_out = fitting(tokenizer, prompts, context_of(target), config.max_new_tokens)
    if not fit:
        raise none_fits(len(left_out), context_of(target), config.max_new_tokens)
    state, folder = this_process(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    never, packed = special_tokens(target, tokenizer), packs(target)
    with state.main_process_first():
        _claim(folder, target, draft, tokenizer, never, packed, prompts, prompts_name, writer_name, config)
    shards = -(-len(prompts) // config.shard)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total} prompts"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), disable=not state.is_main_process) as progress:
        bar = progress.add_task(f"Mine labels ({'packed' if packed else 'not packed'})", total=len(prompts))
        for number in range(shards):
            begin, end = number * config.shard, min((number + 1) * config.shard, len(prompts))
            shard = folder / f"labels-{number:05d}-of-{shards:05d}.parquet"
            if number % state.num_processes == state.process_index and not shard.is_file():
                advance = functools.partial(progress.advance, bar)
                _mine_shard(
                    target, draft, tokenizer, prompts[begin:end], config, never, packed, writer, shard, advance
                )
            else:
                progress.advance(bar, end - begin)
    state.wait_for_everyone()
    return load_labels(folder)


def this_process() -> PartialState:
    """Which of several processes this is; on GPUs it takes its own. To be asked before models are loaded."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=30))


def _mine_shard(
    target: PreTrainedModel,
    draft: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    config: MiningConfig,
    never: list[int],
    packed: bool,
    writer: Writer | None,
    shard: Path,
    advance: Callable[[float], None],
) -> None:
    """Mine and write one shard; `advance` is told how many prompts' worth of work was done."""
    since, tally = time.monotonic(), Tally()
    kept, ids, left_out = fitting(tokenizer, prompts, context_of(target), config.max_new_tokens)
    ids = [row.to(target.device) for row in ids]
    answers = _answers(target, tokenizer, kept, ids, config, writer, tally)
    advance(len(prompts) - 0.7 * len(answers))  # answering is about a third of the work

    def label(model: PreTrainedModel, answer: Answer) -> list[dict]:
        rows = label_answer(model, draft, tokenizer, answer, never, config, packed)
        answer.cache.clear()
        advance(0.7)
        return rows

    calls = [lambda model, answer=answer: label(model, answer) for answer in answers]
    rows = list(chain(*run_in_lockstep([target], calls, at_once=config.at_once(packed), tally=tally)))
    counts = {
        "prompts": len(kept),
        "too_long": len(left_out),
        "left_out": left_out,
        "answer_tokens": sum(len(answer.tokens) for answer in answers),
        "substitutions": len(rows),
        "rewrites": sum("rewritten_ids" in row for row in rows),
        "target_tokens": tally.tokens,  # a writer's own not among them
        "target_forwards": tally.forwards,
        "seconds": round(time.monotonic() - since, 1),
    }
    write_json(shard.with_suffix(".json"), counts)
    columns = features_of(target.config.get_text_config().hidden_size)
    table = {name: [row.get(name) for row in rows] for name in columns}
    with atomic_write(shard) as incomplete:
        datasets.Dataset.from_dict(table, features=columns).to_parquet(incomplete)


def _answers(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    ids: list[torch.LongTensor],
    config: MiningConfig,
    writer: Writer | None,
    tally: Tally,
) -> list[Answer]:
    """For each prompt the answer that came with it, or the writer's, or the target's own."""
    given = {
        i: tokenizer(prompt.answer, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        for i, prompt in enumerate(prompts)
        if prompt.answer is not None
    }
    rest = [i for i in range(len(prompts)) if i not in given]
    if eos := eos_tokens(target):
        given = {i: torch.cat([text, text.new_tensor(eos[:1])]) for i, text in given.items()}
    if writer is not None:
        for some in batched(rest, config.answer_batch):
            given |= zip(some, writer([ids[i] for i in some], config.max_new_tokens), strict=True)
        rest = []
    own = target_answers(
        target,
        [prompts[i] for i in rest],
        [ids[i] for i in rest],
        config.max_new_tokens,
        config.runners_up,
        config.answer_batch,
        tally,
    )
    read = read_answers(
        target,
        [prompts[i] for i in given],
        [ids[i] for i in given],
        [text[: config.max_new_tokens].to(target.device) for text in given.values()],
        config.runners_up,
        tally,
    )
    answers = dict(zip([*rest, *given], [*own, *read], strict=True))
    return [answers[i] for i in range(len(prompts)) if len(answers[i].tokens)]


def counts_of(folder: str | os.PathLike) -> dict:
    """What was counted while mining, summed over the shards, and the ids of all that were `left_out`."""
    counted = [path for shard in shards_of(folder) if (path := shard.with_suffix(".json")).is_file()]
    shards = [read_json(path) for path in counted]
    left_out = [name for shard in shards for name in shard.pop("left_out", [])]  # earlier versions named none
    return {key: sum(shard[key] for shard in shards) for key in shards[0]} | {"left_out": left_out} if shards else {}


def _claim(
    folder: Path,
    target: PreTrainedModel,
    draft: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    never: list[int],
    packed: bool,
    prompts: Sequence[Prompt],
    prompts_name: str,
    writer_name: str | None,
    config: MiningConfig,
) -> None:
    """Write the settings beside the shards, or compare with those that are there."""
    text_config = target.config.get_text_config()
    settings = {
        "target": lasting(target.config.name_or_path),
        "target_fingerprint": fingerprint(target),
        "draft": LOOKUP if draft is None else lasting(draft.config.name_or_path),
        "draft_fingerprint": None if draft is None else fingerprint(draft),
        "hidden_size": text_config.hidden_size,
        "vocab_size": text_config.vocab_size,
        "special_tokens": never,
        "layer": None,  # of the hidden states, see `reread`
        "dtype": precision(target),
        "packed": packed,
        "prompts": len(prompts),
        "prompts_name": prompts_name,
        "prompts_sha256": fingerprint_of(prompts),
        "prompts_options": prompts.options if isinstance(prompts, Prompts) else {},
        "chat_template_sha256": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
        "written_by": writer_name,
        **asdict(config),
    }
    versions = {name: version(name) for name in ("hf-selfjudge", "transformers", "torch")}
    check_or_write_settings(folder / "mining.json", settings, {"versions": versions}, PACE)


def judged_writer(judged: JudgedModel, draft: PreTrainedModel | None, lookup: int) -> Writer:
    """Answers that are decoded with a judge, greedily; without a draft, `lookup` tokens are looked up in a round."""
    drafts = {} if draft is None else {"assistant_model": draft}

    def write(prompts: Sequence[torch.LongTensor], max_new_tokens: int) -> list[torch.LongTensor]:
        width, target = max(row.shape[1] for row in prompts), decoding_greedily(judged.target, max_new_tokens)
        ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in prompts])
        mask = torch.cat([torch.nn.functional.pad(torch.ones_like(r), (width - r.shape[1], 0)) for r in prompts])
        target.generation_config.prompt_lookup_num_tokens = lookup or None
        rows = judged.on(target).generate(ids, attention_mask=mask, **drafts)
        return [until_eos(row[width:], eos_tokens(judged.target))[0] for row in rows]

    return write
