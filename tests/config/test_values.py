"""Values of keys: the key's type says what a text means, in files and overrides alike."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from t2i_lm.config.experiment import ExperimentConfig, stays_inside
from t2i_lm.config.key_groups import PATH_KEYS
from t2i_lm.config.load import load_experiment, save_experiment
from t2i_lm.config.sections import OptimConfig
from t2i_lm.config.values import key_types

ROOT = Path(__file__).parents[2]
PRETRAINED = ROOT / "experiments" / "t2i_pretrained.yaml"
# Text that a process can be given as an argument.
WORDS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
AWKWARD = (
    *(
        "photos #2",
        "007",
        "1e3",
        "on",
        "yes",
        "1_000",
        "0x10",
        "2024-01-01",
        "12:30",
        "=",
        "a=b=c",
        "a: b",
        "[a",
        "{a}",
    ),
    *("${name}", "${oc.env:HOME}", "!tag", "&a", "*a", "<<", "- a", "? a", "'a'", '"a"', "  a  ", "a\nb", "%", "@a"),
    *(".inf", ".nan", "Null", "None", "None ", "true", "a\u2028b", "\x85", "é", "图片", "\ufeff", "👩🏽‍🚀", "C:\\x\\y"),
)


def by_file(folder: Path, text: str) -> ExperimentConfig:
    file = folder / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    return load_experiment(file)


def loads_and_reads_back(key: str, text: str, folder: Path) -> None:
    (folder / "mine.yaml").write_text("seed: 0\n")
    config = load_experiment(folder / "mine.yaml", None, [f"{key}={text}"])
    assert config.value(key) == text
    save_experiment(config, folder / "config.yaml")
    assert load_experiment(folder / "config.yaml") == config
    # What reads a run's config.yaml as plain YAML finds the same.
    assert yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["name"] == config.name


@pytest.mark.parametrize("key", ["name", "data.path"])
@pytest.mark.parametrize("text", AWKWARD)
def test_text_is_taken_as_written(key: str, text: str, tmp_path: Path) -> None:
    if key == "data.path" and text == "Null":
        assert load_experiment(PRETRAINED, "demo", ["data.path=Null"]).data.path is None
    else:
        loads_and_reads_back(key, text, tmp_path)


@settings(deadline=None, max_examples=10)
@given(text=WORDS.filter(stays_inside))
def test_any_text_goes_through_override_and_config_file(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    loads_and_reads_back("name", text, tmp_path_factory.getbasetemp())


@settings(deadline=None, max_examples=10)
@given(texts=st.lists(WORDS))
def test_any_list_of_texts_goes_through_the_config_file(
    texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "config.yaml"
    config = ExperimentConfig()
    config = replace(config, forgetting=replace(config.forgetting, prompts=texts))
    save_experiment(config, file)
    assert load_experiment(file) == config


@pytest.mark.parametrize("text", ["007", "1e3", "on", "2024-01-01", "12:30", "1_000", "~/x y", ".5"])
def test_an_unquoted_text_of_a_file_is_taken_as_written(text: str, tmp_path: Path) -> None:
    assert by_file(tmp_path, f"name: {text}\n").name == text
    assert by_file(tmp_path, f"forgetting: {{prompts: [{text}, 'on']}}\n").forgetting.prompts == [text, "on"]


def test_null_is_null_where_a_key_may_be_null_and_text_in_quotes(tmp_path: Path) -> None:
    for null in ("null", "~", ""):
        assert load_experiment(PRETRAINED, "demo", ["data.path=x", f"data.path={null}"]).data.path is None
        assert by_file(tmp_path, f"data: {{path: {null}}}\n").data.path is None
    assert by_file(tmp_path, "data: {path: 'null'}\n").data.path == "null"
    assert load_experiment(PRETRAINED, "demo", ["name=null"]).name == "null"
    with pytest.raises(ValueError, match=r"^run\.dir=: expected text$"):
        load_experiment(PRETRAINED, "demo", ["run.dir="])


def test_every_path_key_expands_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("data: {source: image_folder}\n")
    config = load_experiment(tmp_path / "mine.yaml", None, [f"{key}=~/a b" for key in PATH_KEYS])
    assert {config.value(key) for key in PATH_KEYS} == {f"{tmp_path}/a b"}
    assert load_experiment(PRETRAINED, "demo", ["name=~/x"]).name == "~/x"


def test_path_keys_are_the_keys_whose_meaning_is_a_file_or_folder() -> None:
    named = ("path", "dir", "coco", "weights", "tasks", "text", "aligned_rows", "backbone.config")
    assert set(PATH_KEYS) == {
        key
        for key, kind in key_types().items()
        if key.replace("_", ".").split(".")[-1] in named or key in named
        if kind in (str, str | None)
    }


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("trainer.max_steps", "1e3", 1000),
        ("trainer.max_steps", "1_000", 1000),
        ("trainer.max_steps", "2.0", 2),
        ("seed", "010", 10),
        ("seed", "0x10", 16),
        ("optim.lr", "3e-4", 3e-4),
        ("optim.lr", "1", 1.0),
        ("trainer.packing", "on", True),
        ("trainer.packing", "No", False),
        ("trainer.packing", "1", True),
        ("freeze", "ffn", ["ffn"]),
        ("freeze", "[ffn, norm]", ["ffn", "norm"]),
        ("freeze", "[]", []),
        ("optim.betas", "[0.9, 99e-2]", [0.9, 0.99]),
        ("forgetting.prompts", "Once, on a hill: x", ["Once, on a hill: x"]),
        ("forgetting.prompts", "['a, b', 007, \"c\\n\"]", ["a, b", "007", "c\n"]),
        ("image_tokenizer.model.block_out_channels", "32", [32]),
    ],
)
def test_values_of_every_type(key: str, text: str, value: object, tmp_path: Path) -> None:
    overrides = ["optim.warmup_steps=1", f"{key}={text}"]
    found = load_experiment(PRETRAINED, "demo", overrides).value(key)
    assert found == value
    assert type(found) is type(value)
    *sections, name = key.split(".")
    opened, closed = "".join(f"{section}: {{" for section in sections), "}" * len(sections)
    if text[0] != "O":  # a comma ends a value inside braces
        extra = "" if key.startswith("optim") else "\noptim: {warmup_steps: 1}"
        assert by_file(tmp_path, f"{opened}{name}: {text}{closed}{extra}\n").value(key) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=nan", "optim.lr=nan: expected a finite number"),
        ("optim.lr=inf", "optim.lr=inf: expected a finite number"),
        ("optim.lr=-.inf", "optim.lr=-.inf: expected a finite number"),
        ("optim.lr=1e999", "optim.lr=1e999: expected a finite number"),
        ("optim.lr=true", "optim.lr=true: expected a finite number"),
        ("optim.lr=0,5", "optim.lr=0,5: expected a finite number"),
        ("optim.lr=null", "optim.lr=null: expected a finite number"),
        ("samples.top_p=nan", "samples.top_p=nan: expected null or a finite number"),
        ("optim.betas=[0.9,nan]", "optim.betas=nan: expected a list of finite numbers"),
        ("optim.betas=0.9,0.95", "optim.betas=0.9,0.95: expected a list of finite numbers"),
        ("trainer.max_steps=1.5", "trainer.max_steps=1.5: expected a whole number"),
        ("trainer.max_steps=ten", "trainer.max_steps=ten: expected a whole number"),
        ("trainer.max_steps=inf", "trainer.max_steps=inf: expected a whole number"),
        ("trainer.max_steps=1e99", "trainer.max_steps=1e99: expected a whole number"),
        ("trainer.max_steps=0x_", "trainer.max_steps=0x_: expected a whole number"),
        ("trainer.max_steps=", "trainer.max_steps=: expected a whole number"),
        ("trainer.packing=2", "trainer.packing=2: expected true or false"),
        ("trainer.packing=maybe", "trainer.packing=maybe: expected true or false"),
        ("optim=3", "optim=3: optim is a section of keys, such as optim.name"),
        ("optim=", "optim=: optim is a section"),
        ("optim.lr.x=3", "optim.lr: expected a finite number, found the keys x"),
        ("freeze=null", "freeze=null: expected a list; an empty one is []"),
        ("freeze=[ffn", "freeze=[ffn: expected a list, such as [a, 'b, with a comma']: line 1:"),
        ("freeze=[[ffn]]", "freeze=['ffn']: expected a list of texts"),
        ("freeze=ffn,norm", "freeze=['ffn,norm']: expected names in brackets, such as [ffn,norm]"),
        ("scale=paper", "scale=paper: the scale is chosen by --scale, here demo"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=r".+") as caught:
        load_experiment(PRETRAINED, "demo", ["name=x", override])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lr: 1, lr: 2}", "is not YAML: line 1: the key 'lr' occurs twice"),
        ("seed: 1\nname: a\nseed: 2", "is not YAML: line 1: the key 'seed' occurs twice"),
        ("optim: {lr: 1}\noptim.lr: 2", "optim.lr is given twice"),
        ("optim: {lr: .nan}", "optim.lr=.nan: expected a finite number"),
        ("optim: 3", "optim=3: optim is a section of keys"),
        ("name: {a: 1}", "name: expected text, found the keys a"),
        ("name: [a]", "name=['a']: expected text"),
        ("name: !env HOME", "is not YAML: line 1: the tag !env has no meaning here"),
        ("name: !!binary aGk=", "has no meaning here"),
        ("? {a: 1}\n: 2", "is not YAML: line 1: a key is no text"),
        ("a: [", "is not YAML: line"),
        ("a: \t- b", "is not YAML: line"),
        ("", "must hold keys and values, found no key"),
        ("3", "must hold keys and values, found '3'"),
        ("7: 1", "unknown key '7'"),
        ("a: &a [*a]", "is not YAML"),
    ],
)
def test_a_wrong_file_is_named_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r".+") as caught:
        by_file(tmp_path, text)
    assert message in str(caught.value)
    assert str(tmp_path / "mine.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_files_may_hold(tmp_path: Path) -> None:
    assert by_file(tmp_path, "optim:\nname: x\n").name == "x"  # a section whose keys are all commented out
    assert by_file(tmp_path, "\ufeffname: x\n").name == "x"
    assert by_file(tmp_path, "optim.lr: 2\n").optim.lr == 2
    merged = by_file(tmp_path, "optim: &o {lr: 2, grad_clip: 3}\nname: x\nlog: {interval: 7}\n")
    assert (merged.optim.lr, merged.optim.grad_clip, merged.log.interval) == (2, 3, 7)
    reused = by_file(tmp_path, "data: {length: &n 64}\nforgetting: {length: *n}\n")
    assert reused.forgetting.length == 64


def test_the_last_of_equal_overrides_wins_over_files() -> None:
    assert load_experiment(PRETRAINED, "demo", ["seed=3", "name=x", "seed=4"]).seed == 4


@settings(deadline=None, max_examples=15)
@given(number=st.floats(min_value=1e-9, max_value=1e9))
def test_any_number_reads_back_exactly(number: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "config.yaml"
    config = replace(ExperimentConfig(), optim=OptimConfig(lr=number))
    save_experiment(config, file)
    assert config.optim.lr == load_experiment(file).optim.lr == number


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def in_ascii(folder: Path, *overrides: str) -> "subprocess.CompletedProcess[str]":
    """Python, which then decodes arguments to escapes, loads the overrides and saves the config."""
    code = (
        "import sys; from pathlib import Path; from t2i_lm.config.load import *\n"
        "from t2i_lm.runtime.command_line import exit_code\n"
        "def body():\n"
        "    save_experiment(load_experiment('mine.yaml', None, sys.argv[1:]), Path('config.yaml')); return 0\n"
        "assert sys.getfilesystemencoding() == 'ascii'; sys.exit(exit_code(body))"
    )
    (folder / "mine.yaml").write_text("seed: 0\n")
    environment = os.environ | ASCII | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *overrides]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_locale_without_unicode_changes_no_text_and_refuses_paths_that_libraries_would_not_find(
    tmp_path: Path,
) -> None:
    done = in_ascii(tmp_path, "forgetting.prompts=猫", "name=é")
    assert done.returncode == 0, done.stderr
    config = load_experiment(tmp_path / "config.yaml")
    assert (config.forgetting.prompts, config.name) == (["猫"], "é")
    done = in_ascii(tmp_path, "data.path=图片")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: data.path=\\u56fe")
    assert line.endswith("this process names files in ascii (its locale); set PYTHONUTF8=1")
