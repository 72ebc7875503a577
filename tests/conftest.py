"""What holds for every test: a fixed seed, no repair unless it is asked for, and one thread, as threads cost tiny
tensors more than they give. Without a GPU Triton's kernels are interpreted, which it has to know before it is imported.
"""

import os

import pytest
import torch

os.environ["TIMM_MASTERKEYS_CALIBRATE"] = "none"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
