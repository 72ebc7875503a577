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
import functools, os
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

x = torch.rand(1, 3, 160, 160, generator=torch.Generator().manual_seed(3))
"""


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
        """What the code prints, or the message of the error it must raise."""
        self.pipe.send(textwrap.dedent(code))
        out, error = self.pipe.recv()  # EOFError: the worker died
        if raises is None:
            assert error is None, f"{error[0]}: {error[1]}"
            return out.strip()
        assert error is not None, f"no error; printed: {out}"
        assert error[0] == raises, error
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
    tokens = {"nobody": None, "mistyped": "hf_wrong", "bob": hub.token("bob")}
    workers = {name: Worker(hub.env(home / name, token)) for name, token in tokens.items()}
    yield workers
    for name, other in workers.items():
        other.stop()
        assert tokens[name] is None or tokens[name] not in (home / f"{name}.log").read_text()


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
    assert set(files) == {".gitattributes", *FILES}
    assert len(published.branches["main"]) == 2
    config = json.loads(files["config.json"])
    assert config["architecture"] == "test_convnext"
    assert config["pretrained_cfg"]["tag"] == "mk8_r160_in1k"
    assert config["pretrained_cfg"]["hf_hub_filename"] == "model.safetensors"
    assert config["masterkeys"]["format_version"] == 1
    assert {layer["keys_per_kernel"] for layer in config["masterkeys"]["layers"].values()} == {2}
    assert config["masterkeys"]["source"]["name"] == "timm/test_convnext.r160_in1k"
    assert config["masterkeys"]["source"]["license"] == "apache-2.0"
    assert "mk_bank" not in config["model_args"]
    card = files["README.md"].decode()
    for text in (
        "license: apache-2.0",
        "library_name: timm",
        "base_model: timm/test_convnext.r160_in1k",
        "hf-hub:alice/base",
    ):
        assert text in card
    assert hub.token("alice") not in card + files["config.json"].decode()
    told = worker.run("print(done)")
    for text in (f"hf-hub:alice/base@{published.head().sha}: committed", "public, licence apache-2.0", "account alice"):
        assert text in told
    for name in FILES:
        assert re.search(rf"^{name} +new +[\d.]+ [kM]B$", told, re.MULTILINE), told
    assert f"{len(files['config.json']) / 1e3:.1f} kB" in told


def test_load_with_the_plugin(worker, published, tmp_path):
    worker.run(f"""
        again = timm.create_model("hf-hub:alice/base", pretrained=True, cache_dir={str(tmp_path)!r}).eval()
        same(model, again)
        layers = [m for m in again.modules() if isinstance(m, mk.MasterKeyConv2d)]
        assert layers and all(n.endswith("shift") for l in layers for n, _ in l.named_parameters() if n != "bias")
        assert torch.equal(model(x), again(x))
        pin = "hf-hub:alice/base@{published.head().sha}"
        pinned = timm.create_model(pin, pretrained=True, cache_dir={str(tmp_path)!r})
        same(model, pinned)
    """)


def test_other_heads_inputs_and_features(worker, published, tmp_path):
    worker.run(f"""
        load = functools.partial(
            timm.create_model, "hf-hub:alice/base", pretrained=True, cache_dir={str(tmp_path)!r}
        )
        ten = load(num_classes=10).eval()
        assert ten(x).shape == (1, 10)
        assert torch.equal(ten.forward_features(x), model.forward_features(x))
        assert load(in_chans=1).eval()(x[:, :1]).shape == (1, 1000)
        features = load(features_only=True, feature_cls="getter").eval()
        assert torch.equal(features(x)[-1], model.forward_intermediates(x)[1][-1])
        affine = load(mk_trainable="affine")
        same(model, affine)
        assert any(n.endswith("scale") for n, _ in affine.named_parameters())
    """)
    call = f"timm.create_model('hf-hub:alice/base', pretrained=True, mk_bank='random8:0', cache_dir={str(tmp_path)!r})"
    assert "mk_bank" in worker.run(call, raises="ConversionError")


@pytest.mark.slow
def test_load_without_the_plugin(hub, worker, published, home):
    stock = Worker(hub.env(home / "stock"), plugin=False)
    sums = "torch.manual_seed(3); print(model(torch.rand(1, 3, 160, 160)).double().sum().item())"
    got = stock.run(f"""
        model = timm.create_model("hf-hub:alice/base", pretrained=True).eval()
        assert not any(type(m).__module__.startswith("timm_masterkeys") for m in model.modules())
        {sums}
    """)
    stock.stop()
    assert got == worker.run(sums)
    assert hub.count("GET|HEAD", r"masterkeys\.safetensors") == 0
    assert hub.count("GET|HEAD", r"\.bin") == 0


def test_structure_without_the_weights(worker, published, tmp_path):
    """pretrained=False: the published bank, keys per kernel and layers, random keys."""
    worker.run(f"""
        bare = timm.create_model("hf-hub:alice/base", cache_dir={str(tmp_path)!r})
        bare.load_state_dict(model.state_dict())
        same(bare, model)
    """)


@pytest.mark.slow
def test_offline_with_a_warm_cache(hub, worker, published, home):
    worker.run("timm.create_model('hf-hub:alice/base', pretrained=True)")
    hub.requests.clear()
    offline = Worker(hub.env(home / "alice", HF_HUB_OFFLINE="1"))
    offline.run("same(converted(), timm.create_model('hf-hub:alice/base', pretrained=True))")
    offline.stop()
    assert not hub.requests


def test_published_again_makes_no_commit(hub, worker, published):
    before = len(published.branches["main"])
    out = worker.run("a = mk.push_to_hub(converted(), 'alice/base'); print(a.committed, a.sha, set(a.files.values()))")
    assert out == f"False {published.head().sha} {{'unchanged'}}"
    assert len(published.branches["main"]) == before
    assert hub.count("POST", "/commit/") == hub.count("PUT") == 0


def test_unknown_weights_have_no_licence(hub, worker):
    """What timm did not load is nobody's until its owner says whose it is."""
    worker.run("""
        own = converted()
        own.load_state_dict(timm.create_model("test_convnext").state_dict())
    """)
    assert "licence" in worker.run("mk.push_to_hub(own, 'alice/own')", raises="ConversionError")
    assert not hub.select("POST|PUT")
    worker.run("mk.push_to_hub(own, 'alice/own', license='mit')")
    card = hub.repos["alice/own"].head().files["README.md"].decode()
    assert "license: mit" in card and "base_model" not in card and "timm/test_convnext" not in card
    assert "whose source is not recorded" in card and "given by the author" in card and "inherited" not in card
    worker.run("""
        again = timm.create_model("hf-hub:alice/own", pretrained=True)
        print(mk.push_to_hub(again, "alice/copy"))
    """)
    assert "license: mit" in hub.repos["alice/copy"].head().files["README.md"].decode()


