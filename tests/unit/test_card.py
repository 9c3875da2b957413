"""Model cards: figures from metadata and measurements, what is kept of an earlier card, what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ggufrq import cli
from ggufrq.base.errors import GgufrqError, ModelError, UsageError
from ggufrq.build.project import Build
from ggufrq.cache.kv import KvPair, KvPlan, kv_types
from ggufrq.card import compose, files, head, ladder
from ggufrq.card.compose import Wishes, make, parse_sibling
from ggufrq.card.facts import collect
from ggufrq.make.record import Record
from ggufrq.measure.weight_quality import WeightQuality

NAME = "Small-1B"
LOGS = Path(__file__).resolve().parent.parent / "logs"
TEMPLATE = "{%- if enable_thinking %}<think>{%- endif %}{{ messages }}"
DRY = Wishes(run=False)


def gguf_file(
    path: Path,
    *,
    head_dim: int = 128,
    source: bool = False,
    template: str = "",
    arch: str = "qwen3",
    window: int = 0,
) -> None:
    """A model of two layers with two KV heads, made for 65,536 tokens."""
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("Small | 1B")
    writer.add_context_length(65536)
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if window:
        writer.add_sliding_window(window)
        writer.add_sliding_window_pattern([True, False])
    writer.add_string("ggufrq.llama_cpp", "a" * 40)
    writer.add_string("ggufrq.patch_set", "b" * 64)
    if source:
        writer.add_license("apache-2.0")
        writer.add_languages(["en", "de"])
    if template:
        writer.add_string("tokenizer.chat_template", template)
    for layer in range(2):
        for side in "kv":
            shape = (2 * head_dim, 64)
            writer.add_tensor(f"blk.{layer}.attn_{side}.weight", np.zeros(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def family(folder: Path, types: dict[str, str] | None = None, **model: Any) -> Path:
    """A folder with a file of each type (by name of recipe or type), and its manifest."""
    folder.mkdir(parents=True)
    record = Record(folder, NAME)
    source = model.get("source", False)
    record.data["source"] = (
        {"repo": "org/Small-1B", "revision": "c" * 40} if source else {"folder": NAME, "id": "d" * 64}
    )
    for label, kind in (types or {"Q8_0": "Q8_0", "Q4_K_M": "Q4_K_M"}).items():
        name = f"{NAME}-{label}.gguf"
        recipe = "" if label == kind else label
        with record.making(name) as temporary:
            gguf_file(temporary, **model)
            size = temporary.stat().st_size
            with temporary.open("ab") as file:
                file.write(bytes(1000 if kind == "Q8_0" else 0))
            facts = {"type": kind, "recipe": recipe, "bits": 8 * size / 1e6, "imatrix": ""}
            record.finish(name, [(temporary, name)], {}, facts)
    return folder


@pytest.fixture
def build(tmp_path: Path) -> Build:
    manifest = {"llama_cpp": {"commit": "a" * 40}, "patch_set": "b" * 64}
    return Build("key", tmp_path, tmp_path, tmp_path, manifest)


def tables(text: str) -> dict[str, list[list[str]]]:
    """The tables of a card by the heading before them, as cells; each row must have as many as its head."""
    found: dict[str, list[list[str]]] = {}
    title = ""
    for line in text.splitlines():
        title = line.removeprefix("## ") if line.startswith("## ") else title
        if line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            rows = found.setdefault(title, [])
            if rows and set("".join(cells)) <= set("-: "):
                continue
            rows.append(cells)
    for rows in found.values():
        assert len({len(row) for row in rows if row[0] != "Cache"}) <= 2
    return found


def head_of(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def test_a_model_without_a_cache_of_k_and_v(
    tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as Mamba's, of which llama.cpp keeps a recurrent state alone."""
    folder = family(tmp_path / "f")
    shape = collect(folder).shape
    assert shape is not None
    monkeypatch.setattr("ggufrq.card.facts.memory_shape", lambda _: replace(shape, layers=()))
    made = make(folder, build, Wishes(run=False))
    assert "Memory of the KV cache" in made.text


