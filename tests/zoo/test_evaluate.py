"""Labels that cannot shift, and accuracies as a plain loop counts them."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from lite0 import lite0
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_data_config

import timm_masterkeys
from timm_masterkeys import ZooError
from timm_masterkeys.zoo.evaluate import find_labelled_images, measure

SYNSETS = ImageNetInfo().label_names()


def picture(path, seed):
    """A blurred picture of random colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    Image.fromarray(colours).resize((210, 180), Image.Resampling.BICUBIC).save(path)


def folder(root, **labels):
    """An ImageFolder: how many pictures each label has."""
    for label, count in labels.items():
        for i in range(count):
            picture(root / label / f"{i}.png", [i, *label.encode()])
    return root


def given(labels):
    """The label of the first image of each folder."""
    return {Path(path).parent.name: label for path, label in labels.files if path.endswith("0.png")}


def test_labels_do_not_shift_where_classes_are_missing(tmp_path):
    synsets = find_labelled_images(folder(tmp_path / "synsets", **{SYNSETS[7]: 2, SYNSETS[999]: 1}))
    assert (synsets.num_classes, len(synsets.files)) == (1000, 3)
    assert given(synsets) == {SYNSETS[7]: 7, SYNSETS[999]: 999}
    numbers = find_labelled_images(folder(tmp_path / "numbers", **{"7": 1, "31": 1, "100": 1}))
    assert given(numbers) == {"7": 7, "31": 31, "100": 100} and numbers.num_classes == 1000
    folder(tmp_path / "split" / "train", **{"5": 3})
    folder(tmp_path / "split" / "validation", **{"5": 1})
    assert len(find_labelled_images(tmp_path / "split").files) == 1
    (tmp_path / "map.txt").write_text("cat\ndog\nbee\n")
    mapped = find_labelled_images(folder(tmp_path / "pets", dog=1), tmp_path / "map.txt")
    assert (given(mapped), mapped.num_classes) == ({"dog": 1}, 3)
    (tmp_path / "map.pkl").write_bytes(pickle.dumps({"dog": 0, "cat": 1}))
    assert given(find_labelled_images(tmp_path / "pets", tmp_path / "map.pkl")) == {"dog": 0}


def test_what_names_the_images_is_in_their_checksum(tmp_path):
    first = find_labelled_images(folder(tmp_path / "a", **{"1": 2, "2": 1})).sha256
    assert first == find_labelled_images(folder(tmp_path / "b", **{"1": 2, "2": 1})).sha256
    (tmp_path / "b" / "2").rename(tmp_path / "b" / "3")
    assert first != find_labelled_images(tmp_path / "b").sha256


@pytest.mark.parametrize(
    ("labels", "class_map", "message"),
    [
        ({"cat": 1, SYNSETS[0]: 1}, None, "name no class: 'cat'"),
        ({"1000": 1, "999": 1}, None, "name no class: '1000'"),
        ({"07": 1}, None, "name no class: '07'"),
        ({"7": 1, SYNSETS[0]: 1}, None, "name no class"),
        ({}, None, "Found 0 images"),
        ({"cat": 1, "mouse": 1}, "cat\ndog\n", "'.*map.txt' does not name: 'mouse'"),
        ({"cat": 1}, "cat\ndog\ncat\n", "expected 0 to 1, each once"),
        ({"cat": 1}, "", "gives 0 names"),
    ],
)
def test_labels_that_mean_nothing_are_refused(tmp_path, labels, class_map, message):
    root = folder(tmp_path / "images", **labels)
    root.mkdir(exist_ok=True)
    if class_map is not None:
        (tmp_path / "map.txt").write_text(class_map)
    with pytest.raises(ZooError, match=message):
        find_labelled_images(root, tmp_path / "map.txt" if class_map is not None else "")


def test_no_folder_no_class_map(tmp_path):
    with pytest.raises(ZooError, match="There is no folder"):
        find_labelled_images(tmp_path / "none")
    root = folder(tmp_path / "images", cat=1)
    for name in ("none.txt", "map.json"):
        (tmp_path / "map.json").write_text("{}")
        with pytest.raises(ZooError, match=rf"class map '.*{name}' cannot be read"):
            find_labelled_images(root, tmp_path / name)
    picture(root / "stray.png", 0)
    (tmp_path / "map.txt").write_text("cat\n")
    with pytest.raises(ZooError, match="does not name: ''"):
        find_labelled_images(root, tmp_path / "map.txt")


