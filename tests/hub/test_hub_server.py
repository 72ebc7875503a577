"""The tests' Hub against the real ``huggingface_hub`` client: that it is a Hub, and that what it breaks is broken."""

import json
import subprocess
import sys

import pytest
from hub_server import HubServer

pytestmark = pytest.mark.slow  # each starts an interpreter

PRELUDE = """
import json, os, sys, time
from huggingface_hub import HfApi, hf_hub_download

api, repo, folder = HfApi(), "alice/model", sys.argv[1]
pause = time.sleep
time.sleep = lambda seconds: pause(seconds / 50)  # the client's waits between tries

def attempt(function, *args, **kwargs):
    try:
        return function(*args, **kwargs)
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", "")
        return f"{type(error).__name__} {status}: {error}"

def upload(**kwargs):
    return attempt(lambda: api.upload_folder(repo_id=repo, folder_path=folder, **kwargs).oid)

def size(*args, **kwargs):
    return attempt(lambda: os.path.getsize(hf_hub_download(repo, *args, **kwargs)))
"""
DATA = bytes(range(256)) * 8192
HEADER = json.dumps({"weight": {"dtype": "U8", "shape": [len(DATA)], "data_offsets": [0, len(DATA)]}}).encode()
WEIGHTS = len(HEADER).to_bytes(8, "little") + HEADER + DATA
CARD = "---\nlicense: cc-by-nc-4.0\nlibrary_name: timm\ntags:\n- image-classification\n---\n# A model\n"
FILES = {"README.md": CARD.encode(), "config.json": b'{"architecture": "x"}', "model.safetensors": WEIGHTS}


@pytest.fixture
def hub():
    with HubServer() as hub:
        yield hub


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    for name, data in FILES.items():
        (path / name).write_bytes(data)
    return path


@pytest.fixture
def client(hub, folder, tmp_path):
    """Runs code as alice (or with another token) and returns what its last line, an expression, is worth."""

    def run(code, token="hf_alice_write", home="home", **env):
        *lines, last = code.strip().splitlines()
        script = "\n".join([PRELUDE, *lines, f"print(json.dumps({last}))"])
        command, env = [sys.executable, "-c", script, str(folder)], hub.env(tmp_path / home, token, **env)
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_a_folder_goes_up_and_comes_down(hub, client):
    urls = client("[api.create_repo(repo), api.create_repo(repo, exist_ok=True), upload()]")
    assert urls[0] == urls[1] == f"{hub.url}/alice/model"
    first, last = hub.repos["alice/model"].branches["main"]
    assert (first.message, set(first.files)) == ("initial commit", {".gitattributes"})
    assert last == hub.repos["alice/model"].head() and last.sha == urls[2] and last.author == "alice"
    assert last.files == first.files | FILES and last.lfs == {"model.safetensors"}
    steps = "create create validate-yaml validate-yaml preupload batch /storage/ verify commit".split()
    assert all(step in request.path for step, request in zip(steps, hub.requests, strict=True))
    assert [r.method for r in hub.requests if r.origin == "storage"] == ["PUT"]
    hub.requests.clear()
    for home in ("second", "second"):
        assert client("[size('config.json'), size('model.safetensors')]", home=home) == [21, len(WEIGHTS)]
    assert hub.count("HEAD") == 4 and hub.count("GET") == 2  # from the cache, then from the Hub and its storage
    assert {r.headers["authorization"] for r in hub.requests} == {"Bearer hf_alice_write", None} and not hub.leaks


def test_a_stale_parent_is_refused(hub, client):
    repo = hub.add_repo("alice/model", {"config.json": b"{}"})
    old, new = repo.branches["main"]
    refused, made = client(f"[upload(parent_commit={old.sha!r}), upload(parent_commit={new.sha!r})]")
    assert refused.startswith("HfHubHTTPError 412") and "branch was updated" in refused
    assert made == repo.head().sha and repo.branches["main"][:2] == [old, new] and len(repo.branches["main"]) == 3


def test_what_is_missing_and_which_card_is_refused(hub, client, folder):
    hub.add_repo("alice/model", FILES)
    code = """
missing = [size("nope"), size("config.json", revision="nope"), attempt(hf_hub_download, "alice/nope", "config.json")]
open(folder + "/README.md", "w").write("---\\nlicense: nonsense\\nbase_model: a/b/c\\n---\\n")
[*missing, upload()]
"""
    missing = client(code)
    kinds = ("RemoteEntryNotFoundError 404", "RevisionNotFoundError 404", "RepositoryNotFoundError 404", "ValueError ")
    assert all(text.startswith(kind) for text, kind in zip(missing, kinds, strict=True))
    assert '"license" must be one of' in missing[3] and '"base_model[0]" with value "a/b/c"' in missing[3]
    assert not hub.count("POST", "/preupload/")


def test_the_client_tries_the_steps_of_an_upload_again(hub, client):
    repo, steps = hub.add_repo("alice/model"), ("/preupload/", "/batch", "/storage/", "/verify")
    faults = [fault for step in steps for fault in (hub.fail((".*", step), 503), hub.drop((".*", step), when="after"))]
    assert client("upload()") == repo.head().sha and all(fault.hits == 1 for fault in faults)
    assert [hub.count(path=step) for step in steps] == [3, 3, 3, 3]


def test_an_error_of_the_server_itself_is_raised(folder, tmp_path):
    with pytest.raises(KeyError, match="no-such-field"), HubServer() as hub:
        hub.alter(("GET", "/whoami"), change=lambda body: json.loads(body)["no-such-field"])
        command = [sys.executable, "-c", f"{PRELUDE}\nprint(attempt(api.whoami))", str(folder)]
        env = hub.env(tmp_path, hub.token("alice"))
        assert "RemoteProtocolError" in subprocess.run(command, env=env, capture_output=True, text=True).stdout
