"""The command ``zoo`` from end to end: the real client and the real timm in processes, a Hub on loopback, faults."""

import csv
import json
import time
from dataclasses import replace

import pytest
import timm
import torch
from forked import Python, run
from hub_server import HubServer
from PIL import Image
from safetensors.torch import save
from test_evaluate import SYNSETS, picture
from timm.data import create_transform, resolve_data_config
from torch import nn

import timm_masterkeys as mk
from timm_masterkeys.calibration.agreement import KeyBudget, TriedNetwork
from timm_masterkeys.cli import main
from timm_masterkeys.conversion.record import read_record
from timm_masterkeys.zoo.evaluate import LabelledImages, Measurement, find_labelled_images, measure
from timm_masterkeys.zoo.make import ZooSettings, make_zoo, plan_zoo
from timm_masterkeys.zoo.results import Result, make_result, write_result, write_tables

ARCHS = ["test_convnext", "test_convnext3", "test_efficientnet"]
BROKEN = "test_convnext2"  # its weights lack a tensor
NAMES = [f"{arch}.mk8_r160_in1k" for arch in ARCHS]
ONE = "test_convnext.mk8_r160_in1k"  # what the runs of a single network make, of ARCHS[:1]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]


def weights(arch):
    """A state dict that stands for trained weights."""
    torch.manual_seed(len(arch))
    model = timm.create_model(arch)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.state_dict()


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        for arch in [*ARCHS, BROKEN]:
            server.add_repo(f"timm/{arch}.r160_in1k", {"model.safetensors": save(weights(arch))})
        whole = weights(BROKEN)
        whole.pop("head.fc.bias")
        server.add_repo(f"timm/{BROKEN}.r160_in1k", {"model.safetensors": save(whole)})
        yield server
        assert not server.leaks


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Ten to calibrate with; and three in four of eight labelled as the dense test_convnext sees them."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(10):
        picture(root / "calibrate" / f"{i}.png", i)
    model = timm.create_model("test_convnext").eval()
    model.load_state_dict(weights("test_convnext"))
    transform = create_transform(**resolve_data_config(model=model))
    for i in range(8):
        with torch.no_grad():
            seen = int(model(transform(Image.open(root / "calibrate" / f"{i}.png"))[None]).argmax())
        picture(root / "validation" / SYNSETS[seen if i % 4 else (seen + 1) % 1000] / f"{i}.png", i)
    return root


@pytest.fixture(scope="module")
def command(hub, pictures, tmp_path_factory):
    """Starts the command on all four networks, or others, in a process of its own."""

    def start(output, *arguments, names=(*ARCHS, BROKEN), org="alice", launcher=(), **env):
        given = [*names, "--org", org, "--output", output, "--workers", "0"]
        given += ["--calibrate", pictures / "calibrate", "--evaluate", pictures / "validation", *arguments]
        own = hub.env(tmp_path_factory.mktemp("home"), hub.token("alice"), **env)
        return Python("-m", *launcher, "timm_masterkeys", "zoo", *given, env=own)

    return start


@pytest.fixture(autouse=True)
def _fresh(hub):
    """No fault and no request of one test reaches into another."""
    hub.requests.clear()
    yield
    hub.faults.clear()


@pytest.fixture(scope="module")
def dry(hub, command, tmp_path_factory):
    """The folder of a dry run of one network."""
    output = tmp_path_factory.mktemp("dry") / "zoo"
    before = set(hub.repos)
    hub.requests.clear()
    code, _, err = finish(command(output, "--dry-run", names=ARCHS[:1], org="lab"))
    assert (code, err) == (0, "") and set(hub.repos) == before
    assert {r.path.partition("?")[0] for r in hub.select("POST|PUT|DELETE")} <= {"/api/validate-yaml"}
    return output


def finish(process):
    """(exit code, stdout, stderr)"""
    out, err = process.communicate()
    return process.returncode, out, err


def rows(folder):
    with open(folder / "results.csv", newline="") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


def measured(row):
    """A row without what differs from run to run."""
    return {name: value for name, value in row.items() if name not in ("seconds", "repo", "sha")}


def made(out):
    """The networks that a process says it has made or published."""
    return sorted(line.split()[0] for line in out.splitlines() if "calibrated" in line)


