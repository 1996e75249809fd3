"""Metrics of a run: one line on the terminal, one record in each sink."""

from megatron.metrics.builder import build_reporter
from megatron.metrics.reporter import Reporter
from megatron.metrics.sinks.jsonl import read_metrics

__all__ = ["Reporter", "build_reporter", "read_metrics"]
