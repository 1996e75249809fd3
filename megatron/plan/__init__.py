"""Dry run: parameters, FLOPs and memory per rank of a configuration."""

from megatron.plan.report import RunPlan, make_plan

__all__ = ["RunPlan", "make_plan"]
