"""A judge's model card, and the other files of its repo. All of it is computed; nothing is written by hand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from matplotlib.figure import Figure

from ..models.pair import LOOKUP
from ..models.wheels import described
from ..utils.files import atomic_write, json_text, read_json, read_text, write_text
from ..utils.names import is_hub_id
from ..utils.text import in_code, in_markdown, in_python, in_shell, one_line
from .info import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG, WEIGHTS, JudgeInfo, TrainingRecord
from .shipped import HUB_CARDS
from .threshold import Threshold


RESULTS = "results.json"  # measurements of decoding with the judge


def render_card(info: JudgeInfo, name: str, results: dict[str, Any]) -> str:
    """
    Fill in `hub_cards/judge_card.md`.

    Args:
        info ([`JudgeInfo`]): The judge.
        name (`str`): What the judge is loaded by: a folder's name or a repo id.
        results (`dict`): Content of its `results.json`; empty if nothing was measured yet.
    """
    on_hub = is_hub_id(info.target)
    data = ModelCardData(
        library_name="hf_selfjudge",
        license="apache-2.0",
        base_model=[info.target] if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        pipeline_tag="text-generation",
        tags=[
            *("hf_selfjudge", "speculative-decoding", "judge-decoding", "custom_generate"),
            *([f"base_model:adapter:{info.target}"] if on_hub else []),
            *(["lora"] if info.adapter else []),
            "arxiv:2510.02329",
        ],
        model_name=name.rpartition("/")[2],
        eval_results=[result for bench in results.get("bench", {}).items() for result in _model_index(*bench)] or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(HUB_CARDS / "judge_card.md"),
        name=name,
        info=info,
        **{part: info.training[part] for part in TrainingRecord.__annotations__ if part in info.training},
        on_hub=on_hub,
        lookup=info.draft == LOOKUP,
        copy=described(info.target_fingerprint),
        label=info.training.get("fit", {}).get("options", {}).get("label", "changed"),
        results=results,
        **{"md": in_markdown, "code": in_code, "python": in_python, "shell": in_shell, "one_line": one_line},
        limit=_threshold_text,
        interval=lambda value: "–" if value is None else "{:.2f} [{:.2f}, {:.2f}]".format(*value),
        shares=lambda value: "–" if value is None else " / ".join(f"{share:.3f}" for share in value.values()),
    )
    return str(card)


def _threshold_text(value: Threshold | float | str) -> str:
    threshold = Threshold.parse(value)
    return str(threshold) if threshold.per_token else f"{threshold.limit:.3f}"


def _model_index(name: str, bench: dict[str, Any]) -> list[EvalResult]:
    """The judge's results in a bench, as the Hub's `model-index` lists them."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=name,
            dataset_name=name,
            metric_type=metric,
            metric_name=f"{metric.replace('_', ' ')}, {row['setting']}",
            metric_value=round(row[metric][0], 4),
        )
        for row in bench["settings"]
        if row["family"] == bench["family"]
        for metric in ("tokens_per_round", "retention")
        if row[metric]
    ]


def write_card(folder: str | os.PathLike, info: JudgeInfo, weights: str) -> Path:
    """
    Write `README.md` into a judge's folder, with the measurements in its `results.json`.

    Args:
        folder (`str`): The judge's folder; its last part is the judge's name.
        weights (`str`): [`fingerprint`] of the judge.
    """
    path = Path(folder) / "README.md"
    write_text(path, render_card(info, path.parent.resolve().name, read_results(folder, weights)))
    return path


def read_results(folder: str | os.PathLike, weights: str) -> dict[str, Any]:
    """The measurements in a judge's folder; empty if there are none, or they are of other weights than `weights`."""
    path = Path(folder) / RESULTS
    results = read_json(path) if path.is_file() else {}
    return results if results.get("weights") == weights else {}


def plot_reliability(bins: list[dict[str, float]], path: str | os.PathLike) -> None:
    """
    Plot the judge's probabilities against what came true.

    Args:
        bins (`list[dict]`): Mean `probability`, mean `label` and number of `rows` of each bin.
        path (`str`): Where to. The ending chooses the format.

    Raises:
        ValueError: If matplotlib does not write that format.
    """
    figure = Figure(figsize=(4, 4))
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], "--", color="grey", label="calibrated")
    axis.plot([row["probability"] for row in bins], [row["label"] for row in bins], "o-", label="judge")
    axis.set(xlabel="probability that the meaning changes", ylabel="mean label", xlim=(0, 1), ylim=(0, 1))
    axis.set_title(f"held out, {sum(row['rows'] for row in bins)} substitutions", fontsize="medium")
    axis.legend()
    figure.tight_layout()
    with atomic_write(Path(path)) as incomplete:
        figure.savefig(incomplete, metadata={"Software": None} if Path(path).suffix == ".png" else None)


def repo_files(folder: str | os.PathLike, info: JudgeInfo, weights: str, repo_id: str) -> dict[str, Path | bytes]:
    """
    The files of a judge's repo: the judge, its card, plots and results, and the code that
    `generate(custom_generate=repo_id)` loads.

    Args:
        folder, info, weights: See [`write_card`].
        repo_id (`str`): The repo. The card and the code name it.

    Returns:
        For each path in the repo a file or its content, without paths of this computer.
    """
    folder = Path(folder)
    results = read_results(folder, weights)
    files: dict[str, Path | bytes] = {WEIGHTS: folder / WEIGHTS, CONFIG: json_text(info.to_json()).encode()}
    if info.adapter:  # PEFT writes down the path that the target was loaded from
        adapter_config = read_json(folder / ADAPTER_CONFIG) | {"base_model_name_or_path": info.target}
        files[ADAPTER_CONFIG] = json_text(adapter_config).encode()
        files[ADAPTER_WEIGHTS] = folder / ADAPTER_WEIGHTS
    plots = ["reliability.png"] if "held_out" in info.training else []
    plots += [f"curve-{name}.png" for name in results.get("bench", {})]
    files |= {name: folder / name for name in plots}
    if results:
        files[RESULTS] = json_text(results).encode()
    files["README.md"] = render_card(info, repo_id, results).encode()
    code = HUB_CARDS / "custom_generate"
    files["custom_generate/generate.py"] = read_text(code / "generate.py").replace("{{ repo_id }}", repo_id).encode()
    files["custom_generate/requirements.txt"] = code / "requirements.txt"
    for bench in results.get("bench", {}).values():
        # A file of evaluation results is about a benchmark on the Hub, and holds scores on its test split.
        scored = [row for row in bench["settings"] if row["family"] == bench["family"] and row["task"]]
        if bench["dataset"] is not None and scored:
            path = f".eval_results/{bench['dataset'].replace('/', '--')}.yaml"
            files[path] = _evaluation_results(bench, scored).encode()
    return files


def _evaluation_results(bench: dict[str, Any], scored: list[dict[str, Any]]) -> str:
    entries = [
        EvalResultEntry(
            dataset_id=bench["dataset"],
            task_id="default",
            value=round(row["task"][0], 4),
            notes=f"{row['setting']}, {row['tokens_per_round'][0]:.2f} tokens a round; {bench['heading']}",
        )
        for row in scored
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
