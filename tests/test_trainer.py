"""Fitting a judge on labels with a planted signal."""

import json
import shlex

import datasets
import numpy as np
import pytest
import torch

from hf_selfjudge import Judge
from hf_selfjudge.cards import read_results, write_card
from hf_selfjudge.features import SCALARS
from hf_selfjudge.labels import features_of
from hf_selfjudge.trainer import FitConfig, Projection, Table, _logistic, fit_judge


HIDDEN = 24
CONFIG = FitConfig(resamples=50)


def write_labels(folder, prompts=40, target="tiny/llama", seed=0):
    """Meaning changes where the hidden state *before* the token points one way; the margin says nothing."""
    rng = np.random.default_rng(seed)
    rows = []
    for prompt in range(prompts):
        for position in range(6):
            before, after = rng.normal(size=(2, HIDDEN)) * np.linspace(3, 0.1, HIDDEN)
            changed = bool(before[0] + 0.3 * rng.normal() > 3)
            checked = prompt % 2 == 0
            rows.append(
                {
                    **{"prompt_id": f"{seed}-{prompt}", "category": "-", "check": "number" if checked else "text"},
                    **{"kind": "mismatch", "draft_rank": 0, "own": True, "rewrite_finished": True, "says_no": None},
                    **dict.fromkeys(("margin", "likelihood", "confidence"), 0.0),
                    **{"position": position, "token": 3, "substitute": 4, "mismatches": 6, "finished": True},
                    **{"answer_ids": [3, 5], "rewritten_ids": [4, 5], "flipped": changed if checked else None},
                    **{"reconvergence": 1 - 0.8 * changed, "changed": float(changed) if checked else 0.8 * changed},
                    **dict.fromkeys(("draft_logprob", "kl_target_draft", "kl_draft_target"), 0.0),
                    "scalars": rng.normal(size=len(SCALARS)).tolist(),
                    "hidden_before": before.astype(np.float16),
                    "hidden_after": after.astype(np.float16),
                }
            )
    folder.mkdir()
    datasets.Dataset.from_list(rows, features=features_of(HIDDEN)).to_parquet(folder / "labels-00000-of-00001.parquet")
    settings = {
        **{"target": target, "target_fingerprint": "f" * 16, "draft": "tiny/draft", "draft_fingerprint": "e" * 16},
        **{"hidden_size": HIDDEN, "vocab_size": 64, "special_tokens": [1], "dtype": "float32", "prompts": prompts},
        **{"prompts_sha256": "0" * 64, "max_new_tokens": 8, "per_answer": 6, "seed": seed},
        **{"prompts_name": "prompts.jsonl", "answer_batch": 4, "rewrite_batch": 8},
    }
    (folder / "mining.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = write_labels(tmp_path_factory.mktemp("fit") / "labels")
    return folder, fit_judge([folder], CONFIG)


def test_the_planted_signal_is_found(fitted):
    _, judge = fitted
    held_out = judge.info.training["held_out"]
    value, low, high = held_out["scores"]["judge"]["auc_changed_number"]
    assert low <= value <= high
    assert low > 0.8 > held_out["scores"]["margin"]["auc_changed_number"][0]
    assert held_out["log_loss"] < held_out["log_loss_of_the_mean"]
    accepted = held_out["scores"]["judge"]["mean_label_among_accepted"]
    assert accepted["0.5"] < held_out["mean_label"] / 2
    assert held_out["rows"] == 240
    assert held_out["rows_checked_by_number"] == 120


def test_the_threshold_accepts_the_share_asked_for(fitted):
    folder, judge = fitted
    wide = fit_judge([folder], FitConfig(accept_share=0.9, resamples=1))
    assert 0 < judge.info.threshold < wide.info.threshold < 1


def test_the_judge_computes_what_was_fitted(fitted):
    folder, judge = fitted
    table = Table.of(datasets.Dataset.from_parquet(str(folder / "labels-00000-of-00001.parquet")))
    components, penalty = (judge.info.training["fit"][name] for name in ("components", "inverse_penalty"))
    projection = Projection(table, components, CONFIG.seed)
    features = projection(table, components)
    expected = _logistic(features, table.changed, penalty).decision_function(features)
    with torch.no_grad():
        odds = judge(torch.tensor(table.scalars), torch.tensor(table.hidden))
    np.testing.assert_allclose(odds.numpy(), expected, atol=1e-3)


def test_fitting_again_gives_the_same(fitted):
    folder, judge = fitted
    again = fit_judge([folder], CONFIG)
    assert again.info == judge.info
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), judge.state_dict().values(), strict=True)
    )


def test_errors(fitted, tmp_path):
    folder, _ = fitted
    with pytest.raises(ValueError, match="4 prompts are too few for 5 folds"):
        fit_judge([write_labels(tmp_path / "few", prompts=4)])
    other = write_labels(tmp_path / "other", target="tiny/other", seed=1)
    with pytest.raises(
        ValueError, match=r"`labels`: .* of different models \(target: 'tiny/llama' and 'tiny/other'\)"
    ):
        fit_judge([folder, other])
    with pytest.raises(FileNotFoundError, match=r"has no mining.json"):
        fit_judge([tmp_path])


RESULTS = {
    **{"pair": "tiny", "prompts": 2, "max_new_tokens": 8, "draft_length": 5, "threshold": 0.3},
    **{"dtype": "float32", "device": "cpu"},
    "runs": [
        {"decoding": name, "judged_share": 0.1}
        | dict.fromkeys(("tokens_per_second", "seconds_per_answer", "tokens_per_answer"), 2.0)
        | dict.fromkeys(("tokens_per_round", "agreement", "logprob_per_token"), 1.0)
        for name in ("greedy", "assisted", "judged")
    ],
}


def test_card(fitted, tmp_path):
    _, judge = fitted
    judge.save_pretrained(tmp_path / "my-judge")
    text = write_card(Judge.from_pretrained(tmp_path / "my-judge"), tmp_path / "my-judge").read_text()
    assert text.startswith("---\nlibrary_name: hf_selfjudge\n") or "library_name: hf_selfjudge" in text.split("---")[1]
    assert "base_model:\n- tiny/llama" in text
    assert "# my-judge\n" in text
    assert "240 substitutions from 40 prompts" in text
    assert "Measured in decoding" not in text
    assert "--prompts prompts.jsonl --limit 40 --max-new-tokens 8 --per-answer 6 --answer-batch 4" in text
    assert f"hf-selfjudge train labels/* --accept-share {CONFIG.accept_share} --output my-judge" in text
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    text = write_card(judge, tmp_path / "my-judge", read_results(tmp_path / "results.json")).read_text()
    assert "| judged | 2.00 | 2.0 | 2 | 1.00 | 10.0 % | 1.000 | 1.000 |" in text
    judge.info.training["mining"][0]["prompts_options"] = {"system": "Don't ramble.", "limit": 40, "shuffle": 0}
    text = write_card(judge, tmp_path / "my-judge").read_text()
    (command,) = (line for line in text.splitlines() if line.startswith("hf-selfjudge mine"))
    arguments = shlex.split(command)
    assert arguments[arguments.index("--system") + 1] == "Don't ramble."
    assert arguments.count("--limit") == arguments.count("--shuffle") == 1
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a file of `hf-selfjudge quickstart --json`"):
        read_results(tmp_path / "results.json")
