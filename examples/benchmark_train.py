"""Cost of training with frozen keys, compared with dense: layers, whole steps (time and memory) and inference.

The variants alternate, step by step, and medians are printed with their ratio to the dense network. Runs on CUDA if
there is a device (``examples/gpu.sh`` runs all parts there). Run it on an idle machine: a busy one favours the variant
that computes less.

    python examples/benchmark_train.py
    python examples/benchmark_train.py --only layers
    python examples/benchmark_train.py --only steps --models convnext_tiny --sizes 224 --batch-size 4 --channels-last
"""

import argparse
import copy
import csv
import gc
import re
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, pad_same
from torch import nn

from timm_masterkeys import MasterKeyConv2d, calibrate_masterkeys, convert_to_masterkeys, fuse_masterkeys
from timm_masterkeys.conversion.convert import replace_layers
from timm_masterkeys.layers import gpu_operators

Shape = tuple[int, int, int, int | tuple[int, int], int]
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
CALIBRATED = {"tf_efficientnet_lite0": 250, "convnext_base": 76}  # images
VARIANTS = ("dense", "frozen", "autograd", "none", "shift", "affine")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cuda":
    NETWORKS = dict.fromkeys(["convnext_tiny", "convnext_base", "convnextv2_atto", "inception_next_tiny"], 128)
    NETWORKS |= dict.fromkeys(["efficientnet_b0", "mobilenetv3_large_100", "starnet_s1"], 128)
    VARIANTS = ("dense", "none", "none+conv", "shift", "shift+sums", "shift+kernels", "affine", "affine+sums")
    VARIANTS += ("affine+kernels",)
    torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = True  # as timm's train.py has it

SWITCHES = {"": "0", "kernels": "1", "conv": "conv", "sums": "sums"}  # gpu_operators.TRITON by what follows "+"
BLOCKS = {  # to try, by operation and whether in channels_last: places, columns, channels
    ("conv", False): [(128, 32, 1), (128, 64, 1), (256, 32, 1), (256, 64, 1), (512, 64, 1)],
    ("conv", True): [(4, 4, 64), (8, 8, 32), (8, 8, 64), (8, 8, 128), (16, 8, 32), (16, 8, 64), (32, 8, 32)],
    ("sums", False): [(256, 64, 1), (512, 32, 1), (512, 64, 1), (1024, 64, 1)],
    ("sums", True): [(8, 8, 64), (16, 8, 32), (16, 8, 64), (32, 8, 32), (32, 8, 64), (64, 8, 32)],
}


class PlainKeyConv2d(nn.Conv2d):
    """The straightforward layer: kernels ``key + b`` are composed in forward, and autograd differentiates them."""

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
    """A variant of a dense network or convolution, which is not changed; ``interleaved`` switches GPU kernels on."""
    name = name.partition("+")[0]
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
    """Milliseconds of each run in every round; the runs alternate, and the first turns are not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-3 if DEVICE.type == "cuda" else -1, rounds):
        for name, run in runs.items():
            gpu_operators.TRITON = SWITCHES[name.partition("+")[2]]
            milliseconds = run()
            if turn >= 0:
                times[name].append(milliseconds)
    return times


def clock(run: Callable[[], object]) -> float:
    """Milliseconds of one call, including the work of the device."""
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


def write(args: argparse.Namespace, rows: Sequence[dict[str, object]]) -> None:
    """Adds rows to the file of results, if there is one, with the device and versions in each."""
    if args.results is None:
        return
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    settings = {"rounds": args.rounds, "device": where, "torch": torch.__version__, "timm": timm.__version__}
    settings = {"precision": args.precision, "compiled": args.compile, **settings}
    columns = ["part", "what", "batch", "px", "layout", "variant", "ms", "MB", *settings]
    new = not args.results.exists()
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with args.results.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerows({**row, **settings} for row in rows)


def autocast(args: argparse.Namespace) -> torch.autocast:
    """The autocast context for a forward pass."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=args.precision == "bf16")


