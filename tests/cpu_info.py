"""Asks once what CPU this is, where the ranks' server imports it: py-cpuinfo starts processes for a second an answer.

DeepSpeed asks three times wherever an optimizer of its own runs on the CPU.
"""

from __future__ import annotations

import functools

import cpuinfo

cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
cpuinfo.get_cpu_info()
