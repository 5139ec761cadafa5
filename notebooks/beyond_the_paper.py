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
# # Beyond the paper
#
# Initializations between pre-trained and random, the data budget, forgetting and relearning of text, and remedies. Each
# cell shows a figure, prints its table and writes it as PNG and PDF; if runs are missing, it prints the command that
# makes them.
# `python -m t2i_lm.sweep` writes the figure of a sweep itself. Open this file with jupytext, or run it as a script.

# %%
# %matplotlib inline
from pathlib import Path

from t2i_lm.plots.catalogue import Request, show

project = Path("..") if Path.cwd().name == "notebooks" else Path()
request, folder = Request(project / "runs"), project / "figures"

# %% [markdown]
# **Initializations.** Which part of a pre-trained language model helps text-to-image: the statistics of its tensors
# (entries shuffled), its rows, its layers, or image rows aligned with its text rows? The runs come from
# `python -m t2i_lm.train experiments/t2i_NAME.yaml --scale demo` with NAME one of pretrained, scratch, shuffled,
# gaussian, mimetic, embeddings_only, body_only and (after align.yaml) aligned.

# %%
show("inits", request, folder)

# %% [markdown]
# **Data budget.** The gap between the arms against training tokens, each length a run of its own, with fits to zero and
# to a constant. The runs come from `python -m t2i_lm.study experiments/plans/data_budget.yaml`.

# %%
show("gap", request, folder)

# %% [markdown]
# **Forgetting.** Held-out text, measured before, during and after text-to-image training: over the text rows alone, and
# over all rows, where new rows may take probability from the text. The table lists every probe before and after, with
# the standard error of its change. The runs come from `make exp-pretrained` (forgetting.tasks=FOLDER adds questions);
# a random partner with the same keys is added.

# %%
show("forgetting", request, folder)

# %% [markdown]
# **Relearning.** Erased or suppressed? Held-out text loss over the first steps on text, from the weights of both arms,
# from random weights and from the language model itself. The values come from `python -m t2i_lm.evaluate --checkpoint
# RUN --relearn` on both arms.

# %%
show("relearning", request, folder)

# %% [markdown]
# **Remedies.** Increase of the held-out text loss (over the text rows) against the held-out loss of image tokens.
# Points that no other point beats in both form the Pareto front, marked by an asterisk in the table; the dashed line is
# random initialization. The runs come from `python -m t2i_lm.remedies --replay TEXT`.

# %%
show("remedies", request, folder)