def commits(hub, org="alice"):
    return {repo: len(r.branches["main"]) - 1 for repo, r in hub.repos.items() if repo.startswith(f"{org}/")}


@pytest.mark.slow
def test_torchrun_a_broken_model_and_a_hub_that_fails(hub, command, tmp_path):
    """What can be done is done, once; what failed is listed; a second run does that and nothing else."""
    once = hub.drop(("POST", "test_efficientnet.*/commit/"), when="after")  # made, its answer lost
    hub.fail(("POST", "test_convnext3.*/preupload/"), 403, times=None)
    code, out, err = finish(command(tmp_path / "zoo", launcher=TORCHRUN))
    assert code == 1 and once.hits == 1, err
    hub.faults.clear()
    first, failures = rows(tmp_path / "zoo"), tmp_path / "zoo" / "models"
    assert sorted(first) == NAMES
    assert [name for name, row in first.items() if not row["sha"]] == ["test_convnext3.mk8_r160_in1k"]
    assert "2 of 4 networks failed" in err and "test_convnext2.r160_in1k (" in err and "head.fc.bias" in err
    assert "test_convnext3.r160_in1k (Nothing was" in err  # by the first to end: torchrun then ends the other
    assert "Traceback" in (failures / "test_convnext2.r160_in1k" / "failure.txt").read_text()
    downloads = [hub.count("GET", rf"timm/{arch}\..*filename=model.safetensors") for arch in ARCHS]
    assert downloads == [1, 1, 1]
    assert not list(failures.glob("*/download"))
    assert [path.parent.name for path in failures.glob("*/weights")] == ["test_convnext3.r160_in1k"]

    repo = hub.repos[f"timm/{BROKEN}.r160_in1k"]
    hub.add_repo(repo.id, {"model.safetensors": save(weights(BROKEN))})
    code, out, err = finish(command(tmp_path / "zoo"))
    assert (code, err) == (0, ""), err
    second = rows(tmp_path / "zoo")
    assert sorted(second) == sorted([*NAMES, f"{BROKEN}.mk8_r160_in1k"]) and all(row["sha"] for row in second.values())
    assert all(measured(second[name]) == measured(first[name]) for name in NAMES)
    assert made(out) == ["test_convnext2.r160_in1k", "test_convnext3.r160_in1k"]
    assert set(commits(hub).values()) == {1} and len(commits(hub)) == 4
    assert not list(failures.glob("*/weights")) and not list(failures.glob("*/failure.txt"))
    check_published(hub, tmp_path / "zoo", second)


LOADED_BY_NAME = """
import sys, timm, torch, timm_masterkeys
for name in sys.argv[1:]:
    names = f"{name.partition('.')[0]}.mk8", f"hf-hub:alice/{name}"
    named, published = (timm.create_model(name, pretrained=True).state_dict() for name in names)
    assert named.keys() == published.keys() and all(torch.equal(named[key], published[key]) for key in named)
"""


def check_published(hub, folder, table):
    """The commits, the cards and the list of names say the same as the table."""
    lines = (folder / "names.txt").read_text().splitlines()
    for name, row in table.items():
        head = hub.repos[f"alice/{name}"].head()
        assert row["sha"] == head.sha and row["repo"] == f"alice/{name}"
        assert f"{name}=alice/{name}@{head.sha}" in lines
        assert f"{name.partition('.')[0]}.mk8=alice/{name}@{head.sha}" in lines  # timm's default weights
        card, config = head.files["README.md"].decode(), json.loads(head.files["config.json"])
        assert f"base_model: timm/{row['source']}" in card and "license: apache-2.0" in card
        assert f"value: {row['top1']}\n      name: Top 1 Accuracy" in card
        assert f"value: {row['top5']}\n      name: Top 5 Accuracy" in card
        assert "name: validation" in card and "images: 8" in card
        assert str(config["evaluation"]["dense_top1"]) == row["dense_top1"]
    assert len(lines) == 8
    env = hub.env(folder / "home", TIMM_MASTERKEYS_WEIGHTS=str(folder / "names.txt"))
    done = run("-c", LOADED_BY_NAME, *table, env=env)
    assert done.returncode == 0, done.stderr


