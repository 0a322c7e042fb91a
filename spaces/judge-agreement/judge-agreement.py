"""How much of the target's own answers judged decoding keeps, as a measurement of `evaluate`."""

import datasets
import evaluate
import numpy as np

from hf_selfjudge.bench.tradeoff import Grid
from hf_selfjudge.scoring.meaning import reconvergence
from hf_selfjudge.scoring.statistics import Interval


DESCRIPTION = """\
Agreement is the share of a reference's 4-grams that the prediction has, of words; 1 where both are the same. It says
how much of the wording was kept, not whether what was kept is right.

Retention is how much of the references' quality the predictions keep: in each category the mean score of the
predictions divided by that of the references, and over all the mean of the categories. Without scores, agreement is
the score.
"""

ARGUMENTS = """
Args:
    predictions (`list[str]`): Answers of judged decoding.
    references (`list[str]`): The target's own answers to the same prompts (lossless decoding).
    categories (`list[str]`, *optional*): Of the prompts; all are one category by default.
    scores (`list[float]`, *optional*): How good each prediction is (right or wrong, ROUGE, ...), 0 or more.
    reference_scores (`list[float]`, *optional*): How good each reference is.
    resamples (`int`, defaults to 2000): Of the bootstrap over prompts, drawn within categories.
    seed (`int`, defaults to 0): Of the bootstrap.

Returns:
    `agreement` and `retention`, each `(value, low, high)` with a 95 % interval (`None` where it is undefined), and
    `retention_by_category`, a `dict` of such.

Example:

    >>> measurement = evaluate.load("spaces/judge-agreement", module_type="measurement")
    >>> results = measurement.compute(predictions=["so it is 4 in all"], references=["so it is 5 in all"])
    >>> tuple(results["agreement"])
    (0.0, 0.0, 0.0)
"""

CITATION = """\
@article{selfjudge2025, title={SelfJudge: Faster Speculative Decoding via Self-Supervised Judge Verification},
journal={arXiv preprint arXiv:2510.02329}, year={2025}}
"""


class JudgeAgreement(evaluate.Measurement):
    """Agreement and retention, as `hf_selfjudge` defines them."""

    def _info(self):
        return evaluate.MeasurementInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=ARGUMENTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(
        self, predictions, references, categories=None, scores=None, reference_scores=None, resamples=2000, seed=0
    ):
        if (scores is None) != (reference_scores is None):
            raise ValueError("`scores` and `reference_scores` belong together: give both or neither.")
        given = {"categories": categories, "scores": scores, "reference_scores": reference_scores}
        for name, values in given.items():
            if values is not None and len(values) != len(predictions):
                raise ValueError(f"`{name}` must be one for each prediction ({len(predictions)}), got {len(values)}.")
        pairs = zip(references, predictions, strict=True)
        agreement = [reconvergence(reference.split(), prediction.split()) for reference, prediction in pairs]
        ones = np.ones((2, len(agreement)))
        rows = {"agreement": np.array([ones[0], agreement])}
        if scores is not None:
            rows["score"] = np.array([reference_scores, scores], dtype=float)
        categories = np.array(["all"] * len(agreement) if categories is None else categories)
        grid = Grid(
            ["lossless", "judged"],
            ["lossless", "judged"],
            categories,
            ones,
            ones,
            rows,
            resamples=resamples,
            seed=seed,
        )
        by = [[*rows][-1]]
        return {
            "agreement": Interval.of(grid.mean("agreement")[:, 1]),
            "retention": Interval.of(grid.retention(by)[:, 1]),
            "retention_by_category": {
                str(category): Interval.of(grid.retention(by, category)[:, 1]) for category in np.unique(categories)
            },
        }