@pytest.mark.parametrize("test_size", [None, (3, 96, 96)])
def test_accuracy_is_what_a_plain_loop_counts(tmp_path, test_size):
    """At the test size of a network that has one, each network for itself, modes as they were."""
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(timm.create_model("test_efficientnet", num_classes=10))
        models[-1].pretrained_cfg |= {"test_input_size": test_size, "test_crop_pct": test_size and 1.0}
    (tmp_path / "map.txt").write_text("\n".join(map(str, range(10))))
    labels = find_labelled_images(
        folder(tmp_path / "images", **{str(i): 4 for i in range(0, 10, 2)}), tmp_path / "map.txt"
    )
    for model in models:
        model.train().bn1.eval()  # a frozen norm stays frozen
    measured = measure(models, labels, batch_size=3, workers=0)
    assert all(model.training and not model.bn1.training for model in models)
    for row in measured:
        assert (row.images, row.classes) == (20, 5)
        assert (row.img_size, row.crop_pct) == ((96, 1.0) if test_size else (160, 0.95))
    transform = create_transform(**resolve_data_config(model=models[0], use_test_size=True))
    for model, row in zip(models, measured, strict=True):
        right = {1: 0, 5: 0}
        for path in (tmp_path / "images").rglob("*.png"):
            with torch.no_grad():
                out = model.eval()(transform(Image.open(path).convert("RGB"))[None])[0]
            order = out.argsort(descending=True).tolist()
            for k in right:
                right[k] += int(path.parent.name) in order[:k]
        assert (row.top1, row.top5) == (right[1] / 20 * 100, right[5] / 20 * 100)
    assert 0 < measured[0].top5 < 100


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_left_out(tmp_path, caplog, workers):
    """As if it were not there; an image with no end is one, too."""
    root = folder(tmp_path / "images", **{"3": 3, "4": 2})
    model = timm.create_model("test_efficientnet", num_classes=1000)
    whole = root / "4" / "1.png"
    (root / "5").mkdir()
    (root / "5" / "cut.png").write_bytes(whole.read_bytes()[:1000])
    (root / "3" / "none.png").write_bytes(b"")
    labels = find_labelled_images(root)
    [measured] = measure([model], labels, batch_size=3, workers=workers)
    assert len(labels.files) == 7 and (measured.images, measured.classes) == (5, 2)
    assert all(f"{name}' cannot be read" in caplog.text for name in ("cut.png", "none.png"))
    (root / "5" / "cut.png").unlink()
    (root / "3" / "none.png").unlink()
    assert measure([model], find_labelled_images(root), batch_size=3, workers=0) == [measured]


LABELS = {  # of photographs that ship
    "bee": "n02206856",
    "brushes": "n03876231",
    "chelsea": "n02123045",  # a tabby; Lite0 says an Egyptian cat
    "citrus": "n07749582",
    "coffee": "n07920052",
    "coral": "n09256479",
    "egret": "n02009912",
    "oakland_zoo_otters": "n02444819",
    "tiger": "n02129604",
}


def test_synsets_are_the_outputs_of_a_trained_network(tmp_path):
    """EfficientNet-Lite0 knows eight of nine photographs by their first class, and all by the first five."""
    folder = Path(timm_masterkeys.__file__).parent / "calibration" / "data" / "photographs"
    for name, synset in LABELS.items():
        (tmp_path / synset).mkdir()
        Image.open(folder / f"{name}.webp").save(tmp_path / synset / f"{name}.png")
    [measured] = measure([lite0()], find_labelled_images(tmp_path), workers=0)
    assert (measured.top1, measured.top5, measured.images) == (88.8889, 100.0, 9)


def test_other_classes_and_no_image_that_can_be_read_are_refused(tmp_path):
    labels = find_labelled_images(folder(tmp_path / "images", **{"3": 1}))
    with pytest.raises(ZooError, match=r"10 classes, the labels are of 1000"):
        measure([timm.create_model("test_efficientnet", num_classes=10)], labels)
    (tmp_path / "images" / "3" / "0.png").write_bytes(b"")
    with pytest.raises(ZooError, match="None of the 1 images"):
        measure([timm.create_model("test_efficientnet")], labels, workers=0)
