"""In: rows of answers and of their substitutions. Out: shards in a folder, in which each answer is stored once, and
from them a `datasets.Dataset` with one row for each substitution. The dataset carries how it was mined."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow.compute
import pyarrow.parquet
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError

from ..judge.features import SCALARS, STATES
from ..utils.files import atomic_write, json_object, read_json, write_json
from ..utils.names import public_mining
from ..utils.transfer import first_line


FORMAT = 5  # of a folder of labels
# Scores of a substitution that need no rewrite, nats; see `feature_row` in `labels.py`.
CHEAP_SCORES = ("margin", "likelihood", "confidence", "kl_target_draft", "kl_draft_target")
_STRING, _INT, _BOOL, _FLOAT = map(datasets.Value, ("string", "int32", "bool", "float32"))
_TOKENS = datasets.List(_INT)
# Columns of the files of answers. `answer` is the answer's number, by which its substitutions refer to it. A round of
# decoding is an answer, too, which ends with the `drafted` tokens of the round; that is null for whole answers.
# `choice_logprobs` and `entropies` have a value for each token of the answer, nats: the log-probability of the
# target's choice there, and the entropy of its distribution. `known` is whether a whole answer has a result that those
# of others can be compared with; null for rounds.
ANSWER_FEATURES = datasets.Features(
    {
        **dict.fromkeys(("answer", "drafted"), _INT),
        **dict.fromkeys(("prompt_id", "category", "check"), _STRING),
        **dict.fromkeys(("prompt_ids", "answer_ids"), _TOKENS),
        **dict.fromkeys(("own", "finished", "known"), _BOOL),
        **dict.fromkeys(("choice_logprobs", "entropies"), datasets.List(datasets.Value("float16"))),
    }
)
# What labels that are used together must have in common.
COMMON = ("target", "target_fingerprint", "draft", "layer")


def labels_features(hidden_size: int) -> datasets.Features:
    """Columns of the files of labels, for a target with this `hidden_size`; see `feature_row` and `label_row`.
    `hidden_ahead` is null outside of rounds."""
    return datasets.Features(
        {
            "answer": _INT,
            "kind": _STRING,
            **dict.fromkeys(("position", "token", "substitute", "draft_rank", "mismatches"), _INT),
            **dict.fromkeys(("original_suffix", "rewritten_suffix"), _TOKENS),
            **dict.fromkeys(("rewrite_finished", "flipped", "round_flipped"), _BOOL),
            **dict.fromkeys(("changed", "reconvergence", "says_no", "draft_logprob", *CHEAP_SCORES), _FLOAT),
            "scalars": datasets.List(_FLOAT, length=len(SCALARS)),
            **dict.fromkeys(STATES, datasets.List(datasets.Value("float16"), length=hidden_size)),
        }
    )


def answers_beside(shard: Path) -> Path:
    """The file of the answers that a file of labels refers to."""
    return shard.with_name(f"answers{shard.name.removeprefix('labels')}")


def shards_of(folder: str | os.PathLike) -> list[Path]:
    """The files of labels in a folder that are complete."""
    return sorted(Path(folder).glob("labels-*-of-?????.parquet"))


def write_shard(shard: Path, hidden_size: int, answers: list[dict], labels: list[dict], counts: dict) -> None:
    """Write the counts, the answers (rows of [`ANSWER_FEATURES`]) and the labels (rows of [`labels_features`]; what a
    row lacks is null) of a shard, each file whole or not at all. The labels come last: with them it is complete."""
    write_json(shard.with_suffix(".json"), counts)
    files = {answers_beside(shard): (answers, ANSWER_FEATURES), shard: (labels, labels_features(hidden_size))}
    for path, (rows, features) in files.items():
        columns = {name: [row.get(name) for row in rows] for name in features}
        with atomic_write(path) as incomplete:
            datasets.Dataset.from_dict(columns, features=features).to_parquet(incomplete)


def too_large(layer: int | None) -> ValueError:
    """The error for hidden states that the files cannot hold."""
    states = "the last hidden states are" if layer is None else f"what enters layer {layer} is"
    return ValueError(f"`layer`: {states} too large for fp16. Use another layer.")


def read_mining(folder: str | os.PathLike) -> dict:
    """How the labels in a folder were mined: content of its `mining.json`. A `FileNotFoundError` if there is none, a
    `ValueError` if the labels have the format of another version."""
    path = Path(folder) / "mining.json"
    if not path.is_file():
        raise FileNotFoundError(f"`labels`: {folder} has no mining.json. Make labels with `hf-selfjudge mine`.")
    record = read_json(path)
    if record.get("format") != FORMAT:
        raise ValueError(f"`labels`: {folder} has the format of another version. Mine the labels again.")
    return record


def load_labels(labels: str | os.PathLike | Sequence[str | os.PathLike], token: str | None = None) -> datasets.Dataset:
    """
    Load labels that [`mine`] wrote.

    Args:
        labels (`str` or `Sequence[str]`): Folders, or datasets that [`push_labels`] made; all of one target and draft.

    Returns:
        `datasets.Dataset` with one row for each substitution: the columns of [`labels_features`], those of its answer
        ([`ANSWER_FEATURES`]), and its folder as `source`. It carries how it was mined, see [`mining_of`].

    Raises:
        FileNotFoundError: If one of `labels` is neither a folder of labels nor such a dataset.
        ValueError: If a folder holds no substitution or has the format of another version, or the folders are of
            different models or layers.
    """
    references = [labels] if isinstance(labels, str | os.PathLike) else labels
    parts = [_load_folder(source, folder) for source, folder in folders_of(references, token).items()]
    dataset = datasets.concatenate_datasets(parts)
    mining_of(dataset)  # refuses different models or layers
    return dataset


def _load_folder(source: str, folder: Path) -> datasets.Dataset:
    record, shards = read_mining(folder), shards_of(folder)
    if not shards:
        raise FileNotFoundError(f"`labels`: no labels-*.parquet in {folder}. Make them with `hf-selfjudge mine`.")
    filled = [shard for shard in shards if pyarrow.parquet.read_metadata(shard).num_rows]
    if not filled:
        raise ValueError(
            f"`labels`: {folder} holds no substitution: the draft never differed, or all prompts were too long."
        )
    # The cache of `datasets` lies in the folder and is deleted with it.
    files = [glob.escape(str(shard)) for shard in filled]
    labels = datasets.Dataset.from_parquet(files, cache_dir=folder / "cache")
    answers = pyarrow.concat_tables(pyarrow.parquet.read_table(answers_beside(shard)) for shard in filled)
    count = int(shards[0].stem.rsplit("-", 1)[-1])
    return join_answers(labels, answers, record | {"shards": [len(shards), count], "source": source})


def load_answers(labels: str | os.PathLike | Sequence[str | os.PathLike], token: str | None = None) -> pyarrow.Table:
    """The answers of labels ([`ANSWER_FEATURES`], and their folder as `source`), also those without a substitution.
    The arguments are those of [`load_labels`]."""
    references = [labels] if isinstance(labels, str | os.PathLike) else labels
    tables = [
        table.append_column("source", pyarrow.repeat(source, len(table)))
        for source, folder in folders_of(references, token).items()
        for table in (pyarrow.parquet.read_table(answers_beside(shard)) for shard in shards_of(folder))
    ]
    return pyarrow.concat_tables(tables)


def join_answers(labels: datasets.Dataset, answers: pyarrow.Table, record: dict) -> datasets.Dataset:
    """Add to each row of `labels` ([`labels_features`]) the columns of its answer ([`ANSWER_FEATURES`]). `record`,
    which has the folder as `source`, becomes a record of [`mining_records`]."""
    rows = pyarrow.compute.index_in(labels.data.column("answer"), value_set=answers["answer"].combine_chunks())
    joined = answers.drop_columns("answer").take(rows).replace_schema_metadata()
    joined = joined.append_column("source", pyarrow.repeat(record["source"], len(labels)))
    dataset = datasets.concatenate_datasets([datasets.Dataset(joined), labels], axis=1)
    dataset.info.description = json.dumps(record)
    return dataset


def mining_records(dataset: datasets.Dataset) -> list[dict]:
    """How labels were mined, for each folder that they are from: the content of `mining.json`, the folder as `source`,
    and as `shards` how many were written, and of how many. A `ValueError` if the dataset does not carry it."""
    try:  # `concatenate_datasets` puts an empty line between descriptions
        return [json_object(record, "description") for record in dataset.info.description.split("\n\n")]
    except ValueError as error:
        raise ValueError("`dataset` does not say how it was mined. Load labels with `load_labels`.") from error


def mining_of(dataset: datasets.Dataset) -> dict:
    """How labels were mined, as far as it is the same for all folders that they are from. `target`,
    `target_fingerprint`, `draft`, `layer` (whose input the hidden states are; `None`: the last states), `hidden_size`,
    `vocab_size`, `special_tokens` and `end_tokens` are always there. A `ValueError` if the dataset does not carry it,
    or is of different models or layers."""
    records = mining_records(dataset)
    for name in COMMON:
        values = [*dict.fromkeys(public_mining(record).get(name) for record in records)]
        if len(values) > 1:
            raise ValueError(
                f"`labels` are of different models or layers ({name}: {values[0]!r} and {values[1]!r}). Use those of "
                "one pair, with hidden states of one layer."
            )
    always = (*COMMON, "hidden_size", "vocab_size", "special_tokens", "end_tokens")
    same = {name for name in records[0] if all(record.get(name) == records[0][name] for record in records)}
    return {name: value for name, value in records[0].items() if name in {*always, *same}}


def both_answers(row: dict) -> tuple[list[int], list[int]]:
    """The tokens of the original answer and of the rewritten one, which has the substitute; for a row with both. A row
    without an `original_suffix` has the original as its answer."""
    answer, position, suffix = row["answer_ids"], row["position"], row["original_suffix"]
    if suffix is None:
        suffix = answer[position + 1 :]
    before = answer[:position]
    return [*before, row["token"], *suffix], [*before, row["substitute"], *row["rewritten_suffix"]]


def folders_of(references: Sequence[str | os.PathLike], token: str | None = None) -> dict[str, Path]:
    """Local folders of labels under their own names, and those of datasets on the Hub, which are downloaded, under
    `USER/REPO/FOLDER`. A `FileNotFoundError` if a reference is neither."""
    folders = {}
    for reference in map(str, references):
        if Path(reference).exists() or reference.count("/") != 1:
            folders[reference] = Path(reference)
            continue
        try:
            patterns = ["*/labels-*.parquet", "*/answers-*.parquet", "*/mining.json"]
            snapshot = snapshot_download(reference, repo_type="dataset", allow_patterns=patterns, token=token)
        except (HTTPError, OSError, ValueError) as error:
            raise FileNotFoundError(
                f"`labels`: {reference} is neither a folder nor a dataset on the Hub that could be fetched "
                f"({first_line(error)})."
            ) from error
        found = sorted(path.parent for path in Path(snapshot).glob("*/mining.json"))
        if not found:
            raise FileNotFoundError(f"`labels`: {reference} is a dataset, but not of labels.")
        folders |= {f"{reference}/{folder.name}": folder for folder in found}
    return folders
