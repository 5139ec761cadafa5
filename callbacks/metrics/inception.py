"""torch-fidelity's Inception with weights from a file that is checked before it is read.

B is the number of images, H and W their sides in pixels, D the width of a feature.
"""

import hashlib
import io
import pickle
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.image.fid import NoTrainInceptionV3

# torch-fidelity's own file, weights-inception-2015-12-05-6726825d.pth: TensorFlow's graph of 2015, on which published
# numbers rest. torchvision's ImageNet weights give other numbers.
PUBLISHED_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
NETWORK = "inception-v3-compat"
# Images at once on a processor: with more, the system maps and unmaps the activations of every layer, which takes as
# long as the network itself. The features are the same bits.
CPU_BATCH = 4
WIDTHS = (64, 192, 768, 2048)


class Inception:
    """Images -> features.

    Attributes:
        width: D, which layer is read.
        sha256: of the weights file.
    """

    def __init__(self, path: Path, width: int = 2048, sha256: str | None = None) -> None:
        """Reads the weights.

        Args:
            path: a state dict of torch-fidelity's `FeatureExtractorInceptionV3`.
            width: 2048 for anything comparable; 64, 192 and 768 are earlier layers.
            sha256: what the file's hash must be.

        Raises:
            ValueError: if there is no such layer or file, its hash is another, or it holds anything but such weights.
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
                raise ValueError("it holds more than a state dict")
            # The network's constructor would run code from a crafted file (it reads with weights_only=False): it gets a
            # file that was written here.
            checked = io.BytesIO()
            torch.save(dict(state), checked)
            checked.seek(0)
            self._network = NoTrainInceptionV3(NETWORK, [str(width)], checked, antialias=False)  # type: ignore[arg-type]
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise ValueError(f"{path} holds no weights of torch-fidelity's Inception: {str(error)[:300]}") from error
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> None:
        """Moves the network; images follow it."""
        self._network.to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, images_uint8_BCHW: Tensor) -> Tensor:
        """Features (B, D) float32 on the CPU, of images resized to 299 pixels as TensorFlow 1 does, no antialias."""
        size = CPU_BATCH if self.device.type == "cpu" else len(images_uint8_BCHW)
        parts = [self._network(part.to(self.device)) for part in torch.split(images_uint8_BCHW, max(1, size))]
        return torch.cat(parts).float().cpu()
