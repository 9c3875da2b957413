"""The cache types on Vulkan without a GPU: upstream's backend with our shaders on Mesa's lavapipe."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import vulkan
from hard_rows import hard

from ggufrq.base import paths, proc
from ggufrq.build.debian import Unreachable
from ggufrq.build.project import Build
from ggufrq.models.convert import convert
from ggufrq.tools.perplexity import parse_divergence

pytestmark = [pytest.mark.build, pytest.mark.slow]

HERE = Path(__file__).resolve().parent
MODEL = "docs-qwen3-8m"


@dataclass(frozen=True)
class Device:
    """lavapipe, as the programs of a build find it by a module."""

    build: Build
    vulkan: vulkan.Vulkan
    folder: Path

    @property
    def env(self) -> dict[str, str]:
        module = str(self.folder / "libggml-vulkan.so")
        # one thread, and pipelines compiled without optimization
        return {
            **self.vulkan.environment,
            "GGML_BACKEND_PATH": module,
            "LP_NUM_THREADS": "1",
            "GALLIVM_PERF": "nopt",
        }

    def run(self, *command: str | Path, **more: str) -> proc.Completed:
        return proc.run([*self.vulkan.starts, *command], env={**self.env, **more}, check=False, timeout=2000)

    def operations(self, operation: str, pattern: str, **more: str) -> tuple[int, int, str]:
        """Cases of test-backend-ops that agree with the CPU, all that the device supports, and the output."""
        command = [
            self.build.tool("test-backend-ops"),
            "test",
            "-b",
            "Vulkan0",
            "-o",
            operation,
            "-p",
            pattern,
        ]
        text = self.run(*command, **more).stdout
        told = re.search(r"(\d+)/(\d+) tests passed", text)
        assert told, text[-3000:]
        return int(told[1]), int(told[2]), text


def sources(build: Build, bring: Callable[[], vulkan.Vulkan], name: str) -> Device:
    """The backend's sources in a folder of the build, for a driver that is brought; not compiled yet."""
    try:
        found = bring()
    except Unreachable as error:
        pytest.skip(f"no lavapipe and glslc: {error.message}")
    folder = build.root / name
    folder.mkdir(exist_ok=True)
    vulkan.mirror(build, folder)
    return Device(build, found, folder)


@pytest.fixture(scope="module")
def device(llama_build: Build) -> Device:
    made = sources(llama_build, vulkan.bring, "vulkan")
    vulkan.module(made.vulkan, llama_build, made.folder)
    return made


_ATTENTION = "flash_attn*|rq_*|copy*|contig*|dequant*"
_FEATURES = ("COOPMAT", "COOPMAT2", "INTEGER_DOT", "BFLOAT16")
#: What upstream's host code asks of a card, and how lavapipe says yes: whether its driver is Intel's, for
#: which attention takes no subgroups, and whether products of integers are fast.
_AS_CARDS = {
    "if (device->vendor_id == VK_VENDOR_ID_INTEL) {\n        // Disable subgroup use": "AS_INTEL",
    "shader_integer_dot_product_props.integerDotProduct4x8BitPackedSignedAccelerated;": "AS_INT_DOT",
}
#: The ways in which upstream's scalar attention goes on cards.
CARDS = {
    "integer products": {"AS_INT_DOT": "1"},
    "no subgroups": {"AS_INTEL": "1"},
}


@pytest.fixture(scope="module")
def card(llama_build: Build) -> Device:
    """A newer lavapipe that can be told to be taken for a card; of the shaders those of attention, all of
    upstream's ways. Its matrices are of 8 by 8, for which upstream has no attention."""
    made = sources(llama_build, vulkan.bring_newest, "vulkan-cards")
    source = made.folder / "ggml-vulkan" / "ggml-vulkan.cpp"
    text = source.read_text()
    for asked, name in _AS_CARDS.items():
        assert asked in text, asked
        test = re.search(r"device->vendor_id == \w+|shader_integer_dot_product_props\.\w+", asked)
        assert test
        text = text.replace(asked, asked.replace(test[0], f'({test[0]} || getenv("{name}"))'))
    source.write_text(text)
    vulkan.module(made.vulkan, llama_build, made.folder, only=_ATTENTION, features=_FEATURES)
    return made


