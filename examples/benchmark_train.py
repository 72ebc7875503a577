"""What training costs with frozen keys, against dense: layers, whole steps (time and memory) and inference.

Everything is compared side by side: the variants take turns, step by step, and medians are printed with their ratio
to the dense network. On CUDA where there is one. Run it on an idle machine: a busy one flatters whatever computes less.

    python examples/benchmark_train.py
    python examples/benchmark_train.py --only layers
    python examples/benchmark_train.py --only steps --models convnext_tiny --sizes 224 --batch-size 4 --channels-last
"""

import argparse
import copy
import gc
import time
from collections.abc import Callable, Sequence
from statistics import median

import timm
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, pad_same
from torch import nn

from timm_masterkeys import MasterKeyConv2d, convert_to_masterkeys, fuse_masterkeys
from timm_masterkeys.models.surgery import replace_layers

GRID = [  # batch, channels, side, kernel, stride: stages of ConvNeXt, StarNet, EfficientNet and MobileNetV3
    (4, 96, 56, 7, 1),
    (8, 192, 28, 7, 1),
    (8, 384, 14, 7, 1),
    (8, 768, 7, 7, 1),
    (8, 24, 56, 7, 1),
    (8, 96, 14, 7, 1),
    (8, 96, 56, 7, 2),
    (8, 144, 56, 5, 2),
    (8, 240, 28, 5, 1),
    (8, 480, 14, 5, 1),
    (8, 96, 112, 3, 2),
    (8, 192, 28, 3, 1),
]
NETWORKS = {"convnext_tiny": 4, "convnext_atto": 16, "convnextv2_atto": 16, "efficientnet_lite0": 8}
NETWORKS |= {"mobilenetv3_large_100": 8, "starnet_s1": 8}
VARIANTS = ("dense", "frozen", "autograd", "none", "shift", "affine")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class PlainKeyConv2d(nn.Conv2d):
    """The straightforward layer: kernels ``key + b`` composed in forward, gradients by autograd."""

    def __init__(self, layer: MasterKeyConv2d) -> None:
        conv = layer.fuse()
        self.__dict__.update(conv.__dict__)
        del self._parameters["weight"]
        self.same = isinstance(conv, Conv2dSame)
        self.register_buffer("key", layer.compose_weight().detach() - layer.shift.detach().view(-1, 1, 1, 1))
        self.shift = nn.Parameter(layer.shift.detach().clone())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As ``nn.Conv2d``."""
        if self.same:
            input = pad_same(input, self.kernel_size, self.stride, self.dilation)
        return self._conv_forward(input, self.key + self.shift.view(-1, 1, 1, 1), self.bias)


def variant(dense: nn.Module, name: str) -> nn.Module:
    """A copy of a dense network (or convolution) in one of the variants."""
    if name == "dense":
        return copy.deepcopy(dense)
    if name == "frozen":
        model = copy.deepcopy(dense)
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
                module.weight.requires_grad = False
        return model
    if name == "autograd":
        model = convert_to_masterkeys(dense)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, MasterKeyConv2d)}
        return replace_layers(model, {n: PlainKeyConv2d(m) for n, m in layers.items()})
    return convert_to_masterkeys(dense, trainable=name)  # type: ignore[arg-type]


def interleaved(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each run in every round; the runs take turns, and the first turn of all is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            milliseconds = run()
            if turn:
                times[name].append(milliseconds)
    return times


def clock(run: Callable[[], object]) -> float:
    """Milliseconds of one call, the device's work included."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def table(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows under their header, aligned, as Markdown."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in (rows[0], ["-" * width for width in widths], *rows[1:]):
        print("| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) + " |", flush=True)
    print()


def layers(rounds: int) -> None:
    """Backward of one depthwise convolution: dense in milliseconds, the others by how many times they are faster."""
    others = VARIANTS[1:]
    rows = [["batch, channels, side, kernel, stride", "layout", "dense ms", *others]]
    for batch, channels, side, kernel, stride in GRID:
        for layout in (torch.contiguous_format, torch.channels_last):
            torch.manual_seed(0)
            conv = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels).to(DEVICE)
            x = torch.randn(batch, channels, side, side, device=DEVICE).to(memory_format=layout).requires_grad_()

            def backward(layer: nn.Module, x: torch.Tensor = x) -> float:
                inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
                out = layer(x)
                grad = torch.ones_like(out)
                return clock(lambda: torch.autograd.grad(out, inputs, grad))

            made = {name: variant(conv, name) for name in VARIANTS}
            times = interleaved({n: lambda layer=layer: backward(layer) for n, layer in made.items()}, rounds)
            m = {name: median(values) for name, values in times.items()}
            gains = [f"{m['dense'] / m[name]:.1f}x" for name in others]
            shape = f"{batch}, {channels}, {side}, {kernel}, {stride}"
            layout_name = "NCHW" if layout is torch.contiguous_format else "channels_last"
            rows.append([shape, layout_name, f"{m['dense']:.2f}", *gains])
    table(rows)


