"""Requirements of a test on the machine."""

import pytest
import torch

from t2i_lm.runtime.devices import missing_to_compile

needs_compiler = pytest.mark.skipif(bool(missing_to_compile()), reason="no C++ compiler")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
needs_torchs = pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="torch has none")
