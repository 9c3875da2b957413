"""Uploads to a Hub on the loopback interface: what is sent, what is refused, and what happens when it goes
wrong."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import hubs
import loopback
import pytest
from huggingface_hub import constants

from ggufrq import cli
from ggufrq.base.errors import GgufrqError, HubError, ModelError, UsageError
from ggufrq.base.loopback import free_port
from ggufrq.make.record import Record
from ggufrq.models import patience
from ggufrq.models.hub import fetch_gguf
from ggufrq.publish import remote
from ggufrq.publish.local import local_files

fake = hubs.fake()
REPO = "user/Model-GGUF"
SMALL, LARGE = "Model-Q4_K_M.gguf", "Model-Q8_0.gguf"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A family of two files, with a card and a licence."""
    made = tmp_path / "Model-GGUF"
    made.mkdir()
    record = Record(made, "Model")
    for name, size in ((SMALL, 30_000), (LARGE, 70_000)):
        with record.making(name) as temporary:
            temporary.write_bytes(b"GGUF" + random.Random(name).randbytes(size))
            record.finish(name, [(temporary, name)], {}, {"type": name})
    (made / "README.md").write_text("---\nlicense: mit\n---\n# Model\n")
    (made / "LICENSE").write_text("MIT")
    (made / ".hidden.tmp").write_text("half of something")
    (made / "validate-Model").mkdir()
    return made


@pytest.fixture
def hub() -> Iterator[Any]:
    with fake.fake_hub({}, tokens={hubs.TOKEN: "user"}) as server:
        yield server


