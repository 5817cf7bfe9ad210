"""Text tasks without examples, through lm-evaluation-harness.

Any model of transformers' causal kind will do, ours as they are: the harness calls `model(input_ids).logits`.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .intervals import mean_interval


# Llama 2 (arXiv 2307.09288), appendix A.2.2, commonsense reasoning and BoolQ, under the harness's names. Transfusion
# (arXiv 2408.11039, Sec. 4.1) takes the mean of these without OpenBookQA.
LLAMA2_SUITE = (
    "hellaswag",
    "piqa",
    "social_iqa",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "openbookqa",
    "boolq",
)


def zero_shot_accuracy(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] = LLAMA2_SUITE,
    *,
    task_dir: str | Path | None = None,
    batch_size: int = 16,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Measures how often a model ranks the right answer of a question first.

    Args:
        model (`PreTrainedModel`): Scores text; on the device it is on.
        tokenizer (`PreTrainedTokenizerFast`): Of the model.
        tasks (`Sequence[str]`, defaults to `LLAMA2_SUITE`): Names of multiple-choice tasks. Their data are read from
            the Hub, or from where the task's file says.
        task_dir (`str` or `Path`, *optional*): Folder with tasks of one's own as YAML. The harness's are then not
            read.
        batch_size (`int`, defaults to 16): Answers scored at once.
        limit (`int`, *optional*): Questions of each task; all if left out.
        seed (`int`, defaults to 0): Of the bootstrap.

    Returns:
        `dict[str, dict]`: by task `accuracy`, `num_questions`, `interval`, and where the task has it
        `normalized_accuracy`, with answers ranked by log-probability per byte; and under `"mean"` the mean `accuracy`
        over the tasks.

    Raises:
        ModuleNotFoundError: If the harness is not installed.
        ValueError: If there is no task, one is unknown, or one has no `acc`.
    """
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Zero-shot tasks need the package `lm_eval`. Install it with `pip install 'hf_mm[eval]'`."
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every model that is given as an object
    manager = TaskManager(include_path=task_dir, include_defaults=task_dir is None)
    if not tasks:
        raise ValueError("`tasks` is empty. Name at least one.")
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ValueError(f"`tasks` has {unknown}, which are not known here; `lm_eval ls tasks` lists those that are.")
    language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = simple_evaluate(
        model=language_model,
        tasks=list(tasks),
        num_fewshot=0,
        limit=limit,
        bootstrap_iters=0,
        task_manager=manager,
    )
    return _summarize(found["samples"], tasks, seed)


def _summarize(samples: dict[str, list[dict[str, Any]]], tasks: Sequence[str], seed: int) -> dict[str, dict[str, Any]]:
    """Averages the verdicts of each task, and those of the tasks."""
    summary: dict[str, dict[str, Any]] = {}
    for task in tasks:
        answered = samples[task]
        if not answered or "acc" not in answered[0]:
            raise ValueError(f"`tasks`: {task!r} has no accuracy `acc` of any question. Name multiple-choice tasks.")
        verdicts = [float(answer["acc"]) for answer in answered]
        summary[task] = {
            "accuracy": float(np.mean(verdicts)),
            "num_questions": len(verdicts),
            "interval": mean_interval(verdicts, seed=seed),
        }
        if "acc_norm" in answered[0]:
            summary[task]["normalized_accuracy"] = float(np.mean([float(answer["acc_norm"]) for answer in answered]))
    summary["mean"] = {"accuracy": float(np.mean([of_one["accuracy"] for of_one in summary.values()]))}
    return summary