def grid(args: argparse.Namespace) -> list[Shape]:
    """Shapes of depthwise layers: a few on CPU; on CUDA, or if models are chosen, each shape in the models once."""
    if DEVICE.type != "cuda" and not args.models:
        return list(GRID)  # type: ignore[arg-type]
    shapes: dict[Shape, None] = {}
    for name, size in ((name, size) for name in args.models or NETWORKS for size in args.sizes):
        batch = args.batch_size or NETWORKS.get(name, 8)

        def note(module: nn.Module, inputs: tuple[torch.Tensor], out: torch.Tensor, batch: int = batch) -> None:
            if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1 == module.weight.shape[1]:
                kernel = module.kernel_size if module.kernel_size[0] != module.kernel_size[1] else module.kernel_size[0]
                shapes[batch, module.in_channels, inputs[0].shape[3], kernel, module.stride[0]] = None  # type: ignore[index]

        with torch.device("meta"):
            model = timm.create_model(name).eval()
            for module in model.modules():
                module.register_forward_hook(note)
            model(torch.empty(1, 3, size, size))
    return list(shapes)


def layers(args: argparse.Namespace) -> None:
    """One depthwise convolution, forward and backward: milliseconds of dense, and speedups of the other variants."""
    header = ["batch, channels, side, kernel, stride", "layout", "dense ms", *args.variants[1:]]
    rows: dict[str, list[list[str]]] = {"forward": [header], "backward": [header]}
    for shape, layout, conv, x in convolutions(args):

        def forward(layer: nn.Module, x: torch.Tensor = x) -> float:
            with autocast(args):
                return clock(lambda: layer(x))

        def backward(layer: nn.Module, x: torch.Tensor = x) -> float:
            inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
            with autocast(args):
                out = layer(x)
            grad = torch.ones_like(out)
            return clock(lambda: torch.autograd.grad(out, inputs, grad))

        models = {name: variant(conv, name) for name in args.variants}
        for direction, run in (("forward", forward), ("backward", backward)):
            runs = {name: lambda layer=layer, run=run: run(layer) for name, layer in models.items()}
            m = {name: median(values) for name, values in interleaved(runs, args.rounds).items()}
            gains = [f"{m['dense'] / m[name]:.1f}x" for name in args.variants[1:]]
            rows[direction].append([", ".join(map(str, shape)), layout, f"{m['dense']:.2f}", *gains])
            cells = layer_columns(direction, shape, layout)
            write(args, [{**cells, "variant": name, "ms": f"{m[name]:.4f}"} for name in args.variants])
    for direction, lines in rows.items():
        print(direction)
        table(lines)


