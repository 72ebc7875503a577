"""Publishing to the Hub and loading again: the real client and the real timm in subprocesses, a Hub on loopback.

A worker is one Python process with timm and the plugin imported once; tests send it code and get what it printed or
raised. Fresh caches are folders given as ``cache_dir``; processes of their own stand for "no plugin" and "offline".
"""

import contextlib
import io
import json
import logging
import os
import re
import sys
import textwrap
import time
import traceback

import pytest
from forked import FORKS, enter
from hub_server import HubServer


def serve(pipe, env, plugin):
    """A worker: runs the code it is sent in an environment of its own, and sends what that printed or raised."""
    enter(env)
    with open(env["HF_HOME"] + ".log", "a") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
    logging.getLogger("filelock").setLevel(logging.WARNING)
    pause = time.sleep
    time.sleep = lambda seconds: pause(seconds / 50)  # the waits between tries
    import timm
    import torch

    names = {"timm": timm, "torch": torch}
    if plugin:
        import timm_masterkeys

        names["mk"] = timm_masterkeys
    while code := pipe.recv():
        out, error = io.StringIO(), None
        try:
            with contextlib.redirect_stdout(out):
                exec(code, names)
        except BaseException as e:
            error = [type(e).__name__, traceback.format_exc() if isinstance(e, AssertionError) else str(e)]
        pipe.send([out.getvalue(), error])


MODEL = """
import os
from safetensors.torch import save_file
from timm_masterkeys.timm_plugin import compat

stock = os.environ["HF_HOME"] + ".safetensors"
if not os.path.exists(stock):
    torch.manual_seed(5)
    save_file(timm.create_model("test_convnext").state_dict(), stock)
for cfg in compat.cfgs("test_convnext").values():  # where timm looks for its own weights: here, not on the Hub
    cfg.file = stock

def converted(seed=0, **settings):
    settings = {f"mk_{name}": value for name, value in settings.items()}
    model = timm.create_model("test_convnext.mk8_r160_in1k", pretrained=True, mk_keys_per_kernel=2, **settings).eval()
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "conv_dw" not in name:
            torch.nn.init.normal_(p, std=0.1)
    return model

def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a), [k for k in a if not torch.equal(a[k], b[k])]

def load(name="alice/base", **kwargs):
    return timm.create_model(f"hf-hub:{name}", pretrained=True, **kwargs).eval()

x = torch.rand(1, 3, 160, 160, generator=torch.Generator().manual_seed(3))
"""


TOKENS = {"nobody": None, "mistyped": "hf_wrong", "bob": "hf_bob_write"}
FILES = ("README.md", "config.json", "masterkeys.safetensors", "model.safetensors")


class Worker:
    def __init__(self, env, plugin=True):
        self.pipe, theirs = FORKS.Pipe()
        self.process = FORKS.Process(target=serve, args=(theirs, env, plugin))
        self.process.start()
        theirs.close()
        if plugin:
            self.run(MODEL)

    def run(self, code, raises=None):
        """What the code prints, or the message of the error it must raise; ``raises`` matches the name of its class."""
        self.pipe.send(textwrap.dedent(code))
        out, error = self.pipe.recv()  # EOFError: the worker died
        if raises is None:
            assert error is None, f"{error[0]}: {error[1]}"
            return out.strip()
        assert error is not None, f"no error; printed: {out}"
        assert re.fullmatch(raises, error[0]), error
        return error[1]

    def stop(self):
        self.pipe.send("")
        self.process.join(30)
        assert self.process.exitcode == 0
        self.process.close()
        self.pipe.close()


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server
        assert not server.leaks


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def worker(hub, home):
    worker = Worker(hub.env(home / "alice", hub.token("alice")))
    yield worker
    worker.stop()
    assert hub.token("alice") not in (home / "alice.log").read_text()


@pytest.fixture(scope="module")
def others(hub, home):
    """Workers of others than alice: without a token, with an invalid one, with bob's."""
    workers = {name: Worker(hub.env(home / name, token)) for name, token in TOKENS.items()}
    yield workers
    for other in workers.values():
        other.stop()


@pytest.fixture(autouse=True)
def _fresh(hub):
    """No fault and no request of one test reaches into another."""
    hub.requests.clear()
    yield
    hub.faults.clear()


