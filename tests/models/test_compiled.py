"""A compiled draft proposes what it proposes uncompiled, and is compiled only once."""

import gc
import weakref

import pytest
import torch
from transformers import CompileConfig

from hf_selfjudge import JudgedModel, load_model
from hf_selfjudge.models import compiled as module
from hf_selfjudge.models.compiled import compile_step, shared_cache
from hf_selfjudge.models.pair import fit_vocabulary
from hf_selfjudge.rules import Coin, Lossless
from tests.builders import VOCAB, build, perturbed


NEW = 40  # tokens


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    """Caches are small, so that texts need larger ones; nothing is compiled yet."""
    monkeypatch.setattr(module, "SHORTEST", 16)
    monkeypatch.setattr(module, "WARMED_UP", (16, 32))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Backend:
    """Compiles to what it was given, and counts."""

    def __init__(self):
        self.graphs = self.runs = 0

    def __deepcopy__(self, memo):
        return self  # a config copies its backend

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        self.graphs += 1

        def run(*arguments):
            self.runs += 1
            return graph(*arguments)

        return run


def compiled_copy(model, **copy):
    backend, draft = Backend(), perturbed(model, **copy)
    compile_step(draft, CompileConfig(fullgraph=True, backend=backend, mode=None))
    assert shared_cache(draft) is not None
    return draft, backend


def prompt_of(length, seed=0):
    return torch.randint(1, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def answer(target, draft, prompt, rule=None, draft_length=None, **kwargs):
    """The answer, and how it was drafted."""
    judged = JudgedModel(target, rule or Lossless(), draft_length)
    torch.manual_seed(0)
    output = judged.generate(prompt, assistant_model=draft, max_new_tokens=NEW, **kwargs)
    return output.tolist(), judged.stats.rounds, judged.stats.drafted, judged.stats.matched, judged.stats.judged


@pytest.mark.parametrize("how", [{}, {"do_sample": True}, {"prompt_lookup_num_tokens": 4}, {"min_new_tokens": 12}])
def test_same_candidates(pair, how):
    target, draft = pair
    own, backend = compiled_copy(target)
    graphs = backend.graphs
    for length in (9, 30, 3, 100):
        prompt = prompt_of(length)
        runs = backend.runs
        found = answer(target, own, prompt, **how)
        assert found == answer(target, draft, prompt, **how)
        assert found[2] > found[1]  # some rounds draft several tokens
        assert backend.runs > runs
    assert backend.graphs == graphs  # larger caches are not compiled anew


def test_a_rule_that_accepts(llama):
    target, draft = llama
    own, _ = compiled_copy(target)
    found = answer(target, own, prompt_of(9), Coin(0.8))
    assert found == answer(target, draft, prompt_of(9), Coin(0.8))
    assert found[-1] > 0


def test_one_call_at_a_time_has_the_cache(llama):
    target, draft = llama
    own, backend = compiled_copy(target)
    other = Backend()
    assert shared_cache(own).take(other, 20) is not None
    runs = backend.runs
    assert answer(target, own, prompt_of(9)) == answer(target, draft, prompt_of(9))
    assert backend.runs == runs
    del other
    answer(target, own, prompt_of(9))
    assert backend.runs > runs


def test_rows_side_by_side(llama):
    target, draft = llama
    own, backend = compiled_copy(target)
    runs = backend.runs
    prompts = torch.cat([prompt_of(9, seed) for seed in (1, 2)])
    both = {"attention_mask": torch.ones_like(prompts)}
    assert answer(target, own, prompts, **both)[0] == answer(target, draft, prompts, **both)[0]
    assert backend.runs == runs  # they share forwards instead


def test_another_number_of_embeddings(llama):
    target, draft = llama
    smaller = perturbed(target)
    smaller.resize_token_embeddings(VOCAB - 8)
    plain = fit_vocabulary(perturbed(smaller, noise=0.0), VOCAB)
    own, backend = compiled_copy(smaller, noise=0.0)
    for _ in range(2):
        graphs, runs = backend.graphs, backend.runs
        prompt = prompt_of(9) % (VOCAB - 8)
        assert answer(target, fit_vocabulary(own, VOCAB), prompt) == answer(target, plain, prompt)
        assert (backend.graphs, backend.runs > runs) == (graphs, True)


def test_what_cannot_be_compiled(llama, caplog):
    def fails(graph, inputs):
        raise RuntimeError("no compiler here")

    target, draft = llama
    own = perturbed(target)
    for model in (own, fit_vocabulary(own, VOCAB + 8)):
        forward = vars(model).get("forward")
        compile_step(model, CompileConfig(backend=fails, mode=None))
        assert shared_cache(model) is None
        assert vars(model).get("forward") is forward
    assert "no compiler here" in caplog.text
    assert answer(target, own, prompt_of(9)) == answer(target, draft, prompt_of(9))


def test_compiled_only_once(llama):
    draft, backend = compiled_copy(llama[0])
    forward, graphs = draft.forward, backend.graphs
    compile_step(draft)
    assert draft.forward is forward
    assert backend.graphs == graphs


def test_many_models_in_one_process(llama):
    backends = [compiled_copy(llama[0])[1] for _ in range(6)]
    assert all(backend.graphs for backend in backends)


def test_a_call_that_may_not_be_compiled_any_more(llama):
    target, draft = llama
    own, backend = compiled_copy(target)
    runs = backend.runs
    with torch._dynamo.config.patch(recompile_limit=1), torch.inference_mode():  # compiled code is of one mode only
        assert answer(target, own, prompt_of(9)) == answer(target, draft, prompt_of(9))
    assert backend.runs == runs


def test_nothing_outlives_the_model(llama):
    draft, _ = compiled_copy(llama[0])
    answer(llama[0], draft, prompt_of(9))
    cache = weakref.ref(shared_cache(draft).cache)
    del draft
    torch._dynamo.reset()
    gc.collect()
    assert cache() is None


@pytest.mark.parametrize(("name", "value"), [("low_bit", True), ("device_map", "cpu")])
def test_options_that_exclude_each_other(name, value):
    with pytest.raises(ValueError, match=f"`compile` cannot be used with `{name}`"):
        load_model("unused", compile=True, **{name: value})


@pytest.mark.heavy
def test_a_loaded_draft(llama, tokenizer, tmp_path):
    """With the compiler that users get."""
    target, _ = llama
    draft = build("qwen2")
    draft.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    own, _ = load_model(str(tmp_path), torch.float32, compile=True)
    assert shared_cache(own) is not None
    for sampling in (False, True):
        expected = answer(target, draft, prompt_of(9), draft_length=5, do_sample=sampling)
        assert answer(target, own, prompt_of(9), draft_length=5, do_sample=sampling) == expected