@pytest.mark.slow
def test_dry_run_checks_the_account(hub, worker, published, others):
    out = worker.run("print(mk.push_to_hub(model, 'alice/base', dry_run=True))")
    assert "account alice" in out and hub.count("GET", "/api/whoami") == 1
    nobody, wrong = others["nobody"], others["mistyped"]
    out = nobody.run("print(mk.push_to_hub(converted(), 'alice/base', dry_run=True))")
    assert "no account: publishing needs `hf auth login`" in out
    message = nobody.run("mk.push_to_hub(converted(), 'alice/base')", raises="HubError")
    assert message == (
        "Nothing was published to alice/base: there is no token. Log in with `hf auth login`, or set HF_TOKEN."
    )
    for dry_run in (True, False):
        message = wrong.run(f"mk.push_to_hub(converted(), 'alice/base', dry_run={dry_run})", raises="HubError")
        assert "Nothing was published" in message and "hf_wrong" not in message


def test_dry_run(hub, worker, published):
    out = worker.run("""
        new = mk.push_to_hub(converted(), "alice/never", dry_run=True)
        print(new.sha, set(new.files.values()), new.committed)
        assert "public, unless the owner's repositories are private, licence apache-2.0" in str(new)
        secret = mk.push_to_hub(converted(), "alice/never", dry_run=True, private=True)
        assert "private, licence apache-2.0" in str(secret)
        other = mk.push_to_hub(converted(trainable="none"), "alice/base", dry_run=True)
        print({n for n, s in other.files.items() if s == "changed"})
    """).splitlines()
    assert out[0] == "None {'new'} False"
    assert "'masterkeys.safetensors'" in out[1] and "'model.safetensors'" not in out[1]
    assert "alice/never" not in hub.repos
    assert hub.count("POST", "/commit/|/create|/branch") == hub.count("PUT") == 0