def convolutions(args: argparse.Namespace) -> Iterator[tuple[Shape, str, nn.Conv2d, torch.Tensor]]:
    """Yields each shape and layout with a convolution and an input."""
    for shape in grid(args):
        batch, channels, side, kernel, stride = shape
        padding = tuple(k // 2 for k in kernel) if isinstance(kernel, tuple) else kernel // 2
        for name, layout in (("NCHW", torch.contiguous_format), ("channels_last", torch.channels_last)):
            torch.manual_seed(0)
            conv = nn.Conv2d(channels, channels, kernel, stride, padding, groups=channels).to(DEVICE)
            x = torch.randn(batch, channels, side, side, device=DEVICE).to(memory_format=layout).requires_grad_()
            yield shape, name, conv, x


def layer_columns(part: str, shape: Shape, layout: str) -> dict[str, object]:
    """The columns of the results that describe a layer."""
    batch, channels, side, kernel, stride = shape
    what = f"{channels} channels, kernel {kernel}, stride {stride}"
    return {"part": part, "what": what, "batch": batch, "px": side, "layout": layout}


def blocks(args: argparse.Namespace) -> None:
    """Milliseconds of the GPU kernels by the size of the block that one program computes, best first."""
    from timm_masterkeys.layers import gpu_kernels

    tables = {"conv": gpu_kernels.CONVOLUTION, "sums": gpu_kernels.WINDOWS}
    rows = [["batch, channels, side, kernel, stride", "layout", "operation", "places, columns, channels: ms"]]
    for shape, layout, conv, x in convolutions(args):
        last, geometry = layout == "channels_last", (conv.stride, conv.padding, conv.dilation)
        dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
        x, weight = x.detach().to(dtype), conv.weight.detach().to(dtype)
        grad, keys = torch.ones_like(conv.to(dtype)(x)), weight[:8, 0].float()
        none = torch.empty(len(weight), 0, dtype=torch.int64, device=DEVICE)
        calls = {
            "conv": lambda x=x, w=weight, g=geometry: gpu_kernels.depthwise_conv2d(x, w, None, *g),
            "sums": lambda x=x, y=grad, k=keys, i=none, g=geometry: gpu_kernels.affine_sums(y, x, k, i, *g),
        }
        for operation, call in calls.items():
            kept = tables[operation][last]

            def run(block: tuple[int, ...], operation: str = operation, call: Any = call, last: bool = last) -> float:
                tables[operation][last] = dict(zip(("places", "columns", "channels"), block, strict=True))
                return clock(call)

            runs = {str(b): lambda b=b, run=run: run(b) for b in BLOCKS[operation, last]}
            times = {block: median(values) for block, values in interleaved(runs, args.rounds).items()}
            tables[operation][last] = kept
            best = sorted(times, key=times.__getitem__)
            cells = [", ".join(map(str, shape)), layout, operation]
            rows.append([*cells, "; ".join(f"{block[1:-1]}: {times[block]:.3f}" for block in best)])
            columns = layer_columns(f"blocks {operation}", shape, layout)
            write(args, [{**columns, "variant": block, "ms": f"{times[block]:.4f}"} for block in best])
    table(rows)


def measured(args: argparse.Namespace) -> None:
    """Prints the cases for ``gpu_operators.MEASURED``: those where a GPU kernel always won in the part ``layers``."""
    with args.results.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["part"] in ("forward", "backward")]
    times: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        shape = tuple(row[name] for name in ("part", "what", "batch", "px", "layout", "precision", "device"))
        times.setdefault(shape, {})[row["variant"]] = float(row["ms"])
    wins: dict[tuple[str, ...], list[bool]] = {}
    for (part, what, _, _, layout, precision, _), ms in times.items():
        _, kernel, stride = re.fullmatch(r"(\d+) channels, kernel (.+), stride (\d)", what).groups()  # type: ignore[union-attr]
        kernel = kernel if kernel.startswith("(") else f"({kernel}, {kernel})"
        case = f"{kernel}, ({stride}, {stride}), (1, 1), 1, {layout == 'channels_last'}"
        dtype = {"bf16": "torch.bfloat16", "float32": "torch.float32"}[precision]
        # A GPU kernel convolves forward, and backward where there is no stride; the sums are of the backward pass.
        applies = {"conv": part == "forward" or stride == "1", "sums": part == "backward"}
        for operation, scales, ours, plain in (
            ("conv", 0, "none+conv", "none"),
            ("sums", 0, "shift+sums", "shift"),
            ("sums", 1, "affine+sums", "affine"),
        ):
            if applies[operation] and {ours, plain} <= ms.keys():
                won = ms[ours] < min(ms[plain], ms["dense"])
                wins.setdefault((operation, case, dtype, str(scales)), []).append(won)
    for (operation, case, dtype, scales), won in sorted(wins.items()):
        line = f'    Case("{operation}", {case}, {dtype}, {scales}),  # {sum(won)} of {len(won)}'
        print(line if all(won) else f"    # {line.strip()}")


def trainer(dense: nn.Module, kind: str, batch: int, size: int, args: argparse.Namespace) -> Callable[[], float]:
    """A function that takes one training step and returns its milliseconds."""
    form = torch.channels_last if args.channels_last else torch.contiguous_format
    model = variant(dense, kind).train().to(DEVICE, memory_format=form)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    x = torch.randn(batch, 3, size, size, device=DEVICE).to(memory_format=form)
    y = torch.randint(100, (batch,), device=DEVICE)
    forward: Callable[[torch.Tensor], torch.Tensor] = model
    if args.compile:  # new code, or one variant would run what was compiled for another of the same shapes
        names: dict[str, Any] = {"model": model}
        exec("def forward(x): return model(x)", names)
        forward = torch.compile(names["forward"])

    def step() -> None:
        optimizer.zero_grad()
        with autocast(args):
            loss = F.cross_entropy(forward(x), y)
        loss.backward()
        optimizer.step()

    return lambda: clock(step)


