from __future__ import annotations

from pathlib import Path

import pytest
from shards import split_model

from ggufrq import cli
from ggufrq.base.errors import ModelError, UsageError
from ggufrq.models import hub, names, resolve


def test_embedded_models() -> None:
    assert set(resolve.embedded_models()) == {"docs-qwen3-8m", "docs-qwen3.5-8m"}
    found = resolve.resolve("docs-qwen3-8m")
    assert (found.kind, found.name) == ("embedded", "docs-qwen3-8m")
    assert found.path is not None and (found.path / "model.safetensors").is_file()


def test_folder_file_and_hub(tmp_path: Path) -> None:
    folder = tmp_path / "My-Model-1B"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert (resolve.resolve(str(folder)).kind, resolve.resolve(str(folder)).name) == ("folder", "My-Model-1B")
    path = tmp_path / "My-Model-1B-Q4_K_M.gguf"
    path.write_bytes(b"GGUF....")
    assert (resolve.resolve(str(path)).kind, resolve.resolve(str(path)).name) == ("gguf", "My-Model-1B")
    found = resolve.resolve("Qwen/Qwen3-0.6B-GGUF:Q8_0")
    assert (found.kind, found.name, found.repo, found.label) == (
        "hub",
        "Qwen3-0.6B",
        "Qwen/Qwen3-0.6B-GGUF",
        "Q8_0",
    )


def test_a_folder_of_the_hubs_cache(tmp_path: Path) -> None:
    """It is called after a commit; what is made of it is called after the repository. Files that were not
    downloaded are links that lead nowhere."""
    sha = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / sha
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert resolve.resolve(str(folder)) == resolve.Model("folder", "Qwen3-0.6B", folder)
    assert hub.snapshot_of(folder) == ("Qwen/Qwen3-0.6B", sha)
    assert hub.snapshot_of(tmp_path) is None
    for name in ("model.safetensors", "it-Q8_0.gguf"):
        (folder / name).symlink_to(tmp_path / "blobs" / "gone")
    for path in (folder, folder / "it-Q8_0.gguf"):
        with pytest.raises(
            ModelError, match=r"it-Q8_0\.gguf.* of .*/snapshots/\w+ is not downloaded"
        ) as caught:
            resolve.resolve(str(path))
        assert f"hf download Qwen/Qwen3-0.6B --revision {sha}" in str(caught.value.remedy)


def test_a_folder_of_a_family(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What runs is what a repository with these files means; what is quantized has to be named."""
    folder = tmp_path / "M-GGUF"
    folder.mkdir()
    for label in ("BF16", "Q2_K", "Q4_K_M", "mine-Q4_K_M", "imatrix", "kv"):
        (folder / f"M-{label}.gguf").write_bytes(b"GGUF....")
    for _ in range(2):
        found = resolve.resolve(str(folder))
        assert found == resolve.Model("gguf", "M", folder / "M-Q4_K_M.gguf")
    assert [record.getMessage() for record in caplog.records] == [f"taking M-Q4_K_M.gguf of {folder}"]
    with pytest.raises(UsageError, match="name the one that is the original") as caught:
        resolve.resolve(str(folder), original=True)
    assert caught.value.remedy == str(folder / "M-BF16.gguf")
    for label in ("Q4_K_M", "mine-Q4_K_M"):
        (folder / f"M-{label}.gguf").unlink()
    with pytest.raises(UsageError, match=r"none is just Q4_K_M: M-BF16\.gguf, M-Q2_K\.gguf$"):
        resolve.resolve(str(folder))
    (folder / "M-BF16.gguf").unlink()
    assert resolve.resolve(str(folder)).path == folder / "M-Q2_K.gguf", "the only one"


@pytest.mark.parametrize(
    ("kind", "says"), [("imatrix", "an importance matrix"), ("kv-profile", "the profile of a KV cache")]
)
def test_files_that_are_no_models(tmp_path: Path, kind: str, says: str) -> None:
    import gguf

    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "")
    writer.add_type(kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=rf"x\.gguf is no model but {says}$"):
        resolve.resolve(str(path))


def test_a_folder_that_is_misspelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be meant for the Hub, but nobody sees that from what the Hub says."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for text in ("models/My-1B", "models/My-1B", "Qwen/Qwen3-0.6B"):
        assert resolve.resolve(text).kind == "hub"
    says = "models has no My-1B: models/My-1B is taken for a model on the Hub"
    assert [record.getMessage() for record in caplog.records] == [says]


def test_a_revision_of_what_is_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    for options in (["--revision", "main"], ["--revision", "main", "--weights", "Q4_K_M"]):
        assert cli.invoke(["memory", str(tmp_path), *options]) == UsageError.exit_code
        assert "--revision is for models on the Hub" in capsys.readouterr().err
    resolve.require_revision(resolve.resolve("Qwen/Qwen3-0.6B"), "main")


@pytest.mark.parametrize("shard", [1, 2, 3])
def test_any_shard_means_the_model(tmp_path: Path, shard: int) -> None:
    made = split_model(tmp_path / "My-Model-1B-Q8_0", 3)
    found = resolve.resolve(str(made[shard - 1]))
    assert found == resolve.Model("gguf", "My-Model-1B", made[0])
    made[0].unlink()
    if shard > 1:
        with pytest.raises(ModelError, match=r"00001-of-00003\.gguf is missing"):
            resolve.resolve(str(made[shard - 1]))


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no model 'nothing'") as caught:
        resolve.resolve("nothing")
    assert "docs-qwen3-8m" in str(caught.value.remedy)
    with pytest.raises(ModelError, match=r"there is no model 'a/b\.gguf'"):
        resolve.resolve("a/b.gguf")
    with pytest.raises(ModelError, match=r"no config.json"):
        resolve.resolve(str(tmp_path))
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(ModelError, match="not a GGUF file"):
        resolve.resolve(str(tmp_path / "text.txt"))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="name the one that is the original"):
        resolve.resolve(str(tmp_path), original=True)


@pytest.mark.parametrize(
    ("stem", "base"),
    [
        ("Qwen3-0.6B-Q8_0", "Qwen3-0.6B"),
        ("Qwen3-0.6B-BF16", "Qwen3-0.6B"),
        ("Qwen3.5-27B-UD-IQ2_XXS", "Qwen3.5-27B"),
        ("m-MXFP4_MOE", "m"),
        ("m-IQ4_XS-00001-of-00003", "m"),
        ("Qwen3-0.6B-GGUF", "Qwen3-0.6B"),
        ("model.Q4_K_M", "model"),
        ("Phi-4", "Phi-4"),
        ("Q8_0", "Q8_0"),
    ],
)
def test_base_name(stem: str, base: str) -> None:
    assert names.base_name(stem) == base
