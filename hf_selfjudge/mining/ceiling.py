"""In: labels, and the prompts and the target that they were mined with. Out: some of them made once more, and how far
both agree. Other forwards round otherwise, and some answers then end otherwise: no judge can know that."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas
import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..data.prompts import Prompt
from ..forward.lockstep import run_in_lockstep
from ..models.load import fingerprint
from ..models.tokens import context_of, decoding_greedily, eos_tokens, until_eos
from ..scoring.asking import Asked
from ..scoring.checks import CheckedAnswer, check_of
from ..scoring.statistics import auc
from ..utils.progress import progress_bar
from .compact import prompt_tokens
from .label_files import both_answers, load_labels, read_mining
from .report import RESAMPLES, interval


def label_again(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | os.PathLike,
    prompts: Sequence[Prompt],
    per_category: int,
    allow_code: bool = False,
    at_once: int = 32,
    seed: int = 0,
) -> pandas.DataFrame:
    """
    Let the target finish some answers after the substitute once more. Here each text is decoded by itself; when labels
    are mined it is a branch of its answer. The target may have another dtype, too.

    Args:
        target ([`~transformers.PreTrainedModel`]): The one that the labels were mined with.
        folder (`str`): Labels that [`mine`] wrote.
        prompts (`Sequence[Prompt]`): Those that the labels were mined on.
        per_category (`int`): How many substitutions of each category, at random among those whose label is known.
        allow_code (`bool`): Whether the code of answers may be run.
        at_once (`int`): Answers decoded at a time.

    Returns:
        `pandas.DataFrame` with a row for each substitution: `category`, `prompt_id`, and whether the final answer
        changed, when it was mined (`first`) and now (`again`); NaN if that is unknown now.

    Raises:
        FileNotFoundError: If `folder` has no labels.
        ValueError: If the labels are of another target, a prompt is missing or has changed, or no answer was checked.
    """
    labels, record = load_labels(folder), read_mining(folder)
    if record["target_fingerprint"] != fingerprint(target):
        raise ValueError(f"`target` has other weights than the one of the labels. Load {record['target']}.")
    tokens, by_id = prompt_tokens(folder, prompts, tokenizer), {prompt.id: prompt for prompt in prompts}
    known = labels.select_columns(["category", "flipped"]).to_pandas().dropna().sample(frac=1, random_state=seed)
    if known.empty:
        raise ValueError(f"`folder`: no label in {folder} compares final answers. Mine prompts with a `check`.")
    chosen = sorted(known.groupby("category").head(per_category).index)
    needed = ["category", "prompt_id", "answer_ids", "position", "token", "substitute"]
    needed += ["original_suffix", "rewritten_suffix", "flipped"]
    rows = labels.select_columns(needed).select(chosen).to_list()

    def changes(model: PreTrainedModel, row: dict) -> float | None:
        original, rewritten = both_answers(row)
        begin = rewritten[: row["position"] + 1]
        ids = torch.tensor([[*tokens[row["prompt_id"]], *begin]], device=target.device)
        longer, context = (len(original) - len(begin)) * 5 // 4 + 16, context_of(target)  # as in mining
        limit = longer if context is None else min(longer, context - ids.shape[1])
        output = decoding_greedily(model, limit).generate(ids, attention_mask=torch.ones_like(ids))
        rewrite, finished = until_eos(output[0, ids.shape[1] :], eos_tokens(target))
        texts = tokenizer.batch_decode([original, [*begin, *rewrite.tolist()]], skip_special_tokens=True)
        # The original has ended, or its code is whole: otherwise the label would not be known.
        answers = map(CheckedAnswer, texts, (True, finished))
        prompt, reply = by_id[row["prompt_id"]], Asked(model, tokenizer).replies
        same = check_of(prompt, allow_code, reply).same(prompt, *answers)
        bar.update()
        return None if same is None else float(not same)

    with progress_bar(len(rows), "Finish answers again") as bar:
        again = run_in_lockstep([target], [partial(changes, row=row) for row in rows], at_once=at_once)
    frame = pandas.DataFrame(rows)[["category", "prompt_id"]]
    return frame.assign(first=[float(row["flipped"]) for row in rows], again=pandas.Series(again, dtype=float))


def agreement(labels: pandas.DataFrame, resamples: int = RESAMPLES, seed: int = 0) -> list[dict]:
    """
    How far the labels of [`label_again`] agree, for each category and for all.

    Returns:
        `list[dict]` with the `category`, the number of `substitutions` and how many labels are `unknown` now. And of
        the known ones, as [`Interval`]s (bootstrap over prompts) or `None` where there are none: the share that
        `changed` when mined, that `changed_again`, and with the `same_label`; and as `auc_of_a_label` the AUC with
        which the mined label predicts the other one.
    """
    result = []
    for category, rows in [*labels.groupby("category"), ("all", labels)]:
        both = rows.dropna()
        both = both.assign(same=(both["first"] == both["again"]).astype(float))
        counts = {"category": category, "substitutions": len(rows), "unknown": len(rows) - len(both)}
        columns = {"changed": "first", "changed_again": "again", "same_label": "same"}
        shares = {name: interval(np.mean, both, [column], resamples, seed) for name, column in columns.items()}
        ceiling = interval(auc, both, ["again", "first"], resamples, seed)
        result.append(counts | shares | {"auc_of_a_label": ceiling})
    return result
