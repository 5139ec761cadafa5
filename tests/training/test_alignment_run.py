"""Contrastive alignment and the initializations, through the command line."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.load import load_experiment
from t2i_lm.experiment.build import build
from t2i_lm.models.aligned_rows import FILE, TEXT_ROWS
from t2i_lm.models.open_lm import save_open_lm
from t2i_lm.models.token_rows import Embedding
from t2i_lm.modules.alignment import AlignmentModule
from t2i_lm.modules.text_to_image import TextToImageModule
from t2i_lm.plots.catalogue import FIGURES, Request
from t2i_lm.storage.run_folder import Run, read_run, run_folders
from t2i_lm.train import main
from tests.decoders import tiny_decoder
from tests.runs import EXPERIMENTS, losses
from tests.two_ranks import train_on_two_ranks

SMALL = ["data.batch_size=16", "optim.warmup_steps=1"]


def experiment(name: str) -> str:
    return str(EXPERIMENTS / f"{name}.yaml")


@pytest.fixture(scope="module")
def aligned(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("align")
    assert main([experiment("align"), *tiny, *SMALL, f"run.dir={root}", "log.logger=tensorboard"]) == 0
    return read_run(run_folders(root)[-1])


@pytest.mark.slow
def test_an_alignment_leaves_loss_temperature_rows_and_table(aligned: Run) -> None:
    lines = aligned.records("train")
    assert [line["train"]["all"]["count"] for line in lines] == [2 * 2 * 16] * 4
    assert lines[-1]["train"]["all"]["nll"] < lines[0]["train"]["all"]["nll"]
    assert all(line["scalars"]["logit_scale"] > 0 for line in lines)
    assert aligned.validations()[-1]["val"]["all"]["count"] == 2 * 16  # what does not fill a batch is left out
    rows = load_file(aligned.folder / FILE)["image"]
    assert rows.shape == (32, 32)
    with (aligned.folder / "nearest_text_tokens.csv").open() as file:
        table = list(csv.reader(file))
    assert len(table) == 1 + 32
    assert sum(int(row[1]) for row in table[1:]) == 60 * 64
    assert aligned.report is not None
    assert aligned.report["retrieval"]["candidates"] == 16
    events = EventAccumulator(str(aligned.folder / "tb"))
    events.Reload()
    assert "align/train/logit_scale" in events.Tags()["scalars"]
    assert "Figure 6" in events.Tags()["images"]
    assert "nearest text tokens/text_summary" in events.Tags()["tensors"]


@pytest.mark.slow
def test_only_image_rows_and_temperature_are_trained(aligned: Run, tiny: list[str]) -> None:
    before = build(load_experiment(experiment("align"), "demo", [*tiny, *SMALL])).module.state_dict()
    after = torch.load(sorted((aligned.folder / "checkpoints").glob("*.ckpt"))[-1], weights_only=True)["state_dict"]
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"embedding.image", "log_scale"}
    assert set(before) == {"embedding.text", *changed}


@pytest.mark.slow
def test_two_ranks_gather_their_negatives(aligned: Run, tiny: list[str], tmp_path: Path) -> None:
    two = train_on_two_ranks(experiment("align"), tmp_path, *tiny, *SMALL, "trainer.strategy=ddp")
    for ours, theirs in zip(two.metrics, aligned.metrics, strict=True):
        for key, entries in losses(ours).items():
            assert entries["all"]["nll"] == pytest.approx(theirs[key]["all"]["nll"], rel=1e-6)
    assert torch.allclose(load_file(two.folder / FILE)["image"], load_file(aligned.folder / FILE)["image"], atol=1e-6)


def test_a_known_alignment_is_recovered() -> None:
    """Every image code means one text token; images are 24 codes of their caption's tokens, in another order."""
    tokens, codes, dim, pairs = 256, 256, 32, 1024
    generator = torch.Generator().manual_seed(0)
    meaning_I = torch.randperm(tokens, generator=generator)
    code_V = meaning_I.argsort()
    config = ExperimentConfig(task="align")
    embedding = Embedding(tokens, dim)
    with torch.no_grad():
        embedding.text.normal_(generator=generator)
        embedding.image = nn.Parameter(torch.randn(codes, dim, generator=generator))
    module = AlignmentModule(embedding, config)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=3e-2, weight_decay=0.0)

    def batch() -> dict[str, torch.Tensor]:
        text_BN = torch.randint(tokens, (pairs, 24), generator=generator)
        return {
            "text_ids_L": text_BN.flatten(),
            "text_starts_B": torch.arange(pairs) * 24,
            "image_ids_BN": code_V[text_BN.flip(1)],
            "hashes_B2": torch.arange(2 * pairs).view(pairs, 2),
        }

    for _ in range(60):
        optimizer.zero_grad()
        module.nll(batch()).mean().backward()
        optimizer.step()
    with torch.no_grad():
        image_BD, text_BD = module.bags(batch())
    right = (image_BD @ text_BD.T).argmax(dim=1) == torch.arange(pairs)
    assert right.float().mean() > 0.95