@pytest.fixture(scope="module")
def published(hub, worker):
    """alice/base: a converted model of known values."""
    worker.run("model = converted(); done = mk.push_to_hub(model, 'alice/base'); print(done)")
    return hub.repos["alice/base"]


def test_what_is_published(hub, worker, published):
    files = published.head().files
    assert set(files) == {".gitattributes", *FILES} and len(published.branches["main"]) == 2
    config = json.loads(files["config.json"])
    assert config["pretrained_cfg"]["tag"] == "mk8_r160_in1k"
    source = config["masterkeys"]["source"]
    assert (source["name"], source["license"]) == ("timm/test_convnext.r160_in1k", "apache-2.0")
    card = files["README.md"].decode()
    for text in ("license: apache-2.0", "base_model: timm/test_convnext.r160_in1k", "hf-hub:alice/base"):
        assert text in card
    assert hub.token("alice") not in card + files["config.json"].decode()
    told = worker.run("print(done)")
    for text in (f"hf-hub:alice/base@{published.head().sha}: committed", "public, licence apache-2.0", "account alice"):
        assert text in told
    for name in FILES:
        assert re.search(rf"^{name} +new +[\d.]+ [kM]B$", told, re.MULTILINE), told
    assert f"{len(files['config.json']) / 1e3:.1f} kB" in told


def test_load_with_the_plugin(worker, published):
    """Other heads, inputs and features are tried with folders."""
    worker.run(f"""
        same(model, load())
        same(model, load("alice/base@{published.head().sha}"))
        ten = load(num_classes=10, mk_trainable="affine")
        assert torch.equal(ten.forward_features(x), model.forward_features(x)) and ten(x).shape == (1, 10)
        assert any(n.endswith("conv_dw.scale") for n, _ in ten.named_parameters())
        bare = timm.create_model("hf-hub:alice/base")  # of the published bank, keys per kernel and layers
        bare.load_state_dict(model.state_dict())
        same(bare, model)
    """)
    assert "mk_bank" in worker.run("load(mk_bank='random8:0')", raises="ConversionError")


@pytest.mark.slow
def test_load_without_the_plugin(hub, worker, published, home):
    stock = Worker(hub.env(home / "stock"), plugin=False)
    sums = "torch.manual_seed(3); print(model(torch.rand(1, 3, 160, 160)).double().sum().item())"
    got = stock.run(f"""
        for arguments in ({{"num_classes": 3}}, {{"in_chans": 1}}, {{"features_only": True}}, {{}}):
            model = timm.create_model("hf-hub:alice/base", pretrained=True, **arguments).eval()
            assert not any(type(m).__module__.startswith("timm_masterkeys") for m in model.modules())
        {sums}
    """)
    stock.stop()
    assert got == worker.run(sums) and not hub.count("GET|HEAD", r"masterkeys\.safetensors|\.bin")


@pytest.mark.slow
def test_offline_with_a_warm_cache(hub, worker, published, home):
    worker.run("load()")
    hub.requests.clear()
    offline = Worker(hub.env(home / "alice", HF_HUB_OFFLINE="1"))
    offline.run("same(converted(), load())")
    offline.stop()
    assert not hub.requests


@pytest.mark.slow
def test_dry_run_checks_the_account(hub, worker, published, others):
    call = "print(mk.push_to_hub(converted(), 'alice/base', dry_run={}))"
    assert "account alice" in worker.run(call.format(True)) and hub.count("GET", "/api/whoami") == 1
    assert "no account: publishing needs `hf auth login`" in others["nobody"].run(call.format(True))
    message = others["nobody"].run(call.format(False), raises="HubError")
    assert "Nothing was published to alice/base: there is no token" in message and "hf auth login" in message
    for dry_run in (True, False):
        message = others["mistyped"].run(call.format(dry_run), raises="HubError")
        assert "Nothing was published" in message and "hf_wrong" not in message


def test_a_hub_that_does_not_answer(worker):
    message = worker.run(
        """
        from unittest.mock import patch
        with patch("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9"):  # a port that nobody listens to
            mk.push_to_hub(converted(), "alice/base")
        """,
        raises="HubError",
    )
    assert re.search("Nothing was published to alice/base: the Hub does not answer .* Try again online", message)


