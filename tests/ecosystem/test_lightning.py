"""Lightning: a module with a timm model in it, from conversion to a checkpoint."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import layers, lively, photographs
from torch.utils.data import DataLoader, TensorDataset

import timm_masterkeys as mk

lightning = pytest.importorskip("lightning")
pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("ignore")]


class Classifier(lightning.LightningModule):
    def __init__(self, name="test_convnext"):
        super().__init__()
        self.net = timm.create_model(name, num_classes=5)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


@pytest.fixture
def dense():
    return lively(Classifier(), photographs(40, 64))


@pytest.fixture
def folder(tmp_path):
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (20, 80, 90, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    return tmp_path


def trainer(folder, steps):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return lightning.Trainer(max_steps=steps, default_root_dir=folder, enable_checkpointing=False, **quiet)


def loader():
    return DataLoader(TensorDataset(photographs(40, 64)[:8], torch.arange(8) % 5), batch_size=4)


def test_a_folder_is_prepared_for_as_its_timm_model_wants_it(dense, folder):
    """Timm's test networks want 0.5 for every mean and standard deviation: ImageNet's would give other figures."""
    assert dense.net.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(dense.net))
    by_hand = torch.stack([prepare(Image.open(path)) for path in sorted(folder.iterdir())])
    records = []
    for images in (folder, by_hand):
        model = mk.convert_to_masterkeys(dense)
        records.append(mk.calibrate_masterkeys(model, dense, images, stages="norms").record)
    assert records[0].origin == folder.name and records[0].images == 20
    assert (records[0].before, records[0].after) == (records[1].before, records[1].after)


def test_training_leaves_keys_alone_and_a_checkpoint_comes_back(dense, tmp_path):
    model = mk.convert_to_masterkeys(dense)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    fit = trainer(tmp_path, 2)
    fit.fit(model.train(), loader())
    kept = [name for name in start if name.endswith((".keys", ".key_index", ".scale", ".r2"))]
    assert len(kept) == 4 * len(layers(model)) and fit.global_step == 2
    assert all(torch.equal(model.state_dict()[name], start[name]) for name in kept)
    assert all(not torch.equal(model.state_dict()[n], start[n]) for n in start if n.endswith(".shift"))

    fit.save_checkpoint(tmp_path / "last.ckpt")
    again = mk.convert_to_masterkeys(dense)
    again.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    x = photographs(40, 64)[:2]
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert torch.equal(mk.fuse_masterkeys(model)(x), model(x))
    more = trainer(tmp_path, 3)
    more.fit(again.train(), loader(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert more.global_step == 3


def test_a_module_that_converts_itself_loads_its_checkpoint(tmp_path):
    class Converted(Classifier):
        def __init__(self):
            super().__init__()
            mk.initialize_masterkeys(self, inplace=True)

    torch.manual_seed(3)
    model = Converted()
    fit = trainer(tmp_path, 1)
    fit.fit(model, loader())
    fit.save_checkpoint(tmp_path / "last.ckpt")
    again = Converted.load_from_checkpoint(tmp_path / "last.ckpt")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
