"""What holds for every test: a fixed seed, no repair unless it is asked for, and one thread, as threads cost tiny
tensors more than they give.
"""

import os

import pytest
import torch

os.environ["TIMM_MASTERKEYS_CALIBRATE"] = "none"


def pytest_collection_modifyitems(items):
    """With ``-n 2`` a core takes file after file: the longest, which come last by name, are not left to one of them."""
    items.sort(key=lambda item: "zoo" not in item.path.parts)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
