"""Fewer generated scenes behind a report's ceilings and floors, which take most of the time of a tiny run."""

from t2i_lm.evaluation import scenes

SCENES, CAPTIONS = 60, 1200


def use_small_reports() -> None:
    """In this process; a test of the numbers themselves sets its own."""
    scenes.CEILING_SCENES, scenes.FLOOR_CAPTIONS = SCENES, CAPTIONS