def test_what_metadata_says(tmp_path: Path, build: Build) -> None:
    folder = family(tmp_path / "f", source=True, template=TEMPLATE)
    made = make(folder, build, Wishes(repo="me/Small-1B-GGUF", run=False))
    assert head_of(made.text) == {
        "base_model": "org/Small-1B",
        "base_model_relation": "quantized",
        "quantized_by": "me",
        "license": "apache-2.0",
        "language": ["en", "de"],
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "llama.cpp", "quantized", "kv-cache"],
    }
    found = tables(made.text)
    rows = {row[1]: row for row in found["Files"][1:]}
    assert found["Files"][0] == ["Filename", "Quant type", "File Size", "Split", "Description"]
    assert rows["Q8_0"][0] == (
        "[Small-1B-Q8_0.gguf](https://huggingface.co/me/Small-1B-GGUF/blob/main/Small-1B-Q8_0.gguf)"
    )
    assert rows["Q8_0"][3] == "no" and "for 1 GB of memory" in rows["Q8_0"][4]
    facts = dict((row[0], row[1]) for row in found["Model"])
    assert facts["Layers"] == "2, 2 with a KV cache" and facts["Context"] == "65,536 tokens"
    assert facts["Heads"] == "4 of queries, 2 of K and V" and facts["Values of a head"] == "128"
    assert facts["Chat template"] == "yes, with thinking on and off"
    how = dict((row[0], row[1]) for row in found["How it was made"])
    assert how["Source"] == f"[org/Small-1B](https://huggingface.co/org/Small-1B) at `{'c' * 40}`"
    assert how["Patch set"] == f"`{'b' * 64}`" and how["Importance matrix"] == "none"
    assert "--reasoning on" in made.text and "--reasoning off" in made.text
    assert str(tmp_path) not in made.text


def test_the_profile_among_the_files(tmp_path: Path, build: Build) -> None:
    folder = family(tmp_path / "f")
    record, name = Record(folder, NAME), f"{NAME}-kv.gguf"
    with record.making(name) as temporary:
        gguf_file(temporary)
        record.finish(name, [(temporary, name)], {}, {"type": "kv-profile", "source": "weights"})
    made = make(folder, build, replace(DRY, repo="me/x"))
    row = next(row for row in tables(made.text)["Files"] if name in row[0])
    assert row[1] == "kv-profile" and row[4].startswith("metric of K for the rotated cache types")
    assert f"hf download me/x {NAME}-Q4_K_M.gguf {name} --local-dir ." in made.text
    assert f"--kv-profile {name} \\\n  --kv-first 1 --kv-recent 32" in made.text
    assert [file.name for file in made.facts.models] == [f"{NAME}-Q8_0.gguf", f"{NAME}-Q4_K_M.gguf"]


def test_a_head_that_predicts_further_tokens(tmp_path: Path, build: Build) -> None:
    folder = family(tmp_path / "f")
    assert "Tokens guessed ahead" not in make(folder, build, DRY).text
    record = Record(folder, NAME)
    name = f"mtp-{NAME}-BF16.gguf"
    with record.making(name) as temporary:
        gguf_file(temporary)
        record.finish(name, [(temporary, name)], {}, {"type": "mtp", "bits": 16.0})
    card = make(folder, build, replace(DRY, repo="me/Small-1B-GGUF"))
    text = card.text.partition("## Tokens guessed ahead\n")[2].partition("\n## ")[0]
    assert f"in `{name}` beside the model" in text
    assert f"hf download me/Small-1B-GGUF {name} --local-dir ." in text
    assert f"--spec-type draft-mtp -md {name}" in text.replace(" \\\n ", "")
    assert "llama-server -hf me/Small-1B-GGUF:Q4_K_M --spec-type draft-mtp" in text
    assert "guessed ahead, iso3** (not run)" in text


