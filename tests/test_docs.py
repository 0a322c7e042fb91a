"""What the documentation tells readers to type works, and leads somewhere."""

import re
import shlex
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import typer

import hf_selfjudge
from hf_selfjudge import Judge, training
from hf_selfjudge.cli.app import app
from tests.builders import build, perturbed, random_judge, tiny_tokenizer


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("hub_cards/*-qwen2.5-coder.md"))]
PAGES += sorted(ROOT.glob("hub_cards/*/README.md")) + sorted(ROOT.glob("spaces/*/README.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands(page: Path) -> list[str]:
    """Every `hf-selfjudge …` in the blocks and in the text of a page."""
    text = page.read_text()
    shell = "\n".join(body for language, body in BLOCK.findall(text) if language == "bash").replace("\\\n", " ")
    lines = [part for line in shell.splitlines() for part in line.partition(" #")[0].split("&&")]
    lines += re.findall(r"(?<!`)`(hf-selfjudge [^`]+)`(?!`)", BLOCK.sub("", text))
    return [line.strip() for line in lines if line.strip().startswith("hf-selfjudge ")]


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))], ids=name_of)
def test_python_blocks_run(page, monkeypatch):
    """With tiny models in the place of the real ones."""
    tokenizer = tiny_tokenizer()
    target = build("llama", vocab_size=len(tokenizer))
    models = iter([target, perturbed(target), perturbed(target)] * 3)
    monkeypatch.setattr(hf_selfjudge, "load_model", lambda *args, **kwargs: (next(models), tokenizer))
    monkeypatch.setattr(Judge, "from_pretrained", lambda *args, **kwargs: random_judge(target))
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    namespace = {"vllm": Mock(), "openai": Mock()}  # servers and their clients
    torch.manual_seed(0)
    for language, code in BLOCK.findall(page.read_text()):
        if language == "python":
            exec(compile(code, name_of(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_known(page):
    group = typer.main.get_command(app)
    options_of_training = training.script.make_parser()._option_string_actions
    for line in commands(page):
        words = [word for word in shlex.split(line)[1:] if word != "…"]
        command = group.get_command(None, words[0])
        assert command is not None, line
        if words[0] == "train":
            assert all(word in options_of_training for word in words if word.startswith("--")), line
            continue
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known | {"--help"}, line


def test_the_commands_of_the_first_page_are_complete():
    group = typer.main.get_command(app)
    for line in commands(ROOT / "README.md"):
        words = shlex.split(line)[1:]
        if words[0] not in ("train",) and BLOCK.search((ROOT / "README.md").read_text()) and "…" not in words:
            command = group.get_command(None, words[0])
            if any(parameter.required for parameter in command.params) and len(words) > 1:
                command.make_context(words[0], words[1:])  # raises if something is missing or of another type


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page):
    for target, _ in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{target} does not exist"
