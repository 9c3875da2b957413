"""One prompt with quantized caches: the text, what llama.cpp's log says of the cache, honest failures."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import kv_drivers
import pytest
from click.testing import CliRunner
from families import family_of
from narrow import with_heads_of

from ggufrq.base.errors import GgufrqError, ModelError, ToolError
from ggufrq.build.project import Build
from ggufrq.cache.kv import Sought, kv_types, parse_plan
from ggufrq.cli.run import run as command
from ggufrq.drive.run import generate
from ggufrq.ggufs.kv_shape import kv_shape
from ggufrq.make.plan import Family
from ggufrq.profile import profile_from_weights
from ggufrq.tools.logs import Metric, parse_context
from ggufrq.tools.programs import Programs

DENSE, HYBRID = "docs-qwen3-8m", "docs-qwen3.5-8m"
PROMPT = "The CREATE TABLE statement is used to"
UPSTREAM = "f32, f16, bf16, q8_0, q4_0, q4_1, iq4_nl, q5_0, q5_1"


@pytest.mark.parametrize("name", [DENSE, HYBRID])
@pytest.mark.parametrize("kv", ["iso3", "iso3/planar4", "rotor2/q8_0", "f16/iso4", "f16"])
def test_generation(families: dict[str, Family], programs: Programs, name: str, kv: str) -> None:
    plan, model = parse_plan(kv), families[name].file("Q8_0")
    pieces: list[str] = []
    found = generate(
        model, PROMPT, plan, programs, tokens=12, n_ctx=1024, raw=True, temperature=0, on_text=pieces.append
    )
    assert "".join(pieces) == found.text
    assert found.text.strip() or name == HYBRID, "the hybrid model may end its text at once"
    assert (found.type_k, found.type_v, found.tokens_held) == (plan.base.k.name, plan.base.v.name, 1024)
    assert found.kv_bytes == plan.bytes_for(kv_shape(model), 1024)
    assert found.f16_bytes == parse_plan("f16").bytes_for(kv_shape(model), 1024)
    assert (found.recurrent_mib > 0) == (name == HYBRID)
    context = parse_context(found.log.read_text())
    assert context is not None
    assert context.k_types == {plan.base.k.name} and context.v_types == {plan.base.v.name}
    assert set(context.rotations) == {
        side for side, kind in (("K", plan.base.k), ("V", plan.base.v)) if kind.ours
    }


@pytest.mark.parametrize("name", [DENSE, HYBRID])
@pytest.mark.parametrize("kv", ["iso3; 0,-1:q8_0/f16", "q8_0; 1:iso3/planar4", "f16/iso4; 0--1:rotor3/f16"])
def test_layers_apart(families: dict[str, Family], programs: Programs, name: str, kv: str) -> None:
    plan, model = parse_plan(kv), families[name].file("Q8_0")
    found = generate(model, PROMPT, plan, programs, tokens=4, n_ctx=1024, raw=True, temperature=0)
    shape = kv_shape(model)
    assert found.kv_bytes == plan.bytes_for(shape, 1024)
    assert found.f16_bytes == parse_plan("f16").bytes_for(shape, 1024)
    assert abs(found.kv_bytes / (1 << 20) - found.kv_mib) < 0.0051, "as llama.cpp's own log has it"
    context = parse_context(found.log.read_text())
    assert context is not None
    pairs = plan.resolve(len(shape.k_layers))
    assert context.layers == {"K": tuple(p.k.name for p in pairs), "V": tuple(p.v.name for p in pairs)}


@pytest.mark.parametrize("name", [DENSE, HYBRID])
@pytest.mark.parametrize(("kv", "first"), [("iso3", 0), ("iso3", 2), ("iso3/f16; 0:q8_0", 1)])
def test_the_newest_and_first_tokens_in_f16(
    families: dict[str, Family],
    programs: Programs,
    name: str,
    kv: str,
    first: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LLAMA_RQ_RECENT", "7")  # the option counts
    plan, model = parse_plan(kv).with_exact(32, first), families[name].file("Q8_0")
    found = generate(model, PROMPT, plan, programs, tokens=4, n_ctx=1024, raw=True, temperature=0)
    shape = kv_shape(model)
    context = parse_context(found.log.read_text())
    assert context is not None
    assert (context.recent, context.first) == (32, first) == (found.recent, found.first)
    assert context.recent_bytes == plan.recent_bytes(shape, 1024)
    assert found.kv_bytes == plan.bytes_for(shape, 1024) + plan.recent_bytes(shape, 1024)


@pytest.mark.parametrize("name", [DENSE, HYBRID])
@pytest.mark.parametrize("kv", ["iso3", "f16/iso4; 0:iso4/q8_0"])
def test_the_profile_is_made_or_found(
    families: dict[str, Family], programs: Programs, name: str, kv: str, tmp_path: Path
) -> None:
    model = tmp_path / f"{name}-Q4_K_M.gguf"
    model.symlink_to(families[name].file("Q4_K_M"))
    plan = parse_plan(kv).with_profile(Sought.AUTO)
    found = generate(model, PROMPT, plan, programs, tokens=4, n_ctx=512, raw=True, temperature=0)
    assert found.profile is not None and found.profile.startswith("profile from a text")
    context = parse_context(found.log.read_text())
    assert context is not None and context.profile is not None
    assert context.profile.source == "text" and Path(context.profile.file).is_file()
    assert found.kv_bytes == plan.bytes_for(kv_shape(model), 512)
    beside = tmp_path / f"{name}-kv.gguf"
    profile_from_weights(model, 600).write(beside)
    found = generate(model, PROMPT, plan, programs, tokens=4, n_ctx=512, raw=True, temperature=0)
    assert found.profile == f"profile {beside.name}, from the weights"
    context = parse_context(found.log.read_text())
    assert context is not None and context.profile == Metric(str(beside), "weights", 600)
    plain = generate(model, PROMPT, parse_plan(kv), programs, tokens=4, n_ctx=512, raw=True, temperature=0)
    context = parse_context(plain.log.read_text())
    assert context is not None and context.profile is None and plain.profile is None
    with pytest.raises(ModelError, match="for another model"):
        other = families[HYBRID if name == DENSE else DENSE].file("Q4_K_M")
        generate(other, PROMPT, plan.with_profile(beside), programs, tokens=4, n_ctx=512)


def test_layer_that_the_model_does_not_have(families: dict[str, Family], programs: Programs) -> None:
    with pytest.raises(GgufrqError, match=r"layer"):
        generate(
            families[HYBRID].file("Q8_0"), PROMPT, parse_plan("iso3; 2:q8_0"), programs, tokens=4, n_ctx=512
        )


def test_variables_of_the_user_change_nothing(
    families: dict[str, Family], programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_RQ_LAYERS", "0:f16")
    monkeypatch.setenv("LLAMA_RQ_PROFILE", "/not/there.gguf")
    monkeypatch.setenv("LLAMA_RQ_CALIB", "/not/there.gguf")
    monkeypatch.setenv("LLAMA_RQ_FIRST", "3")
    model = families[DENSE].file("Q8_0")
    found = generate(model, PROMPT, parse_plan("iso3"), programs, tokens=2, n_ctx=512, raw=True)
    assert found.kv_bytes == parse_plan("iso3").bytes_for(kv_shape(model), 512)


@pytest.mark.parametrize("kv", [name for name, kind in kv_types().items() if kind.ours])
def test_every_type_takes_what_it_says(families: dict[str, Family], programs: Programs, kv: str) -> None:
    model = families[HYBRID].file("Q4_K_M")
    found = generate(model, PROMPT, parse_plan(kv), programs, tokens=4, n_ctx=512, raw=True, temperature=0)
    values = 2 * 2 * 2 * 256 * 512  # K and V, 2 layers, 2 heads of 256
    assert found.kv_bytes is not None
    assert 8 * found.kv_bytes / values == parse_plan(kv).base.bits in (2.125, 3.125, 4.125, 5.125)


def test_four_bits_say_what_f16_says_for_a_while(families: dict[str, Family], programs: Programs) -> None:
    """Random K and V would not: the cache is really read, and rotated back."""
    model = families[DENSE].file("Q8_0")
    texts = {
        kv: generate(
            model, PROMPT, parse_plan(kv), programs, tokens=6, n_ctx=512, raw=True, temperature=0
        ).text
        for kv in ("f16", "iso4", "rotor4", "planar4")
    }
    assert len({text[:8] for text in texts.values()}) == 1, texts


def test_chat_answer_has_nothing_around_it(families: dict[str, Family], programs: Programs) -> None:
    pieces: list[str] = []
    prompt = 'How do I\n"quote" é — in SQL? \\n is not a newline'
    found = generate(
        families[DENSE].file("Q8_0"),
        prompt,
        parse_plan("iso3"),
        programs,
        tokens=10,
        n_ctx=1024,
        temperature=0,
        on_text=pieces.append,
    )
    assert 1 <= found.tokens <= 10
    assert "".join(pieces) == found.text
    for noise in ("Loading", "available commands", "Exiting", "> How", "▄", "t/s"):
        assert noise not in found.text


@pytest.mark.parametrize("raw", [False, True])
def test_prompt_too_long_for_a_command_line(
    families: dict[str, Family], programs: Programs, monkeypatch: pytest.MonkeyPatch, raw: bool
) -> None:
    model, prompt, seen = families[DENSE].file("Q8_0"), "Some words,\nand \\n more of them. " * 20, []
    for longest in (100_000, 100):
        monkeypatch.setattr("ggufrq.drive.run._LONGEST_ARGUMENT", longest)
        found = generate(
            model, prompt, parse_plan("iso3"), programs, tokens=4, n_ctx=1024, raw=raw, temperature=0
        )
        seen.append((found.prompt_tokens, found.text))
    assert seen[0] == seen[1]
    assert seen[0][0] > 100


@pytest.mark.parametrize("raw", [False, True])
def test_prompt_too_long_for_the_context(families: dict[str, Family], programs: Programs, raw: bool) -> None:
    with pytest.raises(ToolError, match=r"exceeds the available context size|prompt is too long") as caught:
        generate(
            families[DENSE].file("Q8_0"), "word " * 600, parse_plan("iso3"), programs, n_ctx=256, raw=raw
        )
    assert "-c N" in str(caught.value.remedy)


def test_damaged_model(families: dict[str, Family], programs: Programs, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(families[DENSE].file("Q8_0").read_bytes()[:2_000_000])
    with pytest.raises(ToolError, match="data is not within the file bounds"):
        generate(path, PROMPT, parse_plan("iso3"), programs, tokens=4, n_ctx=512)


def test_heads_of_64(llama_build: Build, programs: Programs, tmp_path: Path) -> None:
    """In blocks of 64, by the same names, with all that goes with them, and counted so."""
    source = with_heads_of(64, tmp_path)
    model = family_of(str(source), ["Q8_0"], llama_build, out=tmp_path / "out").file("Q8_0")
    plan = parse_plan("iso3/planar4").with_exact(32, 1).with_profile(Sought.WEIGHTS)
    found = generate(model, PROMPT, plan, programs, tokens=4, n_ctx=1024)
    shape = kv_shape(model)
    assert plan.bits(shape) == (3.25 + 4.25) / 2
    assert found.kv_bytes == plan.bytes_for(shape, 1024) + plan.recent_bytes(shape, 1024)
    assert found.profile is not None and found.tokens >= 1


def test_head_that_a_type_cannot_hold(llama_build: Build, programs: Programs, tmp_path: Path) -> None:
    source = with_heads_of(32, tmp_path)
    model = family_of(str(source), ["Q8_0"], llama_build, out=tmp_path / "out").file("Q8_0")
    for raw in (False, True):
        with pytest.raises(ToolError, match=r"iso3 .*head_dim of 32.* use q4_0") as caught:
            generate(model, PROMPT, parse_plan("f16/iso3"), programs, tokens=4, n_ctx=512, raw=raw)
        assert caught.value.remedy == "--kv q4_0"
    assert generate(model, PROMPT, parse_plan("q8_0"), programs, tokens=4, n_ctx=512).tokens >= 1


# The command


def test_command(families: dict[str, Family]) -> None:
    model = str(families[DENSE].file("Q4_K_M"))
    result = CliRunner().invoke(
        command, [model, "-p", "Hello", "--kv", "iso3/planar4", "-n", "8", "--temp", "0", "--raw"]
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() and result.stdout.endswith("\n")
    plan, shape = parse_plan("iso3/planar4").as_usual(), kv_shape(Path(model))
    size, f16 = plan.bytes_for(shape, 4096), parse_plan("f16").bytes_for(shape, 4096)
    size += plan.recent_bytes(shape, 4096)
    bits = 16 * size / f16
    assert bits == 3.625 + 16 * 34 / 4096
    assert f"cache  iso3/planar4, {bits:g} bits per value: {size:,} bytes for 4,096 tokens" in result.stderr
    assert "the first token and the newest 32 in f16, which is counted above" in result.stderr
    assert f"bytes, {16 / bits:.2f} times that" in result.stderr
    assert "speed  prompt" in result.stderr


def test_command_with_layers_apart(families: dict[str, Family]) -> None:
    model = str(families[DENSE].file("Q4_K_M"))
    result = CliRunner().invoke(
        command,
        [
            model, "-p", "Hello", "--kv", "iso3; 0-1,-1:q8_0", "-n", "4", "-c", "512", "--raw",
            "--kv-recent", "0", "--kv-first", "0",
        ],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    plan, shape = parse_plan("iso3; 0-1,-1:q8_0"), kv_shape(Path(model))
    size, bits = plan.bytes_for(shape, 512), plan.bits(shape)
    assert (
        f"cache  iso3; 0-1,-1:q8_0, {bits:g} bits per value: {size:,} bytes for 512 tokens" in result.stderr
    )


def test_a_cache_without_means_with_layers_apart(families: dict[str, Family], tmp_path: Path) -> None:
    model, means = families[DENSE].file("Q8_0"), tmp_path / "means.gguf"
    kv_drivers.means(model, means, size=0.1)
    arguments = [str(model), "-p", "Hello", "-n", "2", "-c", "512", "--raw", "-t", "1"]
    calibrated = [*arguments, "--kv", "q8_0; 1:iso3", "--kv-calib", str(means)]
    result = CliRunner().invoke(command, calibrated)
    assert result.exit_code == 0, result.output
    assert "means of K subtracted: means.gguf" in result.stderr
    result = CliRunner().invoke(command, [*calibrated, "--kv", "planar3"])
    assert isinstance(result.exception, ToolError) and "is for K rotated by iso" in str(result.exception)
    assert "calibrate" in str(result.exception.remedy)


@pytest.mark.parametrize("raw", [["--raw"], []])
def test_where_the_model_is_to_lie(families: dict[str, Family], raw: list[str]) -> None:
    given = [str(families[DENSE].file("Q4_K_M")), "-p", "Hello", "-n", "2", "-c", "512", "--json", *raw]
    result = CliRunner().invoke(command, [*given, "--", "-dev", "none", "--cpu-moe"])
    assert result.exit_code == 0, result.output
    said = Path(json.loads(result.stdout)["log"]).read_text().splitlines()
    assert said[0].startswith("$ ") and said[0].endswith(" -dev none --cpu-moe")


def test_command_json(families: dict[str, Family]) -> None:
    model = str(families[HYBRID].file("Q8_0"))
    result = CliRunner().invoke(command, [model, "-p", "Hello", "-n", "4", "-c", "512", "--json"])
    told = json.loads(result.stdout)
    assert (told["type_k"], told["type_v"], told["tokens"] > 0) == ("iso3", "iso3", True)
    assert 16 * told["kv_bytes"] / told["f16_bytes"] == 3.125 + 16 * 34 / 512
    assert told["profile"] == f"profile {HYBRID}-kv.gguf, from a text"
    assert (told["first"], told["recent"]) == (1, 32)


def test_embedded_model_is_quantized_when_it_is_first_run() -> None:
    for _ in range(2):
        result = CliRunner().invoke(command, [DENSE, "-p", "Hello", "-n", "2", "--raw"])
        assert result.exit_code == 0, result.output


@pytest.fixture
def unpatched(llama_build: Build, tmp_path: Path) -> Path:
    """Programs with upstream's types alone, by their own help; they refuse others as upstream does."""
    folder = tmp_path / "llama.cpp" / "build" / "bin"
    folder.mkdir(parents=True)
    for name in ("llama-cli", "llama-server", "llama-completion"):
        script = folder / name
        script.write_text(
            "#!/bin/sh\n"
            'if [ "$1" = --help ]; then\n'
            '  echo "-ctk,  --cache-type-k TYPE  data type"; '
            f'echo "  allowed values: {UPSTREAM}"; echo "  (default: f16)"\n'
            "  exit 0\nfi\n"
            f'exec "{llama_build.tool(name)}" "$@"\n'
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return tmp_path / "llama.cpp"


@pytest.mark.skipif(os.name != "posix", reason="the stand-in is a shell script")
def test_llama_cpp_without_our_types(families: dict[str, Family], unpatched: Path) -> None:
    model = str(families[DENSE].file("Q8_0"))
    arguments = [model, "-p", "Hello", "-n", "4", "--llama-cpp", str(unpatched), "--kv", "iso3/f16"]
    result = CliRunner().invoke(command, arguments)
    error = result.exception
    assert result.exit_code != 0 and result.stdout == ""
    assert f"has no cache type iso3; it has {UPSTREAM}" in str(error)
    remedy = getattr(error, "remedy", "")
    assert f"--llama-cpp {unpatched} --kv q8_0/f16" in remedy
    assert "--fallback" in remedy and "LM Studio" in remedy
    result = CliRunner().invoke(command, [*arguments, "--fallback"])
    assert result.exit_code == 0, result.output
    assert "using q8_0/f16" in result.stderr
    assert "cache  q8_0/f16, 12.25 bits per value" in result.stderr
