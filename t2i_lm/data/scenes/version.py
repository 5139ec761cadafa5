"""Version of generated scenes, by which prepared scenes and runs on them are told apart."""

from collections.abc import Mapping
from typing import Any

# Increment when the scenes of a split, their captions, images or image ids change; IMAGES_FORMAT is the last version
# that changed more than the ids.
SCENES_FORMAT, IMAGES_FORMAT = 5, 4
# Key of the version in the index of shards and in env.json.
SCENES = "scenes"


def scenes_version(record: Mapping[str, Any]) -> int:
    """The version in an index or an env.json; 2, the former one, did not record it."""
    return int(record.get(SCENES, 2))
