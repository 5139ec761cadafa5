"""Plug-ins from real packages: installed into a folder on the path, trained with, and refused by name."""

import re
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.load import load_experiment
from t2i_lm.data.shards.cache import shards_of
from t2i_lm.data.sources import open_source
from t2i_lm.experiment.build import open_image, open_text
from t2i_lm.experiment.restore import load_initial, load_trained
from t2i_lm.models import factory
from t2i_lm.models.factory import build_backbone
from t2i_lm.storage.run_folder import read_run, run_folders
from t2i_lm.train import main

ROOT = Path(__file__).parents[2]
PRETRAINED = str(ROOT / "experiments" / "t2i_pretrained.yaml")
PAGE = ROOT / "docs" / "plugins.md"
CODE = """
import hashlib
from pathlib import Path

import torch
from PIL import Image

from t2i_lm.data.pairs import Pair, RejectedPairError
from t2i_lm.models.backbone import Backbone
from t2i_lm.models.decoder import Decoder
from t2i_lm.models.open_lm import decoder_config


class Bytes:
    path = Path(__file__)
    vocab_size, document_end, sha256 = 257, 256, "bytes"

    def encode(self, text):
        return list(text.encode())

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def open_bytes(argument):
    return Bytes()


def open_decoder(argument, pretrained):
    sizes = {"hidden_dim": 32, "n_layers": 2, "n_heads": 2, "seq_len": 112, "vocab_size": 257}
    decoder = Decoder(decoder_config(sizes | {"positional_embedding_type": "rotary"}))
    if pretrained:
        decoder.reset_parameters(torch.Generator().manual_seed(int(argument or 0)))
    decoder.sha256 = f"decoder-{argument}"
    return decoder


class Half(Backbone):
    def hidden(self, ids_BT, cache=None):
        return ids_BT


def open_half(argument, pretrained):
    half = Half()
    half.sha256, half.config, half.tok_embeddings, half.output = "half", None, None, None
    return half


class Colors:
    names = ("red", "green", "blue", "black")

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index == 7:
            raise RejectedPairError("blank", "pair 7")
        name = self.names[index % 4]
        return Pair(str(index), Image.new("RGB", (self.size, self.size), name), [f"all {name}"], None)


def open_colors(data, split, image_size):
    return Colors(image_size)


def open_too_little(argument):
    return None


def open_nothing(argument, other):
    return object()


def open_any_source(data, split, image_size):
    return object()


constant = 3
"""
ENTRY_POINTS = {
    "t2i_lm.text_tokenizers": {"bytes": "tiny_plugins:open_bytes", "sentencepiece": "tiny_plugins:open_bytes"},
    "t2i_lm.backbones": {
        "tiny": "tiny_plugins:open_decoder",
        "empty": "tiny_plugins:open_nothing",
        "half": "tiny_plugins:open_half",
    },
    "t2i_lm.sources": {"colors": "tiny_plugins:open_colors", "empty": "tiny_plugins:open_any_source"},
    "t2i_lm.image_tokenizers": {
        "short": "tiny_plugins:open_too_little",
        "empty": "tiny_plugins:open_nothing",
        "absent": "tiny_plugins:no_such_function",
        "constant": "tiny_plugins:constant",
        "twice": "tiny_plugins:open_nothing",
    },
}
PLUGINS = [
    "image_tokenizer.path=plugin:gray:16",
    "text_tokenizer.path=plugin:bytes",
    "backbone.path=plugin:tiny:5",
    "data.source=plugin:colors",
    "data.max_reject_share=0.1",
    "data.train_size=null",
    "data.val_size=null",
]