def test_change_keeps_the_hand_written_part(hub, worker):
    worker.run("mk.push_to_hub(converted(), 'alice/text')")
    repo = hub.repos["alice/text"]
    head = repo.head()
    text = head.files["README.md"].decode().replace("license:", "my_field: kept\nlicense:") + "\n## Mine\n\nBy hand.\n"
    repo.branches["main"].append(
        repo.make(repo.branches["main"], {**head.files, "README.md": text.encode()}, "by hand", lfs=head.lfs)
    )
    worker.run("mk.push_to_hub(converted(seed=1), 'alice/text', tags=['extra'])")
    card = repo.head().files["README.md"].decode()
    assert "By hand." in card and "my_field: kept" in card and "- extra" in card
    assert card.count("timm_masterkeys: begin") == 1
    assert len(repo.branches["main"]) == 4


def test_branch_and_pull_request(hub, worker, published):
    worker.run("mk.push_to_hub(converted(seed=2), 'alice/base', revision='v2')")
    assert len(published.branches["v2"]) == len(published.branches["main"]) + 1
    worker.run("same(converted(seed=2), timm.create_model('hf-hub:alice/base@v2', pretrained=True))")
    out = worker.run("pr = mk.push_to_hub(converted(seed=4), 'alice/base', create_pr=True); print(pr.revision)")
    assert out == "refs/pr/1"
    assert published.branches["refs/pr/1"][-1].files != published.head().files
    message = worker.run("mk.push_to_hub(model, 'alice/base', create_pr=True, revision='v2')", raises="HubError")
    assert "revision" in message


def test_a_new_branch_of_these_very_files_and_one_of_a_new_repository(hub, worker, published):
    worker.run("mk.push_to_hub(converted(seed=3), 'alice/branches')")
    told = worker.run("print(mk.push_to_hub(converted(seed=3), 'alice/branches', revision='v2'))")
    branches = hub.repos["alice/branches"].branches
    assert branches["v2"] == branches["main"] and f"@{branches['main'][-1].sha}: no commit made" in told
    worker.run("mk.push_to_hub(converted(seed=3), 'alice/new-branch', revision='v2')")
    branches = hub.repos["alice/new-branch"].branches
    assert (len(branches["main"]), len(branches["v2"])) == (1, 2)
    out = worker.run("pr = mk.push_to_hub(converted(seed=3), 'alice/new-pr', create_pr=True); print(pr.url)")
    assert out == f"{hub.url}/alice/new-pr/discussions/1" and len(hub.repos["alice/new-pr"].branches["main"]) == 1


@pytest.mark.slow
def test_private_and_rights(hub, worker, others, home, tmp_path):
    worker.run("mk.push_to_hub(converted(), 'alice/secret', private=True)")
    assert hub.repos["alice/secret"].private
    told = worker.run("print(mk.push_to_hub(converted(), 'alice/secret', dry_run=True))")
    assert "private, licence" in told and "public" not in told
    worker.run(
        f"same(converted(), timm.create_model('hf-hub:alice/secret', pretrained=True, cache_dir={str(tmp_path)!r}))"
    )
    tokens = {"nobody": None, "mistyped": "hf_wrong", "bob": hub.token("bob")}
    for name, token in tokens.items():
        before = {repo_id: len(repo.branches["main"]) for repo_id, repo in hub.repos.items()}
        out = (
            others[name]
            .run("""
            for act in (
                lambda: mk.push_to_hub(converted(seed=9), "alice/secret"),
                lambda: mk.push_to_hub(converted(), "alice/new"),
                lambda: timm.create_model("hf-hub:alice/secret", pretrained=True),
            ):
                try:
                    act()
                    print("no error")
                except Exception as error:
                    print(type(error).__name__, "|", str(error).replace(chr(10), " "))
        """)
            .splitlines()
        )
        assert [line.split(" | ")[0] for line in out[:2]] == ["HubError", "HubError"], out
        assert "Nothing was published" in out[0] and not any("no error" in line for line in out), out
        assert token is None or token not in "".join(out) + (home / f"{name}.log").read_text()
        assert {repo_id: len(repo.branches["main"]) for repo_id, repo in hub.repos.items()} == before


