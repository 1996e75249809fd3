"""What a run tells its user: one line on the terminal, one record in each sink."""

from megatron.observe.build import build_reporter
from megatron.observe.reporter import Reporter
from megatron.observe.sinks.jsonl import read_metrics

__all__ = ["Reporter", "build_reporter", "read_metrics"]
