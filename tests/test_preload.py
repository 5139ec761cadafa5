"""Processes that are forked for tests: loaded and set as `tests/preload.py` says, and as `python -m` runs a module."""

import sys

from t2i_lm.evaluation import scenes
from tests.callbacks.toy_run import finish, server
from tests.preload import LOADED
from tests.runs import Forked
from tests.small_reports import CAPTIONS, SCENES


def exit_with_settings() -> None:
    loaded = {*LOADED, "t2i_lm.training.run"} <= sys.modules.keys()
    sys.exit(7 if loaded and (scenes.CEILING_SCENES, scenes.FLOOR_CAPTIONS) == (SCENES, CAPTIONS) else 1)


def test_forked_processes_have_small_reports() -> None:
    process = server.Process(target=exit_with_settings)
    process.start()
    assert finish(process) == [7]
    assert (scenes.CEILING_SCENES, scenes.FLOOR_CAPTIONS) == (SCENES, CAPTIONS)


def test_a_forked_module_has_arguments_environment_output_and_exit_code() -> None:
    process = Forked("t2i_lm.train", "no/such.yaml", T2I_LM_DEBUG="1")
    output, _ = process.communicate()
    assert process.returncode == 2
    assert "error: no experiment file no/such.yaml" in output
    assert "Traceback" in output
