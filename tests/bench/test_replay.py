"""Replayed rounds: against decoding on tiny random models in fp32, and on rounds made by hand."""

from dataclasses import replace

import pyarrow
import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from hf_selfjudge import JudgedModel, mine
from hf_selfjudge.bench.methods import parse_methods
from hf_selfjudge.bench.replay import read_rounds, replay
from hf_selfjudge.bench.report import replay_tables
from hf_selfjudge.bench.summary import summarise_replay
from hf_selfjudge.cli.replay import ReplayOptions, replay_command
from hf_selfjudge.judge.features import SCALARS, STATES
from hf_selfjudge.mining.label_files import load_answers, load_labels
from hf_selfjudge.models.pair import Pair
from hf_selfjudge.rules import LookAhead, Lossless, Margin, TopK
from tests.builders import LABELS_HIDDEN, MINING, PROMPTS, VOCAB, labels_folder


class Counting(BaseStreamer):
    """How many tokens each round adds; the prompt comes first."""

    def __init__(self):
        self.counts = []

    def put(self, value):
        self.counts.append(value.numel())

    def end(self):
        pass


def test_replayed_rounds_are_those_of_decoding(llama, tokenizer, tmp_path):
    """Each rule keeps as many tokens in a recorded round as in a round of `generate` that begins there."""
    target, draft = llama
    config = replace(MINING, max_new_tokens=32, rounds=50, round_length=6)
    labels = mine(Pair(target, draft, tokenizer), PROMPTS, config, tmp_path)
    labels = labels.remove_columns("round_flipped").add_column("round_flipped", [False] * len(labels))
    answers, kept = load_answers(tmp_path), set()
    known = pyarrow.array(answers["own"].to_pylist())
    answers = answers.set_column(answers.column_names.index("known"), "known", known)
    rows = [row for row in answers.to_pylist() if row["drafted"] is not None]
    for each, row in zip(read_rounds(labels, answers), rows, strict=True):
        text = torch.tensor([row["prompt_ids"] + row["answer_ids"][: len(row["answer_ids"]) - row["drafted"]]])
        for rule in (Lossless(), Margin(0.3), TopK(3), LookAhead(1, 0.1)):
            streamer, judged = Counting(), JudgedModel(target, rule, config.round_length, tokenizer=tokenizer)
            judged.generate(text, assistant_model=draft, max_new_tokens=20, do_sample=False, streamer=streamer)
            assert streamer.counts[1] == each.tokens[each.kept(rule)], rule
            kept.add(each.kept(rule))
    assert len(kept) > 2


@pytest.fixture
def labels(tmp_path):
    """Rounds of 8 drafted tokens: of prompt `a` one with mismatches at 2 and 5 and one without any, of prompt `b` one
    with a mismatch at 4, and of prompt `c`, whose final answer is unknown, one with a mismatch at 0. They begin after
    10 tokens; the n-th mismatch of a round has a margin of n nats."""
    flipped = {"a": [[False, True], []], "b": [[None]], "c": [[None]]}
    places = {"a": [[2, 5], []], "b": [[4]], "c": [[0]]}
    answers, rows = [], []
    for prompt, rounds in places.items():
        for number, mismatches in enumerate(rounds):
            answer = len(answers)
            answers.append(
                {
                    **{"answer": answer, "prompt_id": prompt, "category": "easy" if prompt == "a" else "hard"},
                    **{"drafted": 8, "prompt_ids": [7], "answer_ids": [3] * 18, "own": False, "finished": False},
                }
            )
            for nth, place in enumerate(mismatches):
                scalars = [0.0] * len(SCALARS)
                scalars[SCALARS.index("margin")] = nth + 1.0
                rows.append(
                    {
                        **{"answer": answer, "kind": "mismatch", "position": 10 + place, "token": 3, "substitute": 4},
                        **{"scalars": scalars, "round_flipped": flipped[prompt][number][nth], "kl_target_draft": 0.1},
                        **dict.fromkeys(STATES, [0.0] * LABELS_HIDDEN),
                    }
                )
    answers[1]["answer_ids"] = [3] * 17 + [1]  # nothing follows the end token
    answers.append(answers[2] | {"answer": 4})
    rows.append(rows[2] | {"answer": 4, "position": 16, "round_flipped": False})
    for prompt in places:
        whole = {"answer": len(answers), "drafted": None, "own": True, "finished": True, "known": prompt != "c"}
        answers.append(answers[0] | whole | {"prompt_id": prompt})
    return labels_folder(tmp_path / "labels", answers, rows)


def test_tokens_and_final_answers_of_rounds(labels):
    rounds = read_rounds(load_labels(labels), load_answers(labels))
    assert [(each.prompt_id, each.tokens, each.unchanged) for each in rounds] == [
        ("a", [3, 6, 9], [True, True, False]),
        ("a", [8], [True]),
        ("b", [5, 9], [True, False]),  # a final answer that can no longer be read is another one
        ("b", [7, 9], [True, True]),
    ]
    first = rounds[0].mismatches
    assert (first.matches_after.tolist(), first.positions.tolist(), first.ranks.tolist()) == ([2, 2], [12, 15], [1, 1])
    assert first.vocab_size == VOCAB
    methods = parse_methods(["margin=1.5,2.5"])
    names, curves = zip(*((method.name, method.curve) for method in methods), strict=True)
    grid = replay(rounds, [Lossless(), Margin(1.5), Margin(2.5)], names, curves)
    assert grid.methods == ["lossless", "margin=1.5", "margin=2.5", "oracle"]
    assert grid.tokens.tolist() == [[11, 12], [14, 18], [17, 18], [14, 14]]
    assert grid.rounds.tolist() == [[2, 2]] * 4
    assert grid.scores["unchanged"].tolist() == [[1, 1], [1, 0.5], [0.5, 0.5], [1, 1]]
    results = summarise_replay(grid, methods)
    assert (results["rounds"], results["prompts"]) == (4, 2)
    second = results["settings"][1]
    assert (second["speed"].value, second["unchanged"].value) == (32 / 23, 0.75)
    assert "| margin=1.5 | 8.00 [" in replay_tables(results)


def test_the_command(labels, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    replay_command([str(labels)], ReplayOptions(rule=["margin=1.5", "coin=0.5"], json=tmp_path / "found.json"))
    assert "4 rounds of answers to 2 prompts" in capsys.readouterr().out
    assert '"oracle"' in (tmp_path / "found.json").read_text()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("stock", "`rule` 'stock' cannot be replayed"),
        ("judge:qwen2.5-coder-1.5b-selfjudge=0.5", "the labels have states of layer None"),
        ("lossles", "`rule`"),
    ],
)
def test_rules_that_cannot_be_replayed(labels, rule, message):
    with pytest.raises(ValueError, match=message):
        replay_command([str(labels)], ReplayOptions(rule=[rule]))


def test_labels_without_rounds(llama, tokenizer, tmp_path):
    target, draft = llama
    labels = mine(Pair(target, draft, tokenizer), PROMPTS, MINING, tmp_path)
    with pytest.raises(ValueError, match="hold no round of an answer whose final answer is known"):
        read_rounds(labels, load_answers(tmp_path))
