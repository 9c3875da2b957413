from __future__ import annotations

from pathlib import Path

from ggufrq.base.results import ResultStore, file_sha256, results_dir


def test_results_are_kept_by_what_they_depend_on(tmp_path: Path) -> None:
    kept = ResultStore(tmp_path / "results")
    facts = {"model": "a", "settings": {"x": 1, "y": [2]}}
    assert kept.get(facts) is None
    log = tmp_path / "run.log"
    log.write_text("what was said")
    kept.put(facts, {"ppl": 1.5}, log)
    assert ResultStore(tmp_path / "results").get({"settings": {"y": [2], "x": 1}, "model": "a"}) == {
        "ppl": 1.5
    }
    assert kept.get({**facts, "model": "b"}) is None
    found = kept.log(facts)
    assert found is not None and found.read_text() == "what was said"
    assert kept.log({}) is None
    assert not list((tmp_path / "results").glob(".*")), "nothing half-written is left"


def test_damaged_results_are_as_if_absent(tmp_path: Path) -> None:
    kept = ResultStore(tmp_path)
    for content in ("", "{", "[1]", '{"row": 3}', "null"):
        kept.path({}).write_text(content)
        assert kept.get({}) is None


def test_place_of_results(tmp_path: Path) -> None:
    assert results_dir() == tmp_path / "cache" / "measurements"


def test_hash_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert file_sha256(tmp_path / "x").startswith("ba7816bf8f01cfea")
