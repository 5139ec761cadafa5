"""The token shards of an experiment as the prepare command writes and describes them."""

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.data.shards.format import read_index
from t2i_lm.data.shards.prepare import equal_ids
from t2i_lm.experiment.build import open_image, prepare
from t2i_lm.runtime.devices import local_rank


def prepared(config: ExperimentConfig) -> str:
    """Writes missing shards; their folder, data hash and rows per split.

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
    return "\n".join([f"{folder}  data hash {index['data_hash']}", *rows])


def equality_in_bfloat16(config: ExperimentConfig) -> str:
    """The share of validation ids that are equal when images are encoded in bfloat16."""
    share, ids = equal_ids(config, open_image(config, local_rank()))
    return f"{share:.4%} of {ids:,} ids are equal in bfloat16 and float32"
