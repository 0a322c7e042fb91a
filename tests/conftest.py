"""Fixtures: tiny random models, their tokenizers and folders."""

import pytest
import torch
from huggingface_hub import constants

from tests.builders import VOCAB, build, byte_tokenizer, llama_tokenizer, perturbed, tiny_tokenizer


torch.set_num_threads(1)  # for models this small a second thread only waits


@pytest.fixture(scope="session", params=["llama", "qwen2", "gemma3", "gpt2"])
def pair(request):
    """A target and its draft; tests must not change them."""
    target = build(request.param)
    return target, perturbed(target)


@pytest.fixture(scope="session")
def llama():
    target = build("llama")
    return target, perturbed(target)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """Tests do not ask the Hub."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def prompt():
    return torch.randint(1, VOCAB, (1, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session", params=[llama_tokenizer, byte_tokenizer])
def byte_decoder(request):
    """A tokenizer for which decoding a part is no part of the decoding."""
    return request.param()


@pytest.fixture(scope="session")
def pair_folders(tmp_path_factory, llama, tokenizer):
    """The tiny Llama pair on disk, as `TARGET,DRAFT`."""
    folders = []
    for name, model in zip(("target", "draft"), llama, strict=True):
        folder = tmp_path_factory.mktemp("pair") / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders.append(str(folder))
    return ",".join(folders)


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [f'{{"prompt": "why is {i} not {i + 1}?", "check": "{"number" if i % 2 else "text"}"}}' for i in range(12)]
    path.write_text("\n".join(rows) + "\n")
    return path


# The matrix of architectures, printed at the end of a run ------------------------------------------------------------


@pytest.fixture
def record_matrix(record_property):
    """Note the outcome of one cell: `record_matrix(kind, architecture, decoding, drafter, outcome)`."""
    return lambda *cell: record_property("matrix", cell)


def pytest_terminal_summary(terminalreporter):
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())]
    table: dict[tuple[str, str], dict[str, str]] = {}
    for name, cell in [one for report in reports for one in getattr(report, "user_properties", ())]:
        if name == "matrix":
            kind, architecture, decoding, drafter, outcome = cell
            table.setdefault((kind, architecture), {})[f"{decoding}, {drafter}"] = outcome
    if not table:
        return
    columns = sorted({column for cells in table.values() for column in cells})
    terminalreporter.section("tokens a round: never (= stock) → always (= whole drafts)")
    terminalreporter.write_line(f"{'':20}{'':18}" + "".join(f"{c:>23}" for c in columns))
    for (kind, name), cells in sorted(table.items()):
        terminalreporter.write_line(f"{kind:20}{name:18}" + "".join(f"{cells.get(c, '-'):>23}" for c in columns))