def test_the_shuffled_control_never_pairs_an_image_with_its_own_caption(tiny: list[str]) -> None:
    data = build(load_experiment(experiment("align_shuffled"), "demo", [*tiny, *SMALL])).data
    true = build(load_experiment(experiment("align"), "demo", [*tiny, *SMALL])).data
    for one in (data, true):
        one.setup("fit")
    draws = [(0, index) for index in range(60)]
    ours, theirs = data.train_set.__getitems__(draws), true.train_set.__getitems__(draws)
    assert torch.equal(ours["image_ids_BN"], theirs["image_ids_BN"])
    assert sorted(ours["hashes_B2"][:, 0].tolist()) == sorted(theirs["hashes_B2"][:, 0].tolist())
    every = torch.arange(60).numpy()
    partners = data.train_set._partners(every)  # type: ignore[attr-defined]
    assert all(partners != every)
    assert sorted(partners) == every.tolist()


def decoder_of(name: str, *overrides: str) -> dict[str, torch.Tensor]:
    module = build(load_experiment(experiment(name), "demo", overrides)).module
    assert isinstance(module, TextToImageModule)
    return module.decoder.state_dict()


@pytest.mark.slow
def test_initializations_take_the_documented_tensors(aligned: Run, tiny: list[str]) -> None:
    where = [*tiny, f"run.dir={aligned.folder.parents[1]}"]
    arms = {
        name: decoder_of(f"t2i_{name}", *where)
        for name in ("pretrained", "scratch", "shuffled", "gaussian", "body_only", "embeddings_only", "aligned")
    }
    pretrained, scratch = arms["pretrained"], arms["scratch"]
    rows = {"tok_embeddings.text", "output.text"}
    for name, value in pretrained.items():
        if name.endswith((".special", ".image")):  # equal in all arms, but for aligned image rows
            others = [arm for arm in arms if (arm, name) != ("aligned", "tok_embeddings.image")]
            assert all(torch.equal(arms[arm][name], value) for arm in others), name
            continue
        assert torch.equal(arms["aligned"][name], value)
        assert torch.equal(arms["body_only"][name], scratch[name] if name in rows else value), name
        assert torch.equal(arms["embeddings_only"][name], value if name in rows else scratch[name]), name
        assert torch.equal(arms["shuffled"][name].flatten().sort().values, value.flatten().sort().values), name
    assert torch.equal(arms["aligned"]["tok_embeddings.image"], load_file(aligned.folder / FILE)["image"])