def test_checks_come_before_any_request(hub, worker):
    worker.run("""
        from timm_masterkeys.conversion.record import Record, Source, write_record
        unknown = mk.convert_to_masterkeys(timm.create_model("test_convnext.r160_in1k", pretrained=True))
        nc = converted()
        write_record(nc, Record(source=Source("timm/nc", license="cc-by-nc-4.0")))
    """)
    for call, error, text in (
        ("mk.push_to_hub(unknown, 'alice/bad')", "ConversionError", "test_convnext.r160_in1k are under 'apache-2.0'"),
        ("mk.push_to_hub(unknown, 'alice/bad', license='mitt')", "ConversionError", "Did you mean 'mit'?"),
        ("mk.push_to_hub(nc, 'alice/bad', license='mit')", "ConversionError", "cc-by-nc-4.0"),
        ("mk.push_to_hub(timm.create_model('test_convnext'), 'alice/bad')", "ConversionError", "MasterKeyConv2d"),
        ("mk.push_to_hub(torch.nn.Linear(1, 1), 'alice/bad')", "ConversionError", "timm model"),
    ):
        assert text in worker.run(call, raises=error)
        assert not hub.select("POST|PUT")
    worker.run("mk.push_to_hub(converted(), 'a/b/c')", raises="HubError")
    assert "alice/bad" not in hub.repos and hub.count("POST", "/commit/") == 0
    worker.run("mk.push_to_hub(unknown, 'alice/known', license='mit')")
    worker.run("mk.push_to_hub(nc, 'alice/nc')")
    assert "license: cc-by-nc-4.0" in hub.repos["alice/nc"].head().files["README.md"].decode()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/api/whoami", 500),
        ("GET", "/api/models/alice/f", 503),
        ("POST", "/api/repos/create", 500),
        ("POST", "/api/validate-yaml", 503),
        ("POST", "/preupload/", 500),
        ("POST", "/objects/batch", 503),
        ("PUT", "/storage/", 500),
        ("POST", "/commit/", 500),
        ("POST", "/commit/", 503),
    ],
)
def test_server_errors(hub, worker, method, path, status):
    """Once: an error that says so or a success; after it a second try succeeds, and there is one commit."""
    name = f"alice/f{status}{''.join(c for c in path if c.isalnum())}"
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
    hub.add_repo(name, {".gitattributes": b""})
    before = len(hub.repos[name].branches["main"])
    fault = hub.drop(("POST", "/commit/"), when=when)
    call = f"done = mk.push_to_hub(converted(seed=6), {name!r}, create_pr={create_pr}); print(done.committed, done.sha)"
    if when == "before":
        assert "Run again" in worker.run(call, raises="HubError")
    out = worker.run(call)
    assert fault.hits == 1 and hub.count("POST", "/commit/") == (2 if when == "before" else 1)
    branches = hub.repos[name].branches
    assert len(branches["main"]) == before + (not create_pr)
    assert sum(ref.startswith("refs/pr") for ref in branches) == create_pr
    assert out == f"True {branches['refs/pr/1' if create_pr else 'main'][-1].sha}"


def test_somebody_elses_commit_meanwhile(hub, worker):
    """The commit is on top of what was compared with: nothing of theirs is undone."""
    repo = hub.add_repo("alice/race", {".gitattributes": b""})
    make = repo.make(repo.branches["main"], {"README.md": b"theirs"}, "theirs")

    def commit_before(data):
        repo.branches["main"].append(make)
        return data

    hub.alter(("POST", "/preupload/"), change=commit_before)
    message = worker.run("mk.push_to_hub(converted(seed=6), 'alice/race')", raises="HubError")
    assert message == "Nothing was committed to alice/race: it was changed by somebody else meanwhile. Run again."
    assert repo.head() is make
    worker.run("assert mk.push_to_hub(converted(seed=6), 'alice/race').committed")
    assert b"theirs" in repo.head().files["README.md"]