def test_a_draft_is_no_model(tmp_path: Path, build: Build) -> None:
    folder = family(tmp_path / "f")
    record, name = Record(folder, NAME), f"eagle3-{NAME}-Q4_K_M.gguf"
    with record.making(name) as temporary:
        temporary.write_bytes(b"GGUF")
        record.finish(name, [(temporary, name)], {}, {"type": "Q4_K_M", "bits": 4.5})
    rows = tables(make(folder, build, DRY).text)["Files"]
    assert [row[4] for row in rows if name in row[0]] == ["draft that guesses tokens for the model"]
    with pytest.raises(UsageError, match="has no model to write a card for"):
        make(folder, build, replace(DRY, exclude=(f"{NAME}-*",)))


def test_memory(tmp_path: Path, build: Build) -> None:
    made = make(family(tmp_path / "f"), build, DRY)
    rows = tables(made.text)["Memory of the KV cache"]
    assert rows[0][1:3] == ["f16 (16 bits)", "q8_0 (8.5 bits)"]
    assert [row[0] for row in rows[1:]] == ["8,192", "16,384", "32,768", "65,536"]
    values = 2 * 2 * 2 * 128 * 65536  # sides, layers, heads, tokens
    assert rows[-1][1] == f"{values * 2 / 2**20:.0f} MiB"
    exact = 34 * 2 * values // 65536  # the newest 32 tokens, the first, and one row more, in f16
    profile = 2 * 2 * 128 * (2 * 128 * 2 + 4)  # layers, heads, a matrix for K and one for Q in f16, a mean
    iso3 = rows[0].index("iso3 (3.125 bits)")
    assert rows[-1][iso3] == f"{(values * 50 / 128 + exact + profile) / 2**20:.1f} MiB"
    assert "count the first token and the newest 32 in f16 and the profile of K" in made.text
    times = values / 8 * 2 / (values / 8 * 50 / 128 + exact + profile)
    said = f"At 8,192 tokens the KV cache takes {rows[1][iso3]} in iso3 with all that is kept beside it, and "
    assert f"{said}{rows[1][1]} in f16, {times:.2f} times as much" in made.text


def advised(**klds: float | None) -> dict[str, Any]:
    """What ``ggufrq advise`` has found, as it is kept."""
    rungs = [
        {
            "kv": name,
            "bits": {"f16": 16.0, "q8_0": 8.5, "iso4": 4.2, "iso3": 3.2}[name],
            "cache": 1,
            "kld": kld,
            "kld_err": 0.0001,
            "words": "" if kld is None else "ruinous" if kld > 1 else "small",
        }
        for name, kld in klds.items()
    ]
    return {
        "model": "Small-1B",
        "weights": "Q4_K_M",
        "loss": 0.03,
        "scored": {"chunks": 2, "n_ctx": 1024},
        "text": "heldout.txt",
        "date": "2026-01-02T03:04:05",
        "rungs": rungs,
    }


