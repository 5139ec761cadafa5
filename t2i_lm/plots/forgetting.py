"""What runs retain of language: panels and a table of held-out text beside its floors."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from t2i_lm.comparison.endpoints import Endpoint
from t2i_lm.comparison.measurement import require_one_measurement
from t2i_lm.plots.curves import text_series
from t2i_lm.plots.panels import Panel
from t2i_lm.runtime.tables import text_table, with_error
from t2i_lm.storage.run_folder import Run

TEXTS = ("text", "second_text")
# Words of the floors in a record; the random arm after its own training is a curve of the figure.
FLOORS = {"uniform": "uniform guess", "unigram": "unigram", "random_weights": "random weights"}
HOW = (
    "Perplexity at the points; thin lines: at the temperature of least perplexity. "
    "Dotted: a uniform guess among the text rows; the text's own frequencies of pieces, each row predicted from the "
    "others (unigram); the architecture with random weights."
)


def require_same_texts(runs: Iterable[Run], keys: Sequence[str] = TEXTS) -> None:
    """Checks that the runs that measured a held-out text measured the same one.

    Raises:
        IncomparableError: naming the texts.
    """
    measured = [(run, records[-1]["forgetting"]) for run in runs if (records := run.records("forgetting"))]
    for key in keys:
        with_text = [run for run, record in measured if record.get(key)]
        require_one_measurement(Endpoint(f"forgetting.{key}.text_rows.nll"), with_text)


def retention_panels(arms: Mapping[str, Run]) -> list[Panel]:
    """Perplexity of the first text over the text rows and over all rows, and of the second over the text rows."""
    last = {key: _last(arms, key) for key in TEXTS}
    named = {key: f" ({entry['name']})" if "name" in entry else "" for key, entry in last.items()}
    shown = [("text", "text_rows", "Softmax over the text rows"), ("text", "all_rows", "Softmax over all rows")]
    if last["second_text"]:
        shown[0] = ("text", "text_rows", f"Text rows{named['text']}")
        shown[1] = ("second_text", "text_rows", f"Text rows{named['second_text']}")
        shown.append(("text", "all_rows", f"All rows{named['text']}"))
    return [
        Panel(
            title,
            {arm: series for arm, run in arms.items() if (series := text_series(run, rows, key)).val},
            lines={
                FLOORS[name]: math.exp(floor["nll"])
                for name, floor in last[key].get("floors", {}).items()
                if rows == "text_rows" and name in FLOORS
            },
            axis="tokens seen",
        )
        for key, rows, title in shown
    ]


def retention_table(arms: Mapping[str, Run]) -> str:
    """Loss over the text rows before and after training, at the best temperature, beside the floors; top-1 accuracy."""
    texts = {key: entry for key in TEXTS if (entry := _last(arms, key))}
    rows = [
        (f"{FLOORS[name]}", *(f"{entry['floors'][name]['nll']:.3f}" for entry in texts.values()))
        for name in FLOORS
        if all(name in entry.get("floors", {}) for entry in texts.values())
    ]
    for arm, run in arms.items():
        last = run.records("forgetting")[-1]
        measured = {"before": run.before("forgetting"), "after": last if last["step"] else None}
        for when, line in [(when, line) for when, line in measured.items() if line is not None]:
            for words, read in (("", _nll), (", best temperature", _best), (", top-1 accuracy", _top1)):
                values = [read(line["forgetting"].get(key, {}).get("text_rows", {})) for key in texts]
                if any(values):
                    rows.append((f"{arm}, {when}{words}", *values))
    names = [
        f"{entry.get('name', key)}{', {:,} targets'.format(entry['targets']) if 'targets' in entry else ''}"
        for key, entry in texts.items()
    ]
    return text_table(("nll over the text rows (nats/token)", *names), rows)


def _nll(entry: Mapping[str, Any]) -> str:
    return with_error(f"{entry['nll']:.3f}", entry["se"], digits=3) if "nll" in entry else ""


def _best(entry: Mapping[str, Any]) -> str:
    best = entry.get("best_temperature")
    return f"{best['nll']:.3f} at {best['temperature']:.2f}" if best else ""


def _top1(entry: Mapping[str, Any]) -> str:
    if "top1" not in entry:
        return ""
    error = entry["top1_se"]
    return with_error(f"{100 * entry['top1']:.1f} %", None if error is None else 100 * error, digits=1)


def _last(arms: Mapping[str, Run], key: str) -> dict[str, Any]:
    """A text's entry in the last measurement of the first arm that has one."""
    for run in arms.values():
        for line in reversed(run.records("forgetting")):
            if entry := line["forgetting"].get(key):
                return dict(entry)
    return {}