@pytest.fixture(scope="module")
def bytes_of(llama_build: Build, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """device_bytes.cpp, compiled against the build, and a file of rows that are hard on a code."""
    folder = tmp_path_factory.mktemp("bytes")
    hard(384).tofile(folder / "rows")
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    ggml = llama_build.source / "ggml"
    include = [f"-I{ggml / 'include'}", f"-I{ggml / 'src'}"]
    link = [f"-L{llama_build.bin}", "-lggml", "-lggml-base", f"-Wl,-rpath,{llama_build.bin}"]
    proc.run(
        [compiler, "-std=c++17", "-O1", *include, HERE / "device_bytes.cpp", "-o", folder / "bytes", *link]
    )
    return folder / "bytes", folder / "rows"


def wrong_bytes(device: Device, bytes_of: tuple[Path, Path], *types: str) -> list[str]:
    """What the device does not do as the C code does: stores, copies and reads of some types or all."""
    program, rows = bytes_of
    done = device.run(program, "Vulkan0", rows, "384", *types)
    told = re.findall(r"^(?:set_rows|cpy|get_rows) .*: .*$", done.stdout, re.MULTILINE)
    assert len(told) == 5 * (len(types) or 16), done.stdout + done.stderr
    return [line for line in told if not line.endswith(": ok")]


@pytest.mark.parametrize(
    "types", [("planar2", "iso3", "iso5", "rq4_64"), pytest.param((), marks=pytest.mark.thorough)]
)
def test_bytes_are_those_of_the_c_code(
    device: Device, bytes_of: tuple[Path, Path], types: tuple[str, ...]
) -> None:
    """Blocks and values bit for bit, on rows of all kinds."""
    assert wrong_bytes(device, bytes_of, *types) == []


SOME = "(iso3|planar2|rotor4|rq3_64|q8_0|q4_0)"
#: An operation of test-backend-ops, a pattern of its cases, how many these are at least. lavapipe compiles
#: a pipeline for each pair of types, shape and number of queries, seconds each.
CASES = [
    ("FLASH_ATTN_EXT", "hsk=128,hsv=128,nh=2,nr23=.4,1.,kv=113,nb=3,.*type_K=iso3,type_V=(planar4|q8_0)", 2),
    ("FLASH_ATTN_EXT", "hsk=128,.*kv=1025,nb=1,.*type_K=planar2,type_V=planar2", 1),
    ("FLASH_ATTN_EXT", "recent=33,apart=0,hsk=128,.*kv=256,nb=1,.*type_K=iso3", 1),
    ("FLASH_ATTN_EXT", "recent=300,.*type_K=iso3,.*lift=", 2),
    ("MUL_MAT_RQ", "family=1", 18),
]
MORE = [
    ("SET_ROWS", f"type_dst={SOME}", 36),
    ("CPY", f"type_(src|dst)={SOME}", 6),
    ("GET_ROWS", f"type={SOME}", 6),
    ("FLASH_ATTN_EXT", "hsk=128,hsv=128,nh=2,nr23=.4,1.,kv=113,nb=3,", 121),
    ("FLASH_ATTN_EXT", "hsk=256,.*kv=(113|512),.*type_K=(iso3|planar2|rotor4),", 24),
    ("FLASH_ATTN_EXT", "hsk=128,.*nb=75,.*type_K=(iso3|planar2|rotor4),", 9),
    ("FLASH_ATTN_EXT", "hsk=(64|192|320),.*nb=(1|75),.*type_K=rq3_64,.*v_is_view_of_k=0", 30),
    ("FLASH_ATTN_EXT", "hsk=320,.*nb=(1|75),.*type_K=rq3_64,.*v_is_view_of_k=1", 4),
    ("MUL_MAT_RQ", "family", 54),
    ("FLASH_ATTN_EXT", "hsk=576,.*nb=(1|75),.*type_K=rq3_64", 4),
    ("FLASH_ATTN_EXT", "recent=.*apart=0,hsk=128,.*type_K=(iso3|planar2|q8_0|q4_0)", 24),
    ("FLASH_ATTN_EXT", "recent=.*hsk=576,", 3),
]


@pytest.mark.parametrize(
    ("operation", "pattern", "least"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.thorough) for case in MORE)],
)
def test_operations_agree_with_the_cpu(device: Device, operation: str, pattern: str, least: int) -> None:
    """Upstream's q8_0 and q4_0 stand beside ours as a control."""
    passed, supported, text = device.operations(operation, pattern)
    assert passed == supported >= least, text[-3000:]


