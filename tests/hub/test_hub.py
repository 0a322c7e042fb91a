"""Judges, labels, results and Spaces on a Hub of this machine: the real client, over HTTP."""

import copy
import json
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.cli.extensions import ExtensionManifest
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file

from hf_selfjudge import Judge, JudgeConfig, JudgedModel, JudgeTrainer, load_labels
from hf_selfjudge.bench.report import heading
from hf_selfjudge.decoding.rules import JudgeRule
from hf_selfjudge.demo.page import folder_of
from hf_selfjudge.hub.publish import SPACES, pull_judge, push_judge, push_labels, push_results, push_space
from hf_selfjudge.hub.results import add_results
from hf_selfjudge.judge.card import read_results
from hf_selfjudge.judge.threshold import Threshold
from hf_selfjudge.mining.label_files import folders_of, mining_of, mining_records
from hf_selfjudge.models.load import fingerprint
from hf_selfjudge.training.script import ScriptArguments, main
from hf_selfjudge.utils.names import public_mining
from hf_selfjudge.utils.text import in_markdown
from hf_selfjudge.utils.transfer import HubError
from tests.builders import RESULTS, adapted_judge, adapter, card_of, random_judge, write_labels
from tests.hub_server import Fault, Hub


REPO = "me/tiny-judge"
# What a bench says of a setting, beside its name.
SETTING = {
    **dict.fromkeys(("tokens_per_round", "speed", "retention"), [1.5, 1.4, 1.6]), "judged_share": 0.1,
    "accepted_share": 0.4, "unfinished": 0, "measures": {"task": [0.5, 0.4, 0.6]},
    "final_answers": {"unchanged": [0.8, 0.7, 0.9], "speed": [1.4, 1.3, 1.5]},
    "by_category": {"sums": {"speed": [1.45, 1, 2], "retention": [1, 1, 1], "unchanged": [0.75, 0.7, 0.8]}},
}  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with Hub(tmp_path / "hub") as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between tries
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it keeps the address of its first use
        monkeypatch.setenv("HF_TOKEN", "hf_write")
        yield server


@pytest.fixture
def folder(llama, tmp_path):
    random_judge(llama[0]).save_pretrained(tmp_path / "tiny-judge")
    return tmp_path / "tiny-judge"


def same(first, second):
    tensors = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return first.info == second.info and all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in tensors)


# -- there and back --------------------------------------------------------------------------------------------------


def test_push_and_load(hub, folder):
    push_judge(folder, REPO, private=True, tag="v1")
    assert {*hub.files(REPO)} == {
        ".gitattributes", "README.md", "config.json", "model.safetensors", "custom_generate/generate.py",
        "custom_generate/requirements.txt",
    }  # fmt: skip
    assert sum("/commit/" in request for request in hub.requests) == 1
    loaded = Judge.from_pretrained(REPO)
    assert same(loaded, Judge.from_pretrained(folder))
    hub.requests.clear()
    Judge.from_pretrained(REPO)
    assert {request.split()[0] for request in hub.requests} == {"HEAD"}  # nothing is fetched again
    changed = Judge.from_pretrained(folder)
    changed.info = replace(changed.info, threshold=0.25)
    changed.push_to_hub(REPO)
    assert Judge.from_pretrained(REPO).info.threshold == Threshold(0.25)
    assert Judge.from_pretrained(REPO, revision="v1").info.threshold == Threshold(0.5)
    changed.info = replace(changed.info, threshold=0.75)
    made = changed.push_to_hub(REPO, create_pr=True)
    assert made.pr_url
    assert Judge.from_pretrained(REPO).info.threshold == Threshold(0.25)
    assert Judge.from_pretrained(REPO, revision="refs/pr/1").info.threshold == Threshold(0.75)
    changed.push_to_hub(REPO, revision="try")
    assert Judge.from_pretrained(REPO, revision="try").info.threshold == Threshold(0.75)
    with pytest.raises(FileNotFoundError, match="has no revision 'none'"):
        Judge.from_pretrained(REPO, revision="none")
    before = hub.files(REPO)
    with pytest.raises(ValueError, match="has a tag 'v1' already"):
        push_judge(folder, REPO, tag="v1")
    assert hub.files(REPO) == before


def test_the_trainer_publishes(hub, tmp_path):
    labels = write_labels(tmp_path / "labels")
    args = JudgeConfig(
        str(tmp_path / "judge"), components=4, max_steps=5, push_to_hub=True, hub_model_id=REPO, disable_tqdm=True
    )
    judging = JudgeTrainer(args=args, train_dataset=load_labels(labels))
    judging.train()
    judging.push_to_hub()
    assert same(Judge.from_pretrained(REPO), judging.judge)
    assert "training_args.bin" not in hub.files(REPO)


