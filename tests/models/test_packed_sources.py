"""Models that are quantized already: families of them, or a sentence before anything is made or fetched."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import hubs
import numpy as np
import packed_models
import pytest
from families import family_of
from packed_models import Packed, dense

from ggufrq.base.errors import ModelError
from ggufrq.build.project import Build
from ggufrq.ggufs.files import read_gguf
from ggufrq.ggufs.header import read_header
from ggufrq.models import _hf_to_gguf as wrapper
from ggufrq.models import convert
from ggufrq.profile.tensors import Tensors


def same(path: Path, model: Packed, kinds: set[str]) -> None:
    """Every matrix of a GGUF that is in one of these types is what numpy decodes, in BF16 its nearest."""
    tensors, types = Tensors(path), read_gguf(path).tensor_types
    looked = 0
    for name, values in model.values.items():
        if types[name] in kinds:
            want = packed_models.rounded(values) if types[name] == "bf16" else values.astype(np.float32)
            np.testing.assert_array_equal(tensors.rows(name).reshape(values.shape), want, err_msg=name)
            looked += 1
    assert looked


def test_codes_that_become_floats(llama_build: Build, tmp_path: Path) -> None:
    """By upstream's converter, to the bit; in one process, as it takes seconds to start."""
    models = {told: make() for told, make in packed_models.DECODED.items()}
    folders = {told: model.write(tmp_path / f"m{i}") for i, (told, model) in enumerate(models.items())}
    for told, folder in folders.items():
        found = convert.inspect(folder)
        convert.require_readable(found)
        assert (found.quantized_by, found.kind, found.out_type) == (told, "BF16", "bf16")
    calls = "".join(
        f"main(Path({str(llama_build.source)!r}), '*', 'all', "
        f"[{str(folder)!r}, '--outtype', 'bf16', '--outfile', {str(folder) + '.gguf'!r}])\n"
        for folder in folders.values()
    )
    script = f"import sys\nfrom pathlib import Path\nfrom _hf_to_gguf import main\n{calls}"
    done = subprocess.run(
        [sys.executable, "-B", "-c", script],
        cwd=Path(wrapper.__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for told, folder in folders.items():
        made = folder.with_name(f"{folder.name}.gguf")
        convert.require_kind(made, convert.inspect(folder))
        same(made, models[told], {"bf16"})


def test_a_family_of_floats_in_8_bits(llama_build: Build, tmp_path: Path) -> None:
    model = packed_models.DECODED["FP8 in blocks of 128x128"]()
    folder = model.write(tmp_path / "Eight")
    family = family_of(str(folder), ["BF16", "Q8_0"], llama_build, out=tmp_path / "out", run=False)
    assert [made.name for made in family.files] == ["Eight-BF16.gguf", "Eight-Q8_0.gguf"]
    same(family.file("BF16"), model, {"bf16"})
    values = read_header(family.file("Q8_0")).values
    assert values["ggufrq.source.weights"] == "FP8 in blocks of 128x128"


def test_experts_that_stay(llama_build: Build, tmp_path: Path) -> None:
    """gpt-oss: its MXFP4 stays to the bit, the rest is quantized, and nothing is called what it is not."""
    model = packed_models.gpt_oss()
    folder = str(model.write(tmp_path / "Oss", **packed_models.GPT_OSS))
    out = tmp_path / "out"
    family = family_of(folder, ["Q8_0", "Q4_K_M", "proposal-c"], llama_build, out=out)
    assert [path.name for path in sorted(out.glob("Oss*.gguf"))] == [
        "Oss-MXFP4_MOE.gguf",
        "Oss-Q4_K_M.gguf",
        "Oss-Q8_0.gguf",
        "Oss-kv.gguf",
        "Oss-proposal-c-Q8_0.gguf",
    ]
    same(out / "Oss-MXFP4_MOE.gguf", model, {"mxfp4", "bf16"})
    for made in family.files:
        types = read_gguf(made.path).tensor_types
        assert {kind for name, kind in types.items() if "_exps.weight" in name} == {"mxfp4"}
        assert types["blk.0.attn_q.weight"] == ("q4_k" if made.type == "Q4_K_M" else "q8_0")
        assert made.codes == 3
        same(made.path, model, {"mxfp4"})
    for kind in ("F16", "BF16"):
        with pytest.raises(ModelError, match=rf"no file can be called Oss-{kind}\.gguf: 3 tensors .* mxfp4"):
            family_of(folder, [kind], llama_build, out=out)
    again = family_of(str(out / "Oss-MXFP4_MOE.gguf"), ["Q8_0"], llama_build, out=tmp_path / "again")
    assert read_gguf(again.file("Q8_0")).tensor_types == read_gguf(family.file("Q8_0")).tensor_types
    decoded = family_of(
        str(out / "Oss-MXFP4_MOE.gguf"), ["BF16"], llama_build, out=tmp_path / "again", requantize=True
    )
    same(decoded.file("BF16"), model, {"bf16"})


def test_nvfp4_stays(llama_build: Build, tmp_path: Path) -> None:
    """Beside FP8, which is decoded; the file is named by what stays, whatever the configuration calls it."""
    model = dense(packed_models.MIXED, packed_models.half_nvfp4)
    folder = str(model.write(tmp_path / "Mixed"))
    out = tmp_path / "out"
    (made,) = family_of(folder, ["Q8_0"], llama_build, out=out).files
    same(out / "Mixed-NVFP4.gguf", model, {"bf16", "nvfp4"})
    same(made.path, model, {"nvfp4"})
    types = read_gguf(made.path).tensor_types
    assert (types["blk.0.ffn_up.weight"], types["blk.0.attn_q.weight"]) == ("nvfp4", "q8_0")


def test_on_the_hub_nothing_is_fetched_that_would_be_refused(
    llama_build: Build, command_line: Callable[..., list[str]], fake_hub: ModuleType, tmp_path: Path
) -> None:
    """Neither with ``--dry-run`` nor without: a few headers at most, and no folder is left."""
    model = dense({"quant_method": "awq", "bits": 4}, packed_models.gptq).write(tmp_path / "model")
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    with fake_hub.fake_hub({"somebody/Some-AWQ": files}) as hub:
        for more in ((), ("--dry-run",)):
            done = subprocess.run(
                command_line(llama_build, "quantize", "somebody/Some-AWQ", "--types", "Q8_0", *more),
                cwd=tmp_path,
                env=hubs.environment(hub.url, tmp_path / "hf", token=None),
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == ModelError("").exit_code
            assert "the weights of Some-AWQ are quantized by AWQ, which llama.cpp's conv" in done.stderr
        hub.repos["somebody/Some-FP8"] = {
            path.name: path.read_bytes()
            for path in packed_models.DECODED["FP8 of ModelOpt"]().write(tmp_path / "eight").iterdir()
        }
        done = subprocess.run(
            command_line(llama_build, "quantize", "somebody/Some-FP8", "--types", "Q8_0", "--stream"),
            cwd=tmp_path,
            env=hubs.environment(hub.url, tmp_path / "hf", token=None),
            capture_output=True,
            text=True,
            check=False,
        )
        assert "not with --stream: its weights are FP8 of ModelOpt, with scales that" in done.stderr
        assert hub.sent < len(files["model.safetensors"]) / 2
    assert not (tmp_path / "Some-AWQ-GGUF").exists()
