"""Branches against the same tokens alone, in fp32, on every architecture that keeps keys and values."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from hf_selfjudge.forward.branches import Alone, Branches, packs
from hf_selfjudge.forward.lockstep import run_in_lockstep
from hf_selfjudge.models.attention import share_keys
from tests.architectures import DENSE, MIXTURE, SLIDING_WINDOW, VISION_LANGUAGE, build


KINDS = {
    "dense": DENSE,
    "sliding window": SLIDING_WINDOW,
    "mixture of experts": MIXTURE,
    "vision-language": VISION_LANGUAGE,
}
NAMES = [(kind, name) for kind, names in KINDS.items() for name in names]
CANNOT = {"bloom"}  # its attention takes distances from the order of the cache


def trunk_of(model, ids):
    cache = DynamicCache()
    model(input_ids=ids[None], past_key_values=cache, use_cache=True)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def alone(model, ids, rows):
    output = model(input_ids=ids[None], output_hidden_states=True)
    return output.logits[0, -rows:], output.hidden_states[-1][0, -rows:]


@pytest.mark.parametrize(("kind", "name"), NAMES, ids=[name for _, name in NAMES])
def test_which_architectures_pack(kind, name):
    assert packs(build(kind, name)) == (name not in CANNOT)


@pytest.mark.parametrize("name", ["mamba", "recurrent_gemma"])
def test_recurrent_ones_do_not_pack(name):
    assert not packs(build("recurrent", name))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 128, "num_layers": 2}),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
                                      "long_factor": [2.0] * 4}, "original_max_position_embeddings": 64}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    ],
)  # fmt: skip
def test_what_a_short_trial_does_not_show(name, sizes):
    """A window of its own, or frequencies that follow the longest sequence of a forward."""
    shared = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    shared |= {"num_attention_heads": 4, "num_heads": 4, "max_position_embeddings": 128}
    config = AutoConfig.for_model(name, **shared | sizes)
    assert not packs(AutoModelForCausalLM.from_config(config).eval())


@pytest.mark.parametrize(("kind", "name"), NAMES, ids=[name for _, name in NAMES])
@torch.no_grad()
def test_branches_are_what_they_are_alone(kind, name):
    """Fed in pieces, cut and fed again, one of them dropped in between so that the cache is compacted."""
    model = build(kind, name)
    ids = torch.randint(1, 60, (40,), generator=torch.Generator().manual_seed(0))
    trunk = trunk_of(model, ids)
    packed = None if name in CANNOT else Branches(model, trunk)
    texts = {21: ids[3:15], 5: ids[17:29], 33: ids[9:21]}
    kept = {start: torch.tensor([], dtype=torch.long) for start in texts}
    views = {start: packed or Alone(model, trunk) for start in texts}
    branches = {start: view.branch(start) for start, view in views.items()}
    if packed:
        waste = packed.branch(30)
        packed.feed([waste], [ids.repeat(3)[:70]])
        packed.cut(waste, 0)
        assert len(packed.owner) == 40  # compacted
    for count, keep in ((1, 1), (5, 4), (3, 3), (2, 2)):
        new = {start: text[len(kept[start]) :][:count] for start, text in texts.items()}
        if packed:
            rows = dict(zip(texts, packed.feed([*branches.values()], [*new.values()]), strict=True))
        else:
            rows = {start: views[start].feed([branches[start]], [new[start]])[0] for start in texts}
        for start in texts:
            expected = alone(model, torch.cat([ids[:start], kept[start], new[start]]), count)
            torch.testing.assert_close(rows[start], expected, atol=2e-4, rtol=1e-3)
            kept[start] = torch.cat([kept[start], new[start][:keep]])
            views[start].cut(branches[start], len(kept[start]))


@pytest.mark.parametrize(("kind", "name"), [case for case in NAMES if case[1] not in CANNOT], ids=str)
@torch.no_grad()
def test_branches_of_several_answers_share_a_forward(kind, name):
    """Answers of unlike lengths, with unlike counts of tokens; where the model's attention knows of several sequences,
    none of them is padded."""
    model = build(kind, name)
    share_keys(model)
    ids = torch.randint(1, 60, (40,), generator=torch.Generator().manual_seed(1))
    answers = {40: {21: ids[3:15], 5: ids[17:20]}, 9: {8: ids[:1]}, 25: {12: ids[9:21]}}
    trunks = [trunk_of(model, ids[:length]) for length in answers]

    def call(stand_in, trunk, texts):
        branches = Branches(stand_in, trunk)
        return branches.feed([branches.branch(start) for start in texts], [*texts.values()])

    calls = [lambda m, item=item: call(m, *item) for item in zip(trunks, answers.values(), strict=True)]
    for rows, texts in zip(run_in_lockstep([model], calls), answers.values(), strict=True):
        for row, (start, text) in zip(rows, texts.items(), strict=True):
            expected = alone(model, torch.cat([ids[:start], text]), len(text))
            torch.testing.assert_close(row, expected, atol=2e-4, rtol=1e-3)
