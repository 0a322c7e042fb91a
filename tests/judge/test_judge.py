"""Saving, loading and refusing judges."""

import json
import pickle
from pathlib import Path

import pytest
import torch

from hf_selfjudge import Judge, JudgedModel
from hf_selfjudge.decoding.rules import JudgeRule
from hf_selfjudge.utils.names import is_hub_id, public_name
from tests.builders import build, perturbed, random_judge


@pytest.fixture
def saved(llama, tmp_path):
    judge = random_judge(llama[0], special_tokens=(3,))
    judge.save_pretrained(tmp_path / "judge")
    return judge, tmp_path / "judge"


def test_loads_back_identical(saved):
    judge, folder = saved
    again = Judge.from_pretrained(folder)
    assert again.info == judge.info
    assert again.state_dict().keys() == judge.state_dict().keys()
    for name, tensor in judge.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_forward_normalises_projects_and_adds(saved):
    judge, _ = saved
    judge.scalar_mean.fill_(1.0)
    judge.scalar_scale.fill_(2.0)
    judge.hidden_mean.fill_(0.5)
    scalars, hidden = torch.randn(3, 7), torch.randn(3, 3, 32)
    parts = [(scalars - 1) / 2, *((hidden[:, side] - 0.5) @ judge.projection[side] for side in range(3))]
    expected = torch.cat(parts, dim=1) @ judge.head.weight[0] + judge.head.bias
    torch.testing.assert_close(judge(scalars, hidden), expected)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_missing_file(saved, missing):
    _, folder = saved
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {missing}"):
        Judge.from_pretrained(folder)


def test_truncated_weights(saved):
    _, folder = saved
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        Judge.from_pretrained(folder)


class Explodes:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_pickle_is_never_loaded(saved):
    _, folder = saved
    content = pickle.dumps(Explodes())
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="a pickle is never loaded"):
        Judge.from_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="other weight formats are not loaded"):
        Judge.from_pretrained(folder)


def test_damaged_config(saved):
    _, folder = saved
    path = folder / "config.json"
    content = json.loads(path.read_text())
    path.write_text("{")
    with pytest.raises(ValueError, match="is not the config of a judge"):
        Judge.from_pretrained(folder)
    path.write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ValueError, match="is not the config of a judge"):
        Judge.from_pretrained(folder)
    path.write_text(json.dumps(content | {"scalars": ["rank"]}))
    with pytest.raises(ValueError, match="uses the scalars"):
        Judge.from_pretrained(folder)
    path.write_text(json.dumps(content | {"components": 8}))
    with pytest.raises(ValueError, match="does not fit config.json"):
        Judge.from_pretrained(folder)


def test_unwritable_folder(saved, tmp_path):
    judge, _ = saved
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        judge.save_pretrained(tmp_path / "file" / "judge")


def test_another_target(llama):
    target, _ = llama
    judge = random_judge(target)
    with pytest.raises(
        ValueError, match=r"What differs: hidden size: judge 32, target 16; vocabulary: judge 64, target 80"
    ) as error:
        JudgedModel(build("llama", hidden_size=16, vocab_size=80), JudgeRule(judge, allow_other_weights=True))
    assert "fingerprint" not in str(error.value)
    tuned = perturbed(target)
    tuned.config.name_or_path = "tiny/tuned"
    with pytest.raises(
        ValueError, match=r"id: judge 'tiny/llama', target 'tiny/tuned'; fingerprint: judge '\w+', target '\w+'"
    ):
        JudgedModel(tuned, JudgeRule(judge))
    JudgedModel(tuned, JudgeRule(judge, allow_other_weights=True))


def test_other_weights_of_the_same_target(caplog):
    """A quantised copy, say: it works, and is told of."""
    target, other = build("llama"), perturbed(build("llama"))
    target.config.name_or_path = other.config.name_or_path = "tiny/copied"
    judge = random_judge(target)
    JudgedModel(target, JudgeRule(judge))
    assert not caplog.records
    JudgedModel(other, JudgeRule(judge))
    assert "made on other weights of tiny/copied than those of `target`" in caplog.text


def test_a_folder_is_no_id(tmp_path, monkeypatch):
    """Two folders of one name hold what they hold: the fingerprint tells."""
    target, other = build("llama"), perturbed(build("llama"))
    for folder, model in (("a", target), ("b", other)):
        (tmp_path / folder / "copied").mkdir(parents=True)
        model.config.name_or_path = str(tmp_path / folder / "copied")
    judge = random_judge(target)
    assert judge.info.target == "./copied"
    JudgedModel(target, JudgeRule(judge))
    with pytest.raises(ValueError, match=r"What differs: fingerprint: judge '\w+', target '\w+'\. Load \./copied"):
        JudgedModel(other, JudgeRule(judge))
    JudgedModel(other, JudgeRule(judge, allow_other_weights=True))


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        *((id, id) for id in ("gpt2", "Qwen/Qwen2.5-0.5B", "me/a.b_c-d", "prompt lookup", "", "~")),
        *(
            (folder, "./it")
            for folder in ("/home/kim/it", "/home/kim/it/", "~/it", "./it", "../it", "a/b/it", "a//it")
        ),
        *((folder, "./it") for folder in (r"C:\Users\kim\it", r"kim\it", "kim smith/it", "-kim/it")),
        *((folder, "./folder") for folder in ("/", "/home/kim", "~/..", "../..")),
        ("me/it.", "./it."),
        ("/home/kim/hub/models--Qwen--Qwen2.5-0.5B/snapshots/0a1b", "Qwen/Qwen2.5-0.5B"),
        ("/home/kim/hub/models--gpt2/snapshots/0a1b/", "gpt2"),
        ("/home/kim/hub/models--a..b/snapshots/0a1b", "./0a1b"),
    ],
)
def test_public_names(monkeypatch, reference, name):
    monkeypatch.setattr("pathlib.Path.home", lambda: Path("/home/kim"))
    assert public_name(reference, here=False) == name
    assert public_name(name, here=False) == name
    assert is_hub_id(name) == (name in ("gpt2", "Qwen/Qwen2.5-0.5B", "me/a.b_c-d"))


def test_a_folder_that_is_called_like_an_id(tmp_path, monkeypatch):
    (tmp_path / "models" / "gpt2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "models")
    assert public_name("gpt2") == public_name("./gpt2") == "./gpt2"
    assert public_name("gpt2", here=False) == "gpt2"
    assert public_name(".") == "./models"


def test_the_same_weights_under_another_name(llama, tmp_path):
    target, _ = llama
    judge = random_judge(target)
    copy = build("llama")
    copy.config.name_or_path = str(tmp_path)
    JudgedModel(copy, JudgeRule(judge))
    JudgedModel(copy.to(torch.bfloat16), JudgeRule(judge))
