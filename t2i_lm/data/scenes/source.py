"""Procedural scenes as a source of captioned images."""

from math import ceil

from t2i_lm.data.pairs import Pair
from t2i_lm.data.scenes.captions import describe
from t2i_lm.data.scenes.scene import SIZE, Scene, render
from t2i_lm.data.scenes.space import SPLITS, draw_scene, largest


def paraphrases(text_ratio: float | None) -> int:
    """Captions of a scene for `data.text_ratio`: one where few are joined, since single ones give 0.38 at 64 pixels."""
    return 1 if text_ratio is None or text_ratio <= 3 / 8 else 1 + ceil(4 * text_ratio)


class SceneSource:
    """The first `count` scenes of a split with their captions."""

    def __init__(self, count: int, split: str, seed: int, size: int = SIZE, captions: int = 1) -> None:
        """Scenes of `size` pixels, of the splits that `draw_scene` knows, each with some captions.

        Raises:
            ValueError: if the split is unknown, or has fewer scenes.
        """
        if count > largest(split):
            key = "data.val_size" if SPLITS[split].validation else "data.train_size"
            raise ValueError(f"{key}={count}: expected at most {largest(split):,}, so that no generated scene recurs")
        self.count, self.split, self.seed, self.size, self.captions = count, split, seed, size, captions

    def __len__(self) -> int:
        return self.count

    def scene(self, index: int) -> Scene:
        """A scene, not rendered."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        return draw_scene(self.seed, self.split, index)

    def caption(self, index: int) -> str:
        """The first caption of a scene."""
        return describe(self.scene(index), self._style(index)).text

    def _style(self, index: int) -> str:
        """What the words of a scene's first caption are drawn by."""
        return f"{self.seed}/{self.split}/{index}"

    def __getitem__(self, index: int) -> Pair:
        scene, style = self.scene(index), self._style(index)
        styles = [style, *(f"{style}/{number}" for number in range(1, self.captions))]
        meaning = scene.meaning() | {"style": style}
        return Pair(f"scene-{style}", render(scene, self.size), [describe(scene, one).text for one in styles], meaning)
