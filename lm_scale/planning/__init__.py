# SPDX-License-Identifier: Apache-2.0
"""`lm-scale plan`: what a run's step needs and takes on a slice that nobody has yet.

accelerators.py (what the chips are) -> compile_step.py (the real step, compiled for
them) -> program.py (what the compiled text says), kernel_cycles.py (what it does not
say of our attention) -> plan.py (memory, time, hours) -> report.py (the page). For a
search: candidates.py -> memory_model.py -> time_model.py -> workers.py, which make
plans side by side -> search.py (the ranking).
"""