def test_results_go_with_the_weights_that_they_are_of(hub, folder, tmp_path):
    judge, bench = Judge.from_pretrained(folder), tmp_path / "gsm8k"
    bench.mkdir()
    quality = {
        **{"heading": "so it was measured", "prompts": 3, "dataset": "openai/gsm8k", "categories": {}},
        "judges": {"judge:j": fingerprint(judge), "judge:other": "-"},
        "settings": [
            {"setting": f"{name}=0.5", "family": name, "judge": judge_curve, **SETTING}
            for name, judge_curve in (
                ("margin", None),
                ("judge:j", "judge:j"),
                ("judge:other", "judge:other"),
                ("coin like judge:other", "judge:other"),
            )
        ],
        "comparisons": [
            {"first": "judge:j", "second": second, "speed_ratio": {"0.9": [1.1, 1.0, 1.2]}}
            for second in ("margin", "coin like judge:other")
        ],
        "comparisons_unchanged": [
            {"first": "judge:j", "second": second, "speed_ratio": {"0.8": [1.3, 1.2, 1.4]}}
            for second in ("margin", "coin like judge:other")
        ],
        "comparisons_by_category": {
            "sums": [
                {"first": "judge:j", "second": second, "speed_ratio": {"0.9": [1.05, 1.0, 1.1]}}
                for second in ("margin", "coin like judge:other")
            ]
        },
    }
    (bench / "quality-results.json").write_text(json.dumps({"quality": quality}))
    (bench / "curve.png").write_bytes(b"a picture")
    add_results(folder, fingerprint(judge), benches=[bench])
    push_judge(folder, REPO)
    files = hub.files(REPO)
    card = ModelCard(files["README.md"].decode())
    card.validate()
    assert "| judge:j=0.5 | 1.50 [1.40, 1.60] |" in card.text
    assert "judge:other" not in card.text
    assert "| margin | 1.10 [1.00, 1.20] |" in card.text
    numbers = card.text.partition("share of final answers")[2]
    assert "| against | 80 % |" in numbers
    assert "| margin | 1.30 [1.20, 1.40] |" in numbers
    assert f"| judge:j=0.5 |{3 * ' 1.50 [1.40, 1.60] |'} 0.80 [0.70, 0.90] |" in card.text
    assert "| decoding | sums | \n|---|---|\n| margin=0.5 | 1.45 / 0.75 | \n" in card.text
    assert "| category | margin | \n|---|---|\n| sums | 1.05 [1.00, 1.10] | \n" in numbers
    assert "![curve](curve-gsm8k.png)" in card.text
    assert files["curve-gsm8k.png"] == b"a picture"
    assert {result.metric_type for result in card.data.eval_results} == {"tokens_per_round", "retention"}
    (entry,) = yaml.safe_load(files[".eval_results/openai--gsm8k.yaml"])
    assert (entry["dataset"]["id"], entry["value"]) == ("openai/gsm8k", 0.5)
    with torch.no_grad():
        judge.head.bias.add_(1)
    judge.save_pretrained(folder)  # other weights: nothing was measured of these
    assert read_results(folder, fingerprint(judge)) == {}
    push_judge(folder, "me/other")
    assert not {"curve-gsm8k.png", "results.json"} & hub.files("me/other").keys()
    with pytest.raises(ValueError, match="has no results of this judge"):
        add_results(folder, fingerprint(judge), benches=[bench])


