"""The sections of the how-to page on other libraries, run as they stand there."""

import re
import sys
import types
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny import layers, lively, photographs
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.functional import to_pil_image

import timm_masterkeys as mk

pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("ignore")]

PAGE = Path(__file__).parents[2] / "examples/how-to/convert.md"


def code(section):
    """The Python of a section of the page."""
    text = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S)[1]
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    return block


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with photographs, where the programs run, and the team's own module that they import."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photographs"
    folder.mkdir()
    for i, pixels in enumerate(photographs(44, 64)):
        to_pil_image((pixels * 0.25 + 0.5).clamp(0, 1)).save(folder / f"{i}.png")
    team = types.ModuleType("my_team")
    monkeypatch.setitem(sys.modules, "my_team", team)
    return team


def run(section, **replaced):
    program = code(section)
    for old, new in replaced.items():
        assert old in program
        program = program.replace(old, new)
    names = {}
    exec(compile(program, str(PAGE), "exec"), names)
    assert layers(names["model"])
    return names


def test_a_lightning_module(here):
    lightning = pytest.importorskip("lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = timm.create_model("test_convnext", num_classes=5)

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, index):
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    here.Classifier = Classifier
    here.loader = DataLoader(TensorDataset(photographs(40, 64)[:8], torch.arange(8) % 5), batch_size=4)
    trainer = lightning.Trainer(max_steps=0, logger=False, accelerator="cpu")
    trainer.strategy.connect(lively(Classifier(), photographs(40, 64)))
    trainer.save_checkpoint("last.ckpt")
    names = run("A LightningModule")
    x = photographs(40, 64)[:2]
    assert torch.equal(names["again"].eval()(x), names["model"].eval()(x))


def test_a_transformers_model(here):
    transformers = pytest.importorskip("transformers")
    config = transformers.MobileNetV2Config(depth_multiplier=0.35, image_size=32, num_labels=5)
    dense = lively(transformers.MobileNetV2ForImageClassification(config), photographs())
    dense.save_pretrained("google/mobilenet_v2_1.0_224")  # a folder goes before the Hub
    here.loader = [{"pixel_values": part} for part in photographs().split(10)]
    names = run("A transformers model")
    x = photographs()[:2]
    assert torch.equal(type(dense).from_pretrained("fused").eval()(x).logits, names["model"](x).logits)


def test_a_segmentation_model(here):
    smp = pytest.importorskip("segmentation_models_pytorch")
    dense = smp.Unet("tu-mobilenetv3_small_050", classes=4, encoder_weights=None, decoder_channels=(32, 16, 16, 8, 8))
    lively(dense, photographs(40, 64)).save_pretrained("unet")
    names = run("A segmentation model")
    x = photographs(40, 64)[:2]
    assert torch.equal(smp.from_pretrained("fused").eval()(x), names["model"](x))


def test_a_binary_classifier(here):
    dense = lively(timm.create_model("mobilenetv3_small_050", num_classes=1), photographs(40, 64))
    save_file(dense.state_dict(), "binary.safetensors")
    names = run("A binary classifier or a regressor")
    assert names["budget"].score_name == "same_side" and names["budget"].chosen.score >= 0.9
    report = mk.calibrate_masterkeys(mk.convert_to_masterkeys(dense), dense, photographs(40, 64))
    assert report.record.metric == "regression" and set(report.after) == {"relative error", "correlation"}
