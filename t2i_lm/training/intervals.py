"""Steps between measurements of a run."""

import math

from t2i_lm.config.sections import TrainerConfig


def validation_interval(trainer: TrainerConfig) -> int:
    """Steps between validations; there is one before the first step and one after the last, too."""
    return even_interval(min(trainer.val_check_interval, trainer.max_steps), trainer.max_steps)


def even_interval(interval: int, steps: int) -> int:
    """An interval in steps, up to 2 % longer where its last end would otherwise come just before that of the run."""
    longer = math.ceil(steps / max(1, steps // interval))
    return longer if interval < longer <= 1.02 * interval else interval
