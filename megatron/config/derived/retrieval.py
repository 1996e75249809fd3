"""What a run of two encoders decides: which objectives have them, and the sequences of a sample."""

from __future__ import annotations

from megatron.config.config import Config
from megatron.config.schema.retrieval import RetrievalSection
from megatron.errors import ConfigError

ICT = "ict"
"""The objective whose samples are sentences and the blocks they are from."""
DPR = "dpr"
"""The objective whose samples are questions and passages."""
RETRIEVAL = (ICT, DPR)
"""The objectives of encoders of queries and passages."""
EMBED, SEARCH = "embed_passages.py", "search_passages.py"
RETRIEVAL_SCRIPTS = (EMBED, SEARCH)
"""What is run with a trained model of such an objective."""

EXACT, FLAT, IVF = "exact", "flat", "ivf"
"""Values of retrieval_index."""


def require_dpr_format(form: str | None) -> str:
    """Returns the value of task_format for questions and passages. Raises ConfigError for another one."""
    if form not in (None, DPR):
        what = f"train_impl: {DPR} reads questions with their passages"
        raise ConfigError.of(what, key="task_format", value=form, hint="leave it out")
    return DPR


def passages_of_sample(objective: str, section: RetrievalSection, *, valid: bool = False) -> int:
    """Returns the passages of a sample, the right one included.

    Args:
        objective: train_impl.
        section: the retrieval section.
        valid: of a validation sample, instead of a training sample.
    """
    if objective == ICT:
        return 1
    if valid:
        return 1 + section.retrieval_valid_hard_negatives + section.retrieval_valid_other_negatives
    return 1 + section.retrieval_hard_negatives + section.retrieval_other_negatives


def sequences_of_sample(config: Config) -> int:
    """Returns the sequences of a training sample: the answers of a question, or a query and its passages.

    config: the configuration.
    """
    if config.training.train_impl in RETRIEVAL:
        return 1 + passages_of_sample(config.training.train_impl, config.retrieval)
    return config.task.task_choices or 1
