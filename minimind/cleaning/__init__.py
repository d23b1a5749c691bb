"""Cleaning: raw rows -> rows worth training on, by the steps of a recipe, with a report of what
each step did."""

from minimind.cleaning.pipeline import cache_key, clean, finished_report
from minimind.cleaning.recipe import Recipe, load_recipe

__all__ = ["Recipe", "cache_key", "clean", "finished_report", "load_recipe"]
