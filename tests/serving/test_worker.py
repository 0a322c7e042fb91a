"""The judge inside vLLM, whose parts are fakes here. `test_vllm.py` has the real ones."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from hf_selfjudge.serving.settings import Rules, ServingConfig
from tests.builders import build, midway_judge, random_judge
from tests.serving import fake_vllm
from tests.serving.fake_vllm import Metadata, Step, request, runner


VOCAB = 6
LOGITS = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.05, 0.05]).log()  # the target chooses 0
GREEDY = SimpleNamespace(all_greedy=True, bias=torch.zeros(VOCAB))


@pytest.fixture
def serving(monkeypatch):
    """The modules that import vLLM."""
    fake_vllm.install(monkeypatch)
    return SimpleNamespace(**{name.split(".")[-1]: importlib.import_module(name) for name in fake_vllm.OURS})


def sampler_of(serving, requests, rule="top-k=2", special=(), **options):
    """A sampler of a server, in a step of these requests."""
    own = runner(**options)
    own.requests = {each.req_id: each for each in requests}
    own.input_batch.req_ids = [*own.requests]
    return serving.sampler.JudgedSampler(own, Rules(ServingConfig(rule=rule)), [*special])


def sample(sampler, drafts, metadata=GREEDY, logits=None):
    """What a step adds to each request."""
    found = Metadata(drafts)
    rows = len(found.logits_indices)
    logits = LOGITS.repeat(rows, 1) if logits is None else logits
    sampler.runner.positions = torch.arange(rows) + 10
    sampler.step = Step(logits, torch.zeros(rows, 4), None, None)
    output = sampler(found, None, logits, metadata)
    return [[token for token in row if token >= 0] for row in output.sampled_token_ids.tolist()], output


@pytest.mark.parametrize(
    ("drafts", "added", "counts"),
    [
        ([[1, 1]], [[1, 1, 0]], (2, 0)),  # both are kept, and a token of the target comes after them
        ([[1, 2, 1]], [[1, 0]], (1, 1)),  # the candidate after the rejected one does not count
        ([[2, 1], [0, 0, 1]], [[0], [0, 0, 1, 0]], (1, 1)),
        ([[0, 0], []], [[0, 0, 0], [0]], (0, 0)),
    ],
)
def test_what_a_step_adds(serving, drafts, added, counts):
    sampler = sampler_of(serving, [request(str(number)) for number in range(len(drafts))])
    assert sample(sampler, drafts)[0] == added
    assert (sampler.judged, sampler.refused) == counts
    sample(sampler, drafts)
    assert (sampler.judged, sampler.refused) == tuple(2 * count for count in counts)


def test_no_rule_is_asked_while_vllm_warms_up(serving):
    sampler = sampler_of(serving, [])
    found = Metadata([[1], [1]])
    assert sampler(found, None, LOGITS.repeat(4, 1), GREEDY).sampled_token_ids[:, 0].tolist() == [0, 0]


def test_protected_tokens(serving):
    requests = [request("a"), request("b", stops={1}), request("c")]
    sampler = sampler_of(serving, requests, rule="top-k=6", special={2, VOCAB + 3})
    assert sample(sampler, [[1], [1], [2]])[0] == [[1, 0], [0], [0]]
    assert (sampler.judged, sampler.refused) == (1, 0)


def test_masked_tokens(serving):
    """By a constraint, and for sampled requests by a filter."""
    masked = torch.zeros(VOCAB)
    masked[1] = -torch.inf
    sampler = sampler_of(serving, [request("a")], rule="top-k=6")
    assert sample(sampler, [[1, 2]], SimpleNamespace(all_greedy=True, bias=masked))[0] == [[0]]
    sampler = sampler_of(serving, [request("a", temperature=0.7)], rule="top-k=6")
    filtered = SimpleNamespace(all_greedy=False, bias=torch.zeros(VOCAB), filter=masked)
    assert sample(sampler, [[2, 1]], filtered)[0] == [[2, 0]]


def test_requests_may_be_lossless(serving):
    requests = [request("a"), request("b", extra={"selfjudge": 0})]
    sampler = sampler_of(serving, requests)
    assert sample(sampler, [[1], [1]])[0] == [[1, 0], [0]]
    sampler = sampler_of(serving, requests[1:])
    assert sample(sampler, [[1]])[0] == [[0]]
    assert (sampler.judged, sampler.refused) == (0, 0)


def test_a_rule_that_the_server_does_not_have(serving):
    """It is decoded losslessly, with a line in the log."""
    sampler = sampler_of(serving, [request("a", extra={"selfjudge": 0.5})])
    assert [sample(sampler, [[1]])[0] for _ in range(2)] == [[[0]], [[0]]]
    (line,) = serving.sampler.logger.lines
    assert line.startswith("Request a is decoded losslessly. `selfjudge` can only be 0")


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
@pytest.mark.parametrize("all_greedy", [True, False])
def test_log_probabilities_are_the_targets_own(serving, mode, all_greedy):
    sampler = sampler_of(serving, [request("a"), request("b")], logprobs_mode=mode)
    metadata = SimpleNamespace(
        all_greedy=all_greedy, bias=torch.zeros(VOCAB), filter=torch.tensor([0.0, 1, 0, 0, 0, 0])
    )
    _, output = sample(sampler, [[1, 2], [1]], metadata)
    changed = metadata.filter if mode.startswith("processed") and not all_greedy else 0
    expected = (LOGITS + changed).log_softmax(-1)[[1, 2, 1]]
    assert torch.allclose(output.logprobs_tensors, expected)


# The worker ------------------------------------------------------------------------------------------------------


def config_of(selfjudge, target="tiny/llama", **changed):
    """A configuration of vLLM."""
    hf_config = build("llama").config
    parts = {
        "additional_config": {"selfjudge": selfjudge},
        "speculative_config": SimpleNamespace(method="draft_model", rejection_sample_method="standard"),
        "parallel_config": SimpleNamespace(world_size=1),
        "use_v2_model_runner": False,
        "model_config": SimpleNamespace(model=target, hf_config=hf_config),
    }
    return SimpleNamespace(**parts | changed)


def started(serving, config):
    worker = serving.worker.JudgedWorker(config, 0, 0, "")
    worker.load_model()
    return worker


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    folder, target = tmp_path_factory.mktemp("judges"), build("llama")
    random_judge(target, (3,)).save_pretrained(folder / "last")
    midway_judge(target).save_pretrained(folder / "layer")
    return folder


def test_steps_of_a_worker(serving):
    worker = started(serving, config_of({"rule": "top-k=2"}))
    own = worker.model_runner
    assert isinstance(own.rejection_sampler, serving.sampler.JudgedSampler)
    assert (own.rejection_sampler.special.nonzero().flatten().tolist(), worker.layers) == ([5], [])
    assert not own.use_aux_hidden_state_outputs
    own.requests, own.input_batch.req_ids = {"a": request("a")}, ["a"]
    counters = serving.worker.COUNTERS
    for step in (1, 2):
        found, logits = Metadata([[1, 2]]), LOGITS.repeat(3, 1)
        own.positions = torch.arange(3) + 10
        own.execute_model_state = Step(logits, torch.zeros(3, 4), None, (found, None, logits, GREEDY))
        assert worker.sample_tokens(None).sampled_token_ids.tolist() == [[1, 0, -1]]
        assert (counters["judged"].value, counters["refused"].value) == (step, step)
    assert own.rejection_sampler.step is None
    lines = serving.worker.logger.lines
    assert lines[0] == "Decoding with TopK(k=2)."
    assert [line.split(",")[0] for line in lines[1:]] == ["Judge: 1 mismatches kept and 1 refused so far"]


@pytest.mark.parametrize(("name", "layers"), [("last", []), ("layer", [(1,)])])
def test_a_judge_gets_the_states_of_its_layer(serving, judges, name, layers):
    config = config_of({"judge": str(judges / name), "threshold": 0.5})
    worker = started(serving, config)
    sampler = worker.model_runner.rejection_sampler
    assert (worker.layers, worker.model_runner.use_aux_hidden_state_outputs) == (layers, bool(layers))
    assert config.additional_config["selfjudge_layer"] == sampler.rules.layer
    found = Metadata([[1], [1, 1]])
    last, entered = torch.rand(5, 4), torch.rand(9, 4)
    found.logits_indices = torch.tensor([1, 2, 5, 6, 7])
    sampler.step = Step(None, last, [entered] if layers else None, None)
    assert torch.equal(sampler._hidden(found), entered[found.logits_indices] if layers else last)


def test_a_target_that_does_not_give_its_states(serving, judges, monkeypatch):
    monkeypatch.setattr(serving.worker, "supports_eagle3", lambda model: False)
    with pytest.raises(ValueError, match="layer 1, which SimpleNamespace does not give in vLLM"):
        started(serving, config_of({"judge": str(judges / "layer")}))


DRAFTS = {"method": "draft_model", "rejection_sample_method": "standard"}


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"speculative_config": None}, "needs drafts: --speculative-config"),
        ({"parallel_config": SimpleNamespace(world_size=2)}, "--tensor-parallel-size"),
        ({"use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER must be 0"),
        ({"speculative_config": SimpleNamespace(**DRAFTS | {"rejection_sample_method": "synthetic"})}, "synthetic"),
        (
            {"speculative_config": SimpleNamespace(**DRAFTS | {"method": "eagle3"})},
            "eagle3 drafter reads",
        ),
    ],
)
def test_configurations_that_are_refused(serving, judges, changed, found):
    with pytest.raises(ValueError, match=found):
        started(serving, config_of({"judge": str(judges / "layer")}, **changed))


def test_a_judge_of_another_target(serving, judges):
    with pytest.raises(ValueError, match="made for another target"):
        started(serving, config_of({"judge": str(judges / "last")}, target="other/llama"))
    selfjudge = {"judge": str(judges / "last"), "allow_other_weights": True}
    assert started(serving, config_of(selfjudge, target="other/llama")).rules.judge is not None


def test_another_version_of_vllm(serving, monkeypatch):
    monkeypatch.setattr(serving.worker, "vllm_version", "0.40.1")
    with pytest.raises(ImportError, match="This is vLLM 0.40.1; hf_selfjudge was tested with 0.32"):
        started(serving, config_of({"rule": "top-k=2"}))


def test_requests_are_checked_before_they_reach_the_target(serving):
    check = serving.request_check.RequestCheck
    check.validate_params(SimpleNamespace(extra_args={"selfjudge": "0.03/token"}))
    with pytest.raises(ValueError, match="in the request"):
        check.validate_params(SimpleNamespace(extra_args={"selfjudge": 7}))
    logits = torch.rand(2, 3)
    assert check(None, None, False).apply(logits) is logits
