"""Harness: a run or model under EleutherAI's lm_eval, with its own tasks or with local files of public benchmarks.

lm_eval is an extra (`pip install 'smidgen[eval]'`). Its own tasks fetch their data from the hub; with `data` the formats of
`smidgen.formats` read local files. Generated code is executed only when asked for. Cost: one forward for each option of
each question, or a generation.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

from smidgen.config import ConfigError, nearest
from smidgen.formats import FORMATS, local_tasks
from smidgen.inference import open_folder

__all__ = ["harness"]


def harness(
    name: str,
    tasks: Sequence[str],
    *,
    data: str | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    run_code: bool = False,
    chat: bool = False,
) -> dict[str, Any]:
    """Evaluate a run's folder or any model. Returns {"model", "tasks": {task: {measure: value}}, "rows", "means"}.

    tasks: formats, where `data` is given; else names that lm_eval knows, or paths of its YAML files. shots: None: the task's
    own number. limit: questions of each task. chat: questions are asked in the model's chat template. means: of a format
    with several tasks, over all its questions. Raises ConfigError: lm_eval is missing, an unknown task, a kind of model that
    does not write, a format that executes code without `run_code`; DataError: bad rows.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--lm-eval needs the evaluation harness lm_eval: pip install 'smidgen[eval]'")
    wanted: list[Any] = []
    for task in tasks:
        if task == "humaneval" and not run_code:
            raise ConfigError("humaneval executes programs that the model writes: allow it with --run-code")
        if data is None:
            wanted.append(task)
        elif task in FORMATS:
            wanted += local_tasks(task, data, shots)
        else:
            close = nearest(task, FORMATS)
            hint = f"did you mean '{close}'?" if close else "leave --data out for a task of lm_eval's own"
            raise ConfigError(f"--data has no format '{task}' ({', '.join(FORMATS)}): {hint}")
    loaded, _ = open_folder(name)
    if loaded.kind not in ("causal", "seq2seq"):
        raise ConfigError(
            f"{name} is a {loaded.kind} model, and the harness compares and generates answers: use a causal model"
        )
    if chat and not loaded.tokenizer.chat_template:
        raise ConfigError(f"--chat: the tokenizer of {name} has no chat template: leave it out")
    return {"model": name, **_evaluate(loaded, wanted, data, shots, limit, batch_size, run_code, chat)}


def _evaluate(
    loaded: Any,
    tasks: list[Any],
    data: str | None,
    shots: int | None,
    limit: int | None,
    batch_size: int | None,
    run_code: bool,
    chat: bool,
) -> dict[str, Any]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_defaults=data is None)
    unknown = [
        task
        for task in tasks
        if isinstance(task, str) and not task.endswith((".yaml", ".yml")) and task not in manager.all_tasks
    ]
    if unknown:
        close = nearest(unknown[0], manager.all_tasks)
        hint = f"did you mean '{close}'?" if close else "`lm_eval ls tasks` lists them; local files: --data FOLDER"
        raise ConfigError(f"lm_eval has no task '{unknown[0]}': {hint}")
    room = loaded.context or 2048
    for task in tasks:
        if isinstance(task, dict) and "generation_kwargs" in task:  # an answer leaves half the context to its question
            task["generation_kwargs"]["max_gen_toks"] = min(task["generation_kwargs"]["max_gen_toks"], room // 2)
    backend = "causal" if loaded.kind == "causal" else "seq2seq"
    model = HFLM(
        pretrained=loaded.adapted.model,
        tokenizer=loaded.tokenizer,
        batch_size=batch_size or 8,
        backend=backend,
        max_length=room,
    )
    found: Any = lm_eval.simple_evaluate(
        model,
        tasks=tasks,
        num_fewshot=shots if data is None else None,
        limit=limit,
        bootstrap_iters=0,
        log_samples=False,
        task_manager=manager,
        random_seed=None,  # type: ignore[arg-type]  # the global generators are the user's
        numpy_random_seed=None,  # type: ignore[arg-type]
        torch_random_seed=None,  # type: ignore[arg-type]
        confirm_run_unsafe_code=run_code,
        apply_chat_template=chat,
    )
    measures = {
        task: {
            key.partition(",")[0]: value for key, value in values.items() if isinstance(value, float) and "stderr" not in key
        }
        for task, values in found["results"].items()
    }
    rows = {task: count["effective"] for task, count in found["n-samples"].items()}
    return {"tasks": measures, "rows": rows, "means": _means(measures, rows)}


def _means(measures: dict[str, dict[str, float]], rows: dict[str, int]) -> dict[str, dict[str, float]]:
    """Of each format with several tasks: the mean of each measure over all questions."""
    found: dict[str, dict[str, float]] = {}
    for family in FORMATS:
        members = [task for task in measures if task.startswith(f"{family}_") and task in rows]
        if len(members) > 1:
            total = sum(rows[task] for task in members)
            found[family] = {
                key: sum(measures[task][key] * rows[task] for task in members) / total for key in measures[members[0]]
            }
    return found
