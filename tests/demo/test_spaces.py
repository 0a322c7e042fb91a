"""The measurement as `evaluate` loads it, on answers whose agreement is known, and its page."""

import importlib.util
import shutil
from pathlib import Path

import evaluate
import pytest
from gradio_client import Client


FOLDER = Path(__file__).parents[2] / "spaces" / "judge-agreement"
ANSWERS = ["a b c d e", "a b c d x", "q r s t u"]


@pytest.fixture(scope="module")
def measurement(tmp_path_factory):
    return evaluate.load(str(FOLDER), module_type="measurement", cache_dir=str(tmp_path_factory.mktemp("cache")))


def test_agreement(measurement):
    found = measurement.compute(predictions=ANSWERS, references=["a b c d e"] * 3)
    # Two 4-grams: both kept, one kept, none.
    value, low, high = found["agreement"]
    assert value == pytest.approx(0.5)
    assert 0 <= low < value < high <= 1
    assert found["retention"] == found["agreement"]
    assert found["retention_by_category"] == {"all": found["retention"]}


def test_retention_is_the_mean_of_categories(measurement):
    found = measurement.compute(
        predictions=ANSWERS,
        references=ANSWERS,
        categories=["maths", "maths", "text"],
        scores=[1, 0, 0.3],
        reference_scores=[1, 1, 0.4],
    )
    assert found["agreement"] == (1, 1, 1)
    assert found["retention_by_category"]["maths"][0] == pytest.approx(0.5)
    assert found["retention_by_category"]["text"] == pytest.approx((0.75,) * 3)
    assert found["retention"][0] == pytest.approx((0.5 + 0.75) / 2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scores": [1, 1, 1]}, "belong together"),
        ({"categories": ["a"]}, "`categories` must be one for each prediction"),
    ],
)
def test_what_does_not_fit_is_refused(measurement, wrong, message):
    with pytest.raises(ValueError, match=message):
        measurement.compute(predictions=ANSWERS, references=ANSWERS, **wrong)


def test_the_page_of_the_measurement(monkeypatch, tmp_path):
    """In a folder of another name, as on the Hub."""
    space = shutil.copytree(FOLDER, tmp_path / "app")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    spec = importlib.util.spec_from_file_location("app", space / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    _, url, _ = app.page.launch(prevent_thread_lock=True, server_name="127.0.0.1", quiet=True, ssr_mode=False)
    try:
        assert Client(url, verbose=False).predict("a b c d e", "a b c d x", api_name="/agreement") == 0.5
    finally:
        app.page.close()
