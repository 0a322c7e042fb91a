"""In: prompts, a pair and a folder. Out: labels in that folder, written shard by shard by one or several processes. A
run that was stopped continues after the last complete shard."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path

import datasets
import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
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
from ..utils.processes import this_process
from ..utils.progress import progress_bar
from .answers import Answer, read_answers, target_answers
from .config import MiningConfig
from .label_files import FORMAT, load_labels, shards_of, too_large, write_shard
from .labels import answers_at_once, has_result, label_answer, label_rounds


# Options that decide how much is computed at a time, not what: they may change when a run continues.
PACE = ("answer_batch", "forward_tokens", "answers_at_once")
ANSWERING = 0.3  # share of the work, for the progress bar


def mine(
    pair: Pair,
    prompts: Sequence[Prompt],
    config: MiningConfig,
    folder: str | os.PathLike,
    prompts_name: str = "prompts",
    judged: JudgedModel | None = None,
    judge_name: str | None = None,
) -> datasets.Dataset:
    """
    Mine labels: find where the draft disagrees with the target's answers, and label how substituting the draft's
    tokens would change them. Each shard of prompts is written as soon as it is done; started again with the same
    settings, mining continues after the last one. Under `accelerate launch` the processes share the shards.

    Args:
        pair ([`Pair`]): Its `draft` is `None` with `config.lookup`.
        config ([`MiningConfig`]): `answer_batch`, `forward_tokens` and `answers_at_once` limit memory and may change
            when mining continues; labels then differ by rounding only.
        folder (`str`): For the labels and `mining.json`, which says how they were mined. All processes must see it.
        prompts_name (`str`, *optional*): The prompts' name in `mining.json` and on a judge's card.
        judged ([`JudgedModel`], *optional*): Decodes the answers, instead of the target alone.
        judge_name (`str`, *optional*): The judge's name in `mining.json`.

    Returns:
        `datasets.Dataset`: what [`load_labels`] returns for the folder.

    Raises:
        ValueError: If `folder` holds labels of other settings, the target is recurrent or has no such layer, there is
            both a draft and prompt lookup, or neither, or a prompt cannot be encoded.
        TooLong: If no prompt fits into the context.
        OSError: If `folder` cannot be written.
    """
    _check(pair, prompts, config, judged)
    state, folder = this_process(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    packed, count = packs(pair.target), -(-len(prompts) // config.shard)
    with state.main_process_first():
        settings = _settings(pair, prompts, config, prompts_name, judge_name)
        versions = {name: version(name) for name in ("hf-selfjudge", "transformers", "torch")}
        check_or_write_settings(folder / "mining.json", settings, {"versions": versions}, PACE)
    description = f"Label prompts ({'packed' if packed else 'not packed'})"
    with progress_bar(len(prompts), description, shown=state.is_main_process) as bar:
        for number in range(count):
            begin, end = number * config.shard, min((number + 1) * config.shard, len(prompts))
            shard = folder / f"labels-{number:05d}-of-{count:05d}.parquet"
            if number % state.num_processes != state.process_index or shard.is_file():
                bar.update(end - begin)
                continue
            _mine_shard(pair, prompts[begin:end], config, judged, shard, begin, bar.update)
    state.wait_for_everyone()
    return load_labels(folder)


def _check(pair: Pair, prompts: Sequence[Prompt], config: MiningConfig, judged: JudgedModel | None) -> None:
    """Refuse, before hours of work, what would fail in some shard."""
    if config.rounds and (judged is not None or any(prompt.answer is not None for prompt in prompts)):
        raise ValueError(
            "`rounds` are those of the target's own answers. Mine them without a judge, on prompts without answers."
        )
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
    pair: Pair, prompts: Sequence[Prompt], config: MiningConfig, prompts_name: str, judge_name: str | None
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
        "end_tokens": pair.end_tokens,
        "dtype": precision(pair.target),
        "packed": packs(pair.target),
        "prompts": len(prompts),
        "prompts_name": prompts_name,
        "prompts_sha256": fingerprint_of(prompts),
        "prompts_options": prompts.options if isinstance(prompts, Prompts) else {},
        "chat_template_sha256": hashlib.sha256(str(pair.tokenizer.chat_template).encode()).hexdigest(),
        "written_by": judge_name,
        **asdict(config),
    }


def _mine_shard(
    pair: Pair,
    prompts: list[Prompt],
    config: MiningConfig,
    judged: JudgedModel | None,
    shard: Path,
    first: int,
    advance: Callable[[float], None],
) -> None:
    """Mine and write one shard, with answers numbered from `first`. `advance` gets the work done, in prompts."""
    since, tally = time.monotonic(), Tally()
    answers, left_out = _answers(pair, prompts, config, judged, tally)
    advance(len(prompts) - (1 - ANSWERING) * len(answers))

    def label(model: PreTrainedModel, answer: Answer, number: int) -> list[tuple[dict, list[dict]]]:
        """Rows of answers, which are numbered from `number`, and for each those of its labels."""
        whole = answer.row(number) | {"known": has_result(model, pair, answer, config)}
        if config.rounds:
            rounds = label_rounds(model, pair, answer, config)
            rows = [(round.row(answer, number + i), labels) for i, (round, labels) in enumerate(rounds, start=1)]
            rows = [(whole, []), *rows]
        else:
            rows = [(whole, label_answer(model, pair, answer, config))]
        answer.cache.clear()
        advance(1 - ANSWERING)
        return rows

    numbers = range(first * (1 + config.rounds), (first + len(prompts)) * (1 + config.rounds), 1 + config.rounds)
    calls = [partial(label, answer=answer, number=number) for answer, number in zip(answers, numbers, strict=False)]
    parts = run_in_lockstep([pair.target], calls, at_once=answers_at_once(config, packs(pair.target)), tally=tally)
    answer_rows = [row for part in parts for row, _ in part]
    labels = [label | {"answer": row["answer"]} for part in parts for row, rows in part for label in rows]
    if not all(np.isfinite(row[name]).all() for row in labels for name in STATES if name in row):
        raise too_large(config.layer)
    counts = {
        "prompts": len(prompts) - len(left_out),
        "too_long": len(left_out),
        "left_out": left_out,
        "answer_tokens": sum(len(answer.tokens) for answer in answers),
        "substitutions": len(labels),
        "rewrites": sum("rewritten_suffix" in row for row in labels),
        "target_tokens": tally.tokens,  # without those of a judged model
        "target_forwards": tally.forwards,
        "seconds": round(time.monotonic() - since, 1),
    }
    write_shard(shard, pair.target.config.get_text_config().hidden_size, answer_rows, labels, counts)


def _answers(
    pair: Pair, prompts: list[Prompt], config: MiningConfig, judged: JudgedModel | None, tally: Tally
) -> tuple[list[Answer], list[str]]:
    """For each prompt the answer that came with it, or else one decoded by `judged`, or else the target's own; and the
    ids of prompts that are too long."""
    prompts, ids, left_out = fitting(pair.tokenizer, prompts, pair.context, config.max_new_tokens, may_be_empty=True)
    ids = [row.to(pair.target.device) for row in ids]

    def of(numbers: Iterable[int]) -> tuple[list[Prompt], list[torch.LongTensor]]:
        return [prompts[i] for i in numbers], [ids[i] for i in numbers]

    texts, end = {}, torch.tensor(pair.end_tokens[:1], dtype=torch.long)
    for i, prompt in enumerate(prompts):
        if prompt.answer is not None:
            tokens = pair.tokenizer(prompt.answer, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
            texts[i] = torch.cat([tokens, end])
    own = [i for i in range(len(prompts)) if i not in texts]
    if judged is not None:
        for start in range(0, len(own), config.answer_batch):
            batch = own[start : start + config.answer_batch]
            texts |= zip(batch, judged_texts(judged, pair.draft, of(batch)[1], config), strict=True)
        own = []
    options = config.max_new_tokens, config.runners_up, config.answer_batch
    answers = dict(zip(own, target_answers(pair.target, *of(own), *options, tally), strict=True))
    cut = [text[: config.max_new_tokens].to(pair.target.device) for text in texts.values()]
    answers |= zip(texts, read_answers(pair.target, *of(texts), cut, config.runners_up, tally), strict=True)
    return [answers[i] for i in range(len(prompts)) if len(answers[i].tokens)], left_out


def judged_texts(
    judged: JudgedModel, draft: PreTrainedModel | None, ids: list[torch.LongTensor], config: MiningConfig
) -> list[torch.LongTensor]:
    """Answers of shape `(answer_length,)` to prompts of shape `(1, prompt_length)`, decoded greedily with a judge."""
    target = decoding_greedily(judged.target, config.max_new_tokens)
    target.generation_config.prompt_lookup_num_tokens = config.lookup or None
    # Any token can pad: the mask hides it.
    padded, mask = (
        pad_sequence([row[0] for row in rows], batch_first=True, padding_side="left")
        for rows in (ids, [torch.ones_like(row) for row in ids])
    )
    texts = judged.on(target).generate(padded, attention_mask=mask, assistant_model=draft)[:, padded.shape[1] :]
    return [until_eos(text, eos_tokens(judged.target))[0] for text in texts]


def counts_of(folder: str | os.PathLike) -> dict:
    """What was counted while mining, summed over the shards, and the ids of all prompts `left_out`."""
    shards = [read_json(shard.with_suffix(".json")) for shard in shards_of(folder)]
    left_out = [prompt_id for shard in shards for prompt_id in shard.pop("left_out")]
    numbers = [key for key, value in shards[0].items() if isinstance(value, int | float)] if shards else []
    return {key: sum(shard[key] for shard in shards) for key in numbers} | ({"left_out": left_out} if shards else {})