def test_dry_run(hub, worker, published):
    """Nor is a commit made of what is there already."""
    out = worker.run("""
        new = mk.push_to_hub(converted(), "alice/never", dry_run=True)
        assert (new.sha, set(new.files.values()), new.committed) == (None, {"new"}, False)
        assert "public, unless the owner's repositories are private, licence apache-2.0" in str(new)
        secret = mk.push_to_hub(converted(), "alice/never", dry_run=True, private=True)
        assert "private, licence apache-2.0" in str(secret)
        other = mk.push_to_hub(converted(trainable="none"), "alice/base", dry_run=True)
        changed = {n for n, s in other.files.items() if s == "changed"}
        assert "masterkeys.safetensors" in changed and "model.safetensors" not in changed
        assert "hf-hub:alice/base, branch main: no commit made" in str(other)  # the commit there holds other weights
        again = mk.push_to_hub(converted(), "alice/base")
        assert not again.committed and set(again.files.values()) == {"unchanged"}
        assert f"hf-hub:alice/base@{again.sha}: no commit made" in str(again)
        print(again.sha)
    """)
    assert out == published.head().sha and "alice/never" not in hub.repos
    assert hub.count("POST", "/commit/|/create|/branch") == hub.count("PUT") == 0


def test_change_keeps_the_hand_written_part(hub, worker):
    repo = hub.add_repo("alice/text", {"README.md": b"---\nmy_field: kept\n---\n## Mine\n\nBy hand.\n"})
    for seed in (0, 1):
        worker.run(f"mk.push_to_hub(converted(seed={seed}), 'alice/text', tags=['extra'])")
        card = repo.head().files["README.md"].decode()
        assert "By hand." in card and "my_field: kept" in card and "- extra" in card
        assert card.count("timm_masterkeys: begin") == 1 and len(repo.branches["main"]) == 3 + seed


def test_results_of_other_weights_are_not_kept(hub, worker):
    worker.run("from huggingface_hub import EvalResult")
    results = "[EvalResult('image-classification', 'imagenet-1k', 'ImageNet', 'accuracy', 71.2)]"
    for seed, metrics, kept in ((1, results, True), (1, "()", True), (0, "()", False)):
        worker.run(f"mk.push_to_hub(converted(seed={seed}), 'alice/r', metrics={metrics})")
        assert ("value: 71.2" in hub.repos["alice/r"].head().files["README.md"].decode()) == kept


def test_branch_and_pull_request(hub, worker, published):
    worker.run("mk.push_to_hub(converted(seed=2), 'alice/base', revision='v2')")
    assert len(published.branches["v2"]) == len(published.branches["main"]) + 1
    worker.run("same(converted(seed=2), load('alice/base@v2'))")
    out = worker.run("pr = mk.push_to_hub(converted(seed=4), 'alice/base', create_pr=True); print(pr.revision)")
    assert out == "refs/pr/1" and published.branches["refs/pr/1"][-1].files != published.head().files
    message = worker.run("mk.push_to_hub(model, 'alice/base', create_pr=True, revision='v2')", raises="HubError")
    assert "revision" in message
    told = worker.run("print(mk.push_to_hub(model, 'alice/base', revision='same'))")
    assert published.branches["same"] == published.branches["main"] and "no commit made" in told
    worker.run("mk.push_to_hub(model, 'alice/new-branch', revision='v2')")  # and of repositories that there are not
    branches = hub.repos["alice/new-branch"].branches
    assert (len(branches["main"]), len(branches["v2"])) == (1, 2)
    out = worker.run("print(mk.push_to_hub(model, 'alice/new-pr', create_pr=True).url)")
    assert out == f"{hub.url}/alice/new-pr/discussions/1" and len(hub.repos["alice/new-pr"].branches["main"]) == 1


