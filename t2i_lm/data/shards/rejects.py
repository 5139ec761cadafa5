"""Rejected samples of a split, judged while it is read: `data.max_reject_share`."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t2i_lm.data.shards.cache import say
from t2i_lm.data.shards.format import read_part

# Samples of a part that are read in any case, so that a refusal names more than the first reason.
LOOK_AHEAD = 100
# Samples of a stream, whose length is unknown, after which a line says that too many are rejected.
NOTE_AFTER = 1000


@dataclass
class Rejects:
    """The rejected samples of a split, over all of its parts that are complete.

    Attributes:
        share: `data.max_reject_share`.
        split: `train` or `val`.
        total: samples of the split; None if unknown.
        origin: the key and value that name the data.
        remedy: what a repair of the samples requires beside.
    """

    share: float
    split: str
    total: int | None
    origin: str
    remedy: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    rows: int = 0
    _added: set[Path] = field(default_factory=set)
    _noted: bool = False

    def add_parts(self, targets: Iterable[Path]) -> None:
        """Adds the parts that are complete, each once, whichever process wrote them."""
        for target in targets:
            if target not in self._added and target.exists():
                self._added.add(target)
                entry = read_part(target)
                self.counts.update(entry["rejects"])
                self.examples = entry["examples"] | self.examples
                self.rows += entry["rows"]

    def too_many(self, part: Counter[str]) -> bool:
        """Whether the split cannot pass any more, with the rejects of a part that is being read."""
        return self.total is not None and (self.counts.total() + part.total()) / self.total > self.share

    def note(self, part: Counter[str], examples: dict[str, str], read: int) -> None:
        """Says once that a stream, which is judged at its end, has had too many rejects up to here."""
        if self.total is None and not self._noted and read >= NOTE_AFTER and part.total() / read > self.share:
            self._noted = True
            say(f"{self._message(part, examples, read)}. data.max_reject_share={self.share} is judged at its end")

    def refusal(self, part: Counter[str], examples: dict[str, str], read: int) -> ValueError:
        """The error of a split that cannot pass, after `read` samples of a part."""
        return ValueError(
            f"{self.origin}: {self._message(part, examples, read)}. data.max_reject_share={self.share} allows fewer. "
            f"Raise it, or repair the samples{self.remedy}"
        )

    def require_few(self) -> None:
        """Raises a ValueError if the rejects of the whole split exceed the share."""
        read = self.rows + self.counts.total()
        if read and self.counts.total() / read > self.share:
            raise self.refusal(Counter(), {}, 0)

    def require_usable(self) -> None:
        """Prints the rejects of the whole split by reason.

        Raises:
            ValueError: if they exceed the share, or no sample is usable.
        """
        self.require_few()
        nothing = Counter[str]()
        if not self.rows:
            found = f"; {self._message(nothing, {}, 0)}" if self.counts else ""
            raise ValueError(f"{self.origin}: no usable {self.split} sample{found}")
        if self.counts:
            say(self._message(nothing, {}, 0))

    def _message(self, part: Counter[str], examples: dict[str, str], read: int) -> str:
        counts, firsts = self.counts + part, examples | self.examples
        read += self.rows + self.counts.total()
        first = {reason: f" (first: {example})" for reason, example in firsts.items()}
        reasons = "; ".join(f"{count:,} {reason}{first.get(reason, '')}" for reason, count in counts.most_common())
        so_far = "" if read == self.total or not part else " read so far"
        return f"{counts.total():,} of {read:,} {self.split} samples{so_far} cannot be used: {reasons}"


def require_few_rejects(share: float, index: dict[str, Any], origin: str) -> None:
    """Checks shards that are reused, of which an index counts the rejects by split and reason.

    Raises:
        ValueError: if those of a split exceed `data.max_reject_share`.
    """
    for split, entry in index["splits"].items():
        Rejects(share, split, None, origin, counts=Counter(entry.get("rejects", {})), rows=entry["rows"]).require_few()
