"""Scoring on tasks of the LM Evaluation Harness."""

from megatron.config.field import Section, key
from megatron.config.types import Strings, Table


class EvaluationSection(Section):
    """Tasks, their limits and the output of the results."""

    eval_tasks: Strings | None = key(None, "Names of tasks or shell wildcards.")
    eval_results_prefix: str = key("", "Put before the name of the results file.")
    eval_include_path: str | None = key(None, "Folder of further task files.")
    eval_num_fewshot: int | None = key(None, "Worked examples before each question.", unit="examples")
    eval_limit: int | None = key(None, "Documents of each task; all when left out.", unit="documents")
    eval_batch_size: int | None = key(
        None, "Requests in one forward pass; the micro batch size when left out.", unit="samples"
    )
    eval_model_args: Table | None = key(None, "Further arguments for the harness.")
    eval_text: str | None = key(None, "File of text, or .jsonl, whose bits per byte tools/bits_per_byte.py measures.")
    eval_chat_template: bool = key(False, "Put prompts into the chat template of the tokenizer's folder.")
    eval_cache_requests: bool = key(False, "Keep the built requests of each task on disk for the next evaluation.")
    eval_cloze: str | None = key(None, "JSONL file for last-word prediction by tools/perplexity.py (LAMBADA style).")
    eval_overlap: int = key(
        32,
        "Tokens that each window after the first scores in tools/perplexity.py and text_gen_type precompute; fewer "
        "cost more.",
        unit="tokens",
    )
    eval_metadata: Table | None = key(
        None, "What tasks that make their own data need, such as max_seq_lengths; the tokenizer is there already."
    )
