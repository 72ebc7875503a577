"""The tests' Hub against the real ``huggingface_hub`` client: that it is a Hub, and that what it breaks is broken."""

import json
import subprocess
import sys
import time
from hashlib import sha256

import pytest
from hub_server import HubServer

PRELUDE = """
import json, os, sys, time
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

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
    assert [(r.method, r.size) for r in hub.requests if r.origin == "storage"] == [("PUT", len(WEIGHTS))]

    hub.requests.clear()
    fresh = client("path = snapshot_download(repo)\n[path, sorted(os.listdir(path))]", home="fresh")
    assert fresh[0].endswith(last.sha) and fresh[1] == sorted(last.files)
    assert (hub.count("GET", "/storage/"), hub.count("HEAD", status=302), hub.count("HEAD", status=200)) == (1, 1, 3)
    hub.requests.clear()
    for home in ("fresh", "third"):
        assert client("[size('config.json'), size('model.safetensors')]", home=home) == [21, len(WEIGHTS)]
    assert hub.count("HEAD") == 4 and hub.count("GET") == 2  # from the cache, then from the Hub and its storage
    assert {r.headers.get("authorization") for r in hub.requests} == {"Bearer hf_alice_write", None} and not hub.leaks


def test_what_the_hub_tells(hub, client):
    hub.add_repo("alice/model", FILES)
    code = """
info = api.model_info(repo, files_metadata=True)
weights = next(file for file in info.siblings if file.rfilename == "model.safetensors")
tree = {file.path: file.size for file in api.list_repo_tree(repo)}
[api.whoami()["name"], info.sha, info.private, info.card_data.license, info.tags, weights.lfs.sha256, tree]
"""
    card = ["cc-by-nc-4.0", ["image-classification", "license:cc-by-nc-4.0"]]
    head = hub.repos["alice/model"].head()
    sizes = {path: len(data) for path, data in head.files.items()}
    assert client(code) == ["alice", head.sha, False, *card, sha256(WEIGHTS).hexdigest(), sizes]
    with HubServer() as other:
        assert other.add_repo("alice/model", FILES).head().sha == head.sha
        assert other.add_repo("alice/other", FILES).head().sha != head.sha


def test_what_is_unchanged_is_neither_sent_nor_committed(hub, client):
    first = hub.add_repo("alice/model", FILES).head().sha
    again, changed = client("again = upload()\nopen(folder + '/config.json', 'w').write('{}')\n[again, upload()]")
    assert again == first and changed == hub.repos["alice/model"].head().sha != first
    assert not hub.count("PUT") and [request.size < 1000 for request in hub.select("POST", "/commit/")] == [True]


def test_branches_and_pull_requests(hub, client):
    repo = hub.add_repo("alice/model")
    code = """
missing = upload(revision="dev")
api.create_branch(repo, branch="dev")
twice = attempt(api.create_branch, repo, branch="dev")
api.create_branch(repo, branch="dev", exist_ok=True)
on_dev = upload(revision="dev")
pull = api.upload_folder(repo_id=repo, folder_path=folder, create_pr=True, commit_message="A pull request")
refs = api.list_repo_refs(repo, include_pull_requests=True)
titles = [commit.title for commit in api.list_repo_commits(repo, revision="refs/pr/1")]
[missing, twice, on_dev, pull.pr_revision, [r.name for r in refs.branches + refs.pull_requests], titles]
"""
    missing, twice, on_dev, pull, refs, titles = client(code)
    assert missing.startswith("RevisionNotFoundError 404") and twice.startswith("HfHubHTTPError 409")
    assert on_dev == repo.head("dev").sha and pull == "refs/pr/1" and refs == ["main", "dev", "refs/pr/1"]
    assert titles == ["A pull request", "initial commit"] and len(repo.branches["main"]) == 1
    assert repo.head("dev").files == repo.head("refs/pr/1").files == repo.head().files | FILES


def test_a_stale_parent_is_refused(hub, client):
    repo = hub.add_repo("alice/model", {"config.json": b"{}"})
    old, new = repo.branches["main"]
    refused, made = client(f"[upload(parent_commit={old.sha!r}), upload(parent_commit={new.sha!r})]")
    assert refused.startswith("HfHubHTTPError 412") and "branch was updated" in refused
    assert made == repo.head().sha and repo.branches["main"][:2] == [old, new] and len(repo.branches["main"]) == 3


@pytest.mark.parametrize(
    ("token", "private", "read", "create", "write", "pull"),
    [
        ("", True, "RepositoryNotFoundError 401", "HfHubHTTPError 401", *["RepositoryNotFoundError 401"] * 2),
        ("", False, "", "HfHubHTTPError 401", *["RepositoryNotFoundError 401"] * 2),
        ("hf_wrong", False, *["HfHubHTTPError 401"] * 4),
        (
            "hf_bob_write",
            True,
            "RepositoryNotFoundError 404",
            "HfHubHTTPError 403",
            *["RepositoryNotFoundError 404"] * 2,
        ),
        ("hf_bob_write", False, "", "HfHubHTTPError 403", "HfHubHTTPError 403", ""),
        ("hf_alice_read", True, "", *["HfHubHTTPError 403"] * 3),
    ],
)
def test_who_may_do_what(hub, client, token, private, read, create, write, pull):
    repo = hub.add_repo("alice/model", {"config.json": b"{}"}, private=private)
    code = """