def kept(dense: nn.Module, kind: str, batch: int, size: int) -> float:
    """Megabytes that a training step keeps for its backward pass, beside the parameters; the most of its peak."""
    model = variant(dense, kind).train()
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(torch.randn(batch, 3, size, size)).square().mean()
    megabytes = sum(storages.values()) / 1e6
    del loss  # the graph lives until here: no address was used twice
    return megabytes


def peak(run: Callable[[], object]) -> float:
    """Megabytes that a run takes on a GPU at its peak, beyond those held before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def steps(args: argparse.Namespace) -> None:
    """Whole training steps: milliseconds of dense, speedups of the other variants, and memory.

    On CUDA memory is the peak beyond weights and optimiser state, on CPU the tensors kept for the backward pass.
    """
    kinds = args.variants[1:]
    rows = [["network", "batch, px", "dense ms", *kinds, "dense MB", *(f"{kind} MB" for kind in kinds)]]
    for name, size in ((name, size) for name in args.models or NETWORKS for size in args.sizes):
        images = args.batch_size or NETWORKS.get(name, 8)
        dense = timm.create_model(name, num_classes=100)
        torch.compiler.reset()
        try:
            runs = {kind: trainer(dense, kind, images, size, args) for kind in args.variants}
            m = {kind: median(values) for kind, values in interleaved(runs, args.rounds).items()}
            if DEVICE.type == "cuda":
                peaks = {kind: lambda run=run: peak(run) for kind, run in runs.items()}
                memory = {kind: median(values) for kind, values in interleaved(peaks, 1).items()}
        except torch.OutOfMemoryError:
            print(f"{name} {size}: out of memory", flush=True)
            continue
        finally:
            runs, peaks = {}, {}  # frees their memory for the next network
            gc.collect()
        if DEVICE.type != "cuda":
            memory = {kind: kept(dense, kind.partition("+")[0], images, size) for kind in args.variants}
        more = [f"{memory['dense']:.0f}", *(f"{memory[kind] / memory['dense'] - 1:+.1%}" for kind in kinds)]
        gains = [f"{m['dense'] / m[kind]:.2f}x" for kind in kinds]
        rows.append([name, f"{images}, {size}", f"{m['dense']:.0f}", *gains, *more])
        print(f"{name} {size}: " + ", ".join(f"{k} {v:.0f}" for k, v in m.items()), flush=True)
        cells = {"part": "step", "what": name, "batch": images, "px": size}
        cells["layout"] = "channels_last" if args.channels_last else "NCHW"
        write(args, [{**cells, "variant": k, "ms": f"{m[k]:.3f}", "MB": f"{memory[k]:.1f}"} for k in args.variants])
    table(rows)


def profile(args: argparse.Namespace) -> None:
    """Where the time of a training step goes, by operation."""
    for name, kind in ((name, kind) for name in args.models or NETWORKS for kind in args.variants):
        images = args.batch_size or NETWORKS.get(name, 8)
        run = trainer(timm.create_model(name, num_classes=100), kind, images, args.sizes[-1], args)
        interleaved({kind: run}, 1)
        with torch.profiler.profile() as profiled:
            run()
        order = "self_device_time_total" if DEVICE.type == "cuda" else "self_cpu_time_total"
        print(
            f"{name}, {kind}\n" + profiled.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=80)
        )


def calibrate(args: argparse.Namespace) -> None:
    """Seconds and memory of a calibration, of a network with random weights on images of noise."""
    rows = [["network", "images, px", "s", "MB"]]
    for name in args.models or CALIBRATED:
        images, size = args.batch_size or CALIBRATED.get(name, 76), args.sizes[-1]
        dense = timm.create_model(name).eval().to(DEVICE)
        model, x = convert_to_masterkeys(dense), torch.randn(images, 3, size, size)
        run = lambda model=model, dense=dense, x=x: clock(lambda: calibrate_masterkeys(model, dense, x))  # noqa: E731
        seconds = []
        if DEVICE.type == "cuda":
            memory = peak(lambda run=run, seconds=seconds: seconds.append(run() / 1e3))
        else:
            seconds, memory = [run() / 1e3], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows.append([name, f"{images}, {size}", f"{seconds[0]:.1f}", f"{memory:.0f}"])
        cells = {"part": "calibrate", "what": name, "batch": images, "px": size, "MB": f"{memory:.1f}"}
        write(args, [{**cells, "ms": f"{seconds[0] * 1e3:.0f}"}])
    table(rows)


def inference(args: argparse.Namespace) -> None:
    """Inference: milliseconds of dense, and the time added by the converted network: unfused, fused, on GPU kernels."""
    kernel = ["unfused+conv"] if any("+" in name for name in args.variants) else []
    rows = [["network", "batch, px", "dense ms", "unfused", "fused", *kernel]]
    form = torch.channels_last if args.channels_last else torch.contiguous_format
    for name, size in ((name, size) for name in args.models or NETWORKS for size in args.sizes):
        images = args.batch_size or NETWORKS.get(name, 8)
        models = {"dense": timm.create_model(name, num_classes=100).eval().to(DEVICE, memory_format=form)}
        models["unfused"] = convert_to_masterkeys(models["dense"])
        models["fused"] = fuse_masterkeys(models["unfused"])
        models |= {kind: models["unfused"] for kind in kernel}
        x = torch.randn(images, 3, size, size, device=DEVICE).to(memory_format=form)
        runs = {kind: lambda model=model, x=x: clock(lambda: model(x)) for kind, model in models.items()}
        with torch.inference_mode(), autocast(args):
            times = interleaved(runs, 5 * args.rounds)
        dense = times.pop("dense")
        more = [median(b / a for a, b in zip(dense, other, strict=True)) - 1 for other in times.values()]
        rows.append([name, f"{images}, {size}", f"{median(dense):.0f}", *(f"{m:+.1%}" for m in more)])
    table(rows)


PARTS = {"layers": layers, "steps": steps, "inference": inference, "profile": profile, "calibrate": calibrate}
PARTS |= {"blocks": blocks, "measured": measured}


def main() -> None:
    """Runs the chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS)[:3], help="(default: the first three)")
    parser.add_argument("--models", nargs="+", help=f"timm architectures (default: {', '.join(NETWORKS)})")
    parser.add_argument("--sizes", nargs="+", type=int, help="image sizes (default: 160 224, on CUDA 224)")
    parser.add_argument("--batch-size", type=int, help="images a step (default: 4 to 16, by network; on CUDA 128)")
    parser.add_argument("--channels-last", action="store_true", help="for steps, profile and inference")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32", help="bf16: by autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile, for steps and profile")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), metavar="NAME", help=", ".join(VARIANTS))
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument("--results", type=Path, metavar="CSV", help="rows are added to it")
    args = parser.parse_args()
    args.sizes = args.sizes or ([224] if DEVICE.type == "cuda" else [160, 224])
    if args.variants[0] != "dense":
        parser.error("the first variant is what the others are compared with: dense")
    if any(name.partition("+")[2] not in SWITCHES for name in args.variants):
        parser.error(f"after + a variant has one of {', '.join(filter(None, SWITCHES))}")
    if "measured" in args.only and args.results is None:
        parser.error("measured reads what --results names")
    old = args.compile and not hasattr(torch.compiler, "is_exporting")  # it compiles without GPU kernels
    if old or not gpu_operators.gpu_kernels_run(DEVICE.type):
        args.variants = [name for name in args.variants if "+" not in name]
        args.only = [part for part in args.only if part != "blocks"]
        print("Triton does not run here, or not compiled: no GPU kernels are measured.")
    print(f"torch {torch.__version__}, timm {timm.__version__}, {DEVICE}, {torch.get_num_threads()} threads")
    layout = "channels_last" if args.channels_last else "NCHW"
    print(f"{args.precision}, {layout}, {'compiled' if args.compile else 'eager'}\n")
    for part in args.only:
        PARTS[part](args)


if __name__ == "__main__":
    main()