def test_tokens_decide_who_reads_and_writes(hub, folder, monkeypatch):
    push_judge(folder, REPO, private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    assert same(Judge.from_pretrained(REPO), Judge.from_pretrained(folder))
    before = hub.files(REPO)
    with pytest.raises(HubError, match="me/tiny-judge could not be written") as refused:
        push_judge(folder, REPO)
    assert "hf_read" not in str(refused.value)
    assert hub.files(REPO) == before
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(FileNotFoundError, match="neither a folder nor a repo on the Hub that you may see"):
        Judge.from_pretrained("me/other")
    assert same(Judge.from_pretrained(REPO, token="hf_read"), Judge.from_pretrained(folder))
    with pytest.raises(ValueError, match="neither a folder nor a name on the Hub"):
        Judge.from_pretrained("a/b/c/d")


def test_pull(hub, folder, tmp_path):
    (folder / "holiday.png").write_bytes(b"a picture that does not belong here")
    push_judge(folder, REPO)
    hub.write(REPO, {"../outside.png": b"-", "more/code.py": b"-", "weights.bin": pickle.dumps(1)})
    names = pull_judge(REPO, tmp_path / "there")
    assert names == [
        "README.md", "config.json", "custom_generate/generate.py", "custom_generate/requirements.txt",
        "model.safetensors",
    ]  # fmt: skip
    assert same(Judge.from_pretrained(tmp_path / "there"), Judge.from_pretrained(folder))
    assert not list(tmp_path.rglob("outside*"))
    with pytest.raises(FileExistsError, match="is not empty"):
        pull_judge(REPO, tmp_path / "there")


def test_the_page_has_the_results_of_the_repo(hub, folder, monkeypatch):
    judge = Judge.from_pretrained(folder)
    (folder / "results.json").write_text(json.dumps({"weights": fingerprint(judge), "bench": {}}))
    push_judge(folder, REPO)
    hub.write(REPO, {"curve-gsm8k.png": b"a picture"})
    assert folder_of(str(folder)) == folder
    fetched = folder_of(REPO)
    assert same(Judge.from_pretrained(fetched), judge)
    assert read_results(fetched, fingerprint(judge))["bench"] == {}
    assert (fetched / "curve-gsm8k.png").read_bytes() == b"a picture"
    Judge.from_pretrained(REPO)  # by its name, so that the cache knows it
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached = folder_of(REPO)
    assert same(Judge.from_pretrained(cached), judge)
    assert not (cached / "curve-gsm8k.png").exists()


def test_the_card_is_one_the_hub_takes(hub, folder):
    push_judge(folder, REPO)
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    card.validate()
    data = card.data.to_dict()
    assert data["library_name"] == "hf_selfjudge"
    assert data["base_model"] == ["tiny/llama"]
    assert data["base_model_relation"] == "adapter"
    assert {"hf_selfjudge", "custom_generate", "base_model:adapter:tiny/llama", "arxiv:2510.02329"} <= {*data["tags"]}
    pattern = (
        r"\n# me/tiny-judge\n\nA judge for speculative decoding with .*\n\nThe output is \*\*not\*\* that of the "
        r'target alone.*\n## Use\n\n```python\n.*from_pretrained\(target, "me/tiny-judge"\).*\n```\n\nOr with nothing '
        r'imported.*custom_generate="me/tiny-judge".*\n```\n\n`judged.threshold` is 0.500; 0 is lossless\.\n\n'
        r"\| \| \|\n\|---\|---\|\n(\| .* \|\n){4}\s+## Limits\n\n(- .*\n)+\s+The judge is published under "
        r"Apache-2\.0.*\n```bibtex\n.*\n```\n?"
    )
    assert re.fullmatch(pattern.replace(".*", "[^\0]*"), card.text)


def test_labels_results_and_spaces(hub, tmp_path):
    folders = [write_labels(tmp_path / "one", seed=0), write_labels(tmp_path / "two", seed=1)]
    push_labels(folders, "me/labels")
    read = folders_of(["me/labels"])
    assert [*read] == ["me/labels/one", "me/labels/two"]
    ours, theirs = load_labels(folders), load_labels("me/labels")
    assert {*theirs["source"]} == {*read}
    assert ours.remove_columns("source").to_dict() == theirs.remove_columns("source").to_dict()
    card = hub.files("me/labels", kind="datasets")["README.md"].decode()
    assert "| one | prompts.jsonl | 40 | 240 |" in card
    with pytest.raises(FileNotFoundError, match="neither a folder nor a dataset on the Hub"):
        folders_of(["me/nothing"])
    with pytest.raises(ValueError, match="two folders are named 'one'"):
        push_labels([folders[0], folders[0]], "me/labels")
    bench = tmp_path / "bench"
    bench.mkdir()
    (bench / "quality-results.json").write_text(json.dumps({"quality": {"heading": "so it was measured"}}))
    (bench / "quality-results.md").write_text("so it was measured\n\n| a table |\n")
    (bench / "quality.jsonl").write_text('{"setting": "lossless"}\n')
    push_results(bench, "me/results")
    assert "| a table |" in hub.files("me/results", kind="datasets")["README.md"].decode()
    push_space("judge-agreement", "me/judge-agreement")
    files = hub.files("me/judge-agreement", kind="spaces")
    assert files["app.py"] == (SPACES / "judge-agreement/app.py").read_bytes()
    needed = files["requirements.txt"].decode().splitlines()
    assert {"evaluate>=0.4.6", "transformers>=5.19"} <= {*needed}
    assert not any("extra" in line for line in needed)
    with pytest.raises(FileNotFoundError, match="there is no Space 'nothing'"):
        push_space("nothing", "me/x")


def test_a_space_includes_the_package(hub, tmp_path):
    """It runs where nobody has installed that."""
    push_space("judge-playground", "me/playground")
    space = tmp_path / "space"
    for name, content in hub.files("me/playground", kind="spaces").items():
        (space / name).parent.mkdir(parents=True, exist_ok=True)
        (space / name).write_bytes(content)
    code = """if True:
        from hf_selfjudge import Judge
        from hf_selfjudge.demo import page as playground
        from hf_selfjudge.judge.shipped import shipped_judge
        for place in playground.__file__, shipped_judge("qwen2.5-coder"):
            print(place)
        Judge.from_pretrained(place)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=space, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [Path(line).relative_to(space).parts[0] for line in done.stdout.splitlines()] == ["hf_selfjudge"] * 2


# -- names of this machine -------------------------------------------------------------------------------------------


@pytest.fixture
def private(llama, tokenizer, tmp_path, monkeypatch):
    """A target and a draft in folders of somebody's home: their whole paths."""
    home = tmp_path / "kim-private"
    monkeypatch.setattr(Path, "home", lambda: home)
    references = [home / "models of mine" / name for name in ("target", "draft")]
    for path, model in zip(references, llama, strict=True):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return tuple(map(str, references))


def labels_of_private(folder, private):
    write_labels(folder)
    path = folder / "mining.json"
    made = json.loads(path.read_text()) | {
        **{"target": private[0], "draft": private[1], "prompts_name": f"{private[0]}/p.jsonl"},
        "written_by": f"{Path(private[0]).parents[1] / 'judge'}, weights 0123, threshold 0.3",
    }
    path.write_text(json.dumps(made))
    return folder


def bench_of_private(folder, private, judge):
    folder.mkdir()
    made = {
        **{"target": private[0], "target_dtype": "float32", "draft": private[1], "draft_dtype": "float32"},
        "draft_length": 5,
        **{"max_new_tokens": 8, "machine": "x86_64", "versions": {}},
    }
    (folder / "quality.json").write_text(json.dumps(made))
    quality = {
        **{"heading": heading(folder / "quality.json", "p.jsonl", 3), "prompts": 3, "dataset": "openai/gsm8k"},
        **{"judges": {"judge:j": fingerprint(judge)}, "comparisons": [], "comparisons_unchanged": []},
        **{"comparisons_by_category": {}, "categories": {}},
        "settings": [{"setting": "judge:j=0.5", "family": "judge:j", "judge": "judge:j", **SETTING}],
    }
    quality["heading"] += f" By an earlier version: {private[0]}."
    (folder / "quality-results.json").write_text(json.dumps({"quality": quality}))
    (folder / "quality-results.md").write_text(in_markdown(quality["heading"]))
    (folder / "quality.jsonl").write_text("{}\n")
    (folder / "curve.png").write_bytes(b"a picture")
    return folder


def tells_of_this_machine(files, tmp_path):
    names = {name for name in files if "kim" in name or str(tmp_path) in name}
    return names | {name for name, content in files.items() for private in (b"kim-", b"of mine", bytes(tmp_path))
                    if private in content}  # fmt: skip


def test_nothing_of_this_machine_is_published(hub, private, tmp_path):
    labels = labels_of_private(tmp_path / "labels", private)
    folder = tmp_path / "tiny-judge"
    options = {"components": 4, "max_steps": 5, "disable_tqdm": True, "save_strategy": "steps", "save_steps": 5}
    judge = main(ScriptArguments([str(labels)], resamples=10), JudgeConfig(str(folder), **options))
    assert (judge.info.target, judge.info.draft) == ("./target", "./draft")
    bench = bench_of_private(tmp_path / "gsm8k", private, judge)
    figures = tmp_path / "figures.json"
    figures.write_text(json.dumps(RESULTS | {"pair": ",".join(private)}))
    add_results(folder, fingerprint(judge), figures, [bench])
    card_of(judge, folder)
    shared = [path for path in folder.rglob("*") if path.name in ("README.md", "config.json", "results.json")]
    assert len(shared) == 4  # of a checkpoint, too
    assert not tells_of_this_machine({path.name: path.read_bytes() for path in shared}, tmp_path)
    push_judge(folder, REPO)
    judge.push_to_hub("me/other")
    push_labels([labels], "me/labels")
    push_results(bench, "me/results")
    repos = [hub.files(REPO), hub.files("me/other")]
    repos += [hub.files(name, kind="datasets") for name in ("me/labels", "me/results")]
    for files in repos:
        assert len(files) >= 4
        assert not tells_of_this_machine(files, tmp_path)
        assert not [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
    card = ModelCard(repos[0]["README.md"].decode())
    card.validate()
    data = card.data.to_dict()
    assert not {"base_model", "base_model_relation"} & data.keys()
    assert not [tag for tag in data["tags"] if "target" in tag]
    assert "This base model is not on the Hub under this name" in card.text
    assert "huggingface.co/./" not in card.text
    assert "\n./target (float32) with ./draft (float32), 5 drafted tokens" in card.text
    assert "mine --pair ./target,./draft --dtype float32 --prompts ./p.jsonl" in card.text
    assert "--judge ./judge --output labels/1  # answers by ./judge, weights 0123" in card.text
    assert 'load_model("./target")' in card.text
    assert json.loads(repos[0]["results.json"])["quickstart"]["pair"] == "./target,./draft"
    assert "This target is not on the Hub under this name" in repos[2]["README.md"].decode()
    made = json.loads(repos[2]["labels/mining.json"])
    assert (made["target"], made["draft"], made["prompts_name"]) == ("./target", "./draft", "./p.jsonl")
    assert "shards" not in made
    # What was fetched is the same as what is here.
    both = load_labels([labels, "me/labels"])
    assert [record["source"] for record in mining_records(both)] == [str(labels), "me/labels/labels"]
    assert mining_of(both)["target"] == private[0]


def test_a_judge_of_an_earlier_version_is_published_without_its_paths(hub, private, llama, tmp_path):
    """It has paths in its files. It works where it was made, and what is published has none."""
    folder, target = tmp_path / "old", copy.copy(llama[0])
    target.config = copy.deepcopy(target.config)
    target.config.name_or_path = private[0]
    made = adapter(target)
    adapted_judge(llama[0], made).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"target": private[0], "draft": private[1]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "adapter_config.json").write_text(json.dumps(made.config | {"base_model_name_or_path": private[0]}))
    judge = Judge.from_pretrained(folder)
    judge.check_target(target)
    for push in (lambda: push_judge(folder, REPO), lambda: judge.push_to_hub(REPO)):
        push()
        files = hub.files(REPO)
        assert not tells_of_this_machine(files, tmp_path)
        assert json.loads(files["config.json"])["target"] == "./target"
        assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "./target"
    mining = {"target": private[0], "draft": private[1], "written_by": f"{private[0]}, weights 01, threshold 0.3"}
    told = replace(judge.info, training={"mining": [mining]}).training["mining"]
    assert told == [{"target": "./target", "draft": "./draft", "written_by": "./target, weights 01, threshold 0.3"}]
    odd = {"written_by": f"{private[0]}, weights of/it, weights 01, threshold 0.3"}
    assert public_mining(odd) == {"written_by": "./it, weights 01, threshold 0.3"}


def test_markup_in_names_does_not_break_a_card(hub, tmp_path):
    """Of a folder, a category, a file of prompts: text in the card, whatever is in it."""
    name = "`x` | *y* <script>"
    labels = write_labels(tmp_path / "[a] | labels")
    path = labels / "mining.json"
    system = "Say it in\n```\ncode's words"
    made = json.loads(path.read_text()) | {"prompts_name": name, "prompts_options": {"system": system}}
    path.write_text(json.dumps(made))
    folder = tmp_path / "judge $(touch harm)"
    options = {"components": 4, "max_steps": 5, "disable_tqdm": True}
    judge = main(ScriptArguments([str(labels)], resamples=10), JudgeConfig(str(folder), **options))
    bench = bench_of_private(tmp_path / "a | bench", (name, name), judge)
    quality = json.loads((bench / "quality-results.json").read_text())
    quality["quality"]["categories"] = {name: {"prompts": 3, "retention_by": "same"}}
    quality["quality"]["settings"][0]["setting"] = f"judge:{name}=0.5"
    (bench / "quality-results.json").write_text(json.dumps(quality))
    add_results(folder, fingerprint(judge), benches=[bench])
    push_judge(folder, REPO)
    push_labels([labels], "me/labels")
    push_results(bench, "me/results")
    texts = [card_of(judge, folder).read_text(), hub.files(REPO)["README.md"].decode()]
    texts += [hub.files(repo, kind="datasets")["README.md"].decode() for repo in ("me/labels", "me/results")]
    for text in texts:
        card = ModelCard(text)
        card.validate(repo_type="dataset" if "configs" in card.data.to_dict() else "model")
        html = MarkdownIt("gfm-like", {"linkify": False}).render(card.text)
        assert "<script" not in html
        assert "<em>" not in html
        for table in html.split("<table>")[1:]:
            rows = [row.count("<td") + row.count("<th>") + row.count("<th ") for row in table.split("<tr>")[1:]]
            assert len(set(rows)) == 1
        if text in texts[:2]:
            assert "<p>The judge is published under Apache-2.0" in html  # behind all that is code
    (command,) = re.findall("^hf-selfjudge mine .*$", texts[0], re.MULTILINE)
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, cwd=tmp_path)
    words = done.stdout.decode().split("\0")
    assert words[words.index("--prompts") + 1] == name
    assert words[words.index("--system") + 1] == system
    assert "--output 'judge $(touch harm)'" in texts[0]


