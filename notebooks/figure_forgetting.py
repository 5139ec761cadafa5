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
# # What a language model forgets as it learns to draw
#
# Held-out text, measured before, during and after text-to-image training: over the text rows alone, and over all rows,
# where new rows may take probability from the text.
#
# The runs come from `python -m t2i_lm.train experiments/t2i_pretrained.yaml --scale demo forgetting.interval=100
# forgetting.text=HELDOUT` (and forgetting.tasks=FOLDER for questions). Open this file with jupytext, or run it as a
# script.

# %%
# %matplotlib inline
from pathlib import Path

from t2i_lm.figures import FIGURES, Request

project = Path("..") if Path.cwd().name == "notebooks" else Path()

# %% [markdown]
# The newest run that measured its forgetting, and its random partner where that did.

# %%
drawing = FIGURES["forgetting"](Request(project / "runs"))
drawing.figure

# %% [markdown]
# Held-out losses of image tokens at the end; then every probe before and after, with the standard error of its change.

# %%
print(drawing.table)

# %%
print(*drawing.save(project / "figures" / "figure_forgetting"), sep="\n")