def test_which_cache_at_which_memory(tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = family(tmp_path / "f")
    title = "Which cache at which memory"
    assert "`ggufrq advise Small-1B-Q4_K_M.gguf` does" in make(folder, build, DRY).text
    advice = advised(f16=None, q8_0=0.001, iso4=0.004, iso3=0.05)
    monkeypatch.setattr(compose, "kept", lambda *_: advice)
    # 65,536 tokens take 134 MB in f16, 71 in q8_0, 35 in iso4, 26 in iso3; 8,192 take 17 in f16
    monkeypatch.setattr(ladder, "MEMORIES", (0.001, 0.025, 0.035, 0.05, 0.1, 0.2, 0.4))
    rows = tables(make(folder, build, DRY).text)[title]
    assert rows[0] == ["Memory", "Context", "`Q8_0`", "`Q4_K_M`"]
    assert [row[:3] for row in rows[1:] if row[1] == "65,536"] == [
        ["0.035 GB", "65,536", "`iso3`*"],
        ["0.05 GB", "65,536", "`iso4`"],
        ["0.1 GB", "65,536", "`q8_0`"],
        ["0.2 GB", "65,536", "`f16`"],
    ]
    assert [row[:3] for row in rows[1:] if row[1] == "8,192"] == [["0.025 GB", "8,192", "`f16`"]]
    advice = advised(f16=None, iso3=3.0)
    text = make(folder, build, DRY).text
    assert "Left out as ruinous on this model: `iso3`" in text
    assert all("iso3" not in row[2] for row in tables(text)[title] if row[0].endswith("GB"))


def test_nothing_was_measured(tmp_path: Path, build: Build) -> None:
    made = make(family(tmp_path / "f"), build, DRY)
    found = tables(made.text)
    assert all(row[2:] == ["not measured"] * 4 for row in found["What the weights cost"][1:])
    caches = [row for row in found["What the KV cache costs"] if row[0] != "Cache"]
    assert {row[0] for row in caches} == {"q8_0", "q4_0", "iso4", "iso3"}
    assert all(cell == "not measured" for row in caches for cell in row[2:])
    assert made.not_measured > 30 and "was not measured on these files" in made.text
    assert "run on" not in made.text.split("## Who takes")[0]
    assert made.text.endswith("without running a command; where nothing was measured, it says so.\n")
    assert made.text.count("(not run)") == 4 and made.text.count("(not run here)") == 2


def test_what_was_just_measured_is_not_recommended(
    tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights without a model in 16 bits stay unmeasured."""
    monkeypatch.setattr("ggufrq.cli.card.require_build", lambda: build)
    for module in (compose, ladder):
        monkeypatch.setattr(module, "measure", lambda *_, **__: None)
    folder = family(tmp_path / "f")
    for options, end in (([], "'; --measure fills them\n"), (["--measure"], " cells say 'not measured'\n")):
        assert cli.invoke(["card", str(folder), "--no-run", *options]) == 0
        assert capsys.readouterr().err.endswith(end)


def test_heads_that_do_not_fit(tmp_path: Path, build: Build) -> None:
    made = make(family(tmp_path / "f", head_dim=32), build, DRY)
    said = (
        "The rotated types cannot be used here: iso3 takes 6.50 bits a value in heads of K with 32, which "
        "are filled up to 64; q8_0 or q4_0 can be used."
    )
    assert said in made.text
    assert "iso3" not in made.text.replace(said, "").split("## Who takes")[0].split("## Quickstart")[1]
    assert "--cache-type-k q8_0" in made.text and "times as much" not in made.text


def test_heads_of_64(tmp_path: Path, build: Build) -> None:
    """Their blocks cost an eighth of a bit more, wherever bits are told."""
    made = make(family(tmp_path / "f", head_dim=64), build, DRY)
    assert "iso3 (3.25 bits)" in made.text and "iso3 (3.125 bits)" not in made.text
    rows = tables(made.text)["Memory of the KV cache"]
    iso3 = rows[1][rows[0].index("iso3 (3.25 bits)")]
    assert f"takes {iso3} in iso3 with all that is kept beside it, and {rows[1][1]} in f16" in made.text


def test_a_profile_beside_the_files_is_part_of_the_commands(tmp_path: Path, build: Build) -> None:
    folder = family(tmp_path / "f")
    assert "--kv-profile" not in make(folder, build, DRY).text
    (folder / f"{NAME}-kv.gguf").write_bytes(b"")
    text = make(folder, build, DRY).text
    ours = text.split("llama-cli, iso3")[1].split("```")[1]
    assert f"--kv-profile {NAME}-kv.gguf" in ours and text.count("--kv-profile") == 2
    assert "--kv-profile" not in text.split("upstream llama.cpp, q8_0")[1]
    other = family(tmp_path / "g", {"mine": "Q4_K_M"})  # by the name of its recipe
    (other / f"{NAME}-kv.gguf").write_bytes(b"")
    assert make(other, build, DRY).text.count(f"--kv-profile {NAME}-kv.gguf") == 2


def test_what_is_kept_beside_is_counted(tmp_path: Path, build: Build) -> None:
    facts = collect(family(tmp_path / "f"))
    iso3, q8_0 = (KvPlan(KvPair(kv_types()[name], kv_types()[name])) for name in ("iso3", "q8_0"))
    usual = [files.estimate(facts, plan.as_usual(), 4096).cache for plan in (iso3, q8_0)]
    plain = [files.estimate(facts, plan, 4096).cache for plan in (iso3, q8_0)]
    row = 2 * 2 * 2 * 2 * 128  # f16, layers, K and V, heads
    profile = 2 * 2 * 128 * (2 * 128 * 2 + 4)
    assert usual == [plain[0] + 34 * row + profile, plain[1]]


def test_layers_with_a_window(tmp_path: Path, build: Build) -> None:
    """They keep the window and a batch of 512 tokens, in cells by 256."""
    made = make(family(tmp_path / "f", arch="gemma3", window=1000), build, DRY)
    row = tables(made.text)["Memory of the KV cache"][1]
    assert row[:2] == ["8,192", f"{2 * 2 * 2 * 128 * (8192 + 1536) / 2**20:.2f} MiB"]
    assert "in iso3 with all that is kept beside it" in made.text and "for 1 GB of memory" in made.text


def result_for(folder: Path, label: str = "Q4_K_M") -> dict[str, Any]:
    """A real result of ``ggufrq validate``, as if it were of a file of this family."""
    result: dict[str, Any] = json.loads((LOGS / "report" / "result.json").read_text())
    entry = Record(folder, NAME).files[f"{NAME}-{label}.gguf"]
    result["subject"] |= {"sha256": entry["parts"][0]["sha256"], "file": f"{NAME}-{label}.gguf"}
    result["again"] = "ggufrq validate /home/me/models/Small-1B-Q4_K_M.gguf --kv 'iso3; 0:q8_0/f16'"
    return result


def test_validated_caches(tmp_path: Path, build: Build) -> None:
    folder = family(tmp_path / "f")
    result = result_for(folder)
    (folder / "validate-Small").mkdir()
    (folder / "validate-Small" / "report.json").write_text(json.dumps(result))
    made = make(folder, build, DRY)
    rows = tables(made.text)["What the KV cache costs"]
    q4_0 = next(row for row in rows if row[:2] == ["q4_0", "4.5"])
    assert q4_0[2:] == ["1,024", "9.644", "0.00460 ± 0.00021", "0.0638", "95.8 ± 0.6"]
    speed = next(row for row in rows if row[:2] == ["q4_0", "512"])
    assert speed[2:4] == ["316 ± 23", "0.188 ± 0.017×"]
    assert "was measured, see below" in made.text
    assert "`ggufrq validate Small-1B-Q4_K_M.gguf --kv 'iso3; 0:q8_0/f16'`" in made.text
    assert "AMD EPYC, 2 cores" in made.text and "/home/me" not in made.text
    assert "| q4_0 | 4.5 | not measured" not in made.text


def test_results_of_other_files(tmp_path: Path, build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    folder = family(tmp_path / "f")
    other = result_for(folder)
    other["subject"]["sha256"] = "0" * 64
    (folder / "validate-Small").mkdir()
    (folder / "validate-Small" / "report.json").write_text(json.dumps(other))
    assert "was not measured" in make(folder, build, DRY).text
    assert "is left out: it is no report on a file of this family" in capsys.readouterr().err
    given = tmp_path / "report.json"
    given.write_text(json.dumps(other))
    wishes = Wishes(run=False, reports=(given,))
    with pytest.raises(ModelError, match="is no report on a file of this family"):
        make(folder, build, wishes)
    failed = result_for(folder)
    failed["checks"][0]["ok"] = False
    given.write_text(json.dumps(failed))
    with pytest.raises(ModelError, match="its run failed"):
        make(folder, build, wishes)


def test_measured_weights(tmp_path: Path, build: Build) -> None:
    folder = family(tmp_path / "f", {"BF16": "BF16", "Q8_0": "Q8_0", "mine": "Q4_K_M"})
    file = folder / f"{NAME}-mine.gguf"
    with WeightQuality(folder / f"{NAME}-BF16.gguf", build) as quality:
        row = {
            "file": "another name",
            "ppl": 13.25,
            "ppl_base": 13.17,
            "kld_mean": 0.0123,
            "kld_mean_err": 0.0004,
            "kld_p999": 0.45,
            "same_top": 0.961,
            "meta": {**quality.facts, "llama_cpp": "a" * 40, "text_name": "heldout.txt"},
        }
        quality.results.put(quality._facts(file), row)
    made = make(folder, build, Wishes(run=False, exclude=("*-BF16.gguf",)))
    found = tables(made.text)
    rows = {row[0]: row for row in found["What the weights cost"][1:]}
    assert rows[f"`{file.name}`"][2:] == ["13.25", "0.0123 ± 0.0004", "0.450", "96.1"]
    assert rows[f"`{NAME}-Q8_0.gguf`"][2:] == ["not measured"] * 4
    assert "Against BF16 (PPL 13.17)" in made.text and "8 texts of 512 tokens" in made.text
    assert "BF16.gguf" not in "".join(row[0] for row in found["Files"])
    (mine,) = [row for row in found["Files"] if "mine" in row[0]]
    assert "recipe mine" in mine[4] and "nearest to the original" in mine[4]


def test_importance_matrix(tmp_path: Path, build: Build) -> None:
    folder = family(tmp_path / "f")
    record = Record(folder, NAME)
    with record.making(f"{NAME}-imatrix.gguf") as temporary:
        temporary.write_bytes(b"GGUF")
        record.finish(f"{NAME}-imatrix.gguf", [(temporary, f"{NAME}-imatrix.gguf")], {}, {"type": "imatrix"})
    there = record.files[f"{NAME}-imatrix.gguf"]["parts"][0]["sha256"]
    for others, says in (
        ({}, f"`{NAME}-imatrix.gguf`; for Q4_K_M"),
        ({"Q8_0": "e" * 64}, f"`{NAME}-imatrix.gguf`; for Q4_K_M. sha256 `{'e' * 16}`; for Q8_0"),
    ):
        for kind, sha in {"Q4_K_M": there, **others}.items():
            record.files[f"{NAME}-{kind}.gguf"]["imatrix"] = sha
        record.save()
        found = tables(make(folder, build, DRY).text)
        how = dict((row[0], row[1]) for row in found["How it was made"])
        assert how["Importance matrix"] == says
        assert [row[4].count("importance matrix") for row in found["Files"][1:]] == [1, len(others)]


def test_siblings(tmp_path: Path, build: Build) -> None:
    folder, other = family(tmp_path / "a"), family(tmp_path / "b", {"IQ4_XS": "IQ4_XS"})
    sibling = parse_sibling(f"{other}=me/Other-GGUF")
    made = make(folder, build, Wishes(repo="me/Small-GGUF", siblings=(sibling,), run=False))
    rows = tables(made.text)["The family"]
    assert [row[0] for row in rows[1:]] == [
        "[me/Other-GGUF](https://huggingface.co/me/Other-GGUF)",
        "**me/Small-GGUF**",
    ]
    assert rows[1][2] == "IQ4_XS" and rows[2][2] == "Q4_K_M, Q8_0"
    for wrong in ("me/Other", f"{other}=name", f"{tmp_path}/none=me/x"):
        with pytest.raises(UsageError, match="is not DIR=user/name"):
            parse_sibling(wrong)


def test_what_is_no_repository_is_refused(
    tmp_path: Path, build: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    """Links of the card would lead nowhere, and the Hub would refuse its head."""
    folder = family(tmp_path / "f")
    for option, wrong in (("--repo", "Small-GGUF"), ("--repo", "me/x:Q8_0"), ("--base-model", "the model")):
        assert cli.invoke(["card", str(folder), "--no-run", option, wrong]) == UsageError.exit_code
        told = capsys.readouterr().err
        assert f"'{wrong}' is no id of a repository" in told and f"{option} USER/NAME" in told
    assert not (folder / "README.md").exists()


def test_split_file(tmp_path: Path, build: Build) -> None:
    folder = family(tmp_path / "f", {"Q8_0": "Q8_0"})
    record = Record(folder, NAME)
    entry = record.files[f"{NAME}-Q8_0.gguf"]
    first = entry["parts"][0]
    names = [f"{NAME}-Q8_0-0000{i}-of-00002.gguf" for i in (1, 2)]
    for name in names:
        (folder / name).write_bytes((folder / first["name"]).read_bytes())
    entry["parts"] = [{**first, "name": name} for name in names]
    record.save()
    made = make(folder, build, DRY)
    (row,) = tables(made.text)["Files"][1:]
    assert row[0] == f"`{names[0]}`" and row[3] == "2 parts"
    assert made.facts.parameters == 2 * 2 * 256 * 64
    (folder / names[1]).unlink()
    with pytest.raises(ModelError, match=f"lacks files of its manifest: {names[1]}"):
        make(folder, build, DRY)


def test_own_text_is_kept(tmp_path: Path, build: Build) -> None:
    folder = family(tmp_path / "f")
    first = make(folder, build, DRY)
    own = "# Mine\n\nWith | bars and\n\n```\ncode\n```"
    text = first.text.replace(head.BEGIN, f"{head.BEGIN}\n{own}")
    text = text.replace("library_name: gguf\n", "library_name: gguf\nwidget:\n- text: Hello\n", 1)
    text = text.replace("---\n", "---\nlicense: mit\nbase_model: org/Base\n", 1)
    text = text.replace("## Files", "## Files\n\nthis is lost")
    first.path.write_text(text)
    second = make(folder, build, DRY)
    assert own in second.text and "this is lost" not in second.text
    data = head_of(second.text)
    assert data["license"] == "mit" and data["base_model"] == "org/Base"
    assert data["base_model_relation"] == "quantized" and data["widget"] == [{"text": "Hello"}]
    second.path.write_text(second.text)
    assert make(folder, build, DRY).text == second.text, "writing it anew changes nothing"
    given = make(folder, build, Wishes(run=False, license="apache-2.0"))
    assert head_of(given.text)["license"] == "apache-2.0"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("# My own card\n", "was not written by ggufrq"),
        (f"{head.BEGIN}\nmine\n", "do not match"),
        (f"{head.END}\nmine\n{head.BEGIN}\n", "do not match"),
        (f"{head.BEGIN}\n{head.END}\n{head.BEGIN}\n{head.END}\n", "do not match"),
        (f"---\na: [\n---\n{head.BEGIN}\n{head.END}\n", "no YAML"),
    ],
)
def test_cards_that_are_not_replaced(tmp_path: Path, build: Build, text: str, says: str) -> None:
    folder = family(tmp_path / "f")
    (folder / "README.md").write_text(text)
    with pytest.raises(UsageError, match=says):
        make(folder, build, DRY)
    assert (folder / "README.md").read_text() == text


def test_force(tmp_path: Path, build: Build) -> None:
    folder = family(tmp_path / "f")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# My own card\n")
    made = make(folder, build, Wishes(run=False, force=True))
    assert head_of(made.text)["license"] == "mit" and "My own card" not in made.text


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / f"{NAME}.ggufrq.json").unlink(), "has no manifests"),
        (lambda folder: (folder / f"{NAME}.ggufrq.json").write_text("{}"), "damaged"),
        (lambda folder: (folder / "Two.ggufrq.json").write_text("{}"), "has 2 manifests"),
        (lambda folder: (folder / f"{NAME}-Q8_0.gguf").unlink(), "lacks files"),
        (lambda folder: (folder / f"{NAME}-Q8_0.gguf").write_bytes(b"GGUF"), "is not what the manifest says"),
    ],
)
def test_folders_that_are_no_family(tmp_path: Path, build: Build, spoil: Any, says: str) -> None:
    folder = family(tmp_path / "f")
    spoil(folder)
    with pytest.raises(GgufrqError, match=says):
        make(folder, build, DRY)


def test_who_takes_what(tmp_path: Path, build: Build) -> None:
    rows = tables(make(family(tmp_path / "f"), build, DRY).text)["Who takes which cache type"]
    by_name = {row[0]: row for row in rows[1:]}
    assert by_name["Ollama"][1:6] == ["yes", "yes", "yes", "", "no"]
    assert by_name["vLLM"][1:4] == ["yes", "no", "no"]
    ours = next(row for name, row in by_name.items() if "patch set bbbbbbbb" in name)
    assert ours[5] == "yes, all 12"
    assert all(re.match(r"\[?20\d\d-\d\d-\d\d", row[7]) for row in rows[1:])