# -- what goes wrong on the way --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["preupload", "objects/batch", "PUT /lfs", "lfs/verify", "/commit/"])
@pytest.mark.parametrize("kind", ["cut", "status"])
def test_a_push_that_breaks_leaves_the_repo_as_it_was(hub, folder, stage, kind):
    push_judge(folder, REPO)
    before = hub.files(REPO)
    judge = Judge.from_pretrained(folder)
    judge.info = replace(judge.info, threshold=0.125)
    with torch.no_grad():
        judge.head.bias.add_(1)
    judge.save_pretrained(folder)
    hub.faults.append(Fault(stage, kind, times=100, status=500))
    with pytest.raises(HubError, match="me/tiny-judge could not be written"):
        push_judge(folder, REPO)
    assert hub.files(REPO) == before
    hub.faults.clear()
    push_judge(folder, REPO)
    assert Judge.from_pretrained(REPO).info.threshold == Threshold(0.125)


@pytest.mark.parametrize("stage", ["config.json", "model.safetensors"])
def test_a_hub_that_recovers(hub, folder, stage):
    push_judge(folder, REPO)
    hub.faults.append(Fault(f"(HEAD|GET) .*{stage}", "status", times=1, status=503))
    assert same(Judge.from_pretrained(REPO), Judge.from_pretrained(folder))
    assert not hub.faults[0].times


