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
# # Remedies against forgetting
#
# What each remedy keeps of the language, and what that costs: the rise of the held-out text loss (over the text rows)
# against the held-out loss of image tokens. Points that no other beats in both form the Pareto front.
#
# The runs come from `python -m t2i_lm.remedies --text HELDOUT --replay TEXT`. Open this file with jupytext, or run it
# as a script.

# %%
# %matplotlib inline
from pathlib import Path

from t2i_lm.figures import FIGURES, Request

project = Path("..") if Path.cwd().name == "notebooks" else Path()

# %% [markdown]
# The newest untouched run and the newest run of every remedy that agrees with it; the line is random initialization.

# %%
drawing = FIGURES["remedies"](Request(project / "runs"))
drawing.figure

# %% [markdown]
# The points as numbers; an asterisk marks the front.

# %%
print(drawing.table)

# %%
print(*drawing.save(project / "figures" / "figure_remedies"), sep="\n")
