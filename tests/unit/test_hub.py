"""Downloads from a Hub on the loopback interface, in their own process: the endpoint is read on import."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import hubs
import pytest
from loopback import PROXY_VARIABLES

from ggufrq.base import proc
from ggufrq.base.errors import ModelError
from ggufrq.models import convert, hub

_PROGRAM = """
import json, sys
from pathlib import Path
from ggufrq.models import hub
from ggufrq.base.errors import GgufrqError
try:
    more = {"head": True} if "head" in sys.argv else {}
    found = getattr(hub, sys.argv[1])(*(word for word in sys.argv[2:] if word != "head"), **more)
    if sys.argv[1] == "fetch_gguf_headers":
        found = Path(found[0][0])
    folder = getattr(found, "folder", found)
    inside = folder.rglob("*") if folder.is_dir() else []
    files = sorted(p.relative_to(folder).as_posix() for p in inside) or [folder.name]
    print(json.dumps({"revision": getattr(found, "revision", None), "files": files, "path": str(folder)}))
except GgufrqError as error:
    print(json.dumps({"error": error.message, "remedy": error.remedy}))
"""
MODEL = {
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": b"one",
    "model-00002-of-00002.safetensors": b"two",
    "tokenizer.json": b"{}",
    "merges.txt": b"",
    "README.md": b"#",
    "pytorch_model.bin": b"unwanted",
    "original/consolidated.safetensors": b"unwanted",
    "onnx/model.onnx": b"unwanted",
}


fake = hubs.fake()


def call(url: str, home: Path, *arguments: str, **env: str) -> dict[str, Any]:
    done = proc.run(
        [sys.executable, "-c", _PROGRAM, *arguments],
        cwd=Path(hub.__file__).parents[2],
        env={
            "HF_ENDPOINT": url,
            "HF_HOME": str(home),
            "GGUFRQ_CACHE": str(home / "ggufrq"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": None,
            "HF_TOKEN": None,
            **dict.fromkeys(PROXY_VARIABLES),
            **env,
        },
        timeout=120,
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**answer, "told": done.stderr}


def test_only_what_is_needed_is_fetched(tmp_path: Path) -> None:
    with fake.fake_hub({"user/model": MODEL}) as server:
        found = call(server.url, tmp_path, "fetch_model", "user/model")
        assert found["revision"] == fake.SHA
        assert found["files"] == [
            "config.json",
            "merges.txt",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "tokenizer.json",
        ]
        fetched = list(server.fetched)
        assert not any("unwanted" in name or "README" in name or "onnx" in name for name in fetched)
        again = call(server.url, tmp_path, "fetch_model", "user/model", fake.SHA)
        assert again["path"] == found["path"]
        assert server.fetched == fetched  # nothing is fetched twice


def test_headers_alone(tmp_path: Path) -> None:
    def shard(name: str) -> bytes:
        header = json.dumps({name: {"dtype": "U8", "shape": [10**6], "data_offsets": [0, 10**6]}}).encode()
        return len(header).to_bytes(8, "little") + header + b"x" * 10**6

    shards = {f"model-0000{i}-of-00002.safetensors": shard(f"t{i}") for i in (1, 2)}
    with fake.fake_hub({"user/model": {**MODEL, **shards}}) as server:
        found = call(server.url, tmp_path, "fetch_headers", "user/model")
        assert found["revision"] == fake.SHA
        assert server.sent < 2000
        sent = server.sent
        assert call(server.url, tmp_path, "fetch_headers", "user/model")["path"] == found["path"]
        assert server.sent == sent
    folder = Path(found["path"])
    assert set(found["files"]) == {"config.json", "merges.txt", "tokenizer.json", *shards}
    assert convert.inspect(folder).data_bytes == 2 * 10**6
    for name, data in shards.items():
        assert (folder / name).read_bytes() == data.rstrip(b"x") + bytes(10**6)


def test_headers_that_are_none(tmp_path: Path) -> None:
    with fake.fake_hub({"user/model": MODEL}) as server:
        found = call(server.url, tmp_path, "fetch_headers", "user/model")
    assert "model-00001-of-00002.safetensors of user/model is not a safetensors file" in found["error"]


def test_gguf_by_label(tmp_path: Path) -> None:
    files = {"m-Q4_K_M.gguf": b"GGUFq4", "m-Q8_0.gguf": b"GGUFq8", "m-imatrix.gguf": b"GGUFi"}
    with fake.fake_hub({"user/model-GGUF": files}) as server:
        assert call(server.url, tmp_path, "fetch_gguf", "user/model-GGUF")["files"] == ["m-Q4_K_M.gguf"]
        assert call(server.url, tmp_path, "fetch_gguf", "user/model-GGUF", "q8_0")["files"] == ["m-Q8_0.gguf"]
        assert server.fetched == ["user/model-GGUF/m-Q4_K_M.gguf", "user/model-GGUF/m-Q8_0.gguf"]


@pytest.mark.parametrize("place", ["", "gguf/"])
def test_the_profile_comes_with_the_model(tmp_path: Path, place: str) -> None:
    files = {"m-Q4_K_M.gguf": b"GGUFq4", "m-kv.gguf": b"GGUFp", "other-kv.gguf": b"GGUFo"}
    files["m-mine-Q8_0.gguf"] = gguf(recipe="mine")
    with fake.fake_hub({"user/m-GGUF": {f"{place}{name}": data for name, data in files.items()}}) as server:
        found = call(server.url, tmp_path, "fetch_gguf", "user/m-GGUF")
        assert sorted(server.fetched) == [
            f"user/m-GGUF/{place}m-Q4_K_M.gguf",
            f"user/m-GGUF/{place}m-kv.gguf",
        ]
        call(server.url, tmp_path / "again", "fetch_gguf", "user/m-GGUF", "mine")
        assert server.fetched[2:] == [f"user/m-GGUF/{place}m-{end}.gguf" for end in ("mine-Q8_0", "kv")]
    file = Path(found["path"])
    assert file.name == "m-Q4_K_M.gguf" and file.with_name("m-kv.gguf").read_bytes() == b"GGUFp"


def test_the_head_comes_with_the_model_where_it_is_wanted(tmp_path: Path) -> None:
    """The one nearest in bits, of those whose names say so."""
    names = ("m-mtp-2-Q4_K_M.gguf", "m-mtp-2-Q8_0.gguf", "mtp-m-mtp-2-BF16.gguf", "mtp-m-mtp-2-Q8_0.gguf")
    with fake.fake_hub({"user/m-GGUF": {name: name.encode() for name in names}}) as server:
        call(server.url, tmp_path, "fetch_gguf", "user/m-GGUF", "Q4_K_M")
        assert server.fetched == ["user/m-GGUF/m-mtp-2-Q4_K_M.gguf"]
        found = call(server.url, tmp_path, "fetch_gguf", "user/m-GGUF", "Q4_K_M", "head")
        assert server.fetched[1:] == ["user/m-GGUF/mtp-m-mtp-2-Q8_0.gguf"]
        assert "fetching mtp-m-mtp-2-Q8_0.gguf, its head for further tokens" in found["told"]
    assert Path(found["path"]).with_name("mtp-m-mtp-2-Q8_0.gguf").is_file()


@pytest.mark.parametrize(
    ("arguments", "status", "says", "remedy"),
    [
        (("fetch_model", "user/none"), {}, "no such repository: user/none", "check the name"),
        (("fetch_model", "user/model", "v9"), {}, "no such revision", "check the name"),
        (("fetch_model", "user/model"), {"user/model": 403}, "accepted its terms", "hf auth login"),
        (("fetch_model", "user/model"), {"user/model": 500}, "could not be fetched", "once more"),
        (("fetch_model", "user/empty"), {}, "no safetensors files, but 1 GGUF", "ggufrq run user/empty"),
        (("fetch_gguf", "user/model"), {}, "no GGUF files", "ggufrq quantize user/model"),
    ],
)
def test_errors(
    tmp_path: Path, arguments: tuple[str, ...], status: dict[str, int], says: str, remedy: str
) -> None:
    with fake.fake_hub({"user/model": MODEL, "user/empty": {"a-Q8_0.gguf": b"GGUF"}}, status) as server:
        found = call(server.url, tmp_path, *arguments)
    assert says in found["error"]
    assert remedy in found["remedy"]


def test_nobody_listens(tmp_path: Path) -> None:
    with fake.fake_hub({}) as server:
        url = server.url
    found = call(url, tmp_path, "fetch_model", "user/model")
    assert "user/model could not be fetched from the Hub" in found["error"]
    assert "HF_ENDPOINT" in found["remedy"]


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "nobody"])
def test_what_is_at_hand_takes_no_network(tmp_path: Path, how: str) -> None:
    """A model that was fetched before is used when the Hub is not to be asked, or nobody answers."""
    files = {"m-Q8_0.gguf": gguf(), "m-Q4_K_M.gguf": gguf()}
    with fake.fake_hub({"user/model": MODEL, "user/m-GGUF": files}) as server:
        url = server.url
        model = call(url, tmp_path, "fetch_model", "user/model")
        file = call(url, tmp_path, "fetch_gguf", "user/m-GGUF", "Q8_0")
        sent = len(server.requests)
        if how == "HF_HUB_OFFLINE":
            at_hand(url, tmp_path, model, file, HF_HUB_OFFLINE="1")
            assert len(server.requests) == sent
    if how == "nobody":
        for listing in tmp_path.glob("hub/*/trees"):  # which older clients of the Hub do not leave
            shutil.rmtree(listing)
        at_hand(url, tmp_path, model, file)


def at_hand(url: str, home: Path, model: dict[str, Any], file: dict[str, Any], **env: str) -> None:
    said = f"user/model is taken from the cache, at {fake.SHA[:12]}"
    for arguments in (("fetch_model", "user/model"), ("fetch_headers", "user/model", fake.SHA)):
        found = call(url, home, *arguments, **env)
        assert (found["path"], found["revision"]) == (model["path"], fake.SHA)
        assert found["told"].count("taken from the cache") == 1 and said in found["told"]
        assert "fetching" not in found["told"] and "Retrying" not in found["told"]
    again = call(url, home, "fetch_gguf", "user/m-GGUF", "Q8_0", **env)
    assert again["path"] == file["path"] and "user/m-GGUF is taken from the cache" in again["told"]
    headers = call(url, home, "fetch_gguf_headers", "user/m-GGUF", "Q8_0", **env)
    assert "error" not in headers and "fetching" not in headers["told"]
    lacking = call(url, home, "fetch_gguf", "user/m-GGUF", "Q4_K_M", **env)
    assert "no file for 'Q4_K_M'; there are m-Q8_0" in lacking["error"]
    other = call(url, home, "fetch_model", "user/other", **env)
    assert ("HF_HUB_OFFLINE" in other["error"]) == bool(env) and "user/other" in other["error"]


def test_headers_at_hand_take_no_network(tmp_path: Path) -> None:
    """Of a model of which only the headers were fetched, they are what is at hand."""
    header = json.dumps({"t": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}).encode()
    weights = {"model.safetensors": len(header).to_bytes(8, "little") + header + bytes(8)}
    with fake.fake_hub({"user/model": {"config.json": b"{}", **weights}}) as server:
        found = call(server.url, tmp_path, "fetch_headers", "user/model")
        url = server.url
    again = call(url, tmp_path, "fetch_headers", "user/model", fake.SHA)
    assert again["path"] == found["path"] and "taken from the cache" in again["told"]


def test_a_cache_without_the_model_is_none(tmp_path: Path) -> None:
    """A snapshot whose weights were removed: what there is to do is to download it, not to convert it."""
    with fake.fake_hub({"user/model": MODEL}) as server:
        found = call(server.url, tmp_path, "fetch_model", "user/model")
        url = server.url
    for path in Path(found["path"]).glob("*.safetensors"):
        path.resolve().unlink()
    for ask in ("fetch_model", "fetch_gguf"):
        said = call(url, tmp_path, ask, "user/model", HF_HUB_OFFLINE="1")
        assert "user/model is not in the Hub's cache" in said["error"]
        assert "without HF_HUB_OFFLINE" in said["remedy"]


def gguf(*, recipe: str | None = None) -> bytes:
    """The header of a model without tensors, which a recipe may have made."""

    def number(value: int) -> bytes:
        return value.to_bytes(8, "little")

    def text(value: str) -> bytes:
        return number(len(value)) + value.encode()

    values = b"" if recipe is None else text("ggufrq.recipe") + (8).to_bytes(4, "little") + text(recipe)
    return b"GGUF" + (3).to_bytes(4, "little") + number(0) + number(int(bool(values))) + values


@pytest.mark.parametrize(
    ("headers", "waits"),
    [({"Retry_After": "1"}, 1), ({"RateLimit": '"api";r=0;t=1'}, 1)],
)
def test_a_busy_hub_says_when_to_ask_again(tmp_path: Path, headers: dict[str, str], waits: int) -> None:
    with fake.fake_hub({"user/model": MODEL}) as server:
        fault = server.fault("GET", "^/api/models", 429, **headers)
        found = call(server.url, tmp_path, "fetch_model", "user/model")
    assert fault.times == 0 and found["revision"] == fake.SHA
    assert f"once more in {waits} s" in found["told"]


def test_no_bars_where_there_is_no_terminal(tmp_path: Path) -> None:
    with fake.fake_hub({"user/model": MODEL}) as server:
        assert "%|" not in call(server.url, tmp_path, "fetch_model", "user/model")["told"]


def test_a_mirror_that_sends_whole_files_only(tmp_path: Path) -> None:
    """A model's weights must not be read into memory for their headers."""
    files = {**MODEL, "it-Q8_0.gguf": b"GGUF" + bytes(1000)}
    with fake.fake_hub({"user/model": files}, ranges=False) as server:
        found = call(server.url, tmp_path, "fetch_headers", "user/model")
        assert found["error"] == "the Hub does not send parts of model-00001-of-00002.safetensors"
        again = call(server.url, tmp_path, "fetch_gguf_headers", "user/model")
        assert again["error"] == "the Hub does not send parts of it-Q8_0.gguf"