@pytest.fixture
def publish(
    folder: Path,
    hub: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command in this process, with what huggingface_hub reads on import set to the fake Hub."""
    for name, value in (("ENDPOINT", hub.url), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(constants, name, value, raising=False)  # old ones lack the second
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    loopback.no_proxies(monkeypatch)

    def run(*arguments: str, token: str | None = hubs.TOKEN) -> subprocess.CompletedProcess[str]:
        with pytest.MonkeyPatch.context() as patch:
            if token is not None:
                patch.setenv("HF_TOKEN", token)
            capsys.readouterr()
            code = cli.invoke(["publish", str(folder), *arguments])
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, out, err)

    return run


def data_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def writes(hub: Any) -> list[str]:
    return [line for line in hub.requests if not line.startswith(("GET", "HEAD"))]


# The folder


def test_what_a_folder_gives(folder: Path) -> None:
    files = {file.name: file for file in local_files(folder)}
    assert list(files) == ["LICENSE", SMALL, LARGE, "Model.ggufrq.json", "README.md"]
    for name, file in files.items():
        data = (folder / name).read_bytes()
        assert (file.bytes, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert file.git_id == fake.git_id(data)
    assert [file.name for file in local_files(folder, ["*-Q8_0.gguf", "LIC*"])] == [
        SMALL,
        "Model.ggufrq.json",
        "README.md",
    ]


def test_files_that_no_manifest_vouches_for(folder: Path) -> None:
    (folder / "other.gguf").write_bytes(b"GGUF")
    (folder / "secret.env").write_text("KEY=1")
    with pytest.raises(UsageError, match=r"vouches for: other\.gguf, secret\.env") as caught:
        local_files(folder)
    assert "--exclude 'other.gguf' --exclude 'secret.env'" in str(caught.value.remedy)
    assert len(local_files(folder, ["other.gguf", "*.env"])) == 5


def test_half_a_model_is_not_sent(folder: Path) -> None:
    names = [f"Model-Q6_K-{part:05d}-of-00002.gguf" for part in (1, 2)]
    record = Record(folder, "Model")
    for name in names:
        (folder / f".{name}.tmp").write_bytes(name.encode())
    record.finish(
        "Model-Q6_K.gguf", [(folder / f".{name}.tmp", name) for name in names], {}, {"type": "Q6_K"}
    )
    assert set(names) <= {file.name for file in local_files(folder)}
    assert not set(names) & {file.name for file in local_files(folder, ["*Q6_K*"])}
    with pytest.raises(UsageError, match="without which the other parts are no model") as caught:
        local_files(folder, ["*-00002-of-*"])
    assert str(caught.value.remedy) == " ".join(f"--exclude '{name}'" for name in names)


def test_a_file_that_changed(folder: Path) -> None:
    path = folder / SMALL
    facts, data = path.stat(), path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    with pytest.raises(ModelError, match=f"{SMALL} is not what the manifest says"):
        local_files(folder)
    assert local_files(folder, [SMALL])


def test_a_file_that_is_missing(folder: Path) -> None:
    (folder / SMALL).unlink()
    with pytest.raises(ModelError, match=f"lacks files of its manifest: {SMALL}"):
        local_files(folder)
    assert local_files(folder, [SMALL])


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (lambda folder: (folder / "Model.ggufrq.json").unlink(), UsageError, "has no manifest"),
        (lambda folder: (folder / "Model.ggufrq.json").write_text("{"), ModelError, "or damaged"),
        (lambda folder: (folder / "Model.ggufrq.json").write_text('{"files": 3}'), ModelError, "or damaged"),
    ],
)
def test_manifests_that_are_none(
    folder: Path, spoil: Callable[[Path], None], error: type[GgufrqError], says: str
) -> None:
    spoil(folder)
    with pytest.raises(error, match=says):
        local_files(folder)


def test_nothing_left(folder: Path) -> None:
    with pytest.raises(UsageError, match="all models are excluded"):
        local_files(folder, ["*.gguf"])


# The upload


def test_dry_run(publish: Callable[..., Any], hub: Any) -> None:
    hub.repos["user/other"] = {}
    done = publish(REPO, "--dry-run", "--collection", "Models")
    assert done.returncode == 0, done.stderr
    assert not writes(hub) and REPO not in hub.repos
    for line in (
        f"send  {SMALL}",
        "send  README.md",
        "repository: new, private",
        "collection 'Models': new; to add",
        "to send: 5 files, ",
    ):
        assert line in done.stdout
    told = data_of(publish(REPO, "--dry-run", "--json"))
    assert {file["action"] for file in told["files"]} == {"send"} and told["is_new"] and told["private"]


def test_upload_and_a_second_run(publish: Callable[..., Any], hub: Any, folder: Path) -> None:
    told = data_of(publish("Model-GGUF", "--json"))  # in the namespace of the token
    assert told["repo"] == REPO and told["is_new"]
    assert sorted(told["verified"]) == ["LICENSE", SMALL, LARGE, "Model.ggufrq.json", "README.md"]
    assert hub.private == {REPO: True}
    assert len(hub.commits) == 1 and len(hub.puts) == 2
    for name in told["verified"]:
        assert hub.repos[REPO][name] == (folder / name).read_bytes()
    assert ".hidden.tmp" not in hub.repos[REPO]
    before = len(writes(hub))
    again = publish(REPO)
    assert again.returncode == 0, again.stderr
    assert "nothing to do" in again.stdout and "verified 5 files" in again.stdout
    assert f"there  {SMALL}" in again.stdout and "left   .gitattributes" in again.stdout
    assert len(writes(hub)) == before, "a second run sends nothing"


def test_what_was_sent_is_told_as_done(publish: Callable[..., Any], hub: Any) -> None:
    done = publish(REPO, "--collection", "Models")
    for line in (f"sent  {SMALL}", "collection 'Models': new; added", "sent: 5 files, "):
        assert line in done.stdout
    assert "send" not in done.stdout.replace("sent", "") and "to add" not in done.stdout


def test_only_what_changed_is_sent(publish: Callable[..., Any], hub: Any, folder: Path) -> None:
    data_of(publish(REPO, "--json"))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Another text\n")
    told = data_of(publish(REPO, "--json"))
    assert [file["name"] for file in told["files"] if file["action"] == "send"] == ["README.md"]
    assert hub.commits[1:] == [(REPO, ["README.md"])] and len(hub.puts) == 2


def test_a_tag_that_means_another_file(publish: Callable[..., Any], hub: Any) -> None:
    """What is in the repository beside the family counts, too."""
    hub.repos[REPO] = {"Model-4x-Q4_K_M.gguf": b"GGUF"}
    done = publish(REPO, "--public", "--dry-run")
    says = "llama.cpp's -hf takes Model-4x-Q4_K_M.gguf for :Q4_K_M, and not Model-Q4_K_M.gguf"
    assert says in done.stdout.splitlines()
    shadows = json.loads(publish(REPO, "--public", "--dry-run", "--json").stdout)["shadows"]
    assert shadows == [says]


def test_a_card_of_other_files_or_another_repository(
    publish: Callable[..., Any], hub: Any, folder: Path
) -> None:
    def card(*names: str, repo: str = REPO) -> list[str]:
        """What is told of a card with these links; the same as text and as data."""
        links = "\n".join(f"[{name}](https://huggingface.co/{repo}/blob/main/{name})" for name in names)
        (folder / "README.md").write_text(f"---\nlicense: mit\n---\n{links}\n")
        asked = (REPO, "--dry-run", "--exclude", LARGE)
        told = [line for line in publish(*asked).stdout.splitlines() if "README.md " in line[:10]]
        assert data_of(publish(*asked, "--json"))["card"] == told
        return told

    assert card() == card(SMALL) == []
    assert card(SMALL, LARGE) == [
        f"README.md links to {LARGE}, not published: `ggufrq card` has --exclude, too"
    ]
    hub.repos[REPO], hub.private[REPO] = {LARGE: b"GGUF"}, True
    assert card(SMALL, LARGE) == []
    assert card(LARGE) == [f"README.md does not name {SMALL}: `ggufrq card DIR --repo {REPO}` does"]
    assert card(SMALL, repo="Model-GGUF")[0].startswith("README.md links to files of Model-GGUF: ")
    assert card(SMALL, repo="user/other") == [
        f"README.md links to files of user/other: `ggufrq card DIR --repo {REPO}` mends that"
    ]


def test_public_only_when_that_is_said(publish: Callable[..., Any], hub: Any) -> None:
    hub.repos[REPO], hub.private[REPO] = {}, False
    done = publish(REPO)
    assert done.returncode == 2 and "is public" in done.stderr and "--public" in done.stderr
    assert not writes(hub)
    hub.private[REPO] = True
    done = publish(REPO, "--public", "--dry-run")
    assert "repository: there, public from now on" in done.stdout and hub.private[REPO]
    data_of(publish(REPO, "--public", "--json"))
    assert hub.private[REPO] is False
    order = [line.rpartition("/")[2] for line in writes(hub)]
    assert order.index("settings") > order.index("main"), "seen only when all is there"
    assert data_of(publish(REPO, "--public", "--json"))["make_public"] is False


def test_collection(publish: Callable[..., Any], hub: Any) -> None:
    told = data_of(publish(REPO, "--collection", "Models", "--json"))
    (made,) = hub.collections
    assert made["private"] and told["collection_url"].endswith(made["slug"])
    data_of(publish("user/Second-GGUF", "--collection", "Models", "--json"))
    assert [item["id"] for item in made["items"]] == [REPO, "user/Second-GGUF"]
    before = len(writes(hub))
    done = publish(REPO, "--collection", "Models")
    assert "collection 'Models': has it" in done.stdout and len(writes(hub)) == before


def test_upload_in_parts(publish: Callable[..., Any], hub: Any, folder: Path) -> None:
    hub.chunk = 16_384
    data_of(publish(REPO, "--json"))
    assert len(hub.puts) == 2 + 5
    assert hub.repos[REPO][LARGE] == (folder / LARGE).read_bytes()


# What goes wrong


@pytest.mark.parametrize(
    ("method", "path", "kind", "headers"),
    [
        ("GET", "whoami", 503, {}),
        ("GET", "tree", "drop", {}),
        ("POST", "repos/create", 429, {"Retry_After": "1"}),
        ("POST", "repos/create", "lose", {}),
        ("POST", "preupload", 502, {}),
        ("POST", "batch", "drop", {}),
        ("PUT", "^/lfs/", 500, {}),
        ("PUT", "^/lfs/", "drop", {}),
        ("POST", "commit", 429, {"RateLimit": '"api";r=0;t=1'}),
        ("POST", "commit", 412, {}),
        ("POST", "commit", "drop", {}),
        ("POST", "commit", "lose", {}),
        ("POST", "collections", 504, {}),
    ],
)
def test_faults_that_pass(
    publish: Callable[..., Any], hub: Any, folder: Path, method: str, path: str, kind: int | str, headers: Any
) -> None:
    fault = hub.fault(method, path, kind, **headers)
    data_of(publish("Model-GGUF", "--collection", "Models", "--json"))
    assert fault.times == 0, "it happened"
    assert hub.repos[REPO][LARGE] == (folder / LARGE).read_bytes()
    assert len(hub.commits) == 1 and sorted(set(hub.puts)) == sorted(hub.objects)
    assert [item["id"] for item in hub.collections[0]["items"]] == [REPO]


@pytest.mark.parametrize("arguments", [(REPO, "--dry-run"), (REPO,), ("Model-GGUF",)])
def test_nobody_answers(
    publish: Callable[..., Any], hub: Any, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    """It is told at once, and before all files are read."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    done = publish(*arguments)
    assert done.returncode == HubError.exit_code and not waits
    says, remedy = done.stderr.splitlines()
    assert says.startswith(f"error: the Hub at {constants.ENDPOINT} does not answer: ")
    assert "HF_ENDPOINT" in remedy


def test_a_hub_that_is_silent(publish: Callable[..., Any], hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST", (1, 1))
    hub.fault("HEAD", "^/$", "stall")
    done = publish(REPO, "--dry-run")
    assert done.returncode == HubError.exit_code and "does not answer: " in done.stderr
    hub.fault("GET", "^/api/models", "stall")
    with pytest.raises(ModelError, match=f"{REPO} could not be fetched"):
        fetch_gguf(REPO)


def test_waits(publish: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setenv("HF_TOKEN", hubs.TOKEN)
    monkeypatch.setattr(time, "sleep", waits.append)
    hub = remote.Hub(REPO)

    class Answer(Exception):
        def __init__(self, status: int, **headers: str) -> None:
            super().__init__("busy")
            self.response = type("Response", (), {"status_code": status, "headers": headers})()

    soon = formatdate(time.time() + 30, usegmt=True)
    errors = [Answer(429, **{"Retry-After": "7"}), Answer(503), ConnectionResetError(), TimeoutError()]
    told = [
        Answer(429, RateLimit='"api";r=0;t=40'),
        Answer(503, **{"Retry-After": soon}),
        Answer(429, **{"Retry-After": "Mon, 01 Jan 2001 00:00:00 GMT"}),
    ]

    def call() -> str:
        if errors:
            raise errors.pop(0)
        return "done"

    assert hub.call(call) == "done"
    assert waits == [7, 2, 4, 8]
    waits.clear()
    errors = told
    assert hub.call(call) == "done"
    assert waits == [40, pytest.approx(30, abs=5), 0]
    waits.clear()
    errors = [Answer(500)] * 10
    with pytest.raises(HubError, match=r"stopped \(500\): busy") as caught:
        hub.call(call)
    assert waits == [1, 2, 4, 8, 16] and "goes on from there" in str(caught.value.remedy)
    for error, says in ((Answer(404), r"\(404\)"), (ValueError("Invalid metadata\nno such"), "no such")):
        errors = [error]
        with pytest.raises(HubError, match=says):
            hub.call(call)
    errors = [OSError(5, "Input/output error")]
    with pytest.raises(OSError, match="Input/output"):
        hub.call(call)
    assert len(waits) == 5


@pytest.mark.parametrize("status", [401, 403, 400])
def test_an_upload_that_stops_in_the_middle(publish: Callable[..., Any], hub: Any, status: int) -> None:
    """All was sent but the commit: the next run sends nothing twice."""
    hub.fault("POST", "commit", status)
    done = publish(REPO)
    assert done.returncode == 8, done.stderr
    assert f"({status})" in done.stderr and "Traceback" not in done.stderr
    assert ("hf auth login" in done.stderr) == (status in (401, 403))
    assert not hub.commits and len(hub.puts) == 2
    told = data_of(publish(REPO, "--json"))
    assert len(told["verified"]) == 5 and len(hub.puts) == 2 and len(hub.commits) == 1


def test_an_expired_token(publish: Callable[..., Any], hub: Any) -> None:
    done = publish(REPO, token="hf_expiredexpiredexpired")
    assert done.returncode == 8
    assert "does not accept the token (401): Invalid user token." in done.stderr
    assert "try: hf auth login" in done.stderr and not hub.repos


def test_a_namespace_of_others(publish: Callable[..., Any], hub: Any) -> None:
    done = publish("other/Model-GGUF")
    assert done.returncode == 8
    assert "may not write to other/Model-GGUF (403): you have no rights" in done.stderr


def test_no_token(publish: Callable[..., Any], hub: Any) -> None:
    done = publish(REPO, token=None)
    assert done.returncode == 8 and "no token for the Hub was found" in done.stderr
    assert not hub.requests and "Checking" not in done.stderr, "known before all files are read"
    done = publish(f"{REPO}:Q4_K_M")
    assert done.returncode == 2 and "is no id of a repository" in done.stderr
    assert not hub.requests and "Checking" not in done.stderr


def test_a_dry_run_that_cannot_look(publish: Callable[..., Any], hub: Any) -> None:
    hub.fault("GET", "tree", 400)
    done = publish(REPO, "--dry-run", token=None)
    assert done.returncode == HubError.exit_code and "upload" not in done.stderr
    assert f"the Hub could not be asked about {REPO} (400): " in done.stderr


def test_a_dry_run_needs_no_token(publish: Callable[..., Any], hub: Any, folder: Path) -> None:
    says = "there is no token: what is private was not seen"
    hub.repos[REPO] = {SMALL: (folder / SMALL).read_bytes()}
    done = publish(REPO, "--public", "--dry-run", "--collection", "Models", token=None)
    assert done.returncode == 0, done.stderr
    assert f"there  {SMALL}" in done.stdout and says in done.stdout
    assert says not in publish(REPO, "--public", "--dry-run").stdout
    done = publish(REPO, "--dry-run", token=None)
    assert done.returncode == UsageError.exit_code and "is public" in done.stderr
    hub.private[REPO] = True
    told = data_of(publish(REPO, "--dry-run", "--json", token=None))
    assert told["is_new"] and told["unseen"]
    done = publish("Model-GGUF", "--dry-run", token=None)
    assert done.returncode == 8 and "or USER/Model-GGUF for --dry-run" in done.stderr
    assert not writes(hub)


def test_metadata_that_the_hub_refuses(publish: Callable[..., Any], hub: Any, folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: nonsense\n---\n")
    done = publish(REPO)
    assert done.returncode == 8
    assert '"license" must be one of' in done.stderr and "README.md" in done.stderr
    assert not hub.commits
    (folder / "README.md").write_text("no metadata")
    done = publish(REPO)
    assert done.returncode == 0 and "empty or missing yaml metadata" in done.stderr


def test_what_arrives_is_verified(publish: Callable[..., Any], hub: Any) -> None:
    hub.spoil = LARGE
    done = publish(REPO, "--public")
    assert done.returncode == 8
    assert f"{LARGE} did not arrive in {REPO} as sent" in done.stderr
    assert hub.private[REPO], "what is not right is not shown"
    hub.spoil = ""
    assert LARGE in data_of(publish(REPO, "--public", "--json"))["verified"]


@pytest.mark.parametrize("more", [(), ("--debug",)])
def test_no_token_anywhere(folder: Path, hub: Any, tmp_path: Path, more: tuple[str, ...]) -> None:
    """A Hub that repeats what was sent to it must not bring the token into messages or logs."""
    hub.fault("POST", "preupload", 429, 1)
    hub.fault("PUT", "^/lfs/", 500, 1)
    hub.fault("POST", "commit", "echo")
    done = subprocess.run(
        [sys.executable, "-m", "ggufrq", *more, "publish", str(folder), REPO],
        env={**hubs.environment(hub.url, tmp_path / "hf"), "GGUFRQ_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 8 and "you sent" in done.stderr, done.stderr
    logs = list((tmp_path / "cache").rglob("*.log"))
    assert logs
    for text in (done.stdout, done.stderr, *(path.read_text() for path in logs)):
        assert hubs.TOKEN not in text and "signature=secret" not in text


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
@pytest.mark.parametrize("stop", ["kill", "interrupt"])
def test_stopped_while_it_sends(
    publish: Callable[..., Any], folder: Path, hub: Any, tmp_path: Path, stop: str
) -> None:
    second = fake.sha256((folder / LARGE).read_bytes())
    fault = hub.fault("PUT", second, "stall")
    process = subprocess.Popen(
        [sys.executable, "-m", "ggufrq", "publish", str(folder), REPO],
        env=hubs.environment(hub.url, tmp_path / "hf"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert fault.seen.wait(60)
    if stop == "kill":
        process.kill()
    else:
        process.send_signal(2)
    _, told = process.communicate(timeout=30)
    assert process.returncode == (-9 if stop == "kill" else 130), told
    assert not hub.commits and len(hub.puts) == 1
    done = data_of(publish(REPO, "--json"))
    assert len(done["verified"]) == 5
    assert sorted(hub.puts) == sorted({*hub.objects}), "what was there was not sent again"


def test_redaction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-form")
    text = "Bearer a-token-of-another-form for hf_abcdef12345 at http://x/y?X-Amz-Signature=abc&z=1 end"
    assert remote.redacted(text) == "Bearer … for … at http://x/y?… end"
