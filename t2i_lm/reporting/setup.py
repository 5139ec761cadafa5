"""The set-up of the runs beside the paper's."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t2i_lm.assets import find
from t2i_lm.comparison.arms import Arms, precision_note
from t2i_lm.comparison.comparability import config_values
from t2i_lm.plots.captions import SOURCES
from t2i_lm.runtime.tables import compact
from t2i_lm.storage.run_folder import Run
from t2i_lm.tokenizers.joint_vocab import BOUNDARY_TOKENS

# Row -> the paper's value and its source; "not stated" where the paper is silent.
PAPER: dict[str, tuple[str, str]] = {
    "language model": ("open_lm-1b: width 2,048, 24 layers, 16 heads", "Section 2.1; open_lm's release"),
    "its pre-training": ("1.6T tokens: RedPajama, Pile, S2ORC and others", "Section 2.1"),
    "positions": ("head_rotary: none beyond the causal mask", "open_lm's release"),
    "parameters": ("1,507.0M with the image rows", "computed from the release"),
    "image tokenizer": ("SBER-MoVQGAN, 256 pixels to 1,024 of 16,384 ids", "Section 2.1"),
    "data": ("HQITP, 134M image-caption pairs, private", "Section 2.1"),
    "sequence": ("1,152 tokens with pads", "Section 2.1"),
    "text : image": ("1 : 34 (captions of 30 tokens); 1 : 30 as the paper rounds it", "Sections 2.1 and 2.2"),
    "steps": ("about 100,000", "from tokens and batch"),
    "batch": ("1M tokens", "Section 2.1"),
    "tokens": ("100B, 0.65 epochs", "Section 2.1; epochs computed"),
    "learning rate": ("peak 0.0003, cosine, 2,000 warm-up steps", "Section 2.1"),
    "optimizer": ("AdamW; betas, decay and clipping not stated", "Section 2.1"),
    "seeds": ("not stated", ""),
    "hardware": ("64 A100 80GB", "Section 2.1"),
}


def setup_rows(arms: Mapping[str, Run], compared: Arms | None = None) -> list[tuple[str, str, str, str]]:
    """Rows of the table: name, the value here, the paper's, and the paper's source.

    Args:
        arms: a run of each arm by its name; a value that differs between them is given for each.
        compared: the runs of the primary comparison.
    """
    here = {arm: _here(run, compared) for arm, run in arms.items()}
    rows = []
    for name, paper in PAPER.items():
        values = {arm: words[name] for arm, words in here.items()}
        differ = len({*values.values()}) > 1
        shown = (
            "; ".join(f"{arm}: {value}" for arm, value in values.items()) if differ else next(iter(values.values()), "")
        )
        rows.append((name, shown, *paper))
    return rows


def scale_words(run: Run) -> str:
    """Parameters, tokens seen and data of a run, as far as they are recorded."""
    here = _here(run, None)
    parameters = f"{here['parameters']} parameters" if "parameters" in run.environment else ""
    return _listed(parameters, f"{here['tokens'].partition(',')[0]} tokens", here["data"])


def positions_of(config: Mapping[str, Any]) -> str | None:
    """Positions of a backbone, by the config or else by the backbone's files; None where these are not at hand."""
    shape = _files(str(config.get("backbone.path") or "")).get("config.json", {})
    return config.get("backbone.positional") or shape.get("positional_embedding_type")