read = [attempt(lambda: api.model_info(repo).id), size("config.json")]
[read, attempt(api.create_repo, repo), upload(), upload(create_pr=True)]
"""
    seen, created, written, pulled = client(code, token=token)
    assert all(error.startswith(read) for error in seen) if read else seen == ["alice/model", 2]
    assert created.startswith(create) and written.startswith(write) and len(repo.branches["main"]) == 2
    assert pulled.startswith(pull) if pull else pulled == repo.head("refs/pr/1").sha
    assert not hub.leaks


def test_namespaces_and_visibility(hub, client):
    code = """
foreign = attempt(api.create_repo, "bob/model")
api.create_repo("lab/model", private=True)
private = [api.model_info("lab/model").private]
api.update_repo_settings("lab/model", private=False)
[foreign, *private, api.model_info("lab/model").private]
"""
    foreign, *private = client(code)
    assert foreign.startswith("HfHubHTTPError 403") and 'under the namespace "bob"' in foreign
    assert private == [True, False] and set(hub.repos) == {"lab/model"}


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
    faults = [(hub.fail((".*", step), 503), hub.drop((".*", step), when="after")) for step in steps]
    assert client("upload()") == repo.head().sha and all(fault.hits == 1 for pair in faults for fault in pair)
    for step in steps:
        tries = [(request.status, request.fault) for request in hub.select(path=step)]
        assert tries == [(503, "fail"), (0, "after"), (200, "none")]


def test_a_commit_that_fails_and_one_whose_answer_is_lost(hub, client):
    repo = hub.add_repo("alice/model")
    commit = ("POST", "/commit/")
    hub.fail(commit, 500), hub.drop(commit), hub.drop(commit, reset=True), hub.drop(commit, when="after")
    failed, dropped, reset, lost, again = client("[upload() for _ in range(5)]")
    assert failed.startswith("HfHubHTTPError 500") and reset.startswith("ReadError")
    assert dropped.startswith("RemoteProtocolError") and lost.startswith("RemoteProtocolError")
    assert again == repo.head().sha and len(repo.branches["main"]) == 2
    assert (hub.count(*commit), hub.count("PUT")) == (4, 1)  # the commit is there: the fifth run has nothing to send


def test_downloads_that_break(hub, client):
    hub.add_repo("alice/model", FILES)
    weights = ("GET", r"filename=model\.safetensors")
    truncated, altered = hub.truncate(weights), hub.alter(weights)
    code = """
import hashlib, huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 2**16  # what is less than a chunk is thrown away
hashlib.sha256(open(hf_hub_download(repo, "model.safetensors"), "rb").read()).hexdigest()
"""
    assert client(code) != sha256(WEIGHTS).hexdigest()  # the client does not look at the content
    assert [r.status for r in hub.select(*weights)] == [200, 206] and truncated.hits == altered.hits == 1
    assert hub.select(*weights)[1].headers["range"] == f"bytes={2**20}-"
    hub.alter(weights, change=lambda body: body[:10])
    hub.stall(weights, seconds=5)
    short, stalled = client("[size('model.safetensors') for _ in range(2)]", home="other", HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert short.startswith("OSError") and "Consistency check failed" in short and stalled == len(WEIGHTS)
    hub.fail(("HEAD", ".*"), 503, times=None)
    assert client("size('model.safetensors')", home="other") == len(WEIGHTS)  # from the cache


def test_a_request_is_seen_while_it_stalls(hub, folder, tmp_path):
    repo = hub.add_repo("alice/model")
    hub.stall(("POST", "/commit/"), seconds=60)
    command = [sys.executable, "-c", f"{PRELUDE}\nupload()", str(folder)]
    with subprocess.Popen(command, env=hub.env(tmp_path, hub.token("alice"))) as client:
        for _ in range(15000):
            if hub.count("POST", "/commit/"):
                break
            time.sleep(0.02)
        client.kill()
    assert hub.count("POST", "/commit/", status=0) == 1 and len(repo.branches["main"]) == 1


def test_an_error_of_the_server_itself_is_raised(folder, tmp_path):
    with pytest.raises(KeyError, match="no-such-field"), HubServer() as hub:
        hub.alter(("GET", "/whoami"), change=lambda body: json.loads(body)["no-such-field"])
        command = [sys.executable, "-c", f"{PRELUDE}\nprint(attempt(api.whoami))", str(folder)]
        env = hub.env(tmp_path, hub.token("alice"))
        assert "RemoteProtocolError" in subprocess.run(command, env=env, capture_output=True, text=True).stdout
