"""How a judge is trained: its label, what it looks at, and every option of transformers' trainer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from .features import SCALARS, STATES


LABELS = ("changed", "flipped", "lost", "says_no", "likelihood", "confidence")
SCORES = ("likelihood", "confidence")  # in nats: what is above a threshold counts as changed
NONE = ["none"]  # how a command line says that a list is empty


@dataclass
class JudgeConfig(TrainingArguments):
    r"""
    Configuration class for the [`JudgeTrainer`].

    This class includes only the parameters that are specific to judges, and those whose defaults differ from
    [`~transformers.TrainingArguments`].

    Parameters:
        > Parameters that control the label

        label (`str`, *optional*, defaults to `"changed"`):
            What the judge predicts. `"changed"`: whether rewriting changed the final number or the passing of tests
            where that is known, else how much of the wording it lost; `"flipped"`: the former alone; `"lost"`: the
            latter alone; `"says_no"`: the target's own probability that both answers do not say the same;
            `"likelihood"` and `"confidence"`: the suffix scores of SelfJudge and of its published code, which need no
            rewrite.
        label_threshold (`float`, *optional*):
            For `"likelihood"` and `"confidence"`: what is above it counts as changed, nats. By default their median.

        > Parameters that control the judge

        scalars (`list[str]`, *optional*, defaults to all):
            Scalar features that it looks at; `"none"` for none.
        states (`list[str]`, *optional*, defaults to all):
            Hidden states that it looks at; `"none"` for none.
        components (`int`, *optional*, defaults to `64`):
            Principal components that are kept of each hidden state, at most its dimensions.

        > Parameters that control the training

        learning_rate (`float`, *optional*, defaults to `1e-2`):
            Initial learning rate of the AdamW optimizer.
        max_steps (`int`, *optional*, defaults to `500`):
            Steps of training.
        num_train_epochs (`float`, *optional*, defaults to `0`):
            Passes over the labels, instead of `max_steps` if it is not 0.
        per_device_train_batch_size (`int`, *optional*, defaults to `256`):
            Substitutions (through the model: answers) of a training batch on each device.
        per_device_eval_batch_size (`int`, *optional*, defaults to `256`):
            The same for evaluation.
        prior (`float`, *optional*, defaults to `0.01`):
            Variance of the Gaussian prior on the head's weights: few labels are trusted less than many. Infinity is
            no prior.
        lr_scheduler_type (`str`, *optional*, defaults to `"cosine"`):
            How the learning rate falls.
        logging_steps (`float`, *optional*, defaults to `100`):
            Steps between two logs.
        save_strategy (`str`, *optional*, defaults to `"no"`):
            When to write checkpoints. On mined features there is nothing to lose: training takes seconds.
        ddp_find_unused_parameters (`bool`, *optional*, defaults to `False`):
            Whether several processes look for parameters without a gradient: a judge has none.
        report_to (`str`, *optional*, defaults to `"none"`):
            Integrations to report to.
    """

    label: str = field(
        default="changed",
        metadata={
            "help": "What the judge predicts. 'changed': whether rewriting changed the final number or the passing of "
            "tests where that is known, else how much of the wording it lost; 'flipped': the former alone; 'lost': "
            "the latter alone; 'says_no': the target's own probability that both answers do not say the same; "
            "'likelihood' and 'confidence': the suffix scores of SelfJudge and of its published code, which need no "
            "rewrite."
        },
    )
    label_threshold: float | None = field(
        default=None,
        metadata={
            "help": "For 'likelihood' and 'confidence': what is above it counts as changed, nats. By default their "
            "median."
        },
    )
    scalars: list[str] = field(
        default_factory=lambda: list(SCALARS), metadata={"help": "Scalar features that it looks at; 'none' for none."}
    )
    states: list[str] = field(
        default_factory=lambda: list(STATES), metadata={"help": "Hidden states that it looks at; 'none' for none."}
    )
    components: int = field(
        default=64,
        metadata={"help": "Principal components that are kept of each hidden state, at most its dimensions."},
    )
    learning_rate: float = field(default=1e-2, metadata={"help": "Initial learning rate of the AdamW optimizer."})
    max_steps: int = field(default=500, metadata={"help": "Steps of training."})
    num_train_epochs: float = field(
        default=0, metadata={"help": "Passes over the labels, instead of 'max_steps' if it is not 0."}
    )
    per_device_train_batch_size: int = field(
        default=256,
        metadata={"help": "Substitutions (through the model: answers) of a training batch on each device."},
    )
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "The same for evaluation."})
    prior: float = field(
        default=0.01,
        metadata={
            "help": "Variance of the Gaussian prior on the head's weights: few labels are trusted less than many. "
            "Infinity is no prior."
        },
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the learning rate falls."})
    logging_steps: float = field(default=100, metadata={"help": "Steps between two logs."})
    save_strategy: str = field(
        default="no",
        metadata={
            "help": "When to write checkpoints. On mined features there is nothing to lose: training takes seconds."
        },
    )
    ddp_find_unused_parameters: bool = field(
        default=False,
        metadata={"help": "Whether several processes look for parameters without a gradient: a judge has none."},
    )
    report_to: str = field(default="none", metadata={"help": "Integrations to report to."})

    def __post_init__(self):
        if self.label not in LABELS:
            raise ValueError(f"`label` must be one of {', '.join(LABELS)}, got {self.label!r}.")
        if self.label_threshold is not None and self.label not in SCORES:
            raise ValueError(f"`label_threshold` is for the labels {' and '.join(SCORES)}, not {self.label!r}.")
        self.scalars, self.states = ([] if names == NONE else names for names in (self.scalars, self.states))
        if self.num_train_epochs:
            self.max_steps = -1
        if self.push_to_hub:
            self.hub_strategy = "end"  # what is published is the judge, not the folder with its checkpoints
        for name, known in (("scalars", SCALARS), ("states", STATES)):
            if unknown := set(getattr(self, name)) - set(known):
                raise ValueError(f"`{name}` must be among {', '.join(known)}, got {', '.join(sorted(unknown))}.")
        if not self.scalars and not self.states:
            raise ValueError("`scalars` and `states` are both empty. Give the judge something to look at.")
        if not self.prior > 0:
            raise ValueError(f"`prior` must be a variance above 0, got {self.prior}.")
        self.label_names = ["labels"]
        # Rows are small, and on a machine without a GPU there is nothing to pin them for.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        super().__post_init__()