@pytest.mark.slow
def test_private_and_rights(hub, worker, others, home):
    worker.run("mk.push_to_hub(converted(), 'alice/secret', private=True)")
    told = worker.run("print(mk.push_to_hub(converted(), 'alice/secret', dry_run=True))")
    assert hub.repos["alice/secret"].private and "private, licence" in told and "public" not in told
    worker.run("same(converted(), load('alice/secret'))")
    before = {repo_id: len(repo.branches["main"]) for repo_id, repo in hub.repos.items()}
    for name, token in TOKENS.items():
        for repo_id in ("alice/secret", "alice/new"):
            message = others[name].run(f"mk.push_to_hub(converted(seed=9), {repo_id!r})", raises="HubError")
            assert "Nothing was published" in message and (token is None or token not in message)
        others[name].run("load('alice/secret')", raises=r"\w+Error")
        assert token is None or token not in (home / f"{name}.log").read_text()
    assert {repo_id: len(repo.branches["main"]) for repo_id, repo in hub.repos.items()} == before


def test_checks_come_before_any_request(hub, worker):
    """A licence, first of all: weights that timm did not load are under what their owner says."""
    worker.run("""
        from timm_masterkeys.conversion.record import Record, Source, write_record
        unknown = mk.convert_to_masterkeys(timm.create_model("test_convnext.r160_in1k", pretrained=True))
        nc = converted()
        write_record(nc, Record(source=Source("timm/nc", license="cc-by-nc-4.0")))
    """)
    for arguments, text in (
        ("unknown, 'alice/bad'", "test_convnext.r160_in1k are under 'apache-2.0'"),
        ("unknown, 'alice/bad', license='mitt'", "Did you mean 'mit'?"),
        ("nc, 'alice/bad', license='mit'", "cc-by-nc-4.0"),
        ("timm.create_model('test_convnext'), 'alice/bad'", "MasterKeyConv2d"),
        ("torch.nn.Linear(1, 1), 'alice/bad'", "timm model"),
    ):
        assert text in worker.run(f"mk.push_to_hub({arguments})", raises="ConversionError")
        assert not hub.select("POST|PUT")
    worker.run("mk.push_to_hub(converted(), 'a/b/c')", raises="HubError")
    assert "alice/bad" not in hub.repos and hub.count("POST", "/commit/") == 0
    worker.run("mk.push_to_hub(unknown, 'alice/known', license='mit')")
    card = hub.repos["alice/known"].head().files["README.md"].decode()
    assert "license: mit" in card and "given by the author" in card and "base_model" not in card
    worker.run("mk.push_to_hub(nc, 'alice/nc')")
    assert "license: cc-by-nc-4.0" in hub.repos["alice/nc"].head().files["README.md"].decode()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ("GET /api/whoami", 500),
        ("GET /api/models/alice/f", 503),
        ("POST /api/repos/create", 500),
        ("POST /api/validate-yaml", 503),
        ("POST /preupload/", 500),
        ("POST /objects/batch", 503),
        ("PUT /storage/", 500),
        ("POST /commit/", 500),
        ("POST /commit/", 503),
    ],
)
def test_server_errors(hub, worker, request_, status):
    """Once: an error that says so or a success; after it a second try succeeds, and there is one commit."""
    (method, path), name = request_.split(), f"alice/f{status}{re.sub(r'[^a-z]', '', request_)}"
    fault = hub.fail((method, path), status)
    out = worker.run(f"""
        try:
            print(mk.push_to_hub(converted(seed=5), {name!r}).committed)
        except mk.HubError as error:
            print("HubError", error)
    """)
    assert fault.hits == 1
    if out != "True":
        uploads = ("/preupload/", "/objects/batch", "/commit/")  # an old client does not try the first two again itself
        assert "Nothing was published" in out or (path in uploads and "Run again" in out)
        assert name not in hub.repos or len(hub.repos[name].branches["main"]) == 1
        worker.run(f"assert mk.push_to_hub(converted(seed=5), {name!r}).committed")
    assert len(hub.repos[name].branches["main"]) == 2