def test_another_seed_changes_every_random_tensor_and_none_is_the_pretrained_one(tiny: list[str]) -> None:
    first, second = (decoder_of("t2i_scratch", *tiny, f"seed={seed}") for seed in (0, 1))
    pretrained = decoder_of("t2i_pretrained", *tiny, "seed=2")
    for name, value in first.items():
        constant = bool((value == value.flatten()[0]).all())
        assert torch.equal(value, second[name]) == constant, name
        assert torch.equal(value, pretrained[name]) == constant, name


@pytest.mark.slow
@pytest.mark.parametrize("latest", [False, True])
def test_t2i_from_aligned_rows_runs_and_its_config_names_the_file(
    aligned: Run, tiny: list[str], tmp_path: Path, latest: bool
) -> None:
    shutil.copytree(aligned.folder, tmp_path / "align" / aligned.folder.name)
    folder = tmp_path / "align" / aligned.folder.name
    named = "latest" if latest else folder
    assert main([experiment("t2i_aligned"), *tiny, f"run.dir={tmp_path}", f"aligned_rows={named}"]) == 0
    run = read_run(run_folders(tmp_path, "t2i_aligned")[-1])
    assert run.config["aligned_rows"] == str(folder / FILE)


@pytest.mark.slow
def test_bad_aligned_rows_are_named(
    aligned: Run, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign, short = tmp_path / "foreign.safetensors", tmp_path / "short.safetensors"
    save_file({"image": torch.zeros(32, 32)}, foreign, {"tokenizers": "{}"})
    from safetensors import safe_open

    with safe_open(aligned.folder / FILE, framework="pt") as file:
        made_with = {key: file.metadata()[key] for key in ("tokenizers", TEXT_ROWS)}
    save_file({"image": torch.zeros(31, 32)}, short, made_with)
    other = [f"backbone.path={tmp_path / 'lm'}"]
    save_open_lm(tiny_decoder(seed=6, seq_len=16, vocab_size=512), tmp_path / "lm", torch.float32, {})
    rows = [f"aligned_rows={aligned.folder}", f"run.dir={tmp_path}"]
    assert main([experiment("t2i_aligned"), *tiny, *rows, *other]) == 2
    assert "the text rows of another language model than backbone.path" in capsys.readouterr().err
    for value, message in (
        ("latest", "to make one: python -m t2i_lm.train experiments/align.yaml"),
        (str(tmp_path / "none"), "expected an aligned_rows.safetensors, an alignment's run folder, or latest"),
        (str(foreign), "another text_tokenizer"),
        (str(short), "(31, 32), expected (32, 32)"),
        (experiment("align"), "cannot be read"),
    ):
        assert main([experiment("t2i_aligned"), *tiny, f"run.dir={tmp_path}", f"aligned_rows={value}"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.val_size=8"], "whole batches of data.batch_size=16"),
        (["trainer.accumulate_grad_batches=2"], "negatives from the whole batch"),
        (["freeze=[ffn]"], "trains the image rows alone"),
        (["align.logit_scale_max=1"], "at least align.logit_scale_init"),
        (["data.train_size=8", "data.batch_size=16"], "train split has only 8 pairs"),
    ],
)
def test_bad_settings_are_named(
    overrides: list[str], message: str, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([experiment("align"), *tiny, *SMALL, f"run.dir={tmp_path}", *overrides]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_figure_6_draws_loss_chance_and_temperature(aligned: Run) -> None:
    drawing = FIGURES["6"](Request(aligned.folder.parents[1]))
    lines = {str(line.get_gid()): line for axes in drawing.figure.axes for line in axes.get_lines()}
    scale = [line["scalars"]["logit_scale"] for line in aligned.records("train")]
    assert [float(y) for y in lines["Learnable temperature/align/raw"].get_ydata()] == scale
    assert "Contrastive loss/floor" in lines
    assert "NO RUN OF THIS SETTING: align_shuffled" in drawing.caption


def test_a_dry_run_counts_trainable_parameters(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([experiment("align"), *tiny, *SMALL, "--dry-run"]) == 0
    assert f"{32 * 32:,} trainable" in capsys.readouterr().out