@pytest.mark.parametrize(
    ("names", "label", "chosen"),
    [
        (["only.gguf"], None, ["only.gguf"]),
        (["m-Q8_0.gguf", "m-Q4_K_M.gguf"], None, ["m-Q4_K_M.gguf"]),
        (["m-Q8_0.gguf", "m-Q4_K_M.gguf"], "q8_0", ["m-Q8_0.gguf"]),
        (["m-Q8_0.gguf", "mmproj-F16.gguf"], None, ["m-Q8_0.gguf"]),
        (
            ["d/m-Q8_0-00002-of-00002.gguf", "d/m-Q8_0-00001-of-00002.gguf", "m-Q4_0.gguf"],
            "Q8_0",
            ["d/m-Q8_0-00001-of-00002.gguf", "d/m-Q8_0-00002-of-00002.gguf"],
        ),
        (
            ["X-Q5_K_M.gguf", "X-awq-Q5_K_M.gguf", "X-proposal-c-Q5_K_M.gguf"],
            "Q5_K_M",
            ["X-Q5_K_M.gguf"],
        ),
        (
            ["X-Q5_K_M.gguf", "X-awq-Q5_K_M.gguf", "X-proposal-c-Q5_K_M.gguf"],
            "awq-Q5_K_M",
            ["X-awq-Q5_K_M.gguf"],
        ),
        (["X-BF16.gguf", "mtp-X-BF16.gguf", "X-kv.gguf"], "BF16", ["X-BF16.gguf"]),
        (["X-BF16.gguf", "mtp-X-BF16.gguf"], None, ["X-BF16.gguf"]),
        (["X-Q8_0.gguf", "X-kv.gguf"], None, ["X-Q8_0.gguf"]),
        (["m-Q8_0.gguf", "n-Q8_0.gguf"], "Q8_0", ["m-Q8_0.gguf"]),  # the repository is called m
    ],
)
def test_choice(names: list[str], label: str | None, chosen: list[str]) -> None:
    assert hub.choose_gguf("r/m", names, label) == chosen