@pytest.mark.parametrize(("when", "create_pr"), [("before", False), ("after", False), ("after", True)])
def test_lost_commit_answer_makes_one_commit(hub, worker, when, create_pr):
    name = f"alice/lost-{when}-{create_pr}"
    branches = hub.add_repo(name, {".gitattributes": b""}).branches
    before, fault = len(branches["main"]), hub.drop(("POST", "/commit/"), when=when)
    call = f"done = mk.push_to_hub(converted(seed=6), {name!r}, create_pr={create_pr}); print(done.committed, done.sha)"
    if when == "before":
        assert "Run again" in worker.run(call, raises="HubError")
    assert worker.run(call) == f"True {branches['refs/pr/1' if create_pr else 'main'][-1].sha}"
    assert fault.hits == 1 and hub.count("POST", "/commit/") == (2 if when == "before" else 1)
    assert len(branches["main"]) == before + (not create_pr)
    assert sum(ref.startswith("refs/pr") for ref in branches) == create_pr


def test_somebody_elses_commit_meanwhile(hub, worker):
    """The commit is on top of what was compared with: nothing of another's is undone."""
    repo = hub.add_repo("alice/race")
    other = repo.make(repo.branches["main"], {"README.md": b"another's"}, "of another")
    hub.alter(("POST", "/preupload/"), change=lambda data: repo.branches["main"].append(other) or data)
    message = worker.run("mk.push_to_hub(converted(seed=6), 'alice/race')", raises="HubError")
    assert "Nothing was committed to alice/race" in message and message.endswith("Run again.")
    assert repo.head() is other
    worker.run("assert mk.push_to_hub(converted(seed=6), 'alice/race').committed")
    assert b"another's" in repo.head().files["README.md"]


@pytest.mark.parametrize(("request_", "create_pr"), [(("GET", "/refs"), True), (("POST", "/commit/"), False)])
def test_a_request_that_never_works(hub, worker, published, request_, create_pr):
    fault = hub.fail(request_, 500, times=None)
    before = {ref: len(commits) for ref, commits in published.branches.items()}
    call = f"mk.push_to_hub(converted(seed=7), 'alice/base', create_pr={create_pr})"
    message = worker.run(call, raises="HubError")
    assert fault.hits and ("Nothing was committed" if create_pr else "Run again") in message
    assert {ref: len(commits) for ref, commits in published.branches.items()} == before


def test_altered_upload_is_noticed(hub, worker, monkeypatch):
    """The Hub holds other bytes than were sent."""
    repo = hub.add_repo("alice/garbled")
    make = repo.make
    garbled = lambda history, files, *a, **k: make(history, {**files, "config.json": b"{}"}, *a, **k)  # noqa: E731
    monkeypatch.setattr(repo, "make", garbled, raising=False)
    assert "config.json" in worker.run("mk.push_to_hub(converted(seed=6), 'alice/garbled')", raises="HubError")


def test_a_lost_compact_file_is_an_error(hub, worker, published, tmp_path):
    """Also with a head of its own; more of what may be lost or damaged is tried with folders."""
    files = {name: data for name, data in published.head().files.items() if name != "masterkeys.safetensors"}
    hub.add_repo("alice/lost", files)
    message = worker.run(f"load('alice/lost', num_classes=7, cache_dir={str(tmp_path)!r})", raises="CheckpointError")
    assert "masterkeys.safetensors" in message


@pytest.mark.parametrize(("file", "error"), [("masterkeys", "CheckpointError"), ("model", ".*")])
def test_an_outage_is_an_error_not_another_model(hub, worker, published, tmp_path, file, error):
    """And never a pickle."""
    hub.fail(("HEAD", rf"/{file}\.safetensors"), 503, times=None)
    message = worker.run(f"load(cache_dir={str(tmp_path)!r})", raises=error)
    assert (f"{file}.safetensors" in message or error == ".*") and hub.count("GET|HEAD", r"\.(bin|pth)") == 0


@pytest.mark.parametrize("kind", ["truncate", "stall"])
def test_download_faults(hub, worker, published, tmp_path, kind):
    match = ("GET", r"filename=masterkeys\.safetensors")
    hub.truncate(match) if kind == "truncate" else hub.stall(match, 0.5)
    worker.run(f"""
        try:
            again = load(cache_dir={str(tmp_path)!r})
        except Exception as error:  # clients before 1.0 do not go on where a download broke off
            assert {kind!r} == "truncate" and "IncompleteRead" in str(error)
            again = load(cache_dir={str(tmp_path)!r})
        same(model, again)
    """)