def test_pull_request_when_the_list_of_refs_fails(hub, worker, published):
    fault = hub.fail(("GET", "/refs"), 500)
    before = {ref: len(commits) for ref, commits in published.branches.items()}
    message = worker.run("mk.push_to_hub(converted(seed=7), 'alice/base', create_pr=True)", raises="HubError")
    assert fault.hits == 1 and "Nothing was committed" in message
    assert {ref: len(commits) for ref, commits in published.branches.items()} == before


def test_commit_that_never_works(hub, worker):
    hub.fail(("POST", "/commit/"), 500, times=None)
    message = worker.run("mk.push_to_hub(converted(seed=6), 'alice/never-works')", raises="HubError")
    assert "Run again" in message
    assert len(hub.repos["alice/never-works"].branches["main"]) == 1


def test_altered_upload_is_noticed(hub, worker, monkeypatch):
    """The Hub holds other bytes than were sent."""
    hub.add_repo("alice/garbled", {".gitattributes": b""})
    repo = hub.repos["alice/garbled"]
    make = repo.make
    monkeypatch.setattr(
        repo,
        "make",
        lambda history, files, *a, **k: make(history, {**files, "config.json": b"{}"}, *a, **k),
        raising=False,
    )
    message = worker.run("mk.push_to_hub(converted(seed=6), 'alice/garbled')", raises="HubError")
    assert "config.json" in message


def edited(hub, name, **files):
    """A copy of alice/base with some files replaced (None: removed), as a repository of its own."""
    head = hub.repos["alice/base"].branches["main"][1]
    content = {path: data for path, data in {**head.files, **files}.items() if data is not None}
    hub.add_repo(name, content)


def test_files_that_do_not_fit_are_refused(hub, worker, published, tmp_path):
    """Also with a head of its own; what each file may be damaged in is tried with folders."""
    files = published.branches["main"][1].files
    compact, about = files["masterkeys.safetensors"], json.loads(files["config.json"])
    newer = {**about, "masterkeys": {**about["masterkeys"], "format_version": 99}}
    altered = files["model.safetensors"][:-1] + bytes([files["model.safetensors"][-1] ^ 1])
    cases = {
        "newer": ({"config.json": json.dumps(newer).encode()}, "99"),
        "altered": ({"model.safetensors": altered}, "SHA-256"),
        "cut": ({"masterkeys.safetensors": compact[:-100]}, "masterkeys.safetensors"),
        "lost": ({"masterkeys.safetensors": None}, "masterkeys.safetensors"),
    }
    for i, (name, (changed, text)) in enumerate(cases.items()):
        edited(hub, f"alice/{name}", **changed)
        settings = f"pretrained=True, num_classes={(1000, 7)[i % 2]}, cache_dir={str(tmp_path)!r}"
        message = worker.run(f"timm.create_model('hf-hub:alice/{name}', {settings})", raises="CheckpointError")
        assert text in message, (name, message)
    dense_only = {key: value for key, value in about.items() if key != "masterkeys"}
    changed = {"masterkeys.safetensors": None, "config.json": json.dumps(dense_only).encode()}
    edited(hub, "alice/dense-only", **changed)
    worker.run(f"""
        kw = dict(pretrained=True, mk_keys_per_kernel=2, cache_dir={str(tmp_path)!r})
        anew = timm.create_model("hf-hub:alice/dense-only", **kw)
        assert any(isinstance(m, mk.MasterKeyConv2d) for m in anew.modules())
    """)


def test_outage_of_the_compact_file_is_an_error_not_another_model(hub, worker, published, tmp_path):
    hub.fail(("HEAD", r"masterkeys\.safetensors"), 503, times=None)
    message = worker.run(
        f"timm.create_model('hf-hub:alice/base', pretrained=True, cache_dir={str(tmp_path)!r})",
        raises="CheckpointError",
    )
    assert "masterkeys.safetensors" in message


def test_outage_of_the_weights_never_loads_a_pickle(hub, worker, published, tmp_path):
    hub.fail(("HEAD", r"/model\.safetensors"), 503, times=None)
    worker.run(f"""
        try:
            timm.create_model("hf-hub:alice/base", pretrained=True, cache_dir={str(tmp_path)!r})
        except Exception as error:
            print(type(error).__name__)
        else:
            raise AssertionError("loaded")
    """)
    assert hub.count("GET|HEAD", r"\.(bin|pth)") == 0


