"""What a configuration will cost before anything runs: parameters, FLOPs and memory a rank."""

from megatron.plan.report import Plan, make_plan

__all__ = ["Plan", "make_plan"]
