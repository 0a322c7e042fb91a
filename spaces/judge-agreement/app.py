"""The measurement as a page: two answers side by side, and what they have in common."""

from pathlib import Path

import evaluate
import gradio as gr


# By its file: the folder of a Space has another name.
measurement = evaluate.load(str(Path(__file__).with_name("judge-agreement.py")), module_type="measurement")


def agreement(reference: str, prediction: str) -> float:
    """Share of the reference's 4-grams of words that the prediction has, in [0, 1]."""
    found = measurement.compute(predictions=[prediction], references=[reference], resamples=1)
    return round(found["agreement"][0], 3)


page = gr.Interface(
    agreement,
    [
        gr.Textbox(label="The target's own answer", lines=6, max_length=20_000),
        gr.Textbox(label="The answer decoded with a judge", lines=6, max_length=20_000),
    ],
    gr.Number(label="Agreement: share of the target's 4-grams that were kept"),
    examples=[
        [
            "The sky is blue because air scatters blue light more.",
            "The sky looks blue because air scatters blue light more.",
        ]
    ],
    title="Judge agreement",
    description=measurement.description,
    flagging_mode="never",
)

if __name__ == "__main__":
    page.launch()