def trainer(dense: nn.Module, kind: str, batch: int, size: int, channels_last: bool) -> Callable[[], float]:
    """A function that takes one training step and returns its milliseconds."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    model = variant(dense, kind).train().to(DEVICE, memory_format=form)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    x = torch.randn(batch, 3, size, size, device=DEVICE).to(memory_format=form)
    y = torch.randint(100, (batch,), device=DEVICE)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return lambda: clock(step)


def kept(dense: nn.Module, kind: str, batch: int, size: int) -> float:
    """Megabytes that a training step keeps for its backward pass, beside the parameters: what its peak is made of."""
    model = variant(dense, kind).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(torch.randn(batch, 3, size, size)).square().mean()
    megabytes = sum(storages.values()) / 1e6
    del loss  # the graph lives until here, so that no two storages had one address
    return megabytes


def steps(names: Sequence[str], sizes: Sequence[int], batch: int | None, channels_last: bool, rounds: int) -> None:
    """Whole training steps: milliseconds, how many times faster than dense, and the memory kept for backward."""
    others = VARIANTS[1:]
    rows = [["network", "batch, px", "dense ms", *others, "dense MB", *(f"{kind} MB" for kind in others)]]
    for name in names:
        for size in sizes:
            images = batch or NETWORKS.get(name, 8)
            dense = timm.create_model(name, num_classes=100)
            runs = {kind: trainer(dense, kind, images, size, channels_last) for kind in VARIANTS}
            m = {kind: median(values) for kind, values in interleaved(runs, rounds).items()}
            del runs
            gc.collect()
            memory = {kind: kept(dense, kind, images, size) for kind in VARIANTS}
            more = [f"{memory['dense']:.0f}", *(f"{memory[kind] / memory['dense'] - 1:+.1%}" for kind in others)]
            gains = [f"{m['dense'] / m[kind]:.2f}x" for kind in others]
            rows.append([name, f"{images}, {size}", f"{m['dense']:.0f}", *gains, *more])
            print(f"{name} {size}: " + ", ".join(f"{k} {v:.0f}" for k, v in m.items()), flush=True)
    table(rows)


def inference(names: Sequence[str], sizes: Sequence[int], batch: int | None, channels_last: bool, rounds: int) -> None:
    """Inference: dense milliseconds, and what the converted network takes more, as it is and fused."""
    rows = [["network", "batch, px", "dense ms", "unfused", "fused"]]
    form = torch.channels_last if channels_last else torch.contiguous_format
    for name in names:
        for size in sizes:
            images = batch or NETWORKS.get(name, 8)
            models = {"dense": timm.create_model(name, num_classes=100).eval().to(DEVICE, memory_format=form)}
            models["unfused"] = convert_to_masterkeys(models["dense"])
            models["fused"] = fuse_masterkeys(models["unfused"])
            x = torch.randn(images, 3, size, size, device=DEVICE).to(memory_format=form)
            runs = {kind: lambda model=model, x=x: clock(lambda: model(x)) for kind, model in models.items()}
            with torch.inference_mode():
                times = interleaved(runs, 5 * rounds)
            dense = times.pop("dense")
            more = [median(b / a for a, b in zip(dense, other, strict=True)) - 1 for other in times.values()]
            rows.append([name, f"{images}, {size}", f"{median(dense):.0f}", *(f"{m:+.1%}" for m in more)])
    table(rows)


def main() -> None:
    """Runs the chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=["layers", "steps", "inference"], help="one part (default: all three)")
    parser.add_argument("--models", nargs="+", default=list(NETWORKS), help="timm architectures")
    parser.add_argument("--sizes", nargs="+", type=int, default=[160, 224], help="image sizes (default: 160 224)")
    parser.add_argument("--batch-size", type=int, help="images a step (default: 4 to 16, by network)")
    parser.add_argument("--channels-last", action="store_true", help="for steps and inference")
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, timm {timm.__version__}, {DEVICE}, {torch.get_num_threads()} threads\n")
    if args.only in (None, "layers"):
        layers(args.rounds)
    if args.only in (None, "steps"):
        steps(args.models, args.sizes, args.batch_size, args.channels_last, args.rounds)
    if args.only in (None, "inference"):
        inference(args.models, args.sizes, args.batch_size, args.channels_last, args.rounds)


if __name__ == "__main__":
    main()
