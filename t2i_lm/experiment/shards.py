"""The token shards of an experiment as commands write and describe them: rows, rejects, cut and empty captions."""

from collections.abc import Iterator
from typing import Any

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.data.shards.format import read_index, validations_in
from t2i_lm.data.shards.held_out import RECURRING, recurring_of
from t2i_lm.data.shards.prepare import equal_ids
from t2i_lm.experiment.build import Experiment, ImageExperiment, open_image, prepare
from t2i_lm.runtime.launch import local_rank
from t2i_lm.runtime.tables import listed
from t2i_lm.tokenizers.layout import Layout


def prepared(config: ExperimentConfig) -> str:
    """Writes missing shards; their folder, data hash, rows per split, and validation images that recur in training.

    Raises:
        ValueError: if the data cannot be read or too many samples are unusable.
    """
    folder = prepare(config, local_rank())
    index = read_index(folder)
    assert index is not None
    rows = (
        f"  {split}: {entry['rows']:,} rows; rejected: {entry.get('rejects') or 'none'}"
        for split, entry in index["splits"].items()
    )
    lines = [f"{folder}  data hash {index['data_hash']}", *rows]
    if RECURRING in index:
        lines.append(f"  {_recurring(recurring_of(index))}")
    notes = (note for notes in index.get("notes", {}).values() for note in notes)
    return "\n".join([*lines, *dict.fromkeys(f"  {note}" for note in notes)])


def equality_in_bfloat16(config: ExperimentConfig) -> str:
    """The share of validation ids that are equal when images are encoded in bfloat16."""
    share, ids = equal_ids(config, open_image(config, local_rank()))
    return f"{share:.4%} of {ids:,} ids are equal in bfloat16 and float32"


def data_counts(experiment: Experiment) -> dict[str, Any]:
    """What is counted of an experiment's data, for env.json and report.json; empty if images are read directly.

    `truncated` counts the captions longer than `text_budget`, where a sequence has captions.
    """
    index = experiment.index
    budget = None
    if isinstance(experiment, ImageExperiment) and isinstance(experiment.layout, Layout):
        budget = experiment.layout.text_budget
    counts: dict[str, Any] = {} if budget is None else {"text_budget": budget}
    for split, entry in index.get("splits", {}).items():
        counts[split] = {"rows": entry["rows"]}
        if "caption_tokens" in entry:
            lengths = {int(length): count for length, count in entry["caption_tokens"].items()}
            counts[split] |= {"rejects": entry["rejects"], "captions": sum(lengths.values())}
            counts[split]["empty"] = lengths.get(0, 0)
            if budget is not None:
                counts[split]["truncated"] = sum(count for length, count in lengths.items() if length > budget)
    if index.get("notes"):
        counts["notes"] = index["notes"]
    if RECURRING in index:
        recurring = {split: found["images"] for split, found in recurring_of(index).items()}
        counts["recurring_images"] = recurring.get("val", recurring)
    return counts


def describe_data(experiment: Experiment) -> Iterator[str]:
    """One line each for rows, rejects and recurring images, for what the source left out, and for cut captions."""
    counts, index = data_counts(experiment), experiment.index
    if not index.get("splits"):
        return
    splits = {split: counts[split] for split in ("train", *validations_in(index))}
    rows = listed([f"{entry['rows']:,} {split}" for split, entry in splits.items()])
    line = f"data: {rows} rows, data hash {experiment.index['data_hash']}"
    if RECURRING in index:
        left_out = [f"{n:,} {split} ({why})" for split in splits for why, n in splits[split]["rejects"].items()]
        line += f"; left out: {', '.join(left_out) or 'none'}"
        line += f"; {_recurring(recurring_of(index))}"
    yield line
    yield from dict.fromkeys(f"data: {note}" for notes in counts.get("notes", {}).values() for note in notes)
    if "text_budget" in counts:
        counted = {split: entry for split, entry in splits.items() if "truncated" in entry}  # streamed ones are not
        cut = listed([_share_cut(entry, split) for split, entry in counted.items()])
        empty = sum(entry["empty"] for entry in counted.values())
        yield f"captions: {cut} are cut to the {counts['text_budget']:,} text ids that fit; {empty:,} are empty"


def _recurring(found: dict[str, dict[str, Any]]) -> str:
    counts = [f"{entry['images']:,}" + f" of {split}" * (len(found) > 1) for split, entry in found.items()]
    return f"validation images that recur in training: {listed(counts)}"


def _share_cut(entry: dict[str, Any], split: str) -> str:
    share = entry["truncated"] / max(1, entry["captions"])
    return f"{entry['truncated']:,} of {entry['captions']:,} {split} ({share:.1%})"


def require_whole_captions(experiment: Experiment) -> None:
    """Checks that few enough captions are cut.

    Raises:
        ValueError: if the share of a split exceeds `data.max_truncated_share`.
    """
    counts, data = data_counts(experiment), experiment.config.data
    for split in experiment.index.get("splits", {}):
        entry = counts[split]
        if entry.get("truncated", 0) > data.max_truncated_share * entry.get("captions", 0):
            raise ValueError(
                f"data.max_truncated_share={data.max_truncated_share}: {entry['truncated']:,} of {entry['captions']:,} "
                f"{split} captions are longer than the {counts['text_budget']:,} text ids that fit in "
                f"data.length={data.length}; raise either"
            )