def test_a_dry_run_measures_and_the_next_run_publishes(hub, command, dry, pictures):
    """Nothing is downloaded or made again."""
    [(name, row)] = rows(dry).items()
    assert (name, row["sha"]) == (ONE, "") and (dry / "names.txt").read_text() == ""
    assert row["dense_top1"] == "75.0"  # as the pictures were labelled
    dense = timm.create_model("test_convnext")
    dense.load_state_dict(weights("test_convnext"))
    [plain] = measure([mk.convert_to_masterkeys(dense)], find_labelled_images(pictures), workers=0)
    assert (row["uncalibrated_top1"], row["uncalibrated_top5"]) == (str(plain.top1), str(plain.top5))
    code, out, err = finish(command(dry, "--private", names=ARCHS[:1], org="lab"))
    assert (code, err) == (0, "") and made(out) == ["test_convnext.r160_in1k"]
    assert hub.count("GET", "/timm/") == 0 and commits(hub, "lab") == {f"lab/{ONE}": 1}
    assert measured(rows(dry)[ONE]) == measured(row) and hub.repos[f"lab/{ONE}"].private
    names = [line.partition("=")[0] for line in (dry / "names.txt").read_text().splitlines()]
    assert names == ["test_convnext.mk8", ONE]


@pytest.mark.slow
def test_killed_twice_and_run_again(hub, command, dry, tmp_path):
    """In a download, and between a commit and the note of it: nothing is lost or done twice, the table is the same."""
    hub.repos.pop(f"lab/{ONE}", None)
    download = r"timm/test_convnext\..*filename=model\.safetensors"
    for path in (download, r"lab/test_convnext\..*/revision/[0-9a-f]{40}"):
        hub.stall(("GET", path), 600)
        process = command(tmp_path / "zoo", names=ARCHS[:1], org="lab")
        while not hub.select("GET", path):
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
        finish(process)
    code, out, err = finish(command(tmp_path / "zoo", names=ARCHS[:1], org="lab"))
    assert (code, err) == (0, "") and made(out) == ["test_convnext.r160_in1k"]
    assert hub.count("GET", download) == 2  # the one broken off, and one more
    assert commits(hub, "lab") == {f"lab/{ONE}": 1}
    [row] = rows(tmp_path / "zoo").values()
    assert measured(row) == measured(rows(dry)[ONE]) and row["sha"] == hub.repos[f"lab/{ONE}"].head().sha
    assert not list((tmp_path / "zoo").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--agreement=0.9", "--keys-per-kernel=2"], "drop keys_per_kernel"),
        (["--keys-per-kernel=9"], "keys_per_kernel is 9"),
        (["--bank=nope"], "Unknown bank 'nope'"),
        (["--org=a team"], "org is 'a team'"),
        (["--batch-size=0"], "batch_size is 0"),
        (["--workers=-1"], "workers -1"),
        (["--device=gpu"], "device 'gpu'"),
        (["--calibrate=none"], "There is no folder 'none'"),
        (["--calibrate=."], "There are 0 images in '.'"),
        (["--agreement=0.9", "--calibrate={}/calibrate"], "There are 10 images"),
    ],
)
def test_options_are_checked_before_the_first_download(pictures, tmp_path, monkeypatch, capsys, options, says):
    """And nothing is written that would bind the folder to them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm, "create_model", None)
    given = ["--org", "me", "--evaluate", str(pictures / "validation"), "--dry-run"]
    given += [option.format(pictures) for option in options]
    assert main(["zoo", "test_convnext", *given]) == 1
    assert says in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_an_account_that_may_not_publish_there(hub, command, tmp_path):
    code, _, err = finish(command(tmp_path / "zoo", org="somebody"))
    assert code == 1 and "only to alice" in err and not (tmp_path / "zoo").exists()
    assert hub.count("GET", "/timm/") == 0


@pytest.mark.slow
def test_a_dry_run_that_fails_and_another_org(hub, command, tmp_path):
    """A check that failed or was for another org is made again; a network published for another org is made anew."""
    names, download = ["test_convnext3"], "timm/test_convnext3.*filename=model.safetensors"
    hub.fail(("POST", "validate-yaml"), 400, times=None)
    for _ in range(2):
        code, out, err = finish(command(tmp_path / "zoo", "--dry-run", names=names))
        assert code == 1 and "1 of 1 networks failed" in err and "FAILED" in out
    hub.faults.clear()
    for org in ("alice", "lab"):
        code, _, err = finish(command(tmp_path / "zoo", "--dry-run", names=names, org=org))
        [row] = rows(tmp_path / "zoo").values()
        assert (code, err) == (0, "") and row["repo"].startswith(f"{org}/") and hub.count("GET", download) == 1
    for org in ("lab", "alice"):
        hub.repos.pop(f"{org}/{row['model']}", None)
        assert finish(command(tmp_path / "zoo", names=names, org=org))[0] == 0
        [again] = rows(tmp_path / "zoo").values()
        assert again["sha"] == hub.repos[f"{org}/{row['model']}"].head().sha and measured(again) == measured(row)


# --- Its parts


def test_plan():
    """Networks with weights, depthwise convolutions and the labels' classes; .mk8 names are not networks of timm's."""
    names, left = plan_zoo(["test_*", "convnext_tiny*", "mobilenetv3_large_100.ra_in1k"], 1000)
    assert {"test_convnext.r160_in1k", "convnext_tiny.fb_in1k", "mobilenetv3_large_100.ra_in1k"} <= set(names)
    assert left["test_resnet.r160_in1k"] == "no depthwise convolutions"
    assert left["convnext_tiny.fb_in22k"] == "21841 classes, the labels are of 1000"
    assert not any(".mk8" in name for name in [*names, *left])
    with pytest.raises(mk.ZooError, match=r"of test_resnet.* no depthwise convolutions"):
        plan_zoo(["test_resnet"], 1000)
    with pytest.raises(mk.ZooError, match=r"of convnext_tiny\.mk8;"):
        plan_zoo(["convnext_tiny.mk8"], 1000)


def measurement(top1, top5):
    return Measurement(top1, 100 - top1, top5, 100 - top5, 1.0, 160, 1.0, "bicubic", 20, 10)


def test_the_row_of_a_network():
    dense = timm.create_model("test_efficientnet").eval()
    model = mk.convert_to_masterkeys(dense, keys_per_kernel=2)
    report = mk.calibrate_masterkeys(model, dense, torch.randn(12, 3, 64, 64))
    columns = {"calibrated": measurement(50.0, 60.0), "dense": measurement(75.0, 85.0)}
    columns |= {"uncalibrated": measurement(25.0, 35.0), "model": "a.mk8", "bank": "b", "seconds": 1.0}
    columns |= {"source": "a", "repo": "o/a"}
    row = make_result(model, report, **columns)
    assert (row.top1, row.top1_err, row.dense_top1, row.uncalibrated_top1) == (50, 50, 75, 25)
    assert (row.top5, row.top5_err, row.dense_top5, row.uncalibrated_top5) == (60, 40, 85, 35)
    [result, _] = row.card_entries("val")["metrics"]  # with the images' size: timm tests many networks at a larger one
    assert result.dataset_args == {"images": 20, "classes": 10, "img_size": 160, "crop_pct": 1.0}
    after = mk.conversion_report(model).calibration.after
    assert (row.agreement, row.divergence) == (round(100 * after["agreement"], 2), round(after["divergence"], 4))
    assert (row.calibration_images, row.held_out_images) == (12, 2)
    assert row.keys == 2
    chosen = TriedNetwork(10 * 3 + 20 * 25, 0.9, after, {"one": 3, "dense": 0})  # kernels of 5 x 5 that stayed dense
    budget = KeyBudget(0.9, "agreement", report.record, chosen, (chosen,), {"one": 10, "dense": 20}, 1.0)
    assert make_result(model, budget, **columns) == replace(row, keys=round(530 / 30, 2))


def result(**values):
    return Result(**{name: 0 for name in Result.__dataclass_fields__} | values)


def test_table_and_names(tmp_path):
    """The columns of timm first, the best first; only what is published has a name to load it by."""
    results = [
        result(model="convnext_tiny.mk8_fb_in1k", top1=70.0, source="convnext_tiny.fb_in1k", repo="o/a", sha="1a"),
        result(model="convnext_tiny.mk8_in12k_ft_in1k", source="convnext_tiny.in12k_ft_in1k", repo="o/b", sha="2b"),
        result(model="convnext_nano.mk8_in12k_ft_in1k", top1=71.5, source="convnext_nano.in12k_ft_in1k", sha=""),
    ]
    for number, one in enumerate(results):
        (tmp_path / "models" / str(number)).mkdir(parents=True)
        write_result(tmp_path / "models" / str(number) / "result.json", one)
    write_tables(tmp_path)
    lines = (tmp_path / "results.csv").read_text().splitlines()
    timms = "model,top1,top1_err,top5,top5_err,param_count,img_size,crop_pct,interpolation"  # as in its results files
    assert lines[0].startswith(f"{timms},dense_top1,")
    assert [line.partition(",")[0] for line in lines[1:]] == [
        "convnext_nano.mk8_in12k_ft_in1k",
        "convnext_tiny.mk8_fb_in1k",
        "convnext_tiny.mk8_in12k_ft_in1k",
    ]
    assert (tmp_path / "names.txt").read_text().splitlines() == [
        "convnext_tiny.mk8=o/b@2b",
        "convnext_tiny.mk8_fb_in1k=o/a@1a",
        "convnext_tiny.mk8_in12k_ft_in1k=o/b@2b",
    ]


@pytest.fixture
def zoo(tmp_path):
    return ZooSettings("me", LabelledImages(tmp_path, (), 1000, ""), tmp_path / "zoo", dry_run=True)


def test_a_licence_that_is_missing_comes_before_the_download(zoo, monkeypatch):
    monkeypatch.setattr(timm, "create_model", None)
    [outcome] = make_zoo(["cpubone_b0_bfrobust.r224_in1k"], zoo)
    assert outcome.result is None and "licence" in outcome.error
    assert (zoo.output / "results.csv").read_text().count("\n") == 1


@pytest.mark.parametrize("given", ["CC-BY-4.0", None])
def test_a_licence_that_is_corrected_after_a_dry_run_is_published(zoo, monkeypatch, given):
    name = "test_convnext.r160_in1k"
    folder, model = zoo.folder(name), mk.convert_to_masterkeys(timm.create_model("test_convnext"))
    mk.save_pretrained(model, folder / "weights", license="apache-2.0")
    write_result(folder / "result.json", result(repo=zoo.repo(name), sha=""))
    published = []
    monkeypatch.setattr(
        "timm_masterkeys.zoo.make.push_to_hub", lambda model, *_, **__: published.append(read_record(model))
    )
    [outcome] = make_zoo([name], replace(zoo, license=given))
    assert not outcome.error and published[0].source.license == (given or "apache-2.0").lower()


def test_other_settings_need_another_folder(dry, pictures, capsys):
    table = rows(dry)
    given = ["--org", "lab", "--calibrate", pictures / "calibrate", "--evaluate", pictures / "validation"]
    given += ["--dry-run", "--output", dry]
    for changed, name in (("--keys-per-kernel=2", "conversion"), ("--calibrate=builtin", "calibrate")):
        assert main(list(map(str, ["zoo", *ARCHS, *given, changed]))) == 1
        assert f"other settings ({name})" in capsys.readouterr().err
    assert rows(dry) == table


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_damaged_settings_are_an_error_before_the_work(zoo, content):
    zoo.output.mkdir()
    (zoo.output / "zoo.json").write_bytes(content)
    with pytest.raises(mk.ZooError, match=r"zoo\.json' is damaged\. Remove it, and give the settings"):
        list(make_zoo(["test_convnext.r160_in1k"], zoo))
    assert [path.name for path in zoo.output.iterdir()] == ["zoo.json"]


def test_a_damaged_result_is_that_networks_failure(zoo):
    folder = zoo.folder("test_convnext.r160_in1k")
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{}")
    [outcome] = make_zoo(["test_convnext.r160_in1k"], zoo)
    assert "is damaged. Remove it" in outcome.error


def test_no_token_is_an_error_before_the_work(zoo, monkeypatch):
    monkeypatch.setattr("timm_masterkeys.zoo.make.get_token", lambda: None)
    with pytest.raises(mk.ZooError, match="no token"):
        list(make_zoo(["test_convnext.r160_in1k"], replace(zoo, dry_run=False)))