@pytest.mark.parametrize(
    ("names", "label", "says"),
    [
        ([], None, "no GGUF files"),
        (["imatrix.gguf"], None, "no GGUF files"),
        (["m-Q8_0.gguf", "m-Q6_K.gguf"], None, "no file for 'Q4_K_M'; there are m-Q8_0, m-Q6_K"),
        (["m-Q8_0.gguf"], "Q4_0", "no file for 'Q4_0'"),
        (["a-Q8_0.gguf", "b-Q8_0.gguf"], "Q8_0", "more than one file"),
        (["m-Q8_0-00001-of-00003.gguf", "m-Q8_0-00003-of-00003.gguf"], None, "2 of 3 shards"),
    ],
)
def test_no_choice(names: list[str], label: str | None, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        hub.choose_gguf("r/m", names, label)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("Qwen/Qwen3-0.6B", ("Qwen/Qwen3-0.6B", None)),
        ("u/m-GGUF:Q4_K_M", ("u/m-GGUF", "Q4_K_M")),
        ("model", None),
        ("a/b/c", None),
        ("./a/b", None),
        ("https://huggingface.co/a/b", None),
    ],
)
def test_ids(text: str, parsed: tuple[str, str | None] | None) -> None:
    assert hub.parse_id(text) == parsed