@pytest.mark.thorough
@pytest.mark.parametrize("way", CARDS)
def test_attention_agrees_on_the_ways_of_cards(card: Device, way: str) -> None:
    pattern = "hsk=64,.*kv=113,nb=3,.*type_K=(rq3_64|q8_0),type_V=rq2_64"
    passed, supported, text = card.operations("FLASH_ATTN_EXT", pattern, **CARDS[way])
    assert passed == supported >= 3, text[-3000:]


@pytest.mark.thorough
def test_products_of_integers_are_taken(card: Device, tmp_path: Path) -> None:
    """A fault in them is seen, where a card has them and there alone."""
    folder = tmp_path / "vulkan"
    shutil.copytree(card.folder, folder, symlinks=True)
    path = folder / "ggml-vulkan" / "vulkan-shaders" / "flash_attn.comp"
    path.write_text(path.read_text().replace("acc += dotPacked", "acc -= dotPacked"))
    vulkan.module(card.vulkan, card.build, folder, only=_ATTENTION, features=_FEATURES)
    faulty = Device(card.build, card.vulkan, folder)
    case = ("FLASH_ATTN_EXT", "hsk=64,.*kv=113,nb=3,.*type_K=q8_0,type_V=rq2_64")
    assert faulty.operations(*case, **CARDS["integer products"])[:2] == (0, 1)
    assert faulty.operations(*case)[:2] == (1, 1)


