"""Rules for fine-tuning on the files of a task: classes, or questions and passages."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.config import Config
from megatron.config.derived.fill import trains
from megatron.config.derived.retrieval import DPR, RETRIEVAL
from megatron.config.derived.task import CLASSES
from megatron.config.validation.dependent_model_keys import DependentKeys
from megatron.errors import ConfigIssue

TASKS = (CLASSES, DPR)
"""Objectives that read the files of a task."""
_NEW_HEADS = (CLASSES, *RETRIEVAL)
"""Objectives with a head that the encoder which they begin with has not."""
_DATA = ("data_path", "train_data_paths", "valid_data_paths", "test_data_paths")
SHORTEST = 8
"""Tokens of the shortest sample with two texts and their separators."""
_MEANINGS = ("text", "text_pair", "label", "choices", "id")


def tasks_have_files(config: Config) -> Iterator[ConfigIssue]:
    """A task is trained on its files, and the classes of a classifier are known and differ."""
    task, training = config.task, config.training
    if training.train_impl not in TASKS:
        return
    if trains(config.launch.user_script) and not task.task_train_data:
        hint = "name the files of the task, in one of the forms of task_format"
        what = f"train_impl: {training.train_impl} trains on a task"
        yield ConfigIssue(what, key="task_train_data", value=None, hint=hint)
    for key in _DATA:
        if getattr(config.data, key) is not None:
            hint = "leave it out: task_train_data names the files"
            yield ConfigIssue("a task is not read from token files", key=key, hint=hint)
    if task.task_format is None and (task.task_train_data or task.task_valid_data):
        hint = "give jsonl, tsv, race, mnli or qqp"
        yield ConfigIssue("it does not follow from the files' names", key="task_format", hint=hint)
    labels = task.task_labels or ()
    if len(set(labels)) != len(labels) or len(labels) == 1:
        what = "a label stands twice in it" if len(labels) > 1 else "one class has nothing to tell apart"
        yield ConfigIssue(what, key="task_labels", value=list(labels))
    if task.task_choices is not None and task.task_choices < 2:
        yield ConfigIssue("a question has at least 2 answers", key="task_choices", value=task.task_choices)
    length = config.model.seq_length
    if length is not None and length < SHORTEST:
        yield ConfigIssue(f"a sample has at least {SHORTEST} tokens", key="seq_length", value=length)


def task_fields_are_known(config: Config) -> Iterator[ConfigIssue]:
    """Fields have one of the meanings, and are names or numbers of columns alike."""
    task = config.task
    if config.training.train_impl != CLASSES or task.task_fields is None:
        return
    if task.task_format not in ("jsonl", "tsv"):
        yield ConfigIssue(f"files of the form {task.task_format} have fields of their own", key="task_fields")
    unknown = sorted(set(task.task_fields) - set(_MEANINGS))
    if unknown:
        hint = f"a row has {', '.join(_MEANINGS)}"
        yield ConfigIssue(f"no field is a {unknown[0]}", key="task_fields", value=task.task_fields, hint=hint)
    flat = [each for value in task.task_fields.values() for each in (value if isinstance(value, list) else [value])]
    kinds = {type(each) for each in flat}
    if any(isinstance(each, int) and each < 0 for each in flat):
        yield ConfigIssue("columns are numbered from 0", key="task_fields", value=task.task_fields)
    if kinds - {str, int} or len(kinds) > 1 or (int in kinds and task.task_format == "jsonl"):
        hint = "names of fields, or of a tsv without a header the numbers of its columns"
        yield ConfigIssue("its values cannot be read", key="task_fields", value=task.task_fields, hint=hint)
    if task.task_choices and task.task_format == "tsv" and not isinstance(task.task_fields.get("choices"), list):
        hint = "choices: [A, B, C, D]"
        yield ConfigIssue("a tsv has a column for each answer", key="task_fields", value=task.task_fields, hint=hint)


def classifiers_have_their_parts(config: Config) -> Iterator[ConfigIssue]:
    """What a classifier cannot be trained with."""
    if config.training.train_impl != CLASSES and config.model.num_classes is not None:
        what = f"only train_impl: {CLASSES} has classes"
        yield ConfigIssue(what, key="num_classes", value=config.model.num_classes, hint="leave it out")
    if config.training.train_impl not in _NEW_HEADS:
        if config.checkpoint.pretrained_checkpoint is not None:
            what, hint = f"only train_impl: {', '.join(_NEW_HEADS)} get another head", "use load with finetune: true"
            value = config.checkpoint.pretrained_checkpoint
            yield ConfigIssue(what, key="pretrained_checkpoint", value=value, hint=hint)
        return
    if config.training.rampup_batch_size is not None and config.training.train_impl in TASKS:
        sizes = list(config.training.rampup_batch_size)
        message = "epochs of a task are counted in steps of one size"
        yield ConfigIssue(message, key="rampup_batch_size", value=sizes, hint="leave it out")
    if config.checkpoint.checkpoint_validation_with_forward_pass:
        key = "checkpoint_validation_with_forward_pass"
        yield ConfigIssue("it compares the logits of a language model", key=key, value=True, hint="leave it out")
    if config.training.char_level_ppl:
        yield ConfigIssue("its loss is of no characters", key="char_level_ppl", value=True, hint="leave it out")


def _reads_a_task(config: Config) -> bool:
    return config.training.train_impl in TASKS


OF_TASKS: tuple[DependentKeys, ...] = (
    DependentKeys(
        ("task_fields", "task_labels", "task_choices"),
        lambda config: config.training.train_impl == CLASSES,
        f"train_impl is not {CLASSES}",
    ),
    DependentKeys(("task_format", "task_train_data", "task_valid_data"), _reads_a_task, "train_impl reads no task"),
    DependentKeys(
        ("task_predictions",),
        lambda config: config.training.train_impl == CLASSES and bool(config.task.task_valid_data),
        "there is no task_valid_data to predict",
    ),
    DependentKeys(
        ("pack_impl", "eod_mask_loss", "valid_same_samples", "mmap_warmup"),
        lambda config: not _reads_a_task(config),
        "a task is not read from token files",
    ),
    DependentKeys(
        ("eval_interval",),
        lambda config: not _reads_a_task(config) or config.training.train_epochs is None,
        "each epoch of a task ends with an evaluation",
    ),
)
"""Keys that only a task reads, and those that it does not."""