@pytest.mark.parametrize("stage", ["config.json", "model.safetensors"])
def test_a_load_that_breaks_leaves_nothing_behind(hub, folder, tmp_path, stage):
    push_judge(folder, REPO)
    hub.faults.append(Fault(f"GET .*{stage}", "cut", times=100))
    with pytest.raises(HubError, match=f"{stage} of me/tiny-judge could not be fetched"):
        Judge.from_pretrained(REPO)
    hub.faults.clear()
    assert same(Judge.from_pretrained(REPO), Judge.from_pretrained(folder))
    hub.faults.append(Fault("resolve", "status", times=1000, status=503))
    assert same(Judge.from_pretrained(REPO), Judge.from_pretrained(folder))  # what was fetched before will do


def test_a_full_disk(hub, folder, tmp_path, monkeypatch):
    push_judge(folder, REPO)

    def full(*arguments, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(HubError, match="No space left on device"):
        Judge.from_pretrained(REPO)
    monkeypatch.undo()
    assert not list((tmp_path / "cache").rglob("snapshots/*/model.safetensors"))


# -- hostile repos --------------------------------------------------------------------------------------------------


class Harm:
    def __reduce__(self):
        return os.system, ("touch harm-was-done",)


def hostile():
    """Name of each, and what it puts in the place of a judge's files."""
    return {
        "a pickle named as weights": ("model.safetensors", pickle.dumps(Harm()), "not a complete safetensors file"),
        "a header of 10 GB": (
            "model.safetensors",
            struct.pack("<Q", 10 * 2**30) + b"{}",
            "not a complete safetensors",
        ),
        "a file that is too large": ("model.safetensors", bytes(2**21), "bytes; no such file has more than"),
        "a config that is too large": ("config.json", b"[" * 2**25, "bytes; no such file has more than"),
        "a config that is deep": ("config.json", b"[" * 2**20, "is not the config of a judge"),
        "a config of a giant": ("config.json", {"hidden_size": 2**40}, "hidden_size is"),
        "a config of another kind": ("config.json", {"hidden_size": "32"}, "hidden_size is a str"),
        "components beyond all": ("config.json", {"components": 10**9}, "components is 1000000000"),
        "a threshold beyond all": ("config.json", {"threshold": 7}, r"`threshold` must be in \[0, 1\].*, got 7"),
        "a threshold that is none": ("config.json", {"threshold": float("nan")}, "`threshold` must be in"),
        "a threshold as text": ("config.json", {"threshold": "half"}, "`threshold` 'half' is none of"),
        "an operating point without": ("config.json", {"operating_points": {"x": {}}}, "has no threshold"),
        "unknown states": ("config.json", {"states": ["hidden_everywhere"]}, "uses the states"),
        "states twice": ("config.json", {"states": ["hidden_before"] * 2}, "states names one twice"),
        "other sizes": ("config.json", {"components": 5}, "does not fit config.json"),
        "an adapter that is not there": ("config.json", {"adapter": True}, "has no adapter_config.json"),
    }


@pytest.mark.parametrize("case", hostile())
def test_a_hostile_repo_is_refused(hub, folder, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    push_judge(folder, REPO)
    name, content, message = hostile()[case]
    if isinstance(content, dict):
        content = json.dumps(json.loads((folder / "config.json").read_text()) | content).encode()
    hub.write(REPO, {name: content})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Judge.from_pretrained(REPO)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pull_judge(REPO, tmp_path / "there")
    assert not (tmp_path / "there").exists()
    assert not list(tmp_path.rglob("harm-was-done"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["head.weight"].fill_(float("nan")), r"contains NaN or infinity \(head.weight\)"),
        (lambda t: t.update({"head.bias": t["head.bias"].half()}), "has numbers of type F16"),
        (lambda t: t.update({"head.bias": t["head.bias"].long()}), "has numbers of type .*I64"),
        (lambda t: t.update({"head.weight": t["head.weight"][:, 1:].contiguous()}), r"head.weight: \(1, 19\) by"),
        (lambda t: t.pop("projection"), r"projection: .* None there"),
        (lambda t: t.update({"more": torch.zeros(1)}), r"more: None by the config, \(1,\) there"),
    ],
)
def test_weights_that_do_not_fit_are_refused(hub, folder, change, message):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        Judge.from_pretrained(folder)
    with pytest.raises(ValueError, match=message):  # nor is it published
        push_judge(folder, REPO)
    assert not hub.store.repos


def test_mutated_files_end_in_an_error_or_in_a_judge(llama, tmp_path):
    """Bytes flipped, cut, doubled and inserted at random places: never anything but a judge or one clear error."""
    target, rng = llama[0], random.Random(0)
    whole = tmp_path / "whole"
    adapted_judge(target, adapter(target)).save_pretrained(whole)
    outcomes = []
    for _ in range(240):
        folder = tmp_path / "mutated"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        name = rng.choice(["config.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors"])
        content = bytearray((folder / name).read_bytes())
        for _ in range(rng.choice((1, 1, 3, 20))):
            at = rng.randrange(min(len(content), 400) if rng.random() < 0.7 else len(content))
            kind = rng.choice(["flip", "cut", "insert", "double"])
            if kind == "flip":
                content[at] ^= 1 << rng.randrange(8)
            elif kind == "cut":
                del content[at : at + rng.randrange(1, 40)]
            elif kind == "insert":
                content[at:at] = rng.randbytes(rng.randrange(1, 40))
            else:
                content[at:at] = content[at : at + 40]
        (folder / name).write_bytes(content)
        try:
            judge = Judge.from_pretrained(folder)
            if judge.adapter is not None:
                JudgedModel(target, JudgeRule(judge, allow_other_weights=True))
            outcomes.append("judge")
        except (ValueError, FileNotFoundError):
            outcomes.append("error")
    assert outcomes.count("error") > 100
    assert outcomes.count("judge") > 5


# -- in processes of their own ---------------------------------------------------------------------------------------

LOAD = """
import json, os, sys, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
target, draft = (AutoModelForCausalLM.from_pretrained(name) for name in sys.argv[1].split(","))
draft.generation_config.num_assistant_tokens = 5
draft.generation_config.num_assistant_tokens_schedule = "constant"
draft.generation_config.assistant_confidence_threshold = 0.0
ids = torch.tensor([[5, 9, 23, 7, 40, 3]])
how = dict(assistant_model=draft, max_new_tokens=40, do_sample=False, return_dict_in_generate=True)
found = {}
for repo in sys.argv[2:]:
    from hf_selfjudge import JudgedModel
    judged = JudgedModel.from_pretrained(target, repo)
    found[repo] = judged.generate(ids, **how).sequences.tolist()
    assert judged.stats.judged, judged.stats
    if os.path.isdir(repo):
        continue
    found[repo + ", custom_generate"] = target.generate(
        ids, **how, custom_generate=repo, trust_remote_code=True
    ).sequences.tolist()
    found[repo + ", lossless"] = target.generate(
        ids, **how, custom_generate=repo, trust_remote_code=True, threshold=0.0
    ).sequences.tolist()
    try:
        target.generate(ids, **how, custom_generate=repo, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code" in str(error)
    else:
        raise SystemExit("the code of a repo ran untrusted")
found["stock"] = target.generate(ids, **how).sequences.tolist()
print(json.dumps(found))
"""


def process(hub, home, *command, **environment):
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HOME": str(home), "HF_TOKEN": "hf_write",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "COLUMNS": "200", **environment,
    }  # fmt: skip
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)


