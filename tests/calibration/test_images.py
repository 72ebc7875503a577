"""The photographs that ship, their licences, and the images made from them, from a folder and from a loader."""

import ast
import csv
import functools
import itertools
import random
import re
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import nn

import timm_masterkeys as mk
from timm_masterkeys.calibration.images import (
    BUILTIN,
    Pixels,
    draw_crops,
    load_images,
    photographs,
    split_for_choice,
    split_images,
)

FOLDER = Path(str(resources.files("timm_masterkeys"))) / "calibration" / "data" / "photographs"
CFG = {"input_size": (3, 64, 96), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25), "interpolation": "bilinear"}
FREE = {"public domain", "CC0-1.0"}
CREDITED = {"CC-BY-2.0", "CC-BY-4.0"}


@pytest.fixture(autouse=True, scope="module")
def _photographs_are_read_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("timm_masterkeys.calibration.images.photographs", functools.cache(photographs))
        yield


def rows():
    with (FOLDER / "sources.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def bytes_of(images, cfg):
    """The pixels again, as (N, channels, H, W) of 0 to 255."""
    mean, std = (torch.tensor(cfg[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return (images * std + mean) * 255


# --- the photographs


def test_every_photograph_has_its_source_and_a_licence_that_allows_it():
    listed = [row["file"] for row in rows()]
    assert sorted(listed) == sorted(path.name for path in FOLDER.iterdir() if path.name != "sources.csv")
    assert len(set(listed)) == len(listed) >= 16
    for row in rows():
        assert all(row[key].strip() for key in ("file", "title", "author", "source", "licence")), row
        assert row["licence"] in FREE | CREDITED, row


def test_small_and_readable():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 1_000_000
    pictures = photographs().values()
    assert len(pictures) == len(rows())
    for picture in pictures:
        assert picture.mode == "RGB" and min(picture.size) >= 160
        assert np.asarray(picture.convert("L")).std() > 5  # shows something


def test_the_wheel_holds_them_and_all_licences():
    root = Path(__file__).parents[2]  # the sources: what is installed has no pyproject.toml
    text = (root / "pyproject.toml").read_text()
    data, licences = (
        ast.literal_eval(re.search(rf"(?m)^{key} = (\[.*\])$", text)[1]) for key in (r'"\*"', "license-files")
    )
    packages = [path.parent for path in (root / "timm_masterkeys").rglob("__init__.py")]
    held = {path for package in packages for pattern in data for path in package.glob(pattern)}
    assert {path for package in packages for path in package.glob("data/**/*") if path.is_file()} <= held
    kept = {path for pattern in licences for path in root.glob(pattern)}
    folders = {path.parent for path in held if path.parent.name == "data"}
    folders -= {root / "timm_masterkeys" / "timm_plugin" / "data"}  # a list of names
    assert kept >= {root / "LICENSE", *(folder / "LICENSE.txt" for folder in folders)}


def test_authors_who_ask_for_credit_get_it_beside_the_photographs():
    note = (FOLDER.parent / "LICENSE.txt").read_text()
    for row in rows():
        if row["licence"] in CREDITED:
            assert re.search(rf"(?m)^ +{re.escape(row['file'])} .*by {re.escape(row['author'])}", note), row


# --- builtin_images


def test_prepared_as_the_cfg_says():
    images = mk.builtin_images(CFG, 5)
    assert images.shape == (5, 3, 64, 96) and images.dtype == torch.float32
    pixels = bytes_of(images, CFG)
    assert torch.allclose(pixels, pixels.round(), atol=1e-3) and pixels.min() > -0.5 and pixels.max() < 255.5
    plain = mk.builtin_images({**CFG, "mean": (0.0,) * 3, "std": (1.0,) * 3}, 5)  # the same crops
    assert torch.allclose(
        images, (plain - torch.tensor(CFG["mean"]).view(3, 1, 1)) / torch.tensor(CFG["std"]).view(3, 1, 1)
    )
    assert not torch.equal(images, mk.builtin_images({**CFG, "interpolation": "bicubic"}, 5))


def test_a_whole_photograph_is_what_timms_transform_gives():
    square = next(iter(photographs().values())).crop((0, 0, 240, 240))
    cfg = {**CFG, "input_size": (3, 96, 96), "crop_pct": 1.0}
    expected = create_transform(**resolve_data_config(pretrained_cfg=cfg))(square)
    crop = next(draw_crops([square], (96, 96), 1, 0, area=(1, 1), ratio=(1, 1), flips=False, interpolation="bilinear"))
    assert torch.allclose(bytes_of(expected, cfg), torch.from_numpy(np.array(crop)).permute(2, 0, 1).float(), atol=1e-3)


def test_crops_lie_in_their_pictures_at_all_scales():
    ramp = np.stack(np.broadcast_arrays(np.arange(256)[None], np.arange(200)[:, None], 7), -1).astype(np.uint8)
    seen = []
    for crop in draw_crops([Image.fromarray(ramp)], (32, 32), 300, 0, flips=False):
        x, y = np.asarray(crop)[..., 0].astype(float), np.asarray(crop)[..., 1].astype(float)
        seen.append((x.min(), x.max() - x.min(), y.max() - y.min()))
    left, width, height = np.array(seen).T
    share = width * height / (256 * 200)
    assert share.min() < 0.08 and share.max() > 0.9 and 0.4 < np.median(share) < 0.65
    assert left.min() < 5 and left.max() > 150
    assert np.median(width / height) == pytest.approx(1, abs=0.1) and (width / height).std() > 0.1


def test_every_picture_before_any_twice_and_half_mirrored():
    grey = [Image.fromarray(np.full((40, 40, 3), value, np.uint8)) for value in range(0, 200, 20)]
    values = [crop.getpixel((0, 0))[0] // 20 for crop in draw_crops(grey, (8, 8), 25, 3)]
    assert sorted(values[:10]) == sorted(values[10:20]) == list(range(10)) and len(set(values[20:])) == 5
    ramp = Image.fromarray(np.repeat(np.arange(0, 200, 2, dtype=np.uint8)[None, :, None], 100, 0).repeat(3, 2))
    mirrored = [c.getpixel((0, 0)) > c.getpixel((15, 0)) for c in draw_crops([ramp], (16, 16), 200, 0)]
    assert 70 < sum(mirrored) < 130


def test_held_out_crops_are_of_other_photographs(monkeypatch):
    grey = [Image.fromarray(np.full((60, 60, 3), 5 * value, np.uint8)) for value in range(21)]
    monkeypatch.setattr("timm_masterkeys.calibration.images.photographs", lambda: dict(enumerate(grey)))
    shown = {
        part: {round(float(x.mean()) / 5) for x in bytes_of(mk.builtin_images(CFG, 42, held_out=part), CFG)}
        for part in (True, False, None)
    }
    assert shown[True] == set(range(3, 21, 4)) and shown[False] == shown[None] - shown[True]
    assert shown[None] == set(range(21))


def test_deterministic_and_no_random_state_is_read_or_changed():
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    first = mk.builtin_images(CFG, 5)
    torch_state, state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    torch.manual_seed(2), random.seed(2), np.random.seed(2)
    assert torch.equal(first, mk.builtin_images(CFG, 5, seed=0))
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    assert torch.equal(torch_state, torch.get_rng_state()) and state == random.getstate()
    assert np.array_equal(numpy_state, np.random.get_state()[1])
    assert torch.equal(first[:3], mk.builtin_images(CFG, 3))
    others = [mk.builtin_images(CFG, 5, seed=seed) for seed in (1, -1)]
    assert all((a - b).abs().mean() > 0.3 for a, b in itertools.combinations([first, *others], 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_whatever_the_default_dtype_and_device(dtype, tmp_path):
    folder_of(tmp_path)
    expected, loaded = mk.builtin_images(CFG, 2), load_images(tmp_path, PLAIN, 10, Pixels(**GIVEN))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            images, loaded_again = mk.builtin_images(CFG, 2), load_images(tmp_path, PLAIN, 10, Pixels(**GIVEN))
    finally:
        torch.set_default_dtype(before)
    assert images.dtype == torch.float32 and torch.equal(images, expected) and torch.equal(loaded_again, loaded)


def test_models_and_cfgs_of_every_kind():
    model = timm.create_model("test_efficientnet")
    images = mk.builtin_images(model, 3)
    assert images.shape[1:] == model.pretrained_cfg["input_size"]
    for same in (timm.get_pretrained_cfg("test_efficientnet"), model.pretrained_cfg, mk.convert_to_masterkeys(model)):
        assert torch.equal(images, mk.builtin_images(same, 3))
    with pytest.raises(mk.CalibrationError, match="Linear has no pretrained_cfg"):
        mk.builtin_images(nn.Linear(2, 2))
    with pytest.raises(mk.CalibrationError, match="count is 0, expected at least 1"):
        mk.builtin_images(CFG, 0)


def test_other_channels():
    models = {channels: timm.create_model("test_convnext", in_chans=channels) for channels in (1, 3, 5)}
    grey, colour, five = (mk.builtin_images(model, 4) for model in models.values())
    assert grey.shape == (4, 1, *colour.shape[2:]) and torch.equal(five, colour[:, [0, 1, 2, 0, 1]])
    cfg = models[3].pretrained_cfg
    luma = (bytes_of(colour, cfg) * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)
    flat = {key: (sum(cfg[key]) / 3,) for key in ("mean", "std")}
    assert torch.allclose(bytes_of(grey, flat)[:, 0], luma, atol=1)
    one = mk.builtin_images({**CFG, "input_size": (1, 64, 96), "mean": (0.5,), "std": (0.25,)}, 2)
    assert one.shape == (2, 1, 64, 96)


# --- how images are prepared: one rule for a folder and for the photographs


class Wrapper(nn.Module):
    """As a LightningModule: a timm model, or several, and something of its own."""

    def __init__(self, *models):
        super().__init__()
        self.models, self.extra = nn.ModuleList(models), nn.Linear(2, 2)


PLAIN = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten())
GIVEN = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "size": (24, 32)}
SAID = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "input_size": (3, 24, 32)}  # the same in a cfg


def picture(path, seed=0, size=(70, 90, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, size).astype(np.uint8)).save(path)


def folder_of(path, count=10):
    for i in range(count):
        picture(path / f"{i:02}.png", i)
    return path


def transformed(folder, cfg, mode="RGB"):
    """What timm's own transform gives for the images of a folder."""
    transform = create_transform(**resolve_data_config(pretrained_cfg=cfg))
    return torch.stack([transform(Image.open(path).convert(mode)) for path in sorted(folder.iterdir())])


def test_the_one_timm_model_inside_says_how(tmp_path):
    folder_of(tmp_path)
    one, other = timm.create_model("test_efficientnet"), timm.create_model("test_convnext")
    assert one.pretrained_cfg["mean"] != other.pretrained_cfg["mean"]
    nested = Wrapper(one)
    nested.pretrained_cfg = other.pretrained_cfg  # the outermost counts
    features = timm.create_model("test_efficientnet", features_only=True)
    grey = timm.create_model("test_efficientnet", in_chans=1)
    for model, expected in (
        (Wrapper(Wrapper(other)), other),
        (Wrapper(features), one),
        (nested, other),
        (Wrapper(grey), grey),
        (nn.DataParallel(Wrapper(one)), one),
    ):
        assert torch.equal(mk.builtin_images(model, 2, size=32), mk.builtin_images(expected, 2, size=32))
    small = Pixels(size=32)
    assert torch.equal(load_images(tmp_path, nested, 10, small), load_images(tmp_path, other, 10, small))


def test_nobody_says_how(tmp_path):
    folder_of(tmp_path)
    two = Wrapper(timm.create_model("test_efficientnet"), timm.create_model("test_convnext"))
    for model, images in ((PLAIN, tmp_path), (two, BUILTIN)):
        with pytest.raises(mk.CalibrationError, match=r"no pretrained_cfg.* give mean=, std=, size=\."):
            load_images(images, model, 10)
        with pytest.raises(mk.CalibrationError, match=r"give std=\."):
            load_images(images, model, 10, Pixels([0.5] * 3, size=32))


def test_mean_std_and_size_that_are_given(tmp_path):
    """Against timm's own transform, and against the cfg that says the same."""
    folder_of(tmp_path)
    assert torch.equal(load_images(BUILTIN, PLAIN, 10, Pixels(**GIVEN)), mk.builtin_images(SAID, 10))
    assert torch.equal(load_images(tmp_path, PLAIN, 10, Pixels(**GIVEN)), transformed(tmp_path, SAID))
    model = timm.create_model("test_efficientnet")  # what is given goes before its cfg
    assert torch.equal(mk.builtin_images(model, 2, size=33), mk.builtin_images(model, 2, size=(33, 33)))
    whole = {**model.pretrained_cfg, "mean": (0.3,) * 3, "input_size": (3, 33, 33)}
    assert torch.equal(mk.builtin_images(model, 2, mean=(0.3,) * 3, size=33), mk.builtin_images(whole, 2))
    assert load_images(tmp_path, model, 10, Pixels(size=33)).shape == (10, 3, 33, 33)
    for size in (0, (3, 20, 20), "20", (20.5, 20)):
        with pytest.raises(mk.CalibrationError, match="expected a height and a width"):
            mk.builtin_images(model, 2, size=size)
    with pytest.raises(mk.CalibrationError, match="divide by 255"):
        mk.builtin_images(model, 2, mean=(123, 116, 103))
    with pytest.raises(mk.CalibrationError, match="taken as they are"):
        load_images(torch.randn(10, 3, 8, 8), PLAIN, 10, Pixels(mean=[0.5] * 3))


def test_held_out_tensors_beside_a_folder(tmp_path):
    """mean, std and size prepare the folder alone."""
    folder_of(tmp_path)
    given, others = Pixels(**GIVEN), torch.randn(10, 3, *GIVEN["size"])
    batches, held_out = split_images(tmp_path, others, PLAIN, 20, given, 5)
    assert torch.equal(torch.cat([batches[i] for i in held_out]), others)
    assert torch.equal(torch.cat(batches)[:10], load_images(tmp_path, PLAIN, 20, given)[:10])


@pytest.mark.parametrize("images", [None, 3])
def test_what_holds_no_images(images):
    with pytest.raises(mk.CalibrationError, match=f"images is {images}, expected a tensor"):
        load_images(images, PLAIN, 10)


# --- folders and loaders


def test_a_folder_in_grey_and_for_four_channels(tmp_path):
    folder_of(tmp_path)
    given = Pixels([0.5], [0.25], 20)
    cfg = {"mean": (0.5,), "std": (0.25,), "input_size": (1, 20, 20)}
    assert torch.equal(load_images(tmp_path, nn.Conv2d(1, 8, 3), 10, given), transformed(tmp_path, cfg, "L"))
    grey = timm.create_model("test_efficientnet", in_chans=1)
    cfg = {**grey.pretrained_cfg, "input_size": (1, 32, 32)}  # with mean and std of three colours
    cfg |= {key: (sum(cfg[key]) / 3,) for key in ("mean", "std")}
    assert torch.equal(load_images(tmp_path, grey, 10, Pixels(size=32)), transformed(tmp_path, cfg, "L"))
    with pytest.raises(mk.CalibrationError, match=r"takes images of 4 channels, a folder gives 3 or 1: give a tensor"):
        load_images(tmp_path, nn.Conv2d(4, 8, 3), 10, Pixels(**GIVEN))


def test_folders_are_searched_at_all_depths_and_through_links(tmp_path):
    cats = folder_of(tmp_path / "elsewhere" / "cats", 6)
    hidden = folder_of(tmp_path / "elsewhere" / "hidden")
    root = tmp_path / "images"
    for i in range(6):
        picture(root / "deep" / "dogs" / f"{i}.jpg", i)
    (root / "cats").symlink_to(cats, target_is_directory=True)
    (root / ".hidden").symlink_to(hidden, target_is_directory=True)
    (root / "back").symlink_to(root, target_is_directory=True)
    (root / "folder.png").mkdir()
    (root / ".hidden.png").write_bytes(b"no image")
    images = load_images(root, PLAIN, 400, Pixels(**GIVEN))
    assert len(images) == 12 and torch.equal(images[:6], transformed(cats, SAID))
    for folder, match in ((tmp_path / "none", "no folder"), (root / "folder.png", "no images")):
        with pytest.raises(mk.CalibrationError, match=match):
            load_images(folder, PLAIN, 400, Pixels(**GIVEN))


def test_files_that_are_no_images_are_named_and_others_take_their_places(tmp_path, caplog, monkeypatch):
    folder, given = folder_of(tmp_path / "good", 11), Pixels(**GIVEN)
    expected = transformed(folder, SAID)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)
    (folder / "empty.png").write_bytes(b"")
    (folder / "corrupt.jpg").write_bytes(b"\xff\xd8 no image")
    (folder / "truncated.png").write_bytes((folder / "00.png").read_bytes()[:500])
    picture(folder / "large.png", 0, (200, 200, 3))  # PIL warns of it
    picture(folder / "bomb.png", 0, (300, 300, 3))  # and refuses this
    images = load_images(folder, PLAIN, 400, given)
    warned = [record.getMessage() for record in caplog.records if "is left out" in record.getMessage()]
    bad = ("empty.png", "corrupt.jpg", "truncated.png", "large.png", "bomb.png")
    assert torch.equal(images, expected) and len(warned) == 5
    assert all(any(str(folder / name) in message for message in warned) for name in bad)
    assert len(load_images(folder, PLAIN, 11, given)) == 11
    for i in (1, 7):
        (folder / f"{i:02}.png").write_bytes(b"no image")
    with pytest.raises(mk.CalibrationError, match=r"9 of 16 images in '.*' can be read, expected at least 10"):
        load_images(folder, PLAIN, 400, given)


def test_batches_with_labels_and_the_most_images():
    x = torch.randn(20, 3, 8, 8)
    for key in ("pixel_values", "image", "images", "input"):
        batches = [{"labels": torch.zeros(len(part)), key: part} for part in x.split(6)]
        assert torch.equal(load_images(batches, PLAIN, 400), x)
        assert torch.equal(load_images({"labels": torch.zeros(20), key: x}, PLAIN, 400), x)  # one batch
    with pytest.raises(mk.CalibrationError, match=r"a dict of 'photo', 'label', .*under one of pixel_values, image"):
        load_images([{"photo": x, "label": 1}], PLAIN, 400)
    labelled = [(part, torch.zeros(len(part))) for part in x.split(7)]
    assert torch.equal(load_images(labelled, PLAIN, 400), x) and torch.equal(load_images(labelled, PLAIN, 12), x[:12])
    assert torch.equal(load_images(x, PLAIN, 10), x[::2])


# --- wherever images are taken


def test_given_to_a_calibration_they_count(tmp_path):
    folder_of(tmp_path, 40)
    dense = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)).eval()
    models = [mk.convert_to_masterkeys(dense) for _ in range(2)]
    named = mk.calibrate_masterkeys(models[0], dense, tmp_path, **GIVEN)
    mk.calibrate_masterkeys(models[1], dense, load_images(tmp_path, dense, 400, Pixels(**GIVEN)))
    assert named.record.origin == tmp_path.name and same(*models)
    _, budget = mk.convert_to_agreement(dense, 0.2, tmp_path, **GIVEN)
    assert (budget.record.images, budget.record.held_out) == (40, 10)
    with pytest.raises(mk.CalibrationError, match="no pretrained_cfg"):
        mk.convert_to_agreement(dense, 0.2, tmp_path)


@pytest.mark.parametrize("part", [None, BUILTIN])
def test_calibrate_takes_the_photographs_and_holds_out_some(part):
    dense = timm.create_model("test_efficientnet", in_chans=1, num_classes=10)
    models = [mk.convert_to_masterkeys(dense) for _ in range(2)]
    fitted, held_out = (mk.builtin_images(dense, 10, held_out=which, size=32) for which in (False, True))
    report = mk.calibrate_masterkeys(models[0], dense, fitted, held_out=held_out, stages=["norms"])
    options = {"held_out": part, "stages": ["norms"], "max_images": 10, "size": 32}
    named = mk.calibrate_masterkeys(models[1], dense, BUILTIN, **options)
    assert report.record.images == named.record.images == 20 and named.record.origin == BUILTIN
    assert report.record.held_out == 10 and report.after == named.after and same(*models)


def test_a_choice_holds_out_crops_by_photograph():
    dense = timm.create_model("test_efficientnet")
    fitted, held_out = split_for_choice("builtin", dense, 20, Pixels(size=32))
    assert torch.equal(fitted, mk.builtin_images(dense, 20, held_out=False, size=32))
    assert torch.equal(held_out, mk.builtin_images(dense, 152, held_out=True, size=32))


def same(model, other):
    state = other.state_dict()
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
