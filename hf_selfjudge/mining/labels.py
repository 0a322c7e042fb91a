"""Mismatch -> what the substitution does to the target's own answer.

In: answers. Out: one row for each substitution, with its label and all that training needs. No human label and no
reference answer is used: the target finishes its answer after the substitution, and its own first answer is the
yardstick (SelfJudge, https://huggingface.co/papers/2510.02329).
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError
from pyarrow.parquet import read_metadata
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..judge.features import SCALARS, candidate_scalars
from ..models.tokens import eos_tokens
from ..scoring.codeblocks import has_code
from ..scoring.meaning import final_number, passes_tests, reconvergence, says_no
from ..utils.files import read_json
from ..utils.names import public_mining
from ..utils.transfer import said
from .rewrites import Continuation, follow
from .substitutions import Answer, Substitution, find_looked_up, find_substitutions, sample


# What tells of a substitution without finishing the answer: higher is worse, nats.
CHEAP_SCORES = ("margin", "likelihood", "confidence", "kl_target_draft", "kl_draft_target")


@dataclass(frozen=True)
class MiningConfig:
    """
    How labels are mined.

    Args:
        max_new_tokens (`int`): Limit of an answer, tokens.
        top (`int`): Choices of the draft to substitute at each place of the answer.
        floor (`float`): Probability below which a choice of the draft other than its first one is left out.
        runners_up (`int`): Next choices of the target itself to substitute at each place.
        lookup (`int`): Tokens that prompt lookup proposes in a round, if drafts come from it; `top`, `floor` and
            `runners_up` are then for nothing. 0: drafts come from a model.
        per_answer (`int`): Substitutions to score in each answer: mismatches first, since they are what decoding
            meets, then others; sampled evenly where there are more.
        rewrites (`int`): How many of these to rewrite, chosen in the same way.
        window (`int`): Tokens of the answer behind a substitution that `likelihood` and `confidence` look at.
        ask (`bool`): Ask the target whether rewritten text says the same.
        allow_code (`bool`): Run the code of answers to prompts with `tests`; else they are compared as text.
        shard (`int`): Prompts whose labels are written together: what a kill loses at most. Their answers stay in
            memory, with the target's cache of each until it is labelled.
        answer_batch (`int`): Answers decoded at a time.
        forward_tokens (`int`): Tokens of one forward of the target over substitutions.
        answers_at_once (`int`): Answers whose substitutions share a forward.
        seed (`int`): Of all samples; together with a prompt's id, so that they do not depend on the order of prompts.
    """

    max_new_tokens: int = 256
    top: int = 1
    floor: float = 0.1
    runners_up: int = 0
    lookup: int = 0
    per_answer: int = 48
    rewrites: int = 8
    window: int = 20
    ask: bool = False
    allow_code: bool = False
    shard: int = 64
    answer_batch: int = 32
    forward_tokens: int = 256
    answers_at_once: int = 8
    seed: int = 0

    def at_once(self, packed: bool) -> int:
        """Answers whose substitutions are followed at a time. Unpacked, each has one under way."""
        return self.answers_at_once if packed else self.answer_batch


def label_answer(
    model: PreTrainedModel,
    draft: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    answer: Answer,
    never: list[int],
    config: MiningConfig,
    packed: bool,
) -> list[dict]:
    """
    All rows of one answer, in the order of positions. If the answer is not the target's own, the yardstick of each
    substitution is what the target makes of the answer with its own choice in that place.

    Args:
        model ([`~transformers.PreTrainedModel`]): The target.
        draft ([`~transformers.PreTrainedModel`], *optional*): `None` for prompt lookup.
        never (`list[int]`): Special tokens, which are not substituted.
        packed (`bool`): Whether substitutions share a forward ([`packs`]).
    """
    if draft is None:
        found = find_looked_up(answer, never, config.lookup)
    else:
        found = find_substitutions(draft, answer, never, config.top, config.floor, config.runners_up)
    mismatches = sum(substitution.kind == "mismatch" for substitution in found)
    found = _mismatches_first(found, config.per_answer, config.seed, answer.prompt.id)
    for substitution in found:
        if substitution.draft_logits is not None:
            substitution.draft_logits = substitution.draft_logits.clone()  # the rest of the draft's logits is freed
    chosen = {id(s) for s in _mismatches_first(found, config.rewrites, config.seed, answer.prompt.id, "rewrite")}
    eos, room = eos_tokens(model), max(1, config.forward_tokens // config.at_once(packed))
    own = {} if answer.own else _own_ways(model, answer, found, chosen, eos, config.window, room, packed)
    order = {id(substitution): i for i, substitution in enumerate(found)}
    rows: list[dict] = [{}] * len(found)
    followed = follow(model, answer, found, [id(s) in chosen for s in found], eos, config.window, room, packed)
    for new in followed:
        way = own.get(new.substitution.position)
        row = feature_row(new, way) | {"mismatches": mismatches}
        if new.rewrite is not None:
            original = (answer.tokens.tolist(), answer.finished) if way is None else (_whole(way), way.finished)
            row |= label_row(model, tokenizer, new, *original, config)
        rows[order[id(new.substitution)]] = row
    return rows


def _mismatches_first(found: list[Substitution], limit: int, *seed: int | str) -> list[Substitution]:
    """At most `limit` of them, in their order."""
    mismatches = [s for s in found if s.kind == "mismatch"]
    kept = sample(mismatches, limit, *seed)
    kept += sample([s for s in found if s.kind != "mismatch"], limit - len(kept), *seed)
    order = {id(s) for s in kept}
    return [s for s in found if id(s) in order]


def _own_ways(model, answer, found, chosen, eos, window, room, packed) -> dict[int, Continuation]:
    """For each place: the answer up to it, then the target's own choice, and what comes of that. Only where something
    is compared with it: a rewrite, or scores along a text that has another token there."""
    rewritten = {s.position for s in found if id(s) in chosen}
    text = answer.tokens.tolist()
    own = {s.position: s.own() for s in found if s.position in rewritten or text[s.position] != s.choice}
    asked = [position in rewritten for position in own]
    ways = follow(model, answer, [*own.values()], asked, eos, window, room, packed)
    return {way.substitution.position: way for way in ways}


def _whole(way: Continuation) -> list[int]:
    """The answer up to the substitution, and how it goes on from there."""
    position = way.substitution.position
    return [*way.answer.tokens[:position].tolist(), way.substitution.token, *way.rewrite]


def label_row(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    new: Continuation,
    original: list[int],
    finished: bool,
    config: MiningConfig,
) -> dict:
    """
    Compare the rewritten answer with the original.

    Args:
        original (`list[int]`): The answer without the substitution, and whether it is `finished`.

    Returns:
        `dict` with `reconvergence` in [0, 1]; `flipped`, whether the final number, or passing the tests, changed
        (`None` where the prompt is not checked so, one of the answers did not end (with tests: not even its code) or
        has no number that can be read, or both fail the tests);
        `says_no`, the target's own probability that they do not say the same (`None` if it was not asked); and
        `changed` in [0, 1], the label:
        `flipped` where it is known, else 1 − `reconvergence`.
    """
    prompt, position, rewritten = new.answer.prompt, new.substitution.position, _whole(new)
    share = reconvergence(original[position + 1 :], new.rewrite)
    before, after = (tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (original, rewritten))
    flipped = no = None
    ended = finished and new.finished
    if prompt.check == "number" and ended:
        numbers = final_number(before), final_number(after)
        flipped = None if None in numbers else numbers[0] != numbers[1]
    elif prompt.check == "tests" and config.allow_code and (ended or (has_code(before) and has_code(after))):
        passed = [passes_tests(text, prompt.tests, prompt.said) for text in (before, after)]
        flipped = passed[0] != passed[1] if any(passed) else None  # two failures may be the same or not
    if config.ask:
        no = 0.0 if before == after else says_no(model, tokenizer, prompt.text, before, after)
    return {
        "answer_ids": original,
        "finished": finished,
        "rewritten_ids": rewritten,
        "rewrite_finished": new.finished,
        "reconvergence": share,
        "flipped": flipped,
        "says_no": no,
        "changed": float(flipped) if flipped is not None else 1.0 - share,
    }


def feature_row(new: Continuation, own: Continuation | None = None) -> dict:
    """
    What the judge will see of a substitution, and the scores that need no rewrite.

    Args:
        own ([`Continuation`], *optional*): What the target's own choice does in that place, if the answer is not
            its own.

    Returns:
        `dict`; among its keys the [`CHEAP_SCORES`]:

    - `margin`: log P(choice) − log P(substitute), nats;
    - `likelihood`: mean drop in log-probability of the next tokens of the answer, nats (suffix term of SelfJudge,
      https://huggingface.co/papers/2510.02329);
    - `confidence`: mean drop of the *largest* log-probabilities there, nats (its published code);
    - `kl_target_draft`, `kl_draft_target`: between target and draft, where the token is chosen, nats; `None`, like
      `draft_logprob`, for prompt lookup.
    """
    answer, substitution = new.answer, new.substitution
    token, position = torch.tensor([substitution.token]), torch.tensor([substitution.position])
    logits = new.logits.cpu()
    scalars = candidate_scalars(logits[:1], token, logits[1:], position)
    behind = slice(substitution.position + 1, substitution.position + 1 + len(new.logprobs))
    before = (answer.logprobs[behind], answer.best[behind]) if own is None else (own.logprobs, own.best)
    return {
        "prompt_id": answer.prompt.id,
        "category": answer.prompt.category,
        "check": answer.prompt.check,
        "kind": substitution.kind,
        "position": substitution.position,
        "token": substitution.choice,
        "substitute": substitution.token,
        "draft_rank": substitution.draft_rank,
        "prompt_ids": answer.ids[: answer.prompt_length].tolist(),
        "answer_ids": answer.tokens.tolist(),
        "own": answer.own,
        "finished": answer.finished,
        "scalars": scalars[0].tolist(),
        "margin": float(scalars[0, SCALARS.index("margin")]),
        "likelihood": _mean(before[0] - new.logprobs),
        "confidence": _mean(before[1] - new.best),
        **_beside(logits[0].log_softmax(-1), substitution),
        "hidden_before": new.hidden[0].half().cpu().numpy(),
        "hidden_after": new.hidden[1].half().cpu().numpy(),
    }


def _beside(logprobs: torch.Tensor, substitution: Substitution) -> dict[str, float | None]:
    """What the draft makes of a place where the target has `logprobs` of shape `(vocab_size,)`."""
    if substitution.draft_logits is None:
        return dict.fromkeys(("draft_logprob", "kl_target_draft", "kl_draft_target"))
    drafts = substitution.draft_logits.cpu().float().log_softmax(-1)
    return {
        "draft_logprob": float(drafts[substitution.token]),
        "kl_target_draft": float((logprobs.exp() * (logprobs - drafts)).sum()),
        "kl_draft_target": float((drafts.exp() * (drafts - logprobs)).sum()),
    }


def _mean(drops: torch.Tensor) -> float | None:
    return float(drops.mean()) if len(drops) else None


def features_of(hidden_size: int) -> datasets.Features:
    """Column types of a labels dataset."""
    value, ids = datasets.Value, datasets.List(datasets.Value("int32"))
    return datasets.Features(
        {
            **dict.fromkeys(("prompt_id", "category", "check", "kind"), value("string")),
            **dict.fromkeys(("position", "token", "substitute", "draft_rank", "mismatches"), value("int32")),
            **dict.fromkeys(("prompt_ids", "answer_ids", "rewritten_ids"), ids),
            **dict.fromkeys(("own", "finished", "rewrite_finished", "flipped"), value("bool")),
            **dict.fromkeys(("changed", "reconvergence", "says_no", "draft_logprob"), value("float32")),
            **dict.fromkeys(CHEAP_SCORES, value("float32")),
            "scalars": datasets.List(value("float32"), length=len(SCALARS)),
            **dict.fromkeys(("hidden_before", "hidden_after"), datasets.List(value("float16"), length=hidden_size)),
        }
    )


def shards_of(folder: str | os.PathLike) -> list[Path]:
    """The files of labels in a folder; not one that a kill left half-written."""
    return sorted(Path(folder).glob("labels-*-of-?????.parquet"))


def load_labels(folder: str | os.PathLike) -> datasets.Dataset:
    """
    Read the shards that [`mine`] wrote.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If they are empty.
    """
    folder = Path(folder)
    shards = shards_of(folder)
    if not shards:
        raise FileNotFoundError(f"`labels`: no labels-*.parquet in {folder}. Make them with `hf-selfjudge mine`.")
    if not any(read_metadata(shard).num_rows for shard in shards):
        raise ValueError(
            f"`labels`: {folder} holds no substitution: the draft never differed, or all prompts were too long."
        )
    # What `datasets` makes of them to read them from disk lies beside them, and goes with them.
    return datasets.Dataset.from_parquet([glob.escape(str(shard)) for shard in shards], cache_dir=folder / "cache")


def folders_of(references: Sequence[str | os.PathLike], token: str | None = None) -> list[Path]:
    """
    Folders of labels; of a dataset on the Hub, what [`push_labels`] put into it.

    Raises:
        FileNotFoundError: If one is neither a folder nor such a dataset.
    """
    folders = []
    for reference in references:
        if Path(reference).exists() or str(reference).count("/") != 1:
            folders.append(Path(reference))
            continue
        try:
            patterns = ["*/labels-*.parquet", "*/mining.json"]
            snapshot = snapshot_download(str(reference), repo_type="dataset", allow_patterns=patterns, token=token)
        except (HTTPError, OSError, ValueError) as error:
            raise FileNotFoundError(
                f"`labels`: {reference} is neither a folder nor a dataset on the Hub that could be fetched "
                f"({said(error)})."
            ) from error
        found = sorted(path.parent for path in Path(snapshot).glob("*/mining.json"))
        if not found:
            raise FileNotFoundError(f"`labels`: {reference} is a dataset, but not of labels.")
        folders += found
    return folders


def mining_of(folders: Sequence[str | os.PathLike]) -> list[dict]:
    """
    How labels were mined, for each folder; and as `shards`, how many there are, and would have been if nothing had
    stopped it.

    Raises:
        FileNotFoundError: If one of them is not one of labels.
        ValueError: If they are of different models or layers.
    """
    mining = []
    for folder in folders:
        path = Path(folder) / "mining.json"
        if not path.is_file():
            raise FileNotFoundError(f"`labels`: {folder} has no mining.json. Make labels with `hf-selfjudge mine`.")
        shards = shards_of(folder)
        total = int(shards[0].stem.split("-")[-1]) if shards else 0
        mining.append(read_json(path) | {"shards": [len(shards), total]})
        for name in ("target", "target_fingerprint", "draft", "layer"):
            one, other = public_mining(mining[0]).get(name), public_mining(mining[-1]).get(name)
            if one != other:
                raise ValueError(
                    f"`labels`: the folders are of different models or layers ({name}: {one!r} and {other!r}). Take "
                    "those of one pair, read at one layer."
                )
    return mining
