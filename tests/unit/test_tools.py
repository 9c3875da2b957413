"""Readers of the tools' output, on output that the real tools gave."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ggufrq.base.errors import ToolError, UsageError
from ggufrq.cache.kv import parse_kv, parse_plan
from ggufrq.tools import bench, cli, completion, fit_params, imatrix, perplexity, programs, quantize, server
from ggufrq.tools.logs import Incomplete, error_lines, exact_bytes, explain, parse_context, retried, uses
from ggufrq.tools.tail import Tail

LOGS = Path(__file__).resolve().parent.parent / "logs" / "tools"


def saved(name: str) -> str:
    return (LOGS / f"{name}.txt").read_text(encoding="utf-8")


# The library's log


def test_context() -> None:
    context = parse_context(saved("cli-ok.err"))
    assert context is not None
    (cache,) = context.caches
    assert (cache.cells, cache.layers, cache.streams, cache.type_k, cache.type_v) == (
        1024,
        8,
        1,
        "q8_0",
        "q4_0",
    )
    assert cache.k_bytes == 8 * 2 * 128 * 1024 * 34 // 32  # printed as 2.12 MiB, which is 2.125
    assert cache.v_bytes == 8 * 2 * 128 * 1024 * 18 // 32
    assert context.kv_values == 2 * 8 * 2 * 128 * 1024
    assert context.upstream_rotates_k and context.upstream_rotates_v
    assert context.recurrent_mib == 0
    assert uses(context, parse_kv("q8_0/q4_0"))
    assert not uses(context, parse_kv("q4_0/q8_0"))
    assert not uses(context, parse_kv("iso3"))


def test_context_of_a_hybrid_model_in_four_streams() -> None:
    context = parse_context(saved("ppl-kld35.err"))
    assert context is not None
    (cache,) = context.caches
    assert (cache.layers, cache.sequences, cache.streams, context.tokens) == (2, 4, 4, 4096)
    assert context.kv_bytes == 2 * 2 * 256 * 4096 * (34 + 18) // 32
    assert context.recurrent_mib == 1.64


def test_context_of_our_types() -> None:
    context = parse_context(saved("ppl-iso3-planar4.err"))
    assert context is not None
    assert context.k_types == {"iso3"} and context.v_types == {"planar4"}
    assert {side: (r.type, r.family, r.mode) for side, r in context.rotations.items()} == {
        "K": ("iso3", "iso", "block"),
        "V": ("planar4", "planar", "block"),
    }
    assert context.kv_bytes == 8 * 2 * 128 * context.tokens * (50 + 66) // 128


def test_last_context_counts() -> None:
    first, second = saved("cli-ok.err"), saved("completion35.err")
    context = parse_context(first + second)
    assert context is not None
    assert context.caches[0].layers == 2


def test_no_context() -> None:
    assert parse_context("nothing of interest\n") is None


@pytest.mark.parametrize(
    ("mib", "tokens", "name", "size"),
    [
        (3.12, 4096, "iso3", 3276800),  # 3.125 MiB
        (3.13, 4096, "iso3", 3276800),
        (2.12, 1024, "q8_0", 2228224),
        (0.27, 256, "iso2", None),  # 31 and 32 rows would both be printed like that
        (3.2, 4096, "iso3", None),  # no multiple of a block is that
        (3.12, 4096, "q9_9", None),
        (3.12, 0, "iso3", None),
    ],
)
def test_exact_bytes(mib: float, tokens: int, name: str, size: int | None) -> None:
    assert exact_bytes(mib, tokens, name) == size


def test_sizes_where_heads_are_of_64() -> None:
    """Rotated over 64 values, a side is in blocks of 64: 26 bytes in iso3."""
    lines = (
        "llama_rq: K iso3, rotation = iso, mode = full, n = 64\n"
        "llama_rq: V iso3, rotation = iso, mode = full, n = 128\n"
        "llama_kv_cache: size =    4.92 MiB (  1024 cells,  30 layers,  1/1 seqs), "
        "K (iso3):    2.29 MiB, V (iso3):    2.34 MiB\n"
    )
    context = parse_context(lines)
    assert context is not None
    [cache] = context.caches
    assert cache.k_bytes == 90 * 1024 * 26 and cache.v_bytes == 48 * 1024 * 50
    assert context.kv_values == 90 * 1024 * 64 + 48 * 1024 * 128


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "cli-ctx.err",
            "request (903 tokens) exceeds the available context size (256 tokens), try increasing it",
        ),
        ("cli-nomodel.err", "failed to open GGUF file 'nope.gguf' (No such file or directory)"),
        ("server-nomodel.err", "failed to open GGUF file 'nope.gguf' (No such file or directory)"),
        ("cli-badtype.err", 'error while handling argument "-ctk": Unsupported cache type: iso3'),
        ("cli-nofa.err", "quantized V cache requires flash_attn to be enabled"),
        (
            "cli-trunc.err",
            "tensor 'blk.0.ffn_up.weight' data is not within the file bounds, "
            "model is corrupted or incomplete",
        ),
        ("completion-ctx.err", "prompt is too long (892 tokens, max 252)"),
        ("bench-badtype.err", "invalid parameter for argument: -ctk"),
        ("completion-rpc-died.err", "Remote RPC server crashed or returned malformed response"),
        ("completion-rpc-missing.err", "Failed to connect to 127.0.0.1:50995"),
    ],
)
def test_reason(name: str, reason: str) -> None:
    assert explain(saved(name), "none") == reason


def test_no_reason_in_a_log_without_errors() -> None:
    assert error_lines(saved("cli-ok.err")) == []
    assert explain("", "none") == "none"


# llama-cli, llama-completion


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 100_000])
def test_answer_in_any_chunks(size: int) -> None:
    output = saved("cli-ok.out")
    answer = cli.Answer("How do I create a table?")
    given = "".join(answer.feed(output[i : i + size]) for i in range(0, len(output), size)) + answer.close()
    assert given == answer.text == "-10000000000000000000000"


def test_answer_comes_as_it_is_generated() -> None:
    output = saved("cli-ok.out")
    answer = cli.Answer("How do I create a table?")
    start = output.index("-1000")
    assert answer.feed(output[:start]) == ""
    assert answer.feed("one ") == "one "
    assert answer.feed("two\n") == "two"
    assert answer.feed("three") == "\nthree"
    assert answer.feed("\n\n\nExiting") == ""
    assert answer.feed("...\n") == ""
    assert answer.close() == ""
    assert answer.text == "one two\nthree"


@pytest.mark.parametrize("text", ["", "\n", "one\n", "one\n\n", "one\n\n\n"])
def test_answers_that_end_in_newlines_or_are_empty(text: str) -> None:
    output = saved("cli-ok.out")
    printed = text if not text or text.endswith("\n") else text + "\n"
    answer = cli.Answer("How do I create a table?")
    whole = output[: output.index("-1000")] + printed + "\n\nExiting...\n"
    given = "".join(answer.feed(character) for character in whole) + answer.close()
    assert given == printed.removesuffix("\n")


def test_answer_may_speak_of_leaving() -> None:
    output = saved("cli-ok.out")
    body = "a\n\n\nExiting...\nb\n\n\nExiting"
    whole = output[: output.index("-1000")] + body + "\n\n\nExiting...\n"
    answer = cli.Answer("How do I create a table?")
    given = "".join(answer.feed(character) for character in whole) + answer.close()
    assert given == body


def test_long_prompt_is_echoed_in_part() -> None:
    output = saved("cli-ctx.out")
    echoed = output[output.index("\n> ") + 3 : output.index(" ... (truncated)")]
    prompt = echoed + " and more of it" * 200
    answer = cli.Answer(prompt)
    assert answer.feed(output) == ""
    assert answer.close() == ""  # the error stands in the log, where nothing can be mistaken for it


def test_echo_cut_within_a_character() -> None:
    prompt = "é" * 300 + "x"
    cut = prompt.encode()[:500] + b" ... (truncated)"
    shown = "banner\navailable commands:\n\n\n> " + cut.decode(errors="replace") + "\nyes\n\n\nExiting...\n"
    answer = cli.Answer(prompt)
    assert answer.feed(shown) + answer.close() == "yes"


def test_answer_that_never_came() -> None:
    answer = cli.Answer("x")
    assert answer.feed("\n\nLoading model... ") == ""
    with pytest.raises(ToolError, match="did not come to the answer"):
        answer.close()


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("cli-ok.err", (18, 4516.94, 24, 2233.44)),
        ("completion-ok.err", (4, 2422.77, 23, 2904.77)),
        ("completion35.err", (4, 2203.86, 23, 432.70)),
    ],
)
def test_timing(name: str, figures: tuple[int, float, int, float]) -> None:
    found = completion.parse_timing(saved(name))
    assert (found.prompt_tokens, found.prompt_tps, found.tokens, found.tps) == figures
    assert found.context.k_types == {"q8_0"}


@pytest.mark.parametrize("name", ["cli-ctx", "cli-nomodel", "cli-nofa", "cli-trunc", "completion-ctx"])
def test_failed_generation_is_an_error_whatever_the_exit_status(name: str) -> None:
    with pytest.raises(ToolError, match="the generation failed: "):
        completion.parse_timing(saved(f"{name}.err"))


def test_generation_that_broke_off_is_an_error() -> None:
    log = saved("cli-ok.err") + "0.11.1.1 E srv    send_error: task id = 0, error: Compute error.\n"
    with pytest.raises(ToolError, match=r"the generation failed: Compute error\."):
        completion.parse_timing(log)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_continuation(size: int) -> None:
    output = saved("completion-ok.out")
    tail = completion.continuation()
    given = "".join(tail.feed(output[i : i + size]) for i in range(0, len(output), size)) + tail.close()
    assert given + "\n\n" == output
    assert given.startswith("ss, beut the should.")


def test_end_of_text_is_taken_off() -> None:
    tail = completion.continuation()
    assert tail.feed("done [end of text]\n") + tail.feed("\n\n") + tail.close() == "done"


def test_tail_keeps_what_only_looked_like_it() -> None:
    tail = Tail("END")
    assert tail.feed("aE") == "a"
    assert tail.feed("N") == ""
    assert tail.feed("Ex") == "ENEx"
    assert tail.feed("EN") + tail.close() == "EN"


# llama-perplexity


def test_perplexity() -> None:
    found = perplexity.parse_perplexity(saved("ppl-base.out"), saved("ppl-base.err"))
    assert (found.ppl, found.ppl_err, found.chunks, found.n_ctx) == (1372.6164, 93.41238, 4, 1024)
    assert found.context.k_types == {"f16"}


def test_divergence() -> None:
    found = perplexity.parse_divergence(saved("ppl-kld.out"), saved("ppl-kld.err"))
    assert (found.ppl, found.ppl_err, found.ppl_base) == (1374.094501, 93.553541, 1372.616046)
    assert (found.kld_mean, found.kld_mean_err, found.kld_max) == (0.000152, 0.000003, 0.001712)
    assert (found.kld_p999, found.kld_p99, found.kld_median) == (0.001461, 0.000673, 0.000116)
    assert (found.same_top, found.same_top_err) == (pytest.approx(0.98288), pytest.approx(0.00287))
    assert (found.chunks, found.n_ctx) == (4, 1024)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ppl-short", "you need at least 2048 tokens to evaluate perplexity with a context of 1024"),
        ("ppl-nobase", "failed to open nope.kld"),
        ("ppl-wrongbase", "short.txt does not look like a file containing log-probabilities"),
        ("ppl-smallerctx", "failed to decode"),
    ],
)
def test_perplexity_failures_that_end_with_status_0(name: str, reason: str) -> None:
    for parse in (perplexity.parse_perplexity, perplexity.parse_divergence):
        with pytest.raises(ToolError, match=re.escape(reason)):
            parse(saved(f"{name}.out"), saved(f"{name}.err"))


@pytest.mark.parametrize(
    ("said", "mended"),
    [
        ("E main: you need at least 1024 tokens for a context of 512 tokens", True),
        ("E main: No prompt provided and no precomputed matrices (--in-file) to combine.", True),
        ("E main: failed to open model.gguf", False),
    ],
)
def test_a_text_that_is_too_short_for_a_matrix(said: str, mended: bool) -> None:
    with pytest.raises(ToolError, match="llama-imatrix gave no result: ") as caught:
        imatrix.check("", f"0.01.002.003 {said}\n")
    assert (caught.value.remedy is not None and "a longer text" in caught.value.remedy) == mended


def test_divergence_is_no_perplexity_and_the_other_way_round() -> None:
    with pytest.raises(ToolError):
        perplexity.parse_divergence(saved("ppl-base.out"), saved("ppl-base.err"))
    with pytest.raises(ToolError):
        perplexity.parse_perplexity(saved("ppl-kld.out"), saved("ppl-kld.err"))


def test_nan_is_an_error() -> None:
    err = saved("ppl-base.err").replace("PPL = 1372.6164 +/- 93.41238", "PPL = nan +/- nan")
    with pytest.raises(ToolError, match="computes no numbers"):
        perplexity.parse_perplexity(saved("ppl-base.out"), err)
    out = saved("ppl-kld.out").replace(
        "Mean    KLD:   0.000152 ±   0.000003", "Mean    KLD:        nan ±        nan"
    )
    with pytest.raises(ToolError, match="computes no numbers"):
        perplexity.parse_divergence(out, saved("ppl-kld.err"))


def test_missing_chunks_are_an_error() -> None:
    out = re.sub(r"^   3 .*\n", "", saved("ppl-kld.out"), flags=re.MULTILINE)
    with pytest.raises(ToolError, match="3 of 4 chunks"):
        perplexity.parse_divergence(out, saved("ppl-kld.err"))
    with pytest.raises(ToolError, match="2 of 4 chunks"):
        perplexity.parse_perplexity("[1]3370.6415,[2]4084.1914,", saved("ppl-base.err"))


@pytest.mark.parametrize("first", ["[1]nan,[2]nan,", "[1]4.5,[2]inf,", "   1   nan ± nan  0.1 ± 0.1"])
def test_a_run_that_computes_no_numbers_says_so(first: str) -> None:
    """llama-perplexity then leaves out its last lines, which would be asked for again."""
    for parse in (perplexity.parse_perplexity, perplexity.parse_divergence):
        with pytest.raises(perplexity.NoNumbers, match="computes no numbers any more"):
            parse(first, saved("ppl-base.err"))


def test_output_cut_short_is_an_error() -> None:
    out, err = saved("ppl-kld.out"), saved("ppl-kld.err")
    for end in ("KL divergence stat", "99.9%   KLD", "Same top p"):
        with pytest.raises(ToolError):
            perplexity.parse_divergence(out[: out.index(end)], err)


def test_lost_last_lines_are_told_from_failures() -> None:
    """llama.cpp's programs may end before all that they said is printed."""
    for name in ("ppl-kld", "ppl-base"):
        parse = perplexity.parse_divergence if name == "ppl-kld" else perplexity.parse_perplexity
        out, err = saved(f"{name}.out"), saved(f"{name}.err")
        cut_err = err[: err.index(" seconds per pass")]
        for cut in ("", out[:150], out[: len(out) * 2 // 3]):
            with pytest.raises(Incomplete):
                parse(cut, cut_err)
    with pytest.raises(ToolError) as caught:
        perplexity.parse_divergence(saved("ppl-nobase.out"), saved("ppl-nobase.err"))
    assert not isinstance(caught.value, Incomplete)
    log = saved("completion-ok.err")
    with pytest.raises(Incomplete):
        completion.parse_timing(log[: log.index("common_perf_print")])
    with pytest.raises(ToolError) as caught:
        completion.parse_timing(saved("completion-ctx.err"))
    assert not isinstance(caught.value, Incomplete)


def test_what_was_lost_is_tried_again() -> None:
    seen: list[int] = []

    def attempt() -> int:
        seen.append(1)
        if len(seen) < 3:
            raise Incomplete("lost")
        return 7

    assert retried(attempt) == 7
    seen.clear()
    with pytest.raises(Incomplete):
        retried(attempt, attempts=2)
    assert len(seen) == 2


def test_log_without_cache_is_an_error() -> None:
    err = "\n".join(line for line in saved("ppl-base.err").splitlines() if "llama_kv_cache" not in line)
    with pytest.raises(ToolError, match="which cache"):
        perplexity.parse_perplexity(saved("ppl-base.out"), err)


def test_chunks_done() -> None:
    assert perplexity.chunks_done("[1]3370.6415,[2]4084.1914,") == 2
    assert perplexity.chunks_done(saved("ppl-kld.out")) == 4
    assert perplexity.chunks_done("") == 0


# llama-bench, llama-imatrix, llama-quantize, llama-server


def test_bench() -> None:
    found = bench.parse(saved("bench.out"), saved("bench.err"))
    assert (found.prefill, found.decode) == (807.125053, 867.406866)
    assert (found.type_k, found.type_v, found.threads, found.depth) == ("q8_0", "q4_0", 1, 0)


@pytest.mark.parametrize(
    ("out", "err", "reason"),
    [
        ("", "bench-badtype.err", "invalid parameter for argument: -ctk"),
        ("bench-nofa.out", "bench-nofa.err", "failed to create context"),
    ],
)
def test_bench_failures(out: str, err: str, reason: str) -> None:
    with pytest.raises(ToolError, match=reason):
        bench.parse(saved(out) if out else "", saved(err))


def test_bench_without_one_half() -> None:
    records = json.loads(saved("bench.out"))
    with pytest.raises(ToolError, match="1 results instead of"):
        bench.parse(json.dumps(records[:1]), "")


def test_imatrix() -> None:
    assert imatrix.check(saved("imatrix.out"), saved("imatrix.err")) == 10
    assert imatrix.chunks_planned(saved("imatrix.err")) == 10
    assert imatrix.chunks_done("[1]4616.5,[2]53") == 2


def test_imatrix_failures() -> None:
    with pytest.raises(ToolError, match="at least 4096 tokens"):
        imatrix.check(saved("imatrix-short.out"), saved("imatrix-short.err"))
    out = saved("imatrix.out").replace("[10]", "")
    with pytest.raises(ToolError, match="9 of 10 chunks"):
        imatrix.check(out, saved("imatrix.err"))


def test_quantize() -> None:
    found = quantize.parse(0, saved("quantize-q8_0"))
    assert (found.model_mib, found.quant_mib, found.bits) == (14.02, 7.46, 8.52)
    assert (found.tensors, found.fallbacks) == (90, 0)
    dry = quantize.parse(0, saved("quantize-dry-run"))
    assert (dry.quant_mib, dry.bits) == (4.41, 5.04)


def test_quantize_failures() -> None:
    with pytest.raises(ToolError, match="this quantization requires an imatrix"):
        quantize.parse(1, saved("quantize-no-imatrix"))
    with pytest.raises(ToolError, match="does not say why"):
        quantize.parse(0, "")
    with pytest.raises(ToolError):
        quantize.parse(-9, saved("quantize-q8_0"))


def test_quantize_counts_fallbacks() -> None:
    line = "llama_model_quantize_impl: WARNING: 12 of 90 tensor(s) required fallback quantization\n"
    assert quantize.parse(0, saved("quantize-q8_0") + line).fallbacks == 12


def test_quantize_progress() -> None:
    output = saved("quantize-q8_0")
    assert quantize.tensors_done(output[: output.index("[  42/")]) == (41, 90)
    assert quantize.tensors_done("") == (0, 0)


def test_quantize_types() -> None:
    types = quantize.parse_types(saved("quantize-help"))
    assert {"IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "Q2_K", "Q3_K_M", "IQ2_XXS", "F16", "BF16"} <= set(
        types
    )
    assert types["Q4_K"] == "Q4_K_M"
    assert types["Q4_K_M"] == "Q4_K_M"
    with pytest.raises(ToolError):
        quantize.parse_types("usage: something else")


def test_cache_types_in_help() -> None:
    upstream = programs.parse_cache_types(saved("cli-help"))
    assert upstream == ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
    patched = programs.parse_cache_types(
        saved("cli-help").replace("q5_0, q5_1\n", "q5_0, q5_1,\n          planar2, iso3, rotor4\n")
    )
    assert patched == (*upstream, "planar2", "iso3", "rotor4")
    with pytest.raises(ToolError, match="does not say which cache types"):
        programs.parse_cache_types("usage: llama-cli")


def test_folder_of_programs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no llama-cli"):
        programs.Programs.in_folder(tmp_path)
    (tmp_path / "build" / "bin").mkdir(parents=True)
    (tmp_path / "build" / "bin" / "llama-server").touch()
    found = programs.Programs.in_folder(tmp_path)
    assert found.folder == tmp_path / "build" / "bin"
    with pytest.raises(ToolError, match="no program 'llama-cli'"):
        found.tool("llama-cli")


def test_server_requests() -> None:
    log = saved("cli-ok.err")
    (request,) = server.parse_requests(log)
    assert (request.slot, request.task, request.ms, request.tokens) == (0, 0, 14.28, 42)


def test_arguments_name_the_types_and_flash_attention() -> None:
    plan = parse_plan("iso3/planar4")
    model = Path("m.gguf")
    made = [
        cli.arguments(model, "hello", plan, tokens=8, n_ctx=64, threads=1, temperature=0, seed=3),
        completion.arguments(model, Path("p.txt"), plan, tokens=8, n_ctx=64),
        server.arguments(model, plan, host="127.0.0.1", port=1, n_ctx=64, extra=("--cache-reuse", "256")),
        perplexity.arguments(
            model, Path("t"), plan, Path("b"), n_ctx=64, chunks=2, divergence=True, threads=2
        ),
        bench.arguments(model, plan.base, threads=2),
    ]
    for args in made:
        text = " ".join(args)
        assert re.search(r"(--cache-type-k|-ctk) iso3 ", text)
        assert re.search(r"(--cache-type-v|-ctv) planar4\b", text)
        assert "-fa on" in text
    assert {"-st", "--simple-io", "-p", "hello", "--temp", "0", "-s", "3"} <= set(made[0])
    assert made[1][2:4] == ["-f", "p.txt"] and "-no-cnv" in made[1]
    assert made[2][-2:] == ["--cache-reuse", "256"]
    assert "--kl-divergence" in made[3] and made[3][made[3].index("-b") + 1] == "128"


# llama-fit-params


def test_a_dry_run() -> None:
    log = saved("fit-params.err")
    assert fit_params.compute_bytes(log) == round(13.02 * 1024 * 1024)
    context = parse_context(log)
    assert context is not None and context.kv_mib == 1.56 and context.recurrent_mib == 0.41
    with pytest.raises(ToolError, match="failed to open GGUF file"):
        fit_params.compute_bytes(saved("fit-params-nomodel.err"))
