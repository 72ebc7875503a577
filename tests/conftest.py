"""What holds for every test: a fixed seed, no calibration unless it is asked for, and one thread, as threads cost tiny
tensors more than they give. Without a GPU Triton's kernels are interpreted, which it has to know before it is imported.
"""

import logging
import os

import pytest
import torch

# Those with long files first: with ``-n 2`` a core takes file after file, and shall not be left alone with a long one.
ROOMS = ["zoo", "tests", "timm_plugin", "calibration", "study", "hub", "conversion", "layers", "keys", "ecosystem"]

os.environ["TIMM_MASTERKEYS_CALIBRATE"] = "none"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: ROOMS.index(item.path.parent.name))


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _log_levels():
    """The command sets them for its process, which is the tests' here."""
    loggers = [logging.getLogger(name) for name in (None, "timm_masterkeys", "huggingface_hub")]
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, level, propagate in before:
        logger.setLevel(level)
        logger.propagate = propagate


@pytest.fixture
def cuda():
    """A GPU, for tests marked ``cuda``; ``TIMM_MASTERKEYS_TEST_DEVICE=cpu`` tries their bodies without one."""
    device = os.environ.get("TIMM_MASTERKEYS_TEST_DEVICE", "cuda")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.backends.cudnn.allow_tf32 = False
    return device


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """Where a test runs that should give the same on CPU and, with ``-m cuda``, on a GPU."""
    return "cpu" if request.param == "cpu" else request.getfixturevalue("cuda")
