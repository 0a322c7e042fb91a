"""What is known of a judge -> `README.md`, the model card, and the files of its repo. Written by the tools, never by
hand."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from matplotlib.figure import Figure

from ..models.load import fingerprint
from ..models.pair import DRAFT_MODEL, LOOKUP
from ..models.wheels import described
from ..utils.files import atomic_write, json_object, json_text, read_json, read_text, shipped, write_json, write_text
from ..utils.names import is_hub_id, public_name, public_text
from ..utils.text import in_code, in_markdown, in_python, in_shell, one_line


if TYPE_CHECKING:
    from .info import JudgeInfo
    from .judge import Judge


HUB_CARDS = shipped("hub_cards")
# Shipped judges: folders in `hub_cards/`, for the known pairs and what drafts.
SHIPPED = {
    ("qwen2.5-coder", DRAFT_MODEL): "qwen2.5-coder-1.5b-selfjudge",
    ("qwen2.5-coder", LOOKUP): "qwen2.5-coder-1.5b-lookup-selfjudge",
}
RESULTS = "results.json"  # in a judge's folder: what the card tells of decoding
PARTS = ("mining", "fit", "held_out", "calibration")  # of what a judge tells of its training
# Of a bench, what goes into a card.
KEPT = ("setting", "family", "tokens_per_round", "speed", "retention", "judged_share", "accepted_share", "unfinished")


def shipped_judge(pair: str, drafts: str = DRAFT_MODEL) -> Path:
    """
    The folder of the judge that is shipped for a known pair.

    Args:
        drafts (`str`, defaults to `DRAFT_MODEL`): What drafts: the pair's draft model, or `LOOKUP`.

    Raises:
        FileNotFoundError: If none is.
    """
    if (pair, drafts) not in SHIPPED:
        raise FileNotFoundError(
            f"`pair`: no judge is shipped for {pair!r} with {drafts} (only for "
            f"{', '.join(f'{name!r} with {kind}' for name, kind in SHIPPED)}). Name one with `--judge`, or make one: "
            "`hf-selfjudge mine`, then `train`."
        )
    return HUB_CARDS / SHIPPED[pair, drafts]


def render_card(info: JudgeInfo, name: str, results: dict) -> str:
    """
    Fill in `hub_cards/judge_card.md`.

    Args:
        name (`str`): What the judge is loaded by: a folder's name, or a repo id.
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
        eval_results=[result for bench in results.get("bench", {}).items() for result in _metrics(*bench)] or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(HUB_CARDS / "judge_card.md"),
        name=name,
        info=info,
        **{part: info.training[part] for part in PARTS if part in info.training},
        on_hub=on_hub,
        lookup=info.draft == LOOKUP,
        copy=described(info.target_fingerprint),
        label=info.training.get("fit", {}).get("options", {}).get("label", "changed"),
        results=results,
        md=in_markdown,
        code=in_code,
        python=in_python,
        shell=in_shell,
        one_line=one_line,
        limit=lambda threshold: threshold if isinstance(threshold, str) else f"{threshold:.3f}",
        interval=lambda value: "–" if value is None else "{:.2f} [{:.2f}, {:.2f}]".format(*value),
        shares=lambda value: "–" if value is None else " / ".join(f"{share:.3f}" for share in value.values()),
    )
    return str(card)


def _metrics(name: str, bench: dict) -> list[EvalResult]:
    """Of the judge's settings in a bench, for `model-index`."""
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


def write_card(judge: Judge, folder: str | os.PathLike) -> Path:
    """
    Write the card beside the judge.

    Args:
        folder (`str`): The judge's folder; its last part is the judge's name. What was measured is in `results.json`.

    Raises:
        OSError: If the card cannot be written.
    """
    folder = Path(folder)
    write_text(folder / "README.md", render_card(judge.info, folder.resolve().name, read_results(folder, judge)))
    return folder / "README.md"


def read_results(folder: str | os.PathLike, judge: Judge) -> dict:
    """What was measured of the judge in `folder`; empty if nothing was, or of other weights."""
    path = Path(folder) / RESULTS
    found = read_json(path) if path.is_file() else {}
    if found.get("weights") != fingerprint(judge):
        return {}
    if "quickstart" in found:
        found["quickstart"] |= {"pair": _public_pair(found["quickstart"]["pair"], here=False)}
    return found


def _public_pair(pair: str, here: bool) -> str:
    """`--pair` with [`public_name`]s."""
    return ",".join(public_name(name.strip(), here) for name in pair.split(","))


