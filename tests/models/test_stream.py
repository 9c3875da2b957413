"""A model on the Hub that is quantized shard by shard: the same files, and less disk on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType

import hubs
import pytest
import sharded

from ggufrq.base import proc
from ggufrq.build.project import Build
from ggufrq.models.resolve import embedded_models

NAME = "docs-qwen3-8m"
TYPES = ["--types", "Q4_K_M,Q8_0", "--no-run"]


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """The most bytes of disk that a folder took, as looked at all the time."""
    most, stop = [0], threading.Event()

    def look() -> None:
        while not stop.is_set():
            used = 0
            # os.walk passes over a folder that goes meanwhile, where rglob ends
            for path in [Path(at, name) for at, _, names in os.walk(folder) for name in names]:
                try:
                    facts = path.lstat()
                except OSError:
                    continue
                if facts.st_nlink == 1 or path.parent == folder:  # of a file with two names one counts
                    used += facts.st_blocks * 512
            most[0] = max(most[0], used)
            time.sleep(0.01)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()


@contextmanager
def limited(folder: Path, size: int) -> Iterator[None]:
    """A folder that takes so many bytes and no more, a file system of its own; what is in it is gone at the
    end. Skips where none may be mounted."""
    folder.mkdir()
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a file system of limited size takes root")
    done = proc.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=False)
    if done.rc != 0:
        pytest.skip(f"no file system of limited size may be mounted: {done.stderr.strip()}")
    try:
        yield
    finally:
        proc.run(["umount", "--lazy", folder])


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".gguf"}


def test_streamed_files_are_the_plain_ones(
    llama_build: Build, fake_hub: ModuleType, tmp_path: Path, command_line: Callable[..., list[str]]
) -> None:
    repo = sharded.repository(embedded_models()[NAME], 1, layers=1)
    with fake_hub.fake_hub({"org/Small": repo}) as hub:
        env = hubs.environment(hub.url, tmp_path / "home", None)

        def quantize(*arguments: str) -> proc.Completed:
            command = command_line(llama_build, "quantize", "org/Small", *TYPES, *arguments)
            return proc.run(command, env=env, cwd=tmp_path, check=False)

        (tmp_path / "text.txt").write_text("words")
        for wrong, says in (
            (["--types", "Q2_K"], "an importance matrix, for which the whole model is run"),
            (["--calibrate", "text.txt"], "--calibrate makes an importance matrix"),
            (["--types", "BF16"], "BF16 is the whole model in 16 bits"),
            (["--fold", "kv"], "folding looks at all that reads a tensor"),
            (["--recipe", "sensitivity", "--bpw", "5"], "a recipe is found on the whole model"),
        ):
            refused = quantize("--stream", "-o", "refused", *wrong)
            assert refused.rc == 2 and says in refused.stderr, refused.stderr
        weights = sum(len(data) for name, data in repo.items() if name.endswith(".safetensors"))
        assert hub.sent < weights, "nothing was fetched but headers and the tokenizer"
        made = quantize("--stream", "-o", "streamed")
        assert made.rc == 0, made.stderr
        assert quantize("-o", "plain").rc == 0
    streamed, plain = files(tmp_path / "streamed"), files(tmp_path / "plain")
    assert sorted(streamed) == ["Small-Q4_K_M.gguf", "Small-Q8_0.gguf", "Small-kv.gguf"]
    for name in sorted(streamed)[:2]:
        assert streamed[name] == plain[name]
    assert not list((tmp_path / "streamed").glob(".Small*"))


def damaged(shard: bytes) -> bytes:
    """A file of weights of which none is a number."""
    start = 8 + struct.unpack("<Q", shard[:8])[0]
    return shard[:start] + b"\xc0\x7f" * ((len(shard) - start) // 2)


@pytest.mark.thorough
def test_another_revision_begins_anew_and_large_files_are_split(
    llama_build: Build, fake_hub: ModuleType, tmp_path: Path, command_line: Callable[..., list[str]]
) -> None:
    """The first one ends at a damaged shard, which stays where it was fetched to, and the second mends it."""
    repo = sharded.repository(embedded_models()[NAME], 2, layers=1)
    last = max(name for name in repo if name.endswith(".safetensors"))
    options = ["--types", "Q8_0", "--split-size", "1M", "--no-run"]
    with fake_hub.fake_hub({"another/Small": {**repo, last: damaged(repo[last])}}) as hub:
        env = hubs.environment(hub.url, tmp_path / "home", None)

        def quantize(*arguments: str) -> proc.Completed:
            command = command_line(llama_build, "quantize", "another/Small", *options, *arguments)
            return proc.run(command, env=env, cwd=tmp_path, check=False)

        stopped = quantize("--stream", "-o", "streamed")
        assert stopped.rc != 0 and "computes no numbers" in stopped.stderr, stopped.stderr
        assert (tmp_path / "streamed" / ".Small.stream" / "shards" / last).is_file()
        hub.sha, hub.repos["another/Small"] = "89abcdef" * 5, repo
        made = quantize("--stream", "-o", "streamed")
        assert made.rc == 0, made.stderr
        assert quantize("-o", "plain").rc == 0
    streamed, plain = files(tmp_path / "streamed"), files(tmp_path / "plain")
    parts = sorted(name for name in streamed if "-of-" in name)
    assert len(parts) > 1 and sorted(streamed) == [*parts, "Small-kv.gguf"]
    assert all(streamed[name] == plain[name] for name in parts)


@pytest.mark.thorough
@pytest.mark.skipif(os.name != "posix", reason="kills a process group")
@pytest.mark.parametrize("disk", ["watched", "quota"])
def test_peak_of_the_disk_and_kill(
    llama_build: Build,
    fake_hub: ModuleType,
    tmp_path: Path,
    command_line: Callable[..., list[str]],
    disk: str,
) -> None:
    """Killed after three pieces and run again, on a disk that has no room for more, or on one that is looked
    at."""
    repo = sharded.repository(embedded_models()[NAME], 6)
    sizes = sorted(len(data) for name, data in repo.items() if name.endswith(".safetensors"))
    assert len(sizes) > 5
    out = tmp_path / "streamed"
    with fake_hub.fake_hub({"org/Sharded": repo}) as hub, ExitStack() as stack:
        env = hubs.environment(hub.url, tmp_path / "home", None)
        command = command_line(llama_build, "quantize", "org/Sharded", *TYPES)
        command[2] = "import ggufrq.make.record as record\nrecord.SPARE_DISK = 0\n" + command[2]
        stream = [*command, "--stream", "-o", "streamed"]
        told = json.loads(proc.run([*stream, "--dry-run", "--json"], env=env, cwd=tmp_path).stdout)
        # Outputs, two shards, and a split in 16 bits as large as one; beside them headers, profile, record
        bound, beside = sum(file["bytes"] for file in told["files"]) + 3 * sizes[-1], 2 << 20
        if disk == "quota":
            sent = hub.sent
            with limited(out, told["disk_needed"] - (1 << 20)):
                refused = proc.run(stream, env=env, cwd=tmp_path, check=False)
            assert (
                refused.rc == 1
                and "the disk has no room: " in refused.stderr
                and hub.sent - sent < sizes[0] / 2
            )
            out.rmdir()
            stack.enter_context(limited(out, bound + beside))
        state = out / ".Sharded.stream" / "state.json"
        process = subprocess.Popen(stream, env=env, cwd=tmp_path, start_new_session=True)
        deadline = time.monotonic() + 1200
        while not (state.is_file() and json.loads(state.read_text())["done"] >= 3):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        done = json.loads(state.read_text())["done"]
        sent = hub.sent
        with watched(out) as most:
            again = proc.run(stream, env=env, cwd=tmp_path)
        assert done >= 3 and again.rc == 0
        assert hub.sent - sent < 0.8 * sum(sizes), "what was made is not fetched again"
        proc.run([*command, "-o", "plain"], env=env, cwd=tmp_path)
        streamed, plain = files(out), files(tmp_path / "plain")
    outputs = ["Sharded-Q4_K_M.gguf", "Sharded-Q8_0.gguf"]
    assert all(streamed[name] == plain[name] for name in outputs)
    assert bound == sum(len(streamed[name]) for name in outputs) + 3 * sizes[-1]
    assert most[0] < bound + len(streamed["Sharded-kv.gguf"]) + (1 << 20)
    assert bound < sum(map(len, plain.values())) + sum(sizes), "the plain way takes more"
