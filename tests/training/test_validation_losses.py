"""Both validation losses of a run, computed once more: one prepared row at a time, with logits and torch's loss."""

import pytest
import torch
import torch.nn.functional as F

from t2i_lm.config.load import load_run
from t2i_lm.data.shards.parts import open_split
from t2i_lm.experiment.build import prepare
from t2i_lm.experiment.restore import load_trained
from t2i_lm.storage.run_folder import Run


@torch.no_grad()
def losses_of(run: Run, split: str) -> dict[str, tuple[float, int]]:
    """Summed nll and number of targets by modality: text [boundaries] image [boundaries], by the ids of targets."""
    model = load_trained(run.folder)
    first = model.text.vocab_size  # of the special ids: <doc> </doc> <text> </text> <image> </image> <pad>
    length = model.config.data.length
    sums = dict.fromkeys(("text", "image", "boundary"), (0.0, 0))
    for row in open_split(prepare(load_run(run.folder)), split):
        image = [first + 7 + int(code) for code in row["image_ids"]]
        caption = [int(piece) for piece in row["text_ids"][0]][: length - len(image) - 6]
        ids = [first, first + 2, *caption, first + 3, first + 4, *image, first + 5, first + 1]
        logits_TV = model.decoder(torch.tensor([ids[:-1]]))[0].double()
        nll_T = F.cross_entropy(logits_TV, torch.tensor(ids[1:]), reduction="none")
        for target, nll in zip(ids[1:], nll_T.tolist(), strict=True):
            name = "text" if target < first else "image" if target >= first + 7 else "boundary"
            total, count = sums[name]
            sums[name] = total + nll, count + 1
    return sums


@pytest.mark.parametrize("split", ["iid", "compositional"])
def test_the_last_validation_is_what_a_plain_loop_computes(pretrained: Run, split: str) -> None:
    recorded = pretrained.validations(split)[-1]["val"]
    for name, (total, count) in losses_of(pretrained, f"val/{split}").items():
        assert recorded[name]["count"] == count, name
        assert recorded[name]["nll"] == pytest.approx(total / count, rel=1e-6), name