OURS = (sys.executable, "-m", "hf_selfjudge")


def extension(home):
    """The `hf` command, of which ours is an extension in this home."""
    extension = home / ".local/share/hf/extensions/hf-selfjudge"
    extension.mkdir(parents=True)
    script = extension / "hf-selfjudge"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m hf_selfjudge "$@"\n')
    script.chmod(0o755)
    ExtensionManifest(
        owner="someone",
        repo="hf-selfjudge",
        repo_id="someone/hf-selfjudge",
        short_name="selfjudge",
        executable_path=str(script),
        type="binary",
        installed_at=datetime.now(),
    ).save(extension)
    return os.path.join(os.path.dirname(sys.executable), "hf"), "selfjudge"


@pytest.mark.heavy
def test_from_prompts_to_a_judge_that_is_loaded_by_its_name(hub, pair_folders, prompts_file, tmp_path):
    """Mined, trained and pushed on the command line, as head and as adapter; then everything local is deleted. By name
    only, online and then offline, with the package and with the repo's own code, the text is the same."""
    home, work = tmp_path / "home", tmp_path / "work"

    def call(*command, **environment):
        done = process(hub, home, *command, **environment)
        assert done.returncode == 0, done.stderr
        assert "hf_write" not in done.stdout + done.stderr
        return done.stdout

    mining = ("--max-new-tokens", 40, "--per-answer", 12, "--rewrites", 12, "--dtype", "float32")
    call(*OURS, "mine", "--pair", pair_folders, "--prompts", prompts_file, "--output", work / "labels", *mining)
    training = ("--labels", work / "labels", "--components", 4, "--folds", 2, "--max_steps", 50, "--dtype", "float32")
    call(*OURS, "train", *training, "--output_dir", work / "head")
    call(*OURS, "train", *training, "--lora_layers", 1, "--output_dir", work / "adapter")
    folders = (work / "head", work / "adapter")
    before = json.loads(call(sys.executable, "-c", LOAD, pair_folders, *folders).splitlines()[-1])
    call(*OURS, "push", work / "head", "me/head")
    call(*extension(home), "push", work / "adapter", "me/adapter")
    shutil.rmtree(work)
    shutil.rmtree(home)

    command = (sys.executable, "-c", LOAD, pair_folders, "me/head", "me/adapter")
    found = json.loads(call(*command).splitlines()[-1])
    assert found["stock"] == before["stock"]
    for repo, folder in zip(("me/head", "me/adapter"), folders, strict=True):
        assert found[f"{repo}, custom_generate"] == found[repo] == before[str(folder)] != found["stock"]
        assert found[f"{repo}, lossless"] == found["stock"]
    hub.requests.clear()
    assert json.loads(call(*command, HF_HUB_OFFLINE="1").splitlines()[-1]) == found
    assert not hub.requests


