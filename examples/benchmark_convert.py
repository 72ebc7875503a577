"""Time and memory of a conversion, speed of the projection, and time of the import beside timm's. Linux only.

The two sides of a comparison run in turns, under the same load; medians over all rounds are printed.

    python examples/benchmark_convert.py
    python examples/benchmark_convert.py --model convnext_base --rounds 3
"""

import argparse
import multiprocessing
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

import timm
import torch
from torch import nn

from timm_masterkeys import convert_to_masterkeys, get_bank, plan_conversion, project_kernels

TURNS = 3  # per round, of everything but building and converting


def seconds(run: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def memory(entry: str) -> int:
    """Bytes of memory that this process holds now (VmRSS), or held at its peak (VmHWM)."""
    kilobytes = re.findall(rf"{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes[0]) * 1024


def broadcast(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The straightforward projection: the residuals of all kernels and keys by broadcasting; the smallest wins."""
    keys = get_bank().keys_for((weight.shape[2], weight.shape[3])).double().flatten(1)
    kernels = weight.double().flatten(1)
    shift = kernels.mean(1)
    scale = ((kernels - shift[:, None])[:, None] * keys).sum(2)
    residual = kernels[:, None] - (scale[:, :, None] * keys + shift[:, None, None])
    index = residual.square().sum(2).argmin(1, keepdim=True)
    return index, scale.gather(1, index).to(weight.dtype), shift.to(weight.dtype)


def conversion(name: str) -> dict[str, float]:
    """Builds the model, converts it in place, and then projects all its kernels together, in both ways.

    Runs in a new process, so that the conversion starts cold, and no memory freed earlier hides what it takes.
    """
    start = time.perf_counter()
    model = timm.create_model(name)
    build = time.perf_counter() - start
    layers = {layer.name for layer in plan_conversion(model).converted}
    kernels = [m.weight.detach().clone() for n, m in model.named_modules() if n in layers and isinstance(m, nn.Conv2d)]
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))

    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    before = memory("VmRSS")
    convert = seconds(lambda: convert_to_masterkeys(model, inplace=True))
    extra = memory("VmHWM") - before

    shape = kernels[0].shape[1:]
    weight = torch.cat([w for w in kernels if w.shape[1:] == shape])
    expected, projection = broadcast(weight), project_kernels(weight)  # the first run of each is not timed
    assert torch.equal(projection.key_index, expected[0])
    torch.testing.assert_close((projection.scale, projection.shift), expected[1:])
    turns = [(seconds(lambda: broadcast(weight)), seconds(lambda: project_kernels(weight))) for _ in range(TURNS)]
    return {
        "build": build,
        "convert": convert,
        "extra": extra,
        "size": size,
        "layers": len(kernels),
        "kernels": sum(map(len, kernels)),
        "projected": len(weight),
        "broadcast": median(plain for plain, _ in turns),
        "project": median(ours for _, ours in turns),
        "gain": median(plain / ours for plain, ours in turns),
    }


def imports() -> tuple[float, float]:
    """Seconds of a new Python process that imports timm, and of one that imports timm and then this package."""
    alone = seconds(lambda: subprocess.run([sys.executable, "-c", "import timm"], check=True))
    both = seconds(lambda: subprocess.run([sys.executable, "-c", "import timm; import timm_masterkeys"], check=True))
    return alone, both


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="convnext_xxlarge", help="timm architecture (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    args = parser.parse_args()

    rounds, turns = [], []
    for _ in range(args.rounds):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            rounds.append(process.submit(conversion, args.model).result())
        turns += [imports() for _ in range(TURNS)]
    m = {entry: median(r[entry] for r in rounds) for entry in rounds[0]}
    alone, both = (median(turn[i] for turn in turns) for i in (0, 1))
    added = median(both / alone - 1 for alone, both in turns)

    rows = [
        ("what", "target", "measured"),
        (
            f"convert {args.model}: {m['kernels']:,.0f} kernels of {m['layers']:.0f} layers, in place",
            "< 1 s",
            f"{m['convert']:.2f} s; building it takes {m['build']:.1f} s",
        ),
        (
            "memory that takes at its peak, beyond the model's own",
            "< 5 %",
            f"{m['extra'] / m['size']:.1%}: {m['extra'] / 1e6:.0f} MB of {m['size'] / 1e9:.2f} GB",
        ),
        (
            f"project_kernels against broadcasting, {m['projected']:,.0f} kernels, same result",
            "faster",
            f"{m['gain']:.1f} times: {m['project']:.3f} s against {m['broadcast']:.3f} s",
        ),
        ("import timm_masterkeys after timm", "< 10 %", f"{added:+.1%}: {both:.2f} s against {alone:.2f} s"),
    ]
    first, second, third = (max(len(row[column]) for row in rows) for column in range(3))
    rows.insert(1, ("-" * first, "-" * second, "-" * third))
    for what, target, measured in rows:
        print(f"| {what:<{first}} | {target:<{second}} | {measured:<{third}} |")
    print(f"\nMedians of {args.rounds} rounds; torch {torch.__version__}, {torch.get_num_threads()} threads.")


if __name__ == "__main__":
    main()
