"""Procedural scenes as a source of captioned images."""

from t2i_lm.data.pairs import Pair
from t2i_lm.data.scenes.captions import describe
from t2i_lm.data.scenes.scene import SIZE, draw_scene, render


class SceneSource:
    """The first `count` scenes of a split with their captions."""

    def __init__(self, count: int, split: str, seed: int, size: int = SIZE) -> None:
        self.count, self.split, self.seed, self.size = count, split, seed, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < self.count:
            raise IndexError(index)
        scene = draw_scene(self.seed, self.split, index)
        style = f"{self.seed}/{self.split}/{index}"
        meaning = scene.meaning() | {"style": style}
        return Pair(f"scene-{style}", render(scene, self.size), [describe(scene, style).text], meaning)
