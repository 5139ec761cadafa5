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
# # Figure 2
#
# Zero-shot FID on COCO of published text-to-image systems, auto-regressive and diffusion, against their release date;
# our runs are added where `python -m t2i_lm.evaluate --coco` has measured them: hollow where they are no COCO FID-30k,
# in the table alone where they are of other than 2,048 features.
#
# The published numbers, each with its source, are in `t2i_lm/plots/published_fid.csv`. Open this file with jupytext, or
# run it as a script.

# %%
# %matplotlib inline
from pathlib import Path

from t2i_lm.figures import FIGURES, Request

project = Path("..") if Path.cwd().name == "notebooks" else Path()

# %%
drawing = FIGURES["2"](Request(project / "runs"))
drawing.figure

# %% [markdown]
# Every number with its source.

# %%
print(drawing.table)

# %%
print(*drawing.save(project / "figures" / "figure2"), sep="\n")
