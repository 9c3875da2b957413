"""tables.json: consistent, derived as it says, and the C header is generated from it."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from ggufrq.codec import cache_type, cache_types, derive, emit, siblings, tables

ROOT = Path(__file__).resolve().parents[2]


def test_cache_types() -> None:
    types = cache_types()
    families = ("planar", "iso", "rotor")
    assert [t.name for t in types] == [
        *(f + b for f in families for b in "234"),
        *(f + "5" for f in families),
    ]
    assert [t.id for t in types] == [*range(112, 121), 124, 125, 126]
    assert {t.bits: (t.block, t.bytes, t.bits_per_value) for t in types} == {
        2: (128, 34, 2.125),
        3: (128, 50, 3.125),
        4: (128, 66, 4.125),
        5: (128, 82, 5.125),
    }
    assert cache_type("iso3").id == 116


def test_siblings() -> None:
    """The same codes with blocks of 64 values, without a name among those that a user types."""
    assert [(s.name, s.id, s.family, s.bits, s.block, s.bytes, s.bits_per_value) for s in siblings()] == [
        ("rq2_64", 121, "", 2, 64, 18, 2.25),
        ("rq3_64", 122, "", 3, 64, 26, 3.25),
        ("rq4_64", 123, "", 4, 64, 34, 4.25),
        ("rq5_64", 127, "", 5, 64, 42, 5.25),
    ]
    for s in siblings():
        narrow, wide = tables.code(s.bits, s.block), tables.code(s.bits)
        assert (narrow.centroids, narrow.starts) == (wide.centroids, wide.starts)
        assert narrow.norm == pytest.approx(wide.norm * 2**0.5)
        with pytest.raises(ValueError, match="no cache type"):
            cache_type(s.name)


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"no cache type 'iso6'.*planar2.*rotor5"):
        cache_type("iso6")
    with pytest.raises(ValueError, match="no code with 6 bits; there are 2, 3, 4, 5"):
        tables.code(6)
    with pytest.raises(ValueError, match="no code with blocks of 32; there are 64, 128"):
        tables.code(3, 32)
    with pytest.raises(ValueError, match="no rotation family 'turbo'"):
        tables.rotation_blocks("turbo")


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_codebooks_are_lloyd_max(bits: int) -> None:
    c = tables.code(bits)
    assert list(c.centroids) == derive.int8_centroids(bits)
    assert list(c.centroids) == sorted(-v for v in c.centroids)
    half = derive.lloyd_max(2 ** (bits - 1))
    edges = [0.0, *((a + b) / 2 for a, b in pairwise(half))]
    best = derive.distortion(half)
    # J. Max, 1960, table I, but the last one, which is computed
    assert best == pytest.approx({2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002505}[bits], rel=1e-3)
    assert edges[1:] == pytest.approx(
        [a / 2 / c.magnitudes[-1] * half[-1] for a in c.mid2], rel=0.04 if bits < 5 else 0.08
    )
    scaled = [m * half[-1] / c.magnitudes[-1] for m in c.magnitudes]
    assert best <= derive.distortion(scaled) < (1.002 if bits < 5 else 1.012) * best


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_encoder_stays_within_32_bits(bits: int) -> None:
    """The bounds that the comments in ggml-rq.c rely on."""
    c = tables.code(bits)
    assert 128 * 32767 * c.magnitudes[-1] < 2**31
    assert 128 * c.magnitudes[-1] ** 2 < 2**21
    assert max(c.mid2) < 256 and max(c.starts) < 256
    # a fit exceeds the scale that chose the indices by the widest cell at most, relative to its centroid,
    # and in the last cell it stays below the largest magnitude
    growth = max(mid2 / 2 / m for mid2, m in zip(c.mid2, c.magnitudes, strict=False))
    start = 32767 * max(max(c.starts) / 8, 2048 / c.magnitudes[-1])
    twice_for_fp16_subnormals = 2
    largest = start * growth**2 * twice_for_fp16_subnormals
    assert largest < 2**24
    assert largest * max(c.mid2) < 2**32


def test_tables_are_as_derived() -> None:
    frozen = tables.load()
    fresh = derive.derive()
    for family in derive.FAMILIES:
        np.testing.assert_allclose(frozen["rotations"][family], fresh["rotations"][family], atol=2e-7)
        fresh["rotations"][family] = frozen["rotations"][family]
    assert frozen == fresh


def test_tables_text_is_normal() -> None:
    text = (Path(derive.__file__).parent / "tables.json").read_text(encoding="utf-8")
    assert text == derive.to_json(json.loads(text))


def test_nine_digits_identify_a_float32() -> None:
    exact = derive.rotations()
    for family in derive.FAMILIES:
        read = np.array(derive.derive()["rotations"][family], np.float32).reshape(exact[family].shape)
        assert np.array_equal(read.view(np.uint32), exact[family].view(np.uint32))


def test_ids_name_every_type_once() -> None:
    text = emit.ids_header()
    for t in cache_types():
        assert text.count(f'X({t.name.upper()}, "{t.name}", {t.bits})') == 1
        assert text.count(f"GGML_TYPE_{t.name.upper()} = {t.id}") == 1
        assert text.count(f"GGML_TYPE_{t.name.upper()}") == 2
    for s in siblings():
        assert text.count(f'X({s.name.upper()}, "{s.name}", {s.bits}_64)') == 1
        assert text.count(f"GGML_TYPE_{s.name.upper()} = {s.id}") == 1
        assert text.count(f"GGML_TYPE_{s.name.upper()}") == 2


@pytest.mark.parametrize("target", emit.headers())
def test_header_is_generated(target: Path) -> None:
    text = (ROOT / target).read_text(encoding="ascii")
    assert text == emit.headers()[target], f"run: {emit.COMMAND}"
    assert text.splitlines()[0].startswith(f"// Generated by: {emit.COMMAND} ")


@pytest.mark.parametrize(
    ("target", "change"), [(emit.TARGET, ("-79", "-80")), (emit.IDS_TARGET, ("113", "114"))]
)
def test_emit_check(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    target: Path,
    change: tuple[str, str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in emit.headers():
        path.parent.mkdir(parents=True, exist_ok=True)
    assert emit.main([]) == 0
    assert emit.main(["--check"]) == 0
    target.write_text(target.read_text().replace(*change, 1))
    assert emit.main(["--check"]) == 1
    told = capsys.readouterr().err
    assert emit.COMMAND in told and str(target) in told
    assert emit.main(["--chekc"]) == 2
