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
# # Figure 5
#
# Image tokens alone, without captions: the loss of a model from random weights, of a pre-trained language model tuned
# fully, and of one of which only a part is tuned. The paper reports that full tuning equals random weights and that
# no part is enough.
#
# The six runs come from `python -m t2i_lm.ablate --all`. Open this file with jupytext, or run it as a script.

# %%
# %matplotlib inline
from pathlib import Path

from t2i_lm.figures import FIGURES, Request

project = Path("..") if Path.cwd().name == "notebooks" else Path()

# %% [markdown]
# The newest runs that agree in data hash, seed, scale, length and logging.

# %%
drawing = FIGURES["5"](Request(project / "runs"))
drawing.figure

# %% [markdown]
# Held-out losses at the end, and their distance from random weights.

# %%
print(drawing.table)

# %%
print(*drawing.save(project / "figures" / "figure5"), sep="\n")
