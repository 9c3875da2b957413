"""A run against a base run, with a program in llama-perplexity's place that says what the real one said."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import pytest
from heard import Heard

from ggufrq.base.errors import ToolError
from ggufrq.build.project import Build
from ggufrq.cache.cases import parse_case
from ggufrq.drive.cache_check import CacheError
from ggufrq.measure.base_run import BaseRun, Scored
from ggufrq.measure.divergence import Divergences, Subject, divergences
from ggufrq.tools import perplexity

LOGS = Path(__file__).resolve().parent.parent / "logs" / "tools"
SCRIPT = """#!/bin/sh
echo "$@" >> "{folder}/runs"
env | grep ^LLAMA_RQ_ >> "{folder}/runs"
case "$*" in
*--kl-divergence) cat "{folder}/out.txt"; cat "{folder}/err.txt" >&2;;
*) cat "{folder}/base.out.txt"; cat "{folder}/base.err.txt" >&2;;
esac
"""

pytestmark = pytest.mark.skipif(os.name != "posix", reason="a shell script stands in for the program")


def saved(name: str) -> str:
    return (LOGS / f"{name}.txt").read_text(encoding="utf-8")


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """The run was iso3/planar4 with block rotations, four texts of 256 tokens."""
    err = saved("ppl-iso3-planar4.err")
    (tmp_path / "out.txt").write_text(saved("ppl-iso3-planar4.out"))
    (tmp_path / "err.txt").write_text(err)
    # its base as the log of a base run: the same context with f16, and the perplexity it was compared with
    sizes = re.sub(
        r"K \(iso3\): +[\d.]+ MiB, V \(planar4\): +[\d.]+ MiB", "K (f16): 4.00 MiB, V (f16): 4.00 MiB", err
    )
    (tmp_path / "base.err.txt").write_text(
        sizes.replace("computing over", "calculating perplexity over")
        + "\nFinal estimate: PPL = 151.2647 +/- 18.2\n"
    )
    (tmp_path / "base.out.txt").write_text("[1]1.0,[2]1.0,[3]1.0,[4]1.0,\n")
    tool = tmp_path / "llama-perplexity"
    tool.write_text(SCRIPT.format(folder=tmp_path))
    tool.chmod(0o755)
    return Build("key", tmp_path, tmp_path, tmp_path, {})


@pytest.fixture
def model(tmp_path: Path) -> Subject:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    return Subject("m", path, "sha", "Q8_0", None)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("words")
    return path


def runs_of(build: Build) -> list[str]:
    path = build.root / "runs"
    return path.read_text().splitlines() if path.is_file() else []


def test_row(build: Build, model: Subject, text: Path) -> None:
    case = parse_case("iso3/planar4:block")
    with Divergences(model, build, text, Scored(256, 4)) as work:
        heard = Heard()
        row = work.take(case, listener=heard)
        assert heard.steps == ["f16: base run", "iso3/planar4 block: perplexity"]
        texts = heard.reached
        assert texts[-1] == 4 and texts == sorted(texts)
        assert work.kept(case) == row
        assert work.kept(parse_case("iso3/planar4")) is None
    assert (row["ctx"], row["chunks"], row["scored"]) == (256, 4, 508)
    assert (row["kld_mean"], row["kld_mean_err"], row["kld_p99"]) == (0.005594, 0.000244, 0.024433)
    assert (row["ln_ratio"], row["ln_ratio_err"]) == (0.005713, 0.004733)
    assert (row["mode"], row["bits_per_value"], row["cache_bytes"]) == ("block", 3.625, 16 * 1024 * 116)
    base, none, first, *variables = runs_of(build)
    assert "-ctk f16 -ctv f16" in base and "--kl-divergence-base" in base
    assert "-c 256 -b 1024 --chunks 4" in first and first.endswith("--kl-divergence")
    assert none == "LLAMA_RQ_PROFILE=none" and sorted(variables) == ["LLAMA_RQ_MODE=block", none]
    assert row["command"].startswith("LLAMA_RQ_MODE=block llama-perplexity -m m.gguf -f text.txt -c 256 ")
    assert not list((build.root / "cache" / "measurements").glob("base-*")), "the base's file is removed"


def test_rows_are_kept(build: Build, model: Subject, text: Path) -> None:
    cases = [parse_case("iso3/planar4:block"), parse_case("iso3/planar4")]
    heard = Heard()
    scored = Scored(256, 4)
    first = divergences(model, cases[:1], build, text, scored, listener=heard)
    again = divergences(model, cases, build, text, scored, listener=heard)
    assert again[0] == first[0] and heard.kept == [False, True, False]
    assert [row for row, _ in heard.rows] == [*first, *again] and heard.done == 3
    count = len(runs_of(build))
    text.write_text("other words")
    divergences(model, cases[:1], build, text, scored)
    assert len(runs_of(build)) > count, "another text, another result"


def test_cache_that_was_kept_otherwise(build: Build, model: Subject, text: Path) -> None:
    with Divergences(model, build, text, Scored(256, 4)) as work:
        with pytest.raises(CacheError, match="did not keep the cache in iso3, but"):
            work.take(parse_case("iso3"))
        assert work.kept(parse_case("iso3")) is None


def test_another_base_than_the_one_that_was_run(build: Build, model: Subject, text: Path) -> None:
    path = build.root / "base.err.txt"
    path.write_text(path.read_text().replace("151.2647", "151.9"))
    with (
        Divergences(model, build, text, Scored(256, 4)) as work,
        pytest.raises(ToolError, match="compared with"),
    ):
        work.take(parse_case("iso3/planar4"))


def test_no_result_whatever_the_exit_code(build: Build, model: Subject, text: Path) -> None:
    (build.root / "out.txt").write_text("")
    with Divergences(model, build, text, Scored(256, 4)) as work, pytest.raises(ToolError, match="no result"):
        work.take(parse_case("iso3/planar4"))


def test_a_failure_names_the_log_that_stays(build: Build, tmp_path: Path) -> None:
    """Runs at the same time have logs of their own, which are added to one that stays."""
    build.tool("llama-perplexity").write_text("#!/bin/sh\nexit 1\n")
    own, every = tmp_path / "own.log", tmp_path / "every.log"
    runs = BaseRun(build, tmp_path / "text", tmp_path / "base.bin", rounding=1e-3, ppl=1.0)
    for see, named in ((None, own), (every, every)):
        with pytest.raises(ToolError, match="failed with exit status 1") as failed:
            runs.compare("m", tmp_path / "m.gguf", parse_case("f16"), Scored(256, 4), log=own, see=see)
        assert failed.value.remedy == f"see {named}"
    assert own.is_file() and not every.exists()


@pytest.mark.parametrize(("rounding", "passes"), [(1e-3, False), (1e-2, True)])
def test_how_far_the_base_may_be_off(build: Build, tmp_path: Path, rounding: float, passes: bool) -> None:
    """The log says that it was compared with a perplexity of 151.2647."""
    runs = BaseRun(build, tmp_path / "text", tmp_path / "base.bin", rounding, ppl=151.9)
    with contextlib.nullcontext() if passes else pytest.raises(ToolError, match=r"compared with 151\.2"):
        found, _ = runs.compare("m", tmp_path / "m.gguf", parse_case("f16"), Scored(256, 4), log=None)
        assert found.kld_mean == 0.005594
    runs.close()
    assert runs.ppl is None


def test_error_of_a_run_compared_with_itself() -> None:
    out = saved("ppl-iso3-planar4.out").replace("0.005713 ±   0.004733", "0.000001 ±       -nan")
    found = perplexity.parse_divergence(out, saved("ppl-iso3-planar4.err"))
    assert (found.ln_ratio, found.ln_ratio_err) == (0.000001, 0.0)


def test_texts_one_after_the_other() -> None:
    args = perplexity.arguments(
        Path("m"),
        Path("t"),
        parse_case("iso3").pair,
        Path("b"),
        n_ctx=4096,
        chunks=3,
        together=1,
        divergence=False,
    )
    assert args[args.index("-b") + 1] == "4096"
    assert args[args.index("--chunks") + 1] == "3"
    assert Scored(4096, 3, together=1).tokens == 4096


def test_text_that_is_too_short() -> None:
    with pytest.raises(ToolError, match="you need at least") as error:
        perplexity.parse_divergence(saved("ppl-short.out"), saved("ppl-short.err"))
    assert error.value.remedy == "a longer text, or a shorter context"
