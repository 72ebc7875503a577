"""Time of ``pretrained=True`` for a ``.mk8`` name: of the first call, and of later ones beside stock timm.

    python examples/benchmark_load.py

The network is EfficientNet-Lite0 with its real weights, in a temporary Hub cache as a download would leave them. It is
calibrated once. Then processes that make one network each alternate between the stock name and the ``.mk8`` name; so
do calls within one process. Medians of the calls and their ratio are printed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ARCH = "tf_efficientnet_lite0"
NAMES = (ARCH, f"{ARCH}.mk8")


def seconds(name: str) -> float:
    """Seconds that one call takes."""
    import timm

    import timm_masterkeys  # noqa: F401  # registers the names

    start = time.perf_counter()
    timm.create_model(name, pretrained=True)
    return time.perf_counter() - start


def seconds_in_new_process(name: str) -> float:
    """Seconds that the first call in a new process takes, without the imports."""
    command = [sys.executable, __file__, "--one", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def download(hub: Path) -> None:
    """Puts the weights where a download from the Hub would leave them."""
    import timm
    from lite0 import lite0
    from safetensors.torch import save_file

    from timm_masterkeys.files import file_sha256

    repo = hub / f"models--{timm.get_pretrained_cfg(ARCH).hf_hub_id.rstrip('/').replace('/', '--')}"
    commit = "0" * 40
    for folder in (repo / "blobs", repo / "refs", repo / "snapshots" / commit):
        folder.mkdir(parents=True)
    save_file(lite0().state_dict(), hub / "dense")
    blob = (hub / "dense").rename(repo / "blobs" / file_sha256(hub / "dense"))
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit / "model.safetensors").symlink_to(blob)


def main() -> None:
    """Prints the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=15, help="of each (default: 15)")
    parser.add_argument("--one", metavar="NAME", help="time one call of a name, and print nothing else")
    args = parser.parse_args()
    if args.one:
        print(seconds(args.one))
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"HF_HUB_CACHE": folder, "HF_HUB_OFFLINE": "1", "TIMM_MASTERKEYS_CACHE": folder}
        download(Path(folder))
        print(f"first call, which calibrates: {seconds_in_new_process(NAMES[1]):.1f} s")
        for title, measure in (("a process's first call", seconds_in_new_process), ("its later calls", seconds)):
            for name in NAMES:
                measure(name)
            times = [[measure(name) for name in NAMES] for _ in range(args.calls)]
            stock, converted = (median(column) for column in zip(*times, strict=True))
            print(f"{title}: {converted:.3f} s, stock timm {stock:.3f} s, ratio {converted / stock:.2f}")


if __name__ == "__main__":
    main()
