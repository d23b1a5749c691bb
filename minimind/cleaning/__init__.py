"""Cleaning: raw rows -> rows worth training on, by the steps of a recipe, with a report of what
each step did."""

from minimind.cleaning.pipeline import cache_key, clean, finished_report
from minimind.cleaning.procedure import Procedure, load_procedure

__all__ = ["Procedure", "cache_key", "clean", "finished_report", "load_procedure"]
