"""torch-fidelity's Inception, with weights from a file that is verified before loading.

B is the number of images, H and W their sides in pixels, D the width of a feature.

Weights: torch-fidelity's weights-inception-2015-12-05-6726825d.pth, TensorFlow's graph of 2015, on which published
numbers rest. torchvision's ImageNet weights give other numbers.
"""

import hashlib
import io
import pickle
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.image.fid import NoTrainInceptionV3

NETWORK = "inception-v3-compat"
# Images per batch on a CPU: with more, the system maps and unmaps the activations of every layer, which takes as long
# as the network itself. The features are bitwise the same.
CPU_BATCH = 4
WIDTHS = (64, 192, 768, 2048)


class Inception:
    """Images -> features.

    Attributes:
        width: D, which selects the layer.
        sha256: of the weights file.
    """

    def __init__(self, path: Path, width: int = 2048, sha256: str | None = None) -> None:
        """Loads the weights.

        Args:
            path: a state dict of torch-fidelity's `FeatureExtractorInceptionV3`.
            width: 2048 for comparable numbers; 64, 192 and 768 are earlier layers.
            sha256: the file's required hash.

        Raises:
            ValueError: if the layer or file does not exist, the hash differs, or the content is anything else.
        """
        if width not in WIDTHS:
            raise ValueError(f"features={width}: expected one of {', '.join(map(str, WIDTHS))}")
        if not path.is_file():
            raise ValueError(f"no Inception weights at {path}")
        content = path.read_bytes()
        self.width, self.sha256 = width, hashlib.sha256(content).hexdigest()
        if sha256 is not None and sha256.lower() != self.sha256:
            raise ValueError(f"{path} has sha256 {self.sha256}, expected {sha256}")
        try:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
                raise ValueError("not a plain state dict")
            # The network's constructor loads with weights_only=False, which would run code from a crafted file, so it
            # gets a copy.
            copy = io.BytesIO()
            torch.save(dict(state), copy)
            copy.seek(0)
            self._network = NoTrainInceptionV3(NETWORK, [str(width)], copy, antialias=False)  # type: ignore[arg-type]
        except pickle.UnpicklingError as error:  # torch's message advises to run the code in it
            unread = "it holds more than tensors, or is damaged, and is not loaded"
            raise ValueError(f"{path} is not torch-fidelity's Inception: {unread}") from error
        except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not torch-fidelity's Inception: {str(error)[:300]}") from error
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> None:
        self._network.to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, images_uint8_BCHW: Tensor) -> Tensor:
        """Features (B, D) float32 on the CPU, of images resized to 299 pixels as in TensorFlow 1, without antialias."""
        size = CPU_BATCH if self.device.type == "cpu" else len(images_uint8_BCHW)
        parts = [self._network(part.to(self.device)) for part in torch.split(images_uint8_BCHW, max(1, size))]
        return torch.cat(parts).float().cpu()
