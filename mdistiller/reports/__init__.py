"""Run plans: methods x pairs x seeds, from runs to a table."""

from .plan import Cell, Plan, load_plan
from .runner import run_plan
from .table import Summary, check_claims, render, summarize

__all__ = ["Cell", "Plan", "Summary", "check_claims", "load_plan", "render", "run_plan", "summarize"]