def add_results(
    folder: str | os.PathLike,
    judge: Judge,
    quickstart: str | os.PathLike | None = None,
    benches: Sequence[str | os.PathLike] = (),
) -> None:
    """
    Note results beside the judge in `folder`, with the curves of benches.

    Args:
        quickstart (`str`, *optional*): What `hf-selfjudge quickstart --json` wrote.
        benches (`Sequence[str]`): Folders of `hf-selfjudge bench`; their names are those of the results.

    Raises:
        ValueError: If a file is something else, of another judge, or of an earlier version.
    """
    folder = Path(folder)
    results = read_results(folder, judge) | {"weights": fingerprint(judge)}
    if quickstart is not None:
        found = read_json(quickstart)
        if not {"pair", "prompts", "runs"} <= found.keys():
            raise ValueError(f"`results`: {quickstart} is not a file of `hf-selfjudge quickstart --json`.")
        results["quickstart"] = found | {"pair": _public_pair(found["pair"], here=True)}
    for bench in map(Path, benches):
        found = read_quality(bench)
        if "comparisons_unchanged" not in found:
            raise ValueError(
                f"`bench`: {bench} was summarised by an earlier version. Run its `hf-selfjudge bench` again: what was "
                "decoded is kept."
            )
        family, name = family_in(found, judge, bench), re.sub(r"[^\w-]", "-", bench.resolve().name)
        others = {*found["judges"]} - {family}
        rows = [row for row in found["settings"] if row["family"].removeprefix("coin like ") not in others]
        results.setdefault("bench", {})[name] = {
            **{key: found[key] for key in ("heading", "prompts", "categories", "dataset")},
            "family": family,
            "settings": [{key: row[key] for key in KEPT} | {"task": row["measures"].get("task")} for row in rows],
            **{
                key: [
                    row
                    for row in found[key]
                    if row["first"] == family and row["second"].removeprefix("coin like ") not in others
                ]
                for key in ("comparisons", "comparisons_unchanged")
            },
        }
        shutil.copyfile(bench / "curve.png", folder / f"curve-{name}.png")
    write_json(folder / RESULTS, results)


def read_quality(bench: str | os.PathLike) -> dict:
    """
    What `hf-selfjudge bench` wrote in mode quality.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = Path(bench) / "quality-results.json"
    if not path.is_file():
        raise FileNotFoundError(f"`bench`: {bench} has no quality-results.json. Make it with `hf-selfjudge bench`.")
    return json_object(public_file(path), str(path))["quality"]


def public_file(path: Path) -> str:
    """Content of a bench's file, with a [`public_name`] in the place of each path of a model."""
    about = [path.with_name(f"{mode}.json") for mode in ("quality", "timing")]
    made = [read_json(file) for file in about if file.is_file()]
    return public_text(read_text(path), [run[name] for run in made for name in ("target", "draft")])


def family_in(quality: dict, judge: Judge, bench: str | os.PathLike) -> str:
    """
    Which curve of a bench is that of a judge.

    Raises:
        ValueError: If none is.
    """
    for family, weights in quality["judges"].items():
        if weights == fingerprint(judge):
            return family
    raise ValueError(f"`bench`: {bench} has no results of this judge. Run `hf-selfjudge bench --rule judge:FOLDER=…`.")


def plot_reliability(rows: list[dict], path: str | os.PathLike) -> None:
    """
    What a judge says, and what came of it.

    Args:
        rows (`list[dict]`): `probability`, `label` and `rows` of each bin.

    Raises:
        ValueError: If the ending of `path` is no format that matplotlib writes.
    """
    figure = Figure(figsize=(4, 4))
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], "--", color="grey", label="calibrated")
    axis.plot([row["probability"] for row in rows], [row["label"] for row in rows], "o-", label="judge")
    axis.set(xlabel="probability that the meaning changes", ylabel="mean label", xlim=(0, 1), ylim=(0, 1))
    axis.set_title(f"held out, {sum(row['rows'] for row in rows)} substitutions", fontsize="medium")
    axis.legend()
    figure.tight_layout()
    with atomic_write(Path(path)) as incomplete:
        figure.savefig(incomplete, metadata={"Software": None} if Path(path).suffix == ".png" else None)


def published(folder: str | os.PathLike, judge: Judge, repo_id: str) -> dict[str, Path | bytes]:
    """
    What belongs into the repo of a judge: its files, the card under its name there, plots and results, and the code
    that `generate(custom_generate=…)` loads.
    """
    folder, info = Path(folder), judge.info
    results = read_results(folder, judge)
    names = ["model.safetensors", *(["adapter_model.safetensors"] if info.adapter else [])]
    files: dict[str, Path | bytes] = {name: folder / name for name in names}
    files |= {name: json_text(content).encode() for name, content in judge.configs().items()}
    pictures = ["reliability.png"] if "held_out" in info.training else []
    pictures += [f"curve-{name}.png" for name in results.get("bench", {})]
    files |= {name: folder / name for name in pictures}
    files |= {RESULTS: json_text(results).encode()} if results else {}
    files["README.md"] = render_card(info, repo_id, results).encode()
    stub = read_text(HUB_CARDS / "custom_generate" / "generate.py")
    files["custom_generate/generate.py"] = stub.replace("{{ repo_id }}", repo_id).encode()
    files["custom_generate/requirements.txt"] = HUB_CARDS / "custom_generate" / "requirements.txt"
    for bench in results.get("bench", {}).values():
        scored = [row for row in bench["settings"] if row["family"] == bench["family"] and row["task"]]
        if bench["dataset"] is None or not scored:
            continue  # such a file is about a benchmark of the Hub, and a score on its test split
        entries = [
            EvalResultEntry(
                dataset_id=bench["dataset"],
                task_id="default",
                value=round(row["task"][0], 4),
                notes=f"{row['setting']}, {row['tokens_per_round'][0]:.2f} tokens a round; {bench['heading']}",
            )
            for row in scored
        ]
        content = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
        files[f".eval_results/{bench['dataset'].replace('/', '--')}.yaml"] = content.encode()
    return files
