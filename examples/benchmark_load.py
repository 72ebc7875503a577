"""How long ``pretrained=True`` takes for a ``.mk8`` name: the first call, and later ones beside stock timm.

    python examples/benchmark_load.py

EfficientNet-Lite0 with its real weights, from a file. The network is calibrated into a cache of its own. Later calls
and calls of the stock name then alternate, and the medians and their ratio are printed.
"""

import argparse
import logging
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import timm
import torch
from lite0 import lite0
from safetensors.torch import save_file

ARCH = "tf_efficientnet_lite0"


def seconds(name: str, file: Path) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(file)})
    return time.perf_counter() - start


def main() -> None:
    """Prints the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=15, help="of each (default: 15)")
    calls = parser.parse_args().calls
    import timm_masterkeys  # noqa: F401  # registers the names

    logging.getLogger("timm_masterkeys").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TIMM_MASTERKEYS_CACHE"] = folder
        file = Path(folder, "dense.safetensors")
        save_file(lite0().state_dict(), file)
        print(f"first call: {seconds(f'{ARCH}.mk8', file):.1f} s, {torch.get_num_threads()} threads")
        times = [(seconds(ARCH, file), seconds(f"{ARCH}.mk8", file)) for _ in range(calls)]
    stock, converted = (median(column) for column in zip(*times, strict=True))
    print(f"later calls: {converted:.3f} s, stock timm {stock:.3f} s, ratio {converted / stock:.2f}, median of {calls}")


if __name__ == "__main__":
    main()
