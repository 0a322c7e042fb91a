"""Options of training: what the judge predicts and looks at, and all options of transformers' trainer.

Each option that the trainer would not obey is refused before anything is trained.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import TrainingArguments

from ..judge.features import SCALARS, STATES


LABELS = ("changed", "flipped", "lost", "says_no", "likelihood", "confidence")
SCORES = ("likelihood", "confidence")  # in nats; a score above a threshold counts as changed
NONE = ["none"]  # an empty list on the command line
BY_LENGTH = ("group_by_length", "batch_rebalance")  # sampling strategies that need the length of each text


def check(valid: bool, option: str, expected: str, value: object) -> None:
    """
    Raises:
        ValueError: If the value of an option is not `valid`; says what is `expected`.
    """
    if not valid:
        raise ValueError(f"`{option}` must be {expected}, got {value}.")


@dataclass
class JudgeConfig(TrainingArguments):
    """
    Options of the [`JudgeTrainer`]: those of [`~transformers.TrainingArguments`], some with other defaults, and of
    judges alone `label`, `label_threshold`, `scalars`, `states`, `components` and `prior`. The help of each is in the
    `metadata` of its field, and in `hf-selfjudge train --help`.

    Raises:
        ValueError: If an option has a value that it cannot have. Options that the trainer would not obey are refused
            by the trainer ([`check_options`]).
    """

    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for the judge and its checkpoints.", "aliases": ["--output"]}
    )
    label: str = field(
        default="changed",
        metadata={
            "help": "What the judge predicts. 'changed': whether rewriting changed the final number or the passing of "
            "tests where that is known, else how much of the wording it lost; 'flipped': only the former; 'lost': "
            "only the latter; 'says_no': the target's own probability that both answers do not say the same; "
            "'likelihood' and 'confidence': the suffix scores of the SelfJudge paper and of its published code, which "
            "need no rewrite."
        },
    )
    label_threshold: float | None = field(
        default=None,
        metadata={"help": "For 'likelihood' and 'confidence': a score above it counts as changed, nats. By default "
        "their median."},
    )  # fmt: skip
    scalars: list[str] = field(
        default_factory=lambda: list(SCALARS), metadata={"help": "Scalar features that it looks at; 'none' for none."}
    )
    states: list[str] = field(
        default_factory=lambda: list(STATES), metadata={"help": "Hidden states that it looks at; 'none' for none."}
    )
    components: int = field(
        default=64, metadata={"help": "Principal components kept of each hidden state, at most its dimensions."}
    )
    prior: float = field(
        default=0.01,
        metadata={"help": "Variance of the Gaussian prior on the head's weights: it counts more with fewer labels. "
        "Infinity is no prior."},
    )  # fmt: skip
    learning_rate: float = field(default=1e-2, metadata={"help": "Initial learning rate of the optimizer."})
    max_steps: int = field(default=500, metadata={"help": "Steps of training."})
    num_train_epochs: float = field(
        default=0, metadata={"help": "Passes over the labels, instead of 'max_steps' if it is not 0."}
    )
    per_device_train_batch_size: int = field(
        default=256,
        metadata={"help": "Substitutions (through the model: answers) in a training batch on each device."},
    )
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "The same for evaluation."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the learning rate falls."})
    logging_steps: float = field(default=100, metadata={"help": "Steps between two logs."})
    save_strategy: str = field(
        default="no", metadata={"help": "When to write checkpoints. On mined features training takes seconds."}
    )
    ddp_find_unused_parameters: bool = field(
        default=False,
        metadata={"help": "Whether several processes look for parameters without a gradient: a judge has none."},
    )
    report_to: str = field(default="none", metadata={"help": "Integrations to report to."})

    def __post_init__(self):
        check(self.label in LABELS, "label", f"one of {', '.join(LABELS)}", repr(self.label))
        if self.label_threshold is not None and self.label not in SCORES:
            raise ValueError(f"`label_threshold` is for the labels {' and '.join(SCORES)}, not {self.label!r}.")
        if self.label_names not in (None, ["labels"]):
            raise ValueError(f"`label_names`: the label is chosen by `label`, got {self.label_names}. Leave it out.")
        for name, known in (("scalars", SCALARS), ("states", STATES)):
            value = getattr(self, name)
            names = [value] if isinstance(value, str) else value
            is_list = isinstance(names, list | tuple) and all(isinstance(part, str) for part in names)
            check(is_list, name, "a list of names, or 'none'", repr(value))
            names = [] if list(names) == NONE else list(names)
            unknown = sorted(set(names) - set(known))
            check(not unknown, name, f"among {', '.join(known)}", ", ".join(unknown))
            setattr(self, name, names)
        if not self.scalars and not self.states:
            raise ValueError("`scalars` and `states` are both empty. Give the judge something to look at.")
        whole = isinstance(self.components, int) and not isinstance(self.components, bool)
        check(whole and self.components >= 1, "components", "a whole number, 1 or more", repr(self.components))
        check(self.prior > 0, "prior", "a variance above 0", self.prior)
        if self.num_train_epochs:
            self.max_steps = -1
        if self.metric_for_best_model is not None and self.metric_for_best_model.endswith("false_accept_rate"):
            # Lower is better. transformers would take the higher one for every name that does not end in "loss".
            self.greater_is_better = bool(self.greater_is_better)
        if self.push_to_hub:
            if self.hub_strategy in ("checkpoint", "all_checkpoints"):
                raise ValueError("`hub_strategy`: checkpoints are not published, only the judge. Leave it out.")
            self.hub_strategy = "end"  # the judge is published, not the folder with its checkpoints
        self.label_names = ["labels"]
        # Rows are small, and without a GPU there is nothing to pin them for.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        super().__post_init__()


def check_options(args: JudgeConfig, through_model: bool, evaluates: bool, own_metrics: bool) -> None:
    """
    Args:
        args ([`JudgeConfig`]): Options of the training.
        through_model (`bool`): Whether the target itself is run.
        evaluates (`bool`): Whether there is an `eval_dataset`.
        own_metrics (`bool`): Whether there is a `compute_metrics`.

    Raises:
        ValueError: If an option would not be obeyed, or is out of its range.
    """
    fp32 = "a judge is kept in fp32. Load the target in another type"
    replicated = "a judge is small and stays whole on each device. Start several processes without it"
    no_text = "on mined features no text is read. Leave it out, or train through the model"
    on_features, adaptive = not through_model, args.optim.startswith(("adamw_torch", "adafactor"))
    best_unsaved = args.save_strategy == "steps" and args.load_best_model_at_end and args.save_steps != args.eval_steps
    at_once = "the metrics need the log-odds of all rows at once. Pass `compute_metrics` of your own"
    refusals = [
        ("label_smoothing_factor", args.label_smoothing_factor, "labels are soft already. Leave it out"),
        ("neftune_noise_alpha", args.neftune_noise_alpha is not None, "the target's states must have no noise"),
        ("fp16_full_eval", args.fp16_full_eval, fp32),
        ("bf16_full_eval", args.bf16_full_eval, fp32),
        ("fp16", args.fp16 and args.device.type == "cpu", "a CPU has none. Leave it out, or set `bf16` and `use_cpu`"),
        ("use_liger_kernel", args.use_liger_kernel, "put kernels into the target before you pass it. Leave it out"),
        *((name, getattr(args, name), replicated) for name in ("fsdp", "deepspeed", "parallelism_config")),
        ("optim_target_modules", args.optim_target_modules, "no whole matrices of the target are trained"),
        ("optim", args.optim.startswith("schedule_free"), "its weights in training are not those to keep"),
        ("optim_args", args.optim_args and adaptive, f"{args.optim.value} takes none"),
        ("length_column_name", args.length_column_name != "length", "lengths are counted, not read from a column"),
        (
            "activation_checkpointing",
            args.activation_checkpointing and on_features,
            f"{no_text}. `gradient_checkpointing` is its older name",
        ),
        ("include_num_input_tokens_seen", args.include_num_input_tokens_seen != "no" and on_features, no_text),
        ("include_for_metrics", "inputs" in args.include_for_metrics and on_features, no_text),
        ("train_sampling_strategy", args.train_sampling_strategy in BY_LENGTH and on_features, no_text),
        ("eval_on_start", args.eval_on_start and not evaluates, "there is no `eval_dataset`. Pass one"),
        (
            "save_strategy",
            args.save_strategy == "best" and args.eval_strategy == "no",
            "nothing tells which judge is best. Set an `eval_strategy`",
        ),
        ("save_steps", best_unsaved, f"the best judge might not be saved. Set it to `eval_steps` ({args.eval_steps})"),
        ("batch_eval_metrics", args.batch_eval_metrics and not own_metrics, at_once),
        ("eval_do_concat_batches", not args.eval_do_concat_batches and not own_metrics, at_once),
    ]
    for option, refused, reason in refusals:
        if refused:
            raise ValueError(f"`{option}` is refused: {reason}.")
    for option in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        check(getattr(args, option) >= 1, option, "1 or more", getattr(args, option))
    check(0 < args.learning_rate < math.inf, "learning_rate", "a number above 0", args.learning_rate)
    unlimited = args.max_grad_norm is None or args.max_grad_norm >= 0
    check(unlimited, "max_grad_norm", "a number, 0 (no limit) or more", args.max_grad_norm)
    check(0 <= args.weight_decay < math.inf, "weight_decay", "a number, 0 or more", args.weight_decay)


def check_steps(args: JudgeConfig, rows: int, known: np.ndarray) -> None:
    """
    Args:
        args ([`JudgeConfig`]): Options of the training.
        rows (`int`): Rows to train on; through the model, answers.
        known (`np.ndarray` of shape `(labels,)`): Their labels.

    Raises:
        ValueError: If there would be no step or no end of training, or all labels are the same.
    """
    length = args.max_steps if args.max_steps >= 0 else args.num_train_epochs
    if not 0 < length < math.inf or (args.dataloader_drop_last and rows < args.train_batch_size * args.world_size):
        raise ValueError(f"Training needs a step, and an end: {describe_steps(args, rows)}.")
    if np.ptp(known) == 0:
        raise ValueError(f"`label`: it is {known[0]:g} in all {len(known)} rows, so there is nothing to tell apart.")


def describe_steps(args: JudgeConfig, rows: int) -> str:
    """What the number of steps on `rows` rows depends on, for errors."""
    return (
        f"`max_steps` is {args.max_steps} and `num_train_epochs` {args.num_train_epochs:g}, there are {rows} rows for "
        f"batches of {args.train_batch_size} on each of {args.world_size} processes, and `dataloader_drop_last` is "
        f"{args.dataloader_drop_last}"
    )


def without_text(args: JudgeConfig) -> JudgeConfig:
    """A copy of the options without those about texts, for training on mined features."""
    args = copy.copy(args)
    args.activation_checkpointing, args.include_num_input_tokens_seen = False, "no"
    if args.train_sampling_strategy in BY_LENGTH:
        args.train_sampling_strategy = "random"
    return args
