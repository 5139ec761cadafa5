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
# # The paper's figures
#
# Figures 1 to 6, redrawn from published numbers and from the runs of this suite. Each cell shows a figure, prints its
# table and writes it as PNG and PDF; if runs are missing, it prints the command that makes them. Open this file with
# jupytext, or run it as a script.

# %%
# %matplotlib inline
from pathlib import Path

from t2i_lm.plots.catalogue import Request, show

project = Path("..") if Path.cwd().name == "notebooks" else Path()
request, folder = Request(project / "runs"), project / "figures"

# %% [markdown]
# **Figure 1.** Two held-out images, their ids, what the image tokenizer decodes from these ids, and the rows that the
# embedding and output matrices of the language model gain. From the newest finished run of either arm.

# %%
show("1", request, folder)

# %% [markdown]
# **Figure 2.** Zero-shot FID on COCO of published text-to-image systems by release date, with sources
# (`t2i_lm/plots/published_fid.csv`). Results of `python -m t2i_lm.evaluate --coco` are added: hollow if they are not
# COCO FID-30k, in the table only if their features are not 2,048 wide.

# %%
show("2", request, folder)

# %% [markdown]
# **Figures 3 and 4.** Perplexity from a pre-trained language model and from random weights by tokens seen: of all
# tokens (3), and of text and image tokens (4). The paper reports that the curves of all tokens coincide for the whole
# run, that text starts far lower from pre-trained weights and the gap soon closes, and that images show no gap.
#
# The two runs come from `make exp-pretrained` and `make exp-scratch`. The newest pair with equal data hash, seed,
# scale, length and logging is used; `Request(root, pretrained=RUN, scratch=RUN)` compares two others.

# %%
show("3", request, folder)

# %%
show("4", request, folder)

# %% [markdown]
# **Figure 5.** Loss of image tokens without captions: from random weights, from a pre-trained language model tuned
# fully, and from one of which only a part is tuned. The paper reports that full tuning equals random weights and that
# no part suffices. The six runs come from `python -m t2i_lm.ablate --all`.
#
# **Figure 6.** Contrastive alignment of image-token rows with the text-token rows of a language model, over bags of
# words, with its learnable temperature. The paper reports that the loss plateaus quickly. The control pairs every image
# with the caption of another one, so its loss on training pairs measures memorization. The runs come from
# `python -m t2i_lm.train experiments/align.yaml --scale demo` and the same with `experiments/align_shuffled.yaml`.

# %%
show("5", request, folder)

# %%
show("6", request, folder)
