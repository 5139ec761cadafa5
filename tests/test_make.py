import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def make(*arguments: str) -> str:
    done = subprocess.run(["make", "--no-print-directory", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_lists_every_target() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    listed = re.findall(r"make ([a-z-]+)", make("help"))
    assert set(targets) == set(listed)
    fixed = ["help", "setup", "check", "test", "tensorboard", "figures", "exp-pretrained", "exp-scratch"]
    assert set(fixed) <= set(listed)


def test_exp_targets_pass_scale_resume_and_overrides() -> None:
    plan = make("-n", "exp-pretrained", "SCALE=flickr8k", "RESUME=1", "ARGS=data.path=x")
    assert 't2i_lm.train experiments/t2i_pretrained.yaml --scale "flickr8k" --resume latest' in plan
    assert "data.path=x" in plan
    for words in ((), ("RESUME=0",), ("RESUME=",)):
        assert "--resume" not in make("-n", "exp-scratch", *words)


@pytest.mark.parametrize(
    "target", ["figures", "exp-pretrained", "exp-scratch", "study", "tensorboard", "screenshots", "demo-assets"]
)
def test_a_folder_of_runs_with_a_space_in_its_name_is_one_argument(target: str, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.touch()
    plan = make("-n", target, "RUNS=/my disk/runs", "SEEDS=1", f"TEXT={text}", f"HELDOUT={text}", "OTHER=/my disk/text")
    words = [word for line in plan.replace("\\\n", "").splitlines() for word in shlex.split(line) if "/my" in word]
    assert words
    assert all("/my disk/" in word for word in words), plan


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    return tmp_path


def setup(fake: Path, script: str) -> "subprocess.CompletedProcess[str]":
    python = fake / "bin" / "python3"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    environment = {"PATH": f"{fake}/bin:/usr/bin:/bin", "HOME": str(fake)}
    command = ["sh", str(ROOT / ".ci" / "setup.sh"), str(fake / "venv"), str(fake / "venv" / "stamp"), str(python)]
    return subprocess.run(command, cwd=fake, env=environment, capture_output=True, text=True)


def test_an_old_python_is_refused_at_once(fake: Path) -> None:
    done = setup(fake, 'case "$1" in -c) exit 1;; *) echo "Python 3.9.18";; esac')
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed, found: Python 3.9.18" in done.stderr


def test_a_machine_without_venv_is_refused_at_once(fake: Path) -> None:
    done = setup(fake, 'case "$2" in *venv*) exit 1;; *) exit 0;; esac')
    assert done.returncode == 1
    assert "python3-venv" in done.stderr


def test_an_interrupted_installation_does_not_count_as_complete(fake: Path) -> None:
    """pip fails once, as when it is cut off; the second call finishes and only then is the stamp there."""
    script = f"""
case "$*" in
  *"-m venv"*) mkdir -p {fake}/venv/bin && cp "$0" {fake}/venv/bin/python;;
  *"pip install"*) if [ ! -f {fake}/tried ]; then touch {fake}/tried; exit 1; fi;;
esac
exit 0"""
    first = setup(fake, script)
    assert first.returncode == 1
    assert "Run the same command again" in first.stderr
    assert not (fake / "venv" / "stamp").exists()
    assert setup(fake, script).returncode == 0
    assert (fake / "venv" / "stamp").exists()
    assert not (fake / "venv.lock").exists()


def test_a_lock_left_by_a_killed_installation_is_taken_over(fake: Path) -> None:
    (fake / "venv.lock").mkdir()
    gone = subprocess.Popen(["true"])
    gone.wait()
    (fake / "venv.lock" / "pid").write_text(f"{gone.pid}\n")
    script = f'case "$*" in *"-m venv"*) mkdir -p {fake}/venv/bin && cp "$0" {fake}/venv/bin/python;; esac; exit 0'
    assert setup(fake, script).returncode == 0
    assert (fake / "venv" / "stamp").exists()


def test_ci_runs_the_readmes_test_command() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert (ROOT / ".ci" / "run").read_text().endswith("exec make test\n")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow["jobs"]["test"]["steps"][-1] == {"run": ".ci/run"}
    readme = ROOT / "README.md"
    for target in re.findall(r"`make ([a-z-]+)", readme.read_text()):
        assert target in make("help")