def install(folder: Path, name: str, version: str, groups: dict[str, dict[str, str]]) -> None:
    """What pip writes of a package beside its modules."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [
        line for group, points in groups.items() for line in (f"[{group}]", *(f"{k} = {v}" for k, v in points.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def open_all(config: ExperimentConfig) -> None:
    open_image(config)
    open_text(config)
    build_backbone(config)
    open_source(config.data, "train", 64)


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages in a folder on the path: the one of docs/plugins.md, and one of all kinds."""
    folder = tmp_path / "site-packages"
    blocks = dict(re.findall(r"```(python|toml)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
    project = tomllib.loads(blocks["toml"])["project"]
    install(folder, project["name"], project["version"], project["entry-points"])
    (folder / "gray_tokenizer.py").write_text(blocks["python"])
    install(folder, "tiny-plugins", "1.2", ENTRY_POINTS)
    (folder / "tiny_plugins.py").write_text(textwrap.dedent(CODE))
    monkeypatch.syspath_prepend(str(folder))
    for module in ("gray_tokenizer", "tiny_plugins"):  # of the test before
        monkeypatch.delitem(sys.modules, module, raising=False)
    return folder


def test_a_run_from_plugins_of_all_kinds(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = "data.max_recurring_share=1"  # both splits of this source have the same images
    assert main([PRETRAINED, *tiny, *PLUGINS, "trainer.max_steps=4", f"run.dir={tmp_path}", allowed]) == 0
    run = read_run(run_folders(tmp_path)[-1])
    assert run.report is not None
    assert run.environment["tokenizers"] == {"image": "gray-16-of-16", "text": "bytes"}
    assert run.environment["backbone"] == {"plugin:tiny:5": "decoder-5"}
    assert run.environment["train_samples"] == 39  # one of 40 is rejected
    assert run.environment["plugins"].keys() == {
        "backbone.path",
        "text_tokenizer.path",
        "image_tokenizer.path",
        "data.source",
    }
    assert run.environment["plugins"]["image_tokenizer.path"].startswith("gray-tokenizer 0.1.0, file sha256 ")
    monkeypatch.setattr(factory, "_PLUGIN_SHA256", {})  # as in a process that has not opened the plug-in yet
    assert load_initial(run.folder).decoder.config == load_trained(run.folder).decoder.config
    model = load_trained(run.folder)
    assert model.image is not None
    assert model.image.grid == (4, 4)


def test_the_page_runs_and_no_plugin_leaves_no_trace(tiny: list[str], tmp_path: Path) -> None:
    command = re.findall(r"python -m t2i_lm\.train experiments/t2i_pretrained\.yaml (.*)", PAGE.read_text())
    for number, keys in enumerate(command):
        config = load_experiment(PRETRAINED, "demo", [*tiny, *keys.split()])
        assert open_image(config).grid == (4, 4), number
    assert len(command) == 2
    assert shards_of(load_experiment(PRETRAINED, "demo", tiny), {}).folder.name.startswith("scenes-")


def test_a_dry_run_knows_the_sizes_of_plugins(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([PRETRAINED, *tiny, *PLUGINS, "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "missing:" not in output
    assert "a sequence has 16 image ids" in output
    assert "plug-in: backbone.path of tiny-plugins 1.2, file sha256 " in output
    assert main([PRETRAINED, *tiny, "text_tokenizer.path=plugin:nowhere", "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith("error: text_tokenizer.path=plugin:nowhere: no installed package")


def test_shards_of_a_source_depend_on_its_package_and_file(tiny: list[str], installed: Path) -> None:
    config = load_experiment(PRETRAINED, "demo", [*tiny, *PLUGINS])
    before = shards_of(config, {}).folder
    assert re.fullmatch(r"plugin-colors-[0-9a-f]{12}", before.name)
    assert shards_of(config, {}).folder == before
    file = installed / "tiny_plugins.py"
    file.write_text(file.read_text() + "\n# changed\n")
    assert shards_of(config, {}).folder != before


def test_code_without_a_package_requires_allow_code(tiny: list[str]) -> None:
    keys = [*tiny, "text_tokenizer.path=code:tiny_plugins:open_bytes"]
    with pytest.raises(ValueError, match=r"text_tokenizer\.path='code:.*runs code, which requires allow_code=true"):
        load_experiment(PRETRAINED, "demo", keys)
    assert open_text(load_experiment(PRETRAINED, "demo", [*keys, "allow_code=true"])).sha256 == "bytes"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("image_tokenizer.path=plugin:nowhere", "no installed package has 'nowhere' in its entry points t2i_lm.image_"),
        ("image_tokenizer.path=plugin:nowhere", "known: absent, constant, empty, gray, short, twice"),
        (
            "image_tokenizer.path=plugin:short",
            "open_too_little of tiny-plugins 1.2 has the parameters (argument);",
        ),
        ("image_tokenizer.path=plugin:short", "expected a function of (argument, image_size)"),
        (
            "image_tokenizer.path=plugin:empty",
            "object of tiny-plugins 1.2 lacks codebook, decode, decodes, encode",
        ),
        ("image_tokenizer.path=plugin:absent", "tiny_plugins:no_such_function of tiny-plugins 1.2 cannot be imported"),
        ("image_tokenizer.path=plugin:constant", "tiny_plugins:constant of tiny-plugins 1.2 is no function"),
        ("image_tokenizer.path=plugin:twice", "'twice' is taken by other-package 3.0 and tiny-plugins 1.2"),
        ("image_tokenizer.path=code:tiny_plugins", "expected code:MODULE:FUNCTION[:ARGUMENT]"),
        ("image_tokenizer.path=code:no_such_module:f", "cannot be imported: No module named 'no_such_module'"),
        ("text_tokenizer.path=plugin:sentencepiece", "'sentencepiece' of tiny-plugins 1.2 is the name of a built-in"),
        ("backbone.path=plugin:empty", "object of tiny-plugins 1.2 is no t2i_lm.models.backbone.Backbone"),
        (
            "backbone.path=plugin:half",
            "Half of tiny-plugins 1.2 lacks next_hidden, enable_activation_checkpointing, en",
        ),
        ("backbone.path=plugin:tiny backbone.config=demo_7m", "backbone.config=demo_7m: expected null"),
        ("backbone.path=plugin:tiny data.length=113", "data.length=113: the backbone has 112 positions"),
        ("data.source=plugin:empty", "data.source=plugin:empty: object of tiny-plugins 1.2 lacks __len__, __getitem__"),
        ("data.source=plugin:colors:big", "a source takes no argument"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_refused_by_name(
    key: str, message: str, tiny: list[str], installed: Path
) -> None:
    install(installed, "other-package", "3.0", {"t2i_lm.image_tokenizers": {"twice": "tiny_plugins:open_nothing"}})
    config = load_experiment(PRETRAINED, "demo", [*tiny, "allow_code=true", *key.split()])
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        open_all(config)
    assert "\n" not in str(caught.value)