@pytest.mark.heavy
def test_the_command_line_and_the_extension(hub, folder, tmp_path):
    """`hf-selfjudge push` and `pull`, and the same as `hf selfjudge`."""
    home = tmp_path / "home"
    pushed = process(hub, home, *OURS, "push", folder, REPO, "--private", "--tag", "v1")
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.startswith(f"Pushed: {hub.url}/{REPO}/commit/")
    pulled = process(hub, home, *extension(home), "pull", REPO, tmp_path / "there", "--revision", "v1")
    assert pulled.returncode == 0, pulled.stderr
    assert same(Judge.from_pretrained(tmp_path / "there"), Judge.from_pretrained(folder))
    refused = process(hub, home, *OURS, "push", folder, REPO, HF_TOKEN="hf_read")
    assert refused.returncode == 1
    assert "could not be written" in refused.stderr
    assert "hf_read" not in refused.stdout + refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_small_hub_keeps_its_repos(hub, folder, tmp_path):
    push_judge(folder, REPO)
    with Hub(tmp_path / "hub") as again:
        assert again.files(REPO) == hub.files(REPO)
        assert HfApi(endpoint=again.url).list_repo_files(REPO) == HfApi(endpoint=hub.url).list_repo_files(REPO)
    assert asdict(hub.store.repos["models", REPO])["name"] == REPO
