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
# # Figure 4
#
# The same runs, split into text and image tokens, from a pre-trained language model and from random weights, against
# tokens seen. The paper reports that text starts far lower from
# pre-trained weights and the gap soon closes; images show no gap.
#
# The two runs come from `make exp-pretrained` and `make exp-scratch`. Open this file with jupytext,
# or run it as a script.

# %%
# %matplotlib inline
from pathlib import Path

from t2i_lm.figures import FIGURES, Request

project = Path("..") if Path.cwd().name == "notebooks" else Path()

# %% [markdown]
# The newest pair of runs with equal data hash, seed, scale, length and logging; name two run
# folders with `pretrained=` and `scratch=` to compare others.

# %%
request = Request(project / "runs")
print(request.pair.pretrained.folder, request.pair.scratch.folder, sep="\n")

# %%
drawing = FIGURES["4"](request)
drawing.figure

# %% [markdown]
# Final held-out values of both arms and their gap.

# %%
print(drawing.table)

# %%
print(*drawing.save(project / "figures" / "figure4"), sep="\n")