def test_altered_download_is_refused(hub, worker, published, tmp_path):
    match = ("GET", r"filename=masterkeys\.safetensors")
    hub.alter(match, lambda data: data[:-5000] + bytes([data[-5000] ^ 1]) + data[-4999:])
    for _ in range(2):  # the client's cache keeps it
        message = worker.run(f"load(cache_dir={str(tmp_path)!r})", raises="CheckpointError")
    [advice] = re.findall(r"SHA-256.* Remove '(.+)' and load again", message)
    os.remove(advice)
    worker.run(f"same(model, load(cache_dir={str(tmp_path)!r}))")


@pytest.mark.slow
def test_team_weights(hub, worker, published, home):
    worker.run("""
        mk.use_weights("test_convnext.mk8_ours", "alice/base")
        same(converted(), timm.create_model("test_convnext.mk8_ours", pretrained=True))
        assert timm.is_model_pretrained("test_convnext.mk8_ours")
        assert timm.create_model("test_convnext.mk8_ours", pretrained=True, num_classes=5).num_classes == 5
        mk.use_weights("test_efficientnet.mk8", "alice/base")
    """)
    call = "timm.create_model('test_efficientnet.mk8', pretrained=True)"
    assert "test_convnext" in worker.run(call, raises="CheckpointError")
    pinned = f"test_convnext.mk8=alice/base@{published.head().sha}"
    team = Worker(hub.env(home / "team", TIMM_MASTERKEYS_WEIGHTS=pinned))
    team.run("same(converted(), timm.create_model('test_convnext.mk8', pretrained=True))")
    team.stop()


def test_command_publish(hub, worker, tmp_path):
    publish = f"assert main(['publish', {str(tmp_path / 'out')!r}, '{{}}', *{{}}]) == {{}}"
    worker.run("from timm_masterkeys.cli import main")
    worker.run(f"mk.save_pretrained(converted(seed=8), {str(tmp_path / 'out')!r})")
    worker.run(publish.format("alice/command", ["--dry-run"], 0))
    assert "alice/command" not in hub.repos
    out = worker.run(publish.format("alice/command", [], 0))
    assert hub.repos["alice/command"].head().sha in out
    worker.run("same(converted(seed=8), load('alice/command'))")
    worker.run(publish.format("bob/command", [], 1))
    assert "bob/command" not in hub.repos


def test_command_convert_of_a_dense_model_on_the_hub(hub, worker, tmp_path):
    """Its licence is inherited; without the command, the error names where it comes from."""
    cfg = {"input_size": [3, 160, 160], "first_conv": "stem.0", "classifier": "head.fc", "license": "cc-by-nc-4.0"}
    config = json.dumps({"architecture": "test_convnext", "num_classes": 1000, "pretrained_cfg": cfg}).encode()
    worker.run("from timm_masterkeys.cli import main; from safetensors.torch import save")
    state = worker.run("print(save(timm.create_model('test_convnext').state_dict()).hex())")
    hub.add_repo("bob/dense", {"config.json": config, "model.safetensors": bytes.fromhex(state)})
    out = tmp_path / "out"
    command = ["convert", "hf-hub:bob/dense", "--pretrained", "--calibrate", "none", "--output", str(out)]
    worker.run(f"assert main({command}) == 0")
    source = json.loads((out / "config.json").read_text())["masterkeys"]["source"]
    assert (source["name"], source["license"], source["license_given"]) == ("bob/dense", "cc-by-nc-4.0", False)
    call = "mk.push_to_hub(mk.convert_to_masterkeys(timm.create_model('hf-hub:bob/dense', pretrained=True)), 'alice/d')"
    assert "The weights of bob/dense are under 'cc-by-nc-4.0'" in worker.run(call, raises="ConversionError")


def test_publishing_what_was_loaded_changes_nothing_but_the_examples(hub, worker, published):
    """A published model, loaded and published elsewhere, keeps its licence and the source it came from."""
    worker.run("mk.push_to_hub(timm.create_model('hf-hub:alice/base', pretrained=True), 'alice/copy')")
    files, copied = published.branches["main"][1].files, hub.repos["alice/copy"].head().files
    for name in ("model.safetensors", "masterkeys.safetensors", "config.json"):
        assert files[name] == copied[name], name
    assert "base_model: timm/test_convnext.r160_in1k" in copied["README.md"].decode()
