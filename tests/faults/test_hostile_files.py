"""Hostile files run no code, reach nothing, and end in seconds, in bounded memory and in one line that names them.

All with T2I_LM_FAULTS of 100 or more, else the quickest.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ALL = int(os.environ.get("T2I_LM_FAULTS", "20")) >= 100
# Limits of one file.
MAX_SECONDS, MAX_MEGABYTES = 5, 300


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("hostile")
    command = [sys.executable, "-m", "tests.faults.hostile_files", str(folder), *([] if ALL else ["quick"])]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_CACHE": str(folder / "hub")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def problems(found: dict[str, Any]) -> list[str]:
    """What is wrong with the outcome of one file."""
    output, file = str(found["output"]), Path(found["path"])
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    shown = file.name.encode("unicode_escape").decode()
    checks = {
        "it was ended": found["code"] is None,
        f"code ran: {found['planted']}": bool(found["planted"]) or found["mark"],
        f"it reached {found['forbidden']}": bool(found["forbidden"]),
        f"{found['seconds']:.1f} s": found["seconds"] > MAX_SECONDS,
        f"{found['megabytes']:.0f} MB": found["megabytes"] > MAX_MEGABYTES,
        "a traceback": "Traceback" in output or found["code"] not in (0, 2),
        "it was read": found["refused"] is True and found["code"] == 0,
        "it was refused": found["refused"] is False and found["code"] != 0,
        "not one line": found["code"] == 2 and (len(lines) != 1 or not output.endswith(f"{lines[0]}\n")),
        "the file is not named": found["code"] == 2
        and not any(name in line for line in lines for name in (file.name, shown, file.parent.name)),
        "it controls the terminal": any(mark in output for mark in "\x1b\x07\x9b"),
        "advice to run code": "weights_only=False" in output or "trust_remote_code=True" in output,
    }
    return [problem for problem, is_so in checks.items() if is_so]


def test_hostile_files_do_no_harm(outcomes: list[dict[str, Any]]) -> None:
    wrong = {found["name"]: (problems(found), found["output"][-500:]) for found in outcomes if problems(found)}
    assert not wrong, "\n".join(f"{name}: {found}" for name, found in wrong.items())
    assert len(outcomes) >= (150 if ALL else 25)


def test_each_kind_has_files_that_are_read_or_refused(outcomes: list[dict[str, Any]]) -> None:
    refused = {found["name"].split(":")[0] for found in outcomes if found["code"] == 2}
    assert {"image", "tar", "COCO", "config", "tokenizer", "Parquet", "text", "image tokenizer"} <= refused
    assert any(found["code"] == 0 for found in outcomes)
