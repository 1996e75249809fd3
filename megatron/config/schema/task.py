"""Fine-tuning on a classification or multiple-choice task (train_impl: classification)."""

from megatron.config.field import Section, key
from megatron.config.types import Strings, Table

TASK_FORMATS = ("jsonl", "tsv", "race", "mnli", "qqp", "dpr")


class TaskSection(Section):
    """Files of a task, what their fields mean, and where predictions go."""

    task_format: str | None = key(
        None,
        "Form of the files: jsonl and tsv have the fields of task_fields; race, mnli and qqp are those of the public "
        "tasks, dpr that of train_impl: dpr. Follows from the ending of the first file.",
        choices=TASK_FORMATS,
    )
    task_train_data: Strings | None = key(None, "Files to train on, or folders of them.")
    task_valid_data: Strings | None = key(
        None, "Files to validate on, or folders; each has an accuracy of its own. A file without labels is predicted."
    )
    task_fields: Table | None = key(
        None,
        "With jsonl and tsv: the fields of a row by their meaning (text, text_pair, label, choices, id); of a tsv "
        "without a header the numbers of its columns, from 0.",
    )
    task_labels: Strings | None = key(None, "Labels of the classes as files spell them, in the order of the logits.")
    task_choices: int | None = key(
        None, "Answers of a question of a multiple-choice task; 4 with race.", unit="choices"
    )
    task_predictions: str | None = key(
        None, "Folder for the predictions of each validation file, as JSON lines, at each evaluation."
    )