def _here(run: Run, compared: Arms | None) -> dict[str, str]:
    seeds, several = (compared.seeds, precision_note(compared.runs)) if compared is not None else ([], [])
    config, environment, report = config_values(run), run.environment, run.report or {}
    backbone = _files(str(config["backbone.path"] or ""))
    shape, card = backbone.get("config.json", {}), backbone.get("card.json", {})
    tokens, steps = report.get("tokens_nominal") or run.metrics[-1]["tokens_nominal"], report.get("steps")
    per_step = tokens / steps if steps else None
    tokens_per_image = _image_tokens(run)
    return {
        "language model": _listed(
            _name(config["backbone.path"] or config["backbone.config"]),
            f"width {shape['hidden_dim']:,}" if "hidden_dim" in shape else "",
            f"{shape['n_layers']} layers" if "n_layers" in shape else "",
            f"{shape['n_heads']} heads" if "n_heads" in shape else "",
        ),
        "its pre-training": _listed(
            f"{compact(card['tokens'])} tokens" if "tokens" in card else "see its own documentation",
            str(card.get("data", "")),
        ),
        "positions": positions_of(config) or "those of the backbone's files",
        "parameters": f"{environment['parameters'] / 1e6:,.1f}M" if "parameters" in environment else "not recorded",
        "image tokenizer": _listed(
            _name(config["image_tokenizer.path"]),
            f"{config['image_tokenizer.size']} pixels" + (f" to {tokens_per_image} ids" if tokens_per_image else ""),
        ),
        "data": _listed(
            SOURCES.get(config["data.source"], str(config["data.source"])).format(_name(config["data.path"])),
            f"{environment['train_samples']:,} pairs" if environment.get("train_samples") else "",
        ),
        "sequence": f"{config['data.length']:,} tokens with pads",
        "text : image": _ratio(run),
        "steps": "" if steps is None else f"{steps:,}",
        "batch": _listed(
            f"{config['data.batch_size']:,} sequences", "" if per_step is None else f"{compact(per_step)} tokens"
        ),
        "tokens": _listed(compact(tokens), _epochs(run)),
        "learning rate": f"peak {config['optim.lr']:g}, cosine, {config['optim.warmup_steps']:,} warm-up steps",
        "optimizer": f"{config['optim.name']}, betas {', '.join(f'{beta:g}' for beta in config['optim.betas'])}, "
        f"decay {config['optim.weight_decay']:g}, clipping at {config['optim.grad_clip']:g}",
        "seeds": ", ".join(map(str, seeds)) or str(config["seed"]),
        "hardware": _listed(
            str(environment.get("device", "not recorded")),
            ", ".join(several) or str(environment.get("precision", "")),
            _threads(environment.get("threads")),
        ),
    }


def _threads(count: int | None) -> str:
    return "" if not count else f"{count} CPU thread{'s' * (count != 1)}"


def _ratio(run: Run) -> str:
    """Text to image tokens in the last validation."""
    counts = _last_counts(run)
    if not counts.get("text") or not counts.get("image"):
        return ""
    return f"1 : {counts['image'] / counts['text']:.2g} in validation"


def _image_tokens(run: Run) -> str:
    """Image tokens of a sequence, from the counts of validation targets; empty where they are unknown."""
    counts = _last_counts(run)
    if not counts.get("image") or not counts.get("boundary"):
        return ""
    # Targets beside text and image tokens: <image>, </image> and </s>, and with a caption two around it.
    boundary = 3 if run.config["task"] == "unconditional" else BOUNDARY_TOKENS - 1
    sequences = counts["boundary"] / boundary
    return f"{counts['image'] / sequences:,.0f}"


def _last_counts(run: Run) -> dict[str, int]:
    lines = run.validations()
    entries = lines[-1]["val"] if lines else {}
    return {name: entry["count"] for name, entry in entries.items() if isinstance(entry, dict) and "count" in entry}


def _epochs(run: Run) -> str:
    pairs, samples = run.environment.get("train_samples"), run.metrics[-1].get("samples")
    if not (pairs and samples):
        return ""
    epochs = f"{samples / pairs:.2g}"
    return f"{epochs} {'epoch' if epochs == '1' else 'epochs'}"


def _files(path: str) -> dict[str, dict[str, Any]]:
    """config.json and card.json of a backbone's folder, as far as they are at hand."""
    found = {}
    for name in ("config.json", "card.json"):
        try:
            file = find(f"{path.rstrip('/')}/{name}") if path else None
            content = json.loads(file.read_text(encoding="utf-8")) if file is not None else None
        except (ValueError, OSError):
            continue
        if isinstance(content, dict):
            found[name] = content
    return found


def _name(path: Any) -> str:
    return Path(str(path or "unnamed").removeprefix("asset:")).name


def _listed(*words: str) -> str:
    return ", ".join(word for word in words if word)
