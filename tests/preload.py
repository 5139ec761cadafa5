"""What a process that is forked from `toy_run.server` has loaded and set before."""

from importlib import import_module

from tests.small_reports import use_small_reports

LOADED = ("t2i_lm.evaluate", "t2i_lm.evaluation.session", "t2i_lm.evaluation.coco_scores", "tests.runs")

for name in LOADED:
    import_module(name)
use_small_reports()