@pytest.mark.parametrize("kind", ["truncate", "stall"])
def test_download_faults(hub, worker, published, tmp_path, kind):
    match = ("GET", r"filename=masterkeys\.safetensors")
    hub.truncate(match) if kind == "truncate" else hub.stall(match, 0.5)
    worker.run(f"""
        load = functools.partial(timm.create_model, "hf-hub:alice/base", pretrained=True, cache_dir={str(tmp_path)!r})
        try:
            model = load()
        except Exception as error:  # clients before 1.0 do not go on where a download broke off
            assert {kind!r} == "truncate" and "IncompleteRead" in str(error)
            model = load()
        same(converted(), model)
    """)


def test_altered_download_is_refused(hub, worker, published, tmp_path):
    middle = len(published.branches["main"][1].files["masterkeys.safetensors"]) - 5000
    hub.alter(
        ("GET", r"filename=masterkeys\.safetensors"), lambda d: d[:middle] + bytes([d[middle] ^ 1]) + d[middle + 1 :]
    )
    call = f"timm.create_model('hf-hub:alice/base', pretrained=True, cache_dir={str(tmp_path)!r})"
    assert "SHA-256" in worker.run(call, raises="CheckpointError")


@pytest.mark.slow
def test_team_weights(hub, worker, published, home, tmp_path):
    worker.run(f"""
        mk.use_weights("test_convnext.mk8_ours", "alice/base")
        ours = timm.create_model("test_convnext.mk8_ours", pretrained=True, cache_dir={str(tmp_path)!r})
        same(converted(), ours)
        assert timm.is_model_pretrained("test_convnext.mk8_ours")
        assert timm.get_pretrained_cfg("test_convnext.mk8_ours").hf_hub_filename == "model.safetensors"
        five = timm.create_model("test_convnext.mk8_ours", pretrained=True, num_classes=5, cache_dir={str(tmp_path)!r})
        assert five.num_classes == 5
        assert timm.create_model("test_convnext.mk8_ours").num_classes == 1000
    """)
    for name, source in (
        ("test_convnext.ours", "alice/base"),
        ("resnet18.mk8", "a/b"),
        ("test_convnext.mk8", "nonsense"),
    ):
        worker.run(f"mk.use_weights({name!r}, {source!r})", raises="ConversionError")
    worker.run("mk.use_weights('test_efficientnet.mk8', 'alice/base')")
    assert "test_convnext" in worker.run(
        "timm.create_model('test_efficientnet.mk8', pretrained=True)", raises="CheckpointError"
    )
    env = hub.env(
        home / "team", TIMM_MASTERKEYS_WEIGHTS=f"test_convnext.mk8=alice/base@{published.branches['main'][1].sha}"
    )
    team = Worker(env)
    team.run("same(converted(), timm.create_model('test_convnext.mk8', pretrained=True))")
    team.stop()


def test_command_publish(hub, worker, tmp_path):
    worker.run(f"""
        from timm_masterkeys.cli import main
        mk.save_pretrained(converted(seed=8), {str(tmp_path / "out")!r})
        assert main(["publish", {str(tmp_path / "out")!r}, "alice/command", "--dry-run"]) == 0
    """)
    assert "alice/command" not in hub.repos
    out = worker.run(f"assert main(['publish', {str(tmp_path / 'out')!r}, 'alice/command']) == 0")
    assert hub.repos["alice/command"].head().sha in out
    worker.run("same(converted(seed=8), timm.create_model('hf-hub:alice/command', pretrained=True))")
    worker.run(f"assert main(['publish', {str(tmp_path / 'out')!r}, 'bob/command']) == 1")
    assert "bob/command" not in hub.repos


def test_publishing_what_was_loaded_changes_nothing_but_the_examples(hub, worker, published):
    """A published model, loaded and published elsewhere, keeps its licence and the source it came from."""
    worker.run("mk.push_to_hub(timm.create_model('hf-hub:alice/base', pretrained=True), 'alice/copy')")
    files, copied = published.branches["main"][1].files, hub.repos["alice/copy"].head().files
    for name in ("model.safetensors", "masterkeys.safetensors", "config.json"):
        assert files[name] == copied[name], name
    assert "base_model: timm/test_convnext.r160_in1k" in copied["README.md"].decode()
