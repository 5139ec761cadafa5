# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Figure 6
#
# Image-token rows aligned with the text-token rows of a language model by a contrastive loss over bags of words, and
# the temperature that is learnt with them. The paper reports that the loss plateaus quickly. The control keeps for
# every image the caption of another one: what it reaches on training pairs is memorised.
#
# The runs come from `python -m t2i_lm.train experiments/align.yaml` and `experiments/align_shuffled.yaml`, both with
# `--scale demo`. Open this file with jupytext, or run it as a script.

# %%
# %matplotlib inline
from pathlib import Path

from t2i_lm.figures import FIGURES, Request

project = Path("..") if Path.cwd().name == "notebooks" else Path()

# %% [markdown]
# The newest runs that agree in data hash, seed, scale, length and logging.

# %%
drawing = FIGURES["6"](Request(project / "runs"))
drawing.figure

# %% [markdown]
# Held-out losses at the end, and the control's distance.

# %%
print(drawing.table)

# %%
print(*drawing.save(project / "figures" / "figure6"), sep="\n")
