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
# # Initializations between pre-trained and random
#
# What of a pre-trained language model is worth something to text-to-image: the statistics of its tensors (entries
# shuffled), its rows, its layers, or image rows aligned with its text rows?
#
# The runs come from `python -m t2i_lm.train experiments/t2i_NAME.yaml --scale demo` with NAME one of pretrained,
# scratch, shuffled, embeddings_only, body_only and (after align.yaml) aligned. Open this file with jupytext, or run
# it as a script.

# %%
# %matplotlib inline
from pathlib import Path

from t2i_lm.figures import FIGURES, Request

project = Path("..") if Path.cwd().name == "notebooks" else Path()

# %% [markdown]
# The newest runs that agree in data hash, seed, scale, length and logging.

# %%
drawing = FIGURES["inits"](Request(project / "runs"))
drawing.figure

# %% [markdown]
# Held-out losses of image tokens at the end, and their distance from random weights.

# %%
print(drawing.table)

# %%
print(*drawing.save(project / "figures" / "figure_inits"), sep="\n")