@pytest.fixture(scope="module")
def model(llama_build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In f32: with other weights each backend rounds activations in its own way, which turns codes over."""
    folder = tmp_path_factory.mktemp("model")
    made = convert(paths.data_dir("models") / MODEL, folder / "bf16.gguf", llama_build.source)
    proc.run([llama_build.tool("llama-quantize"), made, folder / f"{MODEL}.gguf", "F32"])
    return folder / f"{MODEL}.gguf"


def perplexity(device: Device, model: Path, *options: str | Path, **env: str) -> proc.Completed:
    command = [
        device.build.tool("llama-perplexity"),
        "-m",
        model,
        "-f",
        paths.data_dir("texts") / "heldout.txt",
    ]
    return device.run(*command, "-c", "256", "--chunks", "2", "-t", "1", "-lv", "4", *options, **env)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("types", "env"),
    [
        (("f16", "f16"), {}),
        (("iso3", "iso3"), {}),
        (("rotor4", "planar2"), {}),
        (("iso5", "iso5"), {}),
        (("iso3", "iso3"), {"LLAMA_RQ_RECENT": "32", "LLAMA_RQ_FIRST": "1"}),
    ],
)
def test_a_model_says_what_it_says_on_the_cpu(
    device: Device, model: Path, tmp_path: Path, types: tuple[str, str], env: dict[str, str]
) -> None:
    """Weights, cache and attention all on the device. Sums in another order turn codes over, on the CPU by
    upstream's attention as well; logits still diverge by less than half of what the cache itself changes."""

    def cache(type_k: str, type_v: str, where: str) -> tuple[str | Path, ...]:
        options = ("-ctk", type_k, "-ctv", type_v, "-fa", "on", "-dev", where)
        return (*options, "--kl-divergence-base", tmp_path / "logits")

    def divergence(*options: str | Path, **env: str) -> float:
        done = perplexity(device, model, *options, "--kl-divergence", **env)
        assert ("Vulkan0 KV buffer" in done.stderr) == ("Vulkan0" in options), done.stderr[-3000:]
        return parse_divergence(done.stdout, done.stderr).kld_mean

    perplexity(device, model, *cache(*types, "none"), **env)
    got = divergence(*cache(*types, "Vulkan0"), **env)
    changed = divergence(*cache("f16", "f16", "none")) if types != ("f16", "f16") else 2e-5
    assert got < changed / 2, (types, got, changed)


@pytest.mark.parametrize(
    ("type_k", "flash", "env", "said"),
    [
        ("iso3", "off", {}, "has no attention without flash attention for K in iso3"),
        ("iso3", "on", {"LLAMA_RQ_SCALE": "lsq"}, "cannot store rows of iso3"),
    ],
)
def test_what_is_not_there_is_named_at_load(
    device: Device, model: Path, type_k: str, flash: str, env: dict[str, str], said: str
) -> None:
    done = perplexity(device, model, "-ctk", type_k, "-dev", "Vulkan0", "-fa", flash, **env)
    assert done.rc != 0 and "Vulkan0" in done.stderr and said in done.stderr, done.stderr[-3000:]


def test_newest_tokens_are_held(device: Device, model: Path, tmp_path: Path) -> None:
    """Told when the context is made; the text is too short for more."""
    (tmp_path / "text").write_text("Too short.")
    options = ("-ctk", "iso3", "-ctv", "iso3", "-dev", "Vulkan0", "-f", tmp_path / "text", "--no-warmup")
    done = perplexity(device, model, *options, LLAMA_RQ_RECENT="32")
    assert "the newest 32 and first 0 tokens in f16: " in done.stderr, done.stderr[-3000:]


RECENT = ("FLASH_ATTN_EXT", "recent=33,apart=0,hsk=128,.*kv=256,nb=1,.*type_K=iso3")
#: A change of a shader, and what has to see it: bytes, or cases of test-backend-ops.
FAULTS = {
    "encode: thresholds": ("rq_to.comp", ">> 12, 32767u", ">> 11, 32767u", ()),
    "encode: rounding of the scale": (
        "rq_to.comp",
        "rest == half_way && (m & 1u) != 0u",
        "rest == half_way && (m & 1u) == 0u",
        (),
    ),
    "encode: the 64 bits of the squares": ("rq_to.comp", "high << 11 | low >> 21", "high << 11", ()),
    "encode: sign": ("rq_to.comp", "!= 0u ? ~i : i)", "!= 0u ? i : ~i)", ()),
    "decode: plane of the high bit": ("rq_decode.glsl", "(high >> (i/(n/8u)))", "(high >> (i/(n/4u)))", ()),
    "decode: centroids": ("rq_decode.glsl", "+ (neg & 0x01010101u);", ";", ()),
    "get_rows: block": ("rq_get_rows.comp", "+ i00/RQ_N;", "+ i00/(2u*RQ_N);", ()),
    "copy out: place": ("rq_from.comp", "dst_idx(first + i + k)", "dst_idx(first + i + (k ^ 1u))", ()),
    "attention: type of V": (
        "rq_fa.glsl",
        "FA_RQ_VALUES(v_rq, FaTypeV)",
        "FA_RQ_VALUES(v_rq, FaTypeK)",
        ("FLASH_ATTN_EXT", "hsk=128,hsv=128,nh=2,nr23=.4,1.,kv=113,nb=3.*type_K=iso2,type_V=iso4"),
    ),
    "f16 copies: heads": (
        "rq_dequant_transpose.comp",
        "row % heads",
        "0u",
        ("FLASH_ATTN_EXT", "hsk=128,.*nb=75,.*type_K=iso3,type_V=iso3,.*kv_view=0"),
    ),
    "rotation: Hadamard": (
        "rq_rotate.comp",
        ": sh[tid ^ h] - x;",
        ": x - sh[tid ^ h];",
        ("MUL_MAT_RQ", "family=1,mode=3,.*n=5,k=128"),
    ),
    "rotation: blocks": (
        "rq_rotate.comp",
        "4u*i + k",
        "4u*k + 3u",
        ("MUL_MAT_RQ", "family=1,mode=1,.*n=5,k=128"),
    ),
    "recent rows: the parts beside them": ("rq_recent.comp", "l += w*data_a[at];", "l += w;", RECENT),
    "recent rows: a score above those of the parts": (
        "rq_recent.comp",
        "l *= w;",
        "",
        ("FLASH_ATTN_EXT", "recent=300,.*type_K=iso3,.*lift=5"),
    ),
    "recent rows: those of the batch": (
        "rq_recent.comp",
        "at_v_new + (r0 + i - p.n_held)",
        "at_v_new + (r0 + i)",
        RECENT,
    ),
    "copies to f16: the second half of a block": (
        "rq_from_quant.comp",
        "(k & 1u)*(QUANT_K/2u)",
        "(k & 1u)*(QUANT_K/4u)",
        ("FLASH_ATTN_EXT", "recent=33,apart=0,hsk=128,.*nb=75,.*type_K=q4_0"),
    ),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(
    device: Device, bytes_of: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    file, right, wrong, operations = FAULTS[name]
    folder = tmp_path / "vulkan"
    shutil.copytree(device.folder, folder, symlinks=True)
    path = folder / "ggml-vulkan" / "vulkan-shaders" / file
    text = path.read_text()
    assert text.count(right) == 1
    path.write_text(text.replace(right, wrong))
    vulkan.module(device.vulkan, device.build, folder)
    faulty = Device(device.build, device.vulkan, folder)
    if operations:
        passed, supported, _ = faulty.operations(*operations)
        assert passed < supported
        assert device.operations(*operations)[:2] == (supported, supported)
    else:
        assert wrong_bytes(faulty, bytes_of, "iso3")
