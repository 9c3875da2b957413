#!/usr/bin/env python3
"""Make the two small models that ship inside ggufrq, and the texts that they are measured on.

The models exist so that every claim of the tool can be checked on any machine, without a download: a dense
Qwen3 and a hybrid Qwen3.5 (three gated delta net layers, then one full-attention layer), 8 million parameters
each, trained from nothing on free documentation. They are honest little language models, not chat models.

The steps, each of which can be repeated on its own; all intermediate files go below ``--work``:

    python scripts/train_models.py corpus                 # Debian packages -> train.txt, heldout.txt, ...
    python scripts/train_models.py tokenizer              # -> tokenizer.json, tokens as uint16
    python scripts/train_models.py train docs-qwen3-8m --minutes 75
    python scripts/train_models.py export docs-qwen3-8m   # -> ggufrq/data/models/docs-qwen3-8m, in bf16
    python scripts/train_models.py check docs-qwen3-8m    # against transformers; and measured
    python scripts/train_models.py texts                  # -> ggufrq/data/texts, with the licences

It needs a Debian or Ubuntu machine (``apt-get``, ``dpkg``; no root, nothing is installed) and, in Python,
torch, tokenizers, safetensors and numpy; ``check`` also needs transformers. One CPU core per model is enough.
Training is driven by the clock: sequence length and learning rate follow the share of the time budget that
has been used, so a run on a busy machine sees fewer tokens but still ends with a fully decayed rate.
"""

from __future__ import annotations

import argparse
import hashlib
import html.parser
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "ggufrq" / "data" / "models"
TEXTS = ROOT / "ggufrq" / "data" / "texts"

VOCAB = 4096
END, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# The Qwen2 pre-tokenizer, which llama.cpp knows by the name "qwen2".
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
SEED = 20261120


# ---------------------------------------------------------------------------------------------- corpus


@dataclass(frozen=True)
class Package:
    """A Debian package whose documentation is used: where its pages are, whose it is, under which licence."""

    name: str
    root: str
    licence: str
    holder: str
    home: str
    skip: str = r"(?!)"
    only: str = r""


PACKAGES = (
    Package(
        "postgresql-doc-15",
        "usr/share/doc/postgresql-doc-15/html",
        "PostgreSQL",
        "1996-2022 PostgreSQL Global Development Group; 1994 The Regents of the University of California",
        "https://www.postgresql.org/",
        skip=r"release-|bookindex",
    ),
    Package(
        "python3.11-doc",
        "usr/share/doc/python3.11/html",
        "PSF-2.0",
        "2001-2026 Python Software Foundation; All Rights Reserved",
        "https://www.python.org/",
        skip=r"genindex|changelog|search|py-modindex|license",
    ),
    Package(
        "sqlite3-doc",
        "usr/share/doc/sqlite3",
        "public domain",
        "none claimed (D. Richard Hipp and the SQLite contributors)",
        "https://www.sqlite.org/",
        skip=r"changes|doclist|keyword_index|sitemap|releaselog",
    ),
    Package(
        "python-django-doc",
        "usr/share/doc/python-django-doc/html",
        "BSD-3-Clause",
        "Django Software Foundation and individual contributors",
        "https://www.djangoproject.com/",
        skip=r"genindex|search|releases/",
    ),
    Package(
        "cmake-doc",
        "usr/share/doc/cmake-data/html",
        "BSD-3-Clause",
        "2000-2022 Kitware, Inc. and Contributors",
        "https://cmake.org/",
        skip=r"genindex|search|release/",
    ),
    Package(
        "apache2-doc",
        "usr/share/doc/apache2-doc/manual",
        "Apache-2.0",
        "The Apache Software Foundation",
        "https://httpd.apache.org/",
        skip=r"sitemap|quickreference",
        only=r"/en/",
    ),
    Package(
        "python-sqlalchemy-doc",
        "usr/share/doc/python-sqlalchemy-doc/html",
        "MIT",
        "the SQLAlchemy authors and contributors",
        "https://www.sqlalchemy.org/",
        skip=r"genindex|search|changelog/|_modules",
    ),
    Package(
        "nodejs-doc",
        "usr/share/doc/nodejs/api",
        "MIT",
        "Node.js contributors; Joyent, Inc. and other Node contributors",
        "https://nodejs.org/",
        skip=r"all\.html",
    ),
    Package(
        "rust-doc",
        "usr/share/doc/rust-doc/html",
        "MIT OR Apache-2.0",
        "The Rust Project Developers",
        "https://www.rust-lang.org/",
        skip=r"print\.html|toc\.html",
        only=(
            r"html/(book|reference|nomicon|rust-by-example|rustc|rustdoc|embedded-book|edition-guide"
            r"|unstable-book|cargo|std/[a-z_]+/index|std/[a-z_]+/fn|std/(macro|primitive|keyword))"
        ),
    ),
    Package(
        "erlang-doc",
        "usr/share/doc/erlang-doc",
        "Apache-2.0",
        "2002-2022 Ericsson AB",
        "https://www.erlang.org/",
        skip=r"notes|release_notes|_app\.html|index",
    ),
)


class Page(html.parser.HTMLParser):
    """Plain text of one HTML page: headings as ``# ...``, lists as ``- ...``, ``<pre>`` as it stands."""

    SKIP = frozenset(
        ("script", "style", "nav", "head", "header", "footer", "form", "button", "svg", "noscript")
    )
    BLOCK = frozenset(
        re.findall(
            r"\w+",
            "p div table tr ul ol dl dt dd li h1 h2 h3 h4 h5 h6 pre blockquote section article hr br caption",
        )
    )
    VOID = frozenset(re.findall(r"\w+", "area base br col embed hr img input link meta source track wbr"))
    CHROME = re.compile(
        r"\b(nav\w*|sidebar\w*|sphinxsidebar\w*|related|footer|header-?link|headerlink|searchbox|toc|toctree-wrapper"
        r"|menu|breadcrumbs?|api_metadata|preamble|bottomlang|toplang|innertoc|copyright)\b"
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.out: list[str] = []
        self.pre = 0
        self.hidden: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.VOID:
            if tag in ("br", "hr"):
                self.out.append("\n")
            return
        if self.hidden:
            if tag == self.hidden[0]:
                self.hidden.append(tag)
            return
        names = " ".join(value or "" for key, value in attrs if key in ("class", "id", "role"))
        if tag in self.SKIP or (
            tag in ("div", "a", "ul", "table", "span") and self.CHROME.search(names.lower())
        ):
            self.hidden.append(tag)
        elif tag in self.BLOCK:
            self.out.append("\n" if tag in ("tr", "li", "dt", "dd") else "\n\n")
            if tag in ("h1", "h2", "h3", "h4"):
                self.out.append("#" * int(tag[1]) + " ")
            elif tag == "li":
                self.out.append("- ")
            elif tag == "pre":
                self.pre += 1
        elif tag in ("td", "th"):
            self.out.append("  ")

    def handle_endtag(self, tag: str) -> None:
        if self.hidden:
            if tag == self.hidden[0]:
                self.hidden.pop()
        elif tag in self.BLOCK:
            self.out.append("\n\n" if tag not in ("tr", "li", "dt", "dd", "br") else "\n")
            if tag == "pre":
                self.pre = max(0, self.pre - 1)

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.out.append(data if self.pre else re.sub(r"\s+", " ", data))

    def text(self) -> str:
        text = (
            "".join(self.out).replace("\r", "").replace("\xa0", " ").replace("\u00b6", "").replace("\xad", "")
        )
        text = re.sub(r"[ \t]+\n", "\n", text)
        text = re.sub(r"(?m)^-\s*\n\s*", "- ", text)
        text = re.sub(r"\n\n+- ", "\n- ", text)
        text = re.sub(r"(?m)^ (?=\S)", "", text)
        return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def page_text(path: Path) -> str:
    """The text of an HTML page, or an empty string if it is not worth reading."""
    page = Page()
    page.feed(path.read_text(encoding="utf-8", errors="replace"))
    text = page.text()
    letters = sum(c.isascii() for c in text)
    return text if len(text) >= 600 and letters > 0.97 * len(text) else ""


def fetch(package: Package, work: Path) -> tuple[Path, str]:
    """Download and unpack a package; return where it lies and its version."""
    debs, unpacked = work / "debs", work / "unpacked" / package.name
    debs.mkdir(parents=True, exist_ok=True)
    if not list(debs.glob(f"{package.name}_*.deb")):
        subprocess.run(["apt-get", "download", package.name], cwd=debs, check=True, stdout=subprocess.DEVNULL)
    deb = sorted(debs.glob(f"{package.name}_*.deb"))[-1]
    if not unpacked.exists():
        unpacked.mkdir(parents=True)
        subprocess.run(["dpkg", "-x", str(deb), str(unpacked)], check=True)
    version = subprocess.run(
        ["dpkg-deb", "-f", str(deb), "Version"], check=True, capture_output=True, text=True
    )
    return unpacked, version.stdout.strip()


def documents(package: Package, unpacked: Path, seen: set[bytes]) -> Iterator[tuple[str, str]]:
    """Name and text of every page of a package, without the paragraphs that were seen before."""
    pages: list[tuple[str, str]] = []
    base = unpacked / package.root
    for path in sorted(p for p in base.rglob("*.html") if p.is_file() and not p.is_symlink()):
        name = "/" + path.relative_to(base.parent).as_posix()
        if re.search(package.skip, name) or not re.search(package.only, name):
            continue
        if text := page_text(path):
            pages.append((name, text))
    repeated = Counter(line for _, text in pages for line in set(text.split("\n")) if len(line) > 1)
    limit = max(8, len(pages) // 8)
    for name, text in pages:
        text = "\n".join(line for line in text.split("\n") if repeated[line] <= limit or line.startswith(" "))
        kept: list[str] = []
        for paragraph in text.split("\n\n"):
            if len(paragraph) >= 120:
                digest = hashlib.sha256(paragraph.encode()).digest()[:12]
                if digest in seen:
                    continue
                seen.add(digest)
            kept.append(paragraph)
        text = re.sub(r"\n{3,}", "\n\n", "\n\n".join(kept)).strip() + "\n"
        if len(text) >= 500:
            yield name, text


def make_corpus(work: Path) -> None:
    """Packages -> ``train.txt`` (NUL between pages), ``heldout.txt``, ``calibration.txt`` and a record."""
    seen: set[bytes] = set()
    train: list[str] = []
    heldout: list[str] = []
    calibration: list[str] = []
    record: list[dict[str, Any]] = []
    for package in PACKAGES:
        unpacked, version = fetch(package, work)
        pages = list(documents(package, unpacked, seen))
        total = sum(len(text) for _, text in pages)
        # Long pages make good windows: take some of 8 to 60 kB until this package has given its share.
        order = sorted(
            (p for p in pages if 8_000 <= len(p[1]) <= 60_000),
            key=lambda p: hashlib.sha256(f"{SEED} {package.name} {p[0]}".encode()).digest(),
        )
        share = dict(pick(order, 40_000))
        rest = [p for p in order if p[0] not in share]
        heldout.extend(share.values())
        calibrating = dict(pick(rest, 20_000))
        calibration.extend(calibrating.values())
        train.extend(text for name, text in pages if name not in share)
        record.append(
            {
                "name": package.name,
                "version": version,
                "licence": package.licence,
                "pages": len(pages),
                "chars": total,
            }
            | {"held_out": sorted(share), "calibration": sorted(calibrating)}
        )
        print(f"{package.name:24} {version:32} {len(pages):5} pages {total / 1e6:6.2f} MB", flush=True)
    random.Random(SEED).shuffle(train)
    (work / "train.txt").write_text("\0".join(train), encoding="utf-8")
    (work / "heldout.txt").write_text("\n\n".join(heldout), encoding="utf-8")
    (work / "calibration.txt").write_text("\n\n".join(calibration), encoding="utf-8")
    (work / "packages.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name in ("train", "heldout", "calibration"):
        print(f"{name}: {(work / f'{name}.txt').stat().st_size / 1e6:.2f} MB")


def pick(pages: list[tuple[str, str]], size: int) -> Iterator[tuple[str, str]]:
    """Pages from the front of a list until about ``size`` characters are taken."""
    for name, text in pages:
        if size <= 0:
            return
        size -= len(text)
        yield name, text


# ------------------------------------------------------------------------------------------- tokenizer


def make_tokenizer(work: Path) -> None:
    """Train the byte-level BPE vocabulary and encode the corpus."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    pages = (work / "train.txt").read_text(encoding="utf-8").split("\0")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 3,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=24,
    )
    tokenizer.train_from_iterator(pages, trainer)
    tokenizer.add_special_tokens([END, IM_START, IM_END])
    assert tokenizer.get_vocab_size() == VOCAB
    tokenizer.save(str(work / "tokenizer.json"))

    end = tokenizer.token_to_id(END)
    with (work / "train.bin").open("wb") as out:
        for start in range(0, len(pages), 256):
            batch = tokenizer.encode_batch(pages[start : start + 256], add_special_tokens=False)
            out.write(np.concatenate([np.array([*e.ids, end], dtype=np.uint16) for e in batch]).tobytes())
    heldout = tokenizer.encode((work / "heldout.txt").read_text(encoding="utf-8"), add_special_tokens=False)
    (work / "heldout.bin").write_bytes(np.array(heldout.ids, dtype=np.uint16).tobytes())
    for name in ("train", "heldout"):
        print(f"{name}: {(work / f'{name}.bin').stat().st_size // 2:,} tokens")


# ----------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class Shape:
    """What a model looks like. The tensor names and their meaning are those of transformers."""

    name: str
    hybrid: bool
    layers: int = 8
    hidden: int = 256
    ffn: int = 512
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    rotary: float = 1.0
    theta: float = 100_000.0
    context: int = 8192
    eps: float = 1e-6
    # Gated delta net layers
    key_heads: int = 2
    value_heads: int = 4
    delta_dim: int = 64
    conv: int = 4

    def full_attention(self, layer: int) -> bool:
        return not self.hybrid or (layer + 1) % 4 == 0

    def config(self) -> dict[str, Any]:
        """``config.json`` as transformers writes it."""
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self.theta}
        config: dict[str, Any] = {
            "architectures": ["Qwen3_5ForCausalLM" if self.hybrid else "Qwen3ForCausalLM"],
            "model_type": "qwen3_5_text" if self.hybrid else "qwen3",
            "vocab_size": VOCAB,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.eps,
            "max_position_embeddings": self.context,
            "rope_parameters": rope,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "use_cache": True,
            "dtype": "bfloat16",
            "bos_token_id": None,
            "eos_token_id": VOCAB - 3,
            "pad_token_id": VOCAB - 3,
        }
        if self.hybrid:
            rope |= {
                "partial_rotary_factor": self.rotary,
                "mrope_interleaved": True,
                "mrope_section": [11, 11, 10],
            }
            kinds = [
                "full_attention" if self.full_attention(i) else "linear_attention" for i in range(self.layers)
            ]
            config |= {
                "partial_rotary_factor": self.rotary,
                "layer_types": kinds,
                "full_attention_interval": 4,
                "linear_conv_kernel_dim": self.conv,
                "linear_key_head_dim": self.delta_dim,
                "linear_value_head_dim": self.delta_dim,
                "linear_num_key_heads": self.key_heads,
                "linear_num_value_heads": self.value_heads,
            }
        return config


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("docs-qwen3-8m", hybrid=False),
        Shape("docs-qwen3.5-8m", hybrid=True, head_dim=256, rotary=0.25),
    )
}


class Norm(nn.Module):
    """RMS norm. Qwen3.5 stores the weight less one (``zero_centred``)."""

    def __init__(self, size: int, eps: float, zero_centred: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if zero_centred else torch.ones(size))
        self.eps, self.offset = eps, float(zero_centred)

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (self.weight + self.offset)
        return x.bfloat16() if torch.is_autocast_enabled("cpu") else x


class CausalAttention(torch.autograd.Function):
    """Softmax attention in blocks of queries, with the probabilities kept for the way back.

    Queries are (batch, kv heads, group, time, dim) and scaled; keys and values (batch, kv heads, time, dim).
    On one core with bf16 matrix products this is several times faster than torch's fused CPU kernel.
    """

    BLOCK = 256

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, kv, group, time_, dim = q.shape
        block = min(CausalAttention.BLOCK, time_)
        mask = torch.full((block, block), float("-inf"), dtype=q.dtype).triu(1).repeat(group, 1)
        out = torch.empty_like(q)
        probs: list[Tensor] = []
        for start in range(0, time_, block):
            end = start + block
            rows = q[:, :, :, start:end].reshape(batch, kv, group * block, dim)
            scores = rows @ k[:, :, :end].transpose(-1, -2)
            scores[..., start:] += mask
            p = F.softmax(scores, dim=-1)
            probs.append(p)
            out[:, :, :, start:end] = (p @ v[:, :, :end]).view(batch, kv, group, block, dim)
        ctx.save_for_backward(q, k, v, *probs)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *probs = ctx.saved_tensors
        (grad,) = grads
        batch, kv, group, time_, dim = q.shape
        block = min(CausalAttention.BLOCK, time_)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for index, p in enumerate(probs):
            start, end = index * block, (index + 1) * block
            rows = q[:, :, :, start:end].reshape(batch, kv, group * block, dim)
            down = grad[:, :, :, start:end].reshape(batch, kv, group * block, dim)
            dv[:, :, :end] += p.transpose(-1, -2) @ down
            dp = down @ v[:, :, :end].transpose(-1, -2)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, :, :, start:end] = (ds @ k[:, :, :end]).view(batch, kv, group, block, dim)
            dk[:, :, :end] += ds.transpose(-1, -2) @ rows
        return dq, dk, dv


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.heads * shape.head_dim
        kv_width = shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, width * (2 if shape.hybrid else 1), bias=False)
        self.k_proj = nn.Linear(shape.hidden, kv_width, bias=False)
        self.v_proj = nn.Linear(shape.hidden, kv_width, bias=False)
        self.o_proj = nn.Linear(width, shape.hidden, bias=False)
        self.q_norm = Norm(shape.head_dim, shape.eps, shape.hybrid)
        self.k_norm = Norm(shape.head_dim, shape.eps, shape.hybrid)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shape = self.shape
        batch, time_, _ = x.shape
        q = self.q_proj(x).view(batch, time_, shape.heads, -1)
        gate: Tensor | None = None
        if shape.hybrid:
            q, gate = q.chunk(2, dim=-1)
        k = self.k_proj(x).view(batch, time_, shape.kv_heads, shape.head_dim)
        v = self.v_proj(x).view(batch, time_, shape.kv_heads, shape.head_dim).transpose(1, 2)
        dtype = v.dtype
        q = (rotate(self.q_norm(q), cos, sin) * shape.head_dim**-0.5).to(dtype)
        k = rotate(self.k_norm(k), cos, sin).to(dtype).transpose(1, 2)
        q = q.view(batch, time_, shape.kv_heads, -1, shape.head_dim).permute(0, 2, 3, 1, 4)
        out: Tensor = CausalAttention.apply(q.contiguous(), k.contiguous(), v.contiguous())  # type: ignore[no-untyped-call]
        out = out.permute(0, 3, 1, 2, 4).reshape(batch, time_, shape.heads, shape.head_dim)
        if gate is not None:
            out = out * torch.sigmoid(gate)
        projected: Tensor = self.o_proj(out.reshape(batch, time_, -1))
        return projected


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first ``2 * cos.shape[-1]`` values of each head of (batch, time, head, dim)."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, chunk: int = 64) -> Tensor:
    """The gated delta rule over chunks of time.

    All are (batch, head, time, ...); ``g`` is the logarithm of the decay. The state S (key x value) follows
    S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - exp(g_t) S_{t-1}^T k_t)^T and the output is S_t^T q_t. Within a
    chunk the corrections solve a unit lower triangular system; only the states pass from chunk to chunk.
    """
    batch, heads, time_, dim = q.shape
    count = time_ // chunk
    q, k, v = (x.reshape(batch, heads, count, chunk, dim) for x in (q, k, v))
    decay = g.reshape(batch, heads, count, chunk).cumsum(-1)
    beta = beta.reshape(batch, heads, count, chunk, 1)
    causal = torch.ones(chunk, chunk, dtype=torch.bool).tril()
    between = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).masked_fill(~causal, float("-inf")).exp()
    grown = decay.exp().unsqueeze(-1)
    weighted = k * beta
    system = (weighted @ k.transpose(-1, -2)) * between
    right = torch.cat((v * beta, weighted * grown), dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    value, reach = solved[..., :dim], solved[..., dim:]
    within = (q @ k.transpose(-1, -2)) * between
    query = q * grown
    key = k * (decay[..., -1:] - decay).exp().unsqueeze(-1)
    last = decay[..., -1].exp().unsqueeze(-1).unsqueeze(-1)
    state = torch.zeros(batch, heads, dim, dim)
    out: list[Tensor] = []
    parts = zip(*(x.unbind(2) for x in (query, key, value, reach, within, last)), strict=True)
    for query_c, key_c, value_c, reach_c, within_c, last_c in parts:
        fresh = value_c - reach_c @ state
        out.append(query_c @ state + within_c @ fresh)
        state = state * last_c + key_c.transpose(-1, -2) @ fresh
    return torch.stack(out, dim=2).reshape(batch, heads, time_, dim)


class DeltaNet(nn.Module):
    """The linear-attention layer of Qwen3.5."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        key, value = shape.key_heads * shape.delta_dim, shape.value_heads * shape.delta_dim
        self.in_proj_qkv = nn.Linear(shape.hidden, 2 * key + value, bias=False)
        self.in_proj_z = nn.Linear(shape.hidden, value, bias=False)
        self.in_proj_b = nn.Linear(shape.hidden, shape.value_heads, bias=False)
        self.in_proj_a = nn.Linear(shape.hidden, shape.value_heads, bias=False)
        self.conv1d = nn.Conv1d(
            2 * key + value, 2 * key + value, shape.conv, groups=2 * key + value, bias=False
        )
        self.out_proj = nn.Linear(value, shape.hidden, bias=False)
        self.norm = Norm(shape.delta_dim, shape.eps, zero_centred=False)
        # Spread over a wide range of memory lengths: softplus(dt_bias) = 0.1 ... 0.001, A = 1 ... 16.
        self.A_log = nn.Parameter(torch.linspace(1.0, 16.0, shape.value_heads).log())
        step = torch.exp(torch.linspace(math.log(0.1), math.log(0.001), shape.value_heads))
        self.dt_bias = nn.Parameter(torch.log(torch.expm1(step)))

    def forward(self, x: Tensor) -> Tensor:
        shape = self.shape
        batch, time_, _ = x.shape
        mixed = self.in_proj_qkv(x)
        padded = F.pad(mixed, (0, 0, shape.conv - 1, 0))
        taps = self.conv1d.weight[:, 0].to(mixed.dtype)
        mixed = F.silu(
            sum((padded[:, i : i + time_] * taps[:, i] for i in range(shape.conv)), torch.zeros(()))
        )
        heads = mixed.view(batch, time_, -1, shape.delta_dim).transpose(1, 2).float()
        q, k, v = torch.split(heads, [shape.key_heads, shape.key_heads, shape.value_heads], dim=1)
        q = q * torch.rsqrt(q.square().sum(-1, keepdim=True) + 1e-6) * shape.delta_dim**-0.5
        k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + 1e-6)
        group = shape.value_heads // shape.key_heads
        q, k = q.repeat_interleave(group, dim=1), k.repeat_interleave(group, dim=1)
        beta = torch.sigmoid(self.in_proj_b(x).float()).transpose(1, 2)
        g = (-self.A_log.exp() * F.softplus(self.in_proj_a(x).float() + self.dt_bias)).transpose(1, 2)
        with torch.autocast("cpu", enabled=False):
            out = delta_rule(q, k, v, g, beta)
        z = self.in_proj_z(x).view(batch, time_, shape.value_heads, shape.delta_dim)
        out = self.norm(out.transpose(1, 2)) * F.silu(z)
        projected: Tensor = self.out_proj(out.reshape(batch, time_, -1))
        return projected


class FeedForward(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.down_proj = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, shape: Shape, index: int) -> None:
        super().__init__()
        self.full = shape.full_attention(index)
        if self.full:
            self.self_attn = Attention(shape)
        else:
            self.linear_attn = DeltaNet(shape)
        self.mlp = FeedForward(shape)
        self.input_layernorm = Norm(shape.hidden, shape.eps, shape.hybrid)
        self.post_attention_layernorm = Norm(shape.hidden, shape.eps, shape.hybrid)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        normed = self.input_layernorm(x)
        x = x + (self.self_attn(normed, cos, sin) if self.full else self.linear_attn(normed))
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Body(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape, i) for i in range(shape.layers))
        self.norm = Norm(shape.hidden, shape.eps, shape.hybrid)


class LanguageModel(nn.Module):
    """Either architecture; ``state_dict`` has the tensor names of transformers."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Body(shape)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        for layer in self.model.layers:
            for name, weight in layer.named_parameters():
                if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
                    nn.init.normal_(weight, std=0.02 / math.sqrt(2 * shape.layers))
        nn.init.normal_(self.model.embed_tokens.weight, std=0.02)
        rotary = int(shape.head_dim * shape.rotary)
        rates = shape.theta ** (-torch.arange(0, rotary, 2, dtype=torch.float32) / rotary)
        angles = torch.arange(shape.context, dtype=torch.float32)[:, None] * rates
        self.cos, self.sin = angles.cos()[None, :, None], angles.sin()[None, :, None]

    def hidden(self, tokens: Tensor) -> Tensor:
        time_ = tokens.shape[1]
        cos, sin = self.cos[:, :time_], self.sin[:, :time_]
        x: Tensor = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        out: Tensor = self.model.norm(x)
        return out

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood of each target, in nats."""
        hidden = self.hidden(tokens)
        logits = F.linear(hidden, self.model.embed_tokens.weight).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


# -------------------------------------------------------------------------------------------- training

# Share of the time budget up to which a phase lasts, length of its sequences, sequences per pass.
PHASES = ((0.58, 1024, 4), (0.88, 2048, 2), (1.0, 8192, 1))
STEP_TOKENS = 4096
BLOCK_TOKENS = 8192


@dataclass
class Progress:
    """What a checkpoint knows besides weights."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    heldout: float = 0.0


class Batches:
    """Windows of the corpus in a random order that depends on the seed and the position only."""

    def __init__(self, tokens: np.ndarray, seed: int) -> None:
        self.tokens, self.seed = tokens, seed

    def take(self, position: int, count: int, length: int) -> Tensor:
        """``count`` windows; ``position`` is how many tokens were seen before."""
        blocks = (len(self.tokens) - 1) // BLOCK_TOKENS - 2
        index, offset = divmod(position, BLOCK_TOKENS)
        epoch, place = divmod(index, blocks)
        rng = np.random.default_rng((self.seed, epoch))
        start = int(rng.permutation(blocks)[place]) * BLOCK_TOKENS + int(rng.integers(BLOCK_TOKENS)) + offset
        rows = [self.tokens[start + i * length : start + (i + 1) * length + 1] for i in range(count)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def learning_rate(share: float, step: int) -> float:
    """Factor of the learning rate: a short warm-up, a plateau, a linear way down to nothing."""
    warm = min(1.0, (step + 1) / 40)
    return warm * min(1.0, max(0.0, (1.0 - share) / 0.6))


def optimizers(model: LanguageModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, weight in model.named_parameters():
        inner = weight.ndim == 2 and "embed" not in name and min(weight.shape) >= 64
        (matrices if inner else vectors).append(weight)
    muon = torch.optim.Muon(
        matrices, lr=6e-3, momentum=0.95, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(vectors, lr=4e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    return [muon, adam]


@torch.no_grad()
def heldout_loss(model: LanguageModel, tokens: np.ndarray, length: int, limit: int) -> float:
    """Mean loss over the second half of each window, as llama-perplexity counts it."""
    total, count = 0.0, 0
    for start in range(0, min(limit, len(tokens) - length), length):
        window = torch.from_numpy(tokens[start : start + length + 1].astype(np.int64))[None]
        loss = model(window[:, :-1], window[:, 1:])[0, length // 2 : length - 1]
        total, count = total + float(loss.sum()), count + loss.numel()
    return total / count


def save_checkpoint(
    path: Path, model: LanguageModel, opts: list[torch.optim.Optimizer], at: Progress
) -> None:
    state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in opts], "progress": vars(at)}
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def train(shape: Shape, work: Path, minutes: float | None, steps: int | None, threads: int) -> None:
    """Train one model, or go on with it, until its budget of minutes or steps is used up."""
    torch.set_num_threads(threads)
    keep_memory()
    torch.manual_seed(SEED)
    model = LanguageModel(shape)
    opts = optimizers(model)
    rates = [group["lr"] for opt in opts for group in opt.param_groups]
    at = Progress()
    path = work / f"{shape.name}.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        at = Progress(**{k: v for k, v in state["progress"].items() if k in vars(at)})
        print(f"going on from step {at.step}", flush=True)
    batches = Batches(np.fromfile(work / "train.bin", dtype=np.uint16), SEED)
    heldout = np.fromfile(work / "heldout.bin", dtype=np.uint16)
    print(f"{shape.name}: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

    begun, before, saved_at = time.monotonic(), at.seconds, time.monotonic()
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))
    while True:
        share = at.step / steps if steps else at.seconds / (60 * (minutes or 1))
        if share >= 1:
            break
        _, length, rows = next(phase for phase in PHASES if share < phase[0])
        factor = learning_rate(share, at.step)
        for group, rate in zip((g for o in opts for g in o.param_groups), rates, strict=True):
            group["lr"] = rate * factor
        window = batches.take(at.tokens, max(1, STEP_TOKENS // length), length)
        loss_sum = 0.0
        for part in torch.split(window, rows):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(part[:, :-1], part[:, 1:]).sum() / (window.numel() - len(window))
            loss.backward()
            loss_sum += float(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        at.step, at.tokens = at.step + 1, at.tokens + window.numel() - len(window)
        at.seconds = before + time.monotonic() - begun
        at.loss = loss_sum if at.step == 1 else 0.95 * at.loss + 0.05 * loss_sum
        if at.step % 10 == 0:
            left = at.seconds / share * (1 - share) / 60 if share else 0.0
            print(
                f"step {at.step:5} {at.tokens / 1e6:6.2f} M tokens  length {length}  loss {at.loss:.4f}"
                f"  rate {factor:.3f}  {at.tokens / at.seconds:5.0f} tokens/s  {left:5.1f} min left",
                flush=True,
            )
        if stop or time.monotonic() - saved_at > 240:
            save_checkpoint(path, model, opts, at)
            if stop:
                sys.exit(f"stopped after step {at.step}; the same command goes on from here")
            saved_at = time.monotonic()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        at.heldout = heldout_loss(model, heldout, 2048, 60_000)
    print(f"done: held-out loss {at.heldout:.4f} at 2048", flush=True)
    save_checkpoint(path, model, opts, at)


def keep_memory() -> None:
    """Tell glibc to keep freed memory: giving large tensors back to the system costs a tenth of the speed."""
    import ctypes

    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


# ---------------------------------------------------------------------------------------------- export


def export(shape: Shape, work: Path, out: Path, note: str | None) -> None:
    """Write a checkpoint as a Hugging Face folder in bf16."""
    from safetensors.torch import save_file

    path = work / f"{shape.name}.pt"
    model = LanguageModel(shape)
    progress: dict[str, Any] = {}
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        progress = state["progress"]
    out.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in model.state_dict().items()
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(work / "tokenizer.json", out / "tokenizer.json")
    write_json(out / "config.json", shape.config())
    write_json(
        out / "generation_config.json", {"eos_token_id": [VOCAB - 3, VOCAB - 1], "pad_token_id": VOCAB - 3}
    )
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": shape.context,
            "bos_token": None,
            "eos_token": END,
            "pad_token": END,
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    write_json(out / "ggufrq.json", {"pre_tokenizer": "qwen2"})
    packages = json.loads((work / "packages.json").read_text(encoding="utf-8"))
    write_json(
        out / "training.json",
        {
            "made_by": "scripts/train_models.py",
            "parameters": sum(t.numel() for t in tensors.values()),
            "seed": SEED,
            "torch": torch.__version__,
            "steps": progress.get("step", 0),
            "tokens": progress.get("tokens", 0),
            "minutes": round(progress.get("seconds", 0) / 60, 1),
            "train_loss": round(progress.get("loss", 0.0), 4),
            "heldout_loss_2048": round(progress.get("heldout", 0.0), 4),
            "packages": [{k: p[k] for k in ("name", "version", "licence")} for p in packages],
        }
        | ({"note": note} if note else {}),
    )
    size = (out / "model.safetensors").stat().st_size
    print(f"{out}: {size:,} bytes")
    if size >= 16_000_000:
        sys.exit("model.safetensors must stay below 16,000,000 bytes")


def check(shape: Shape, work: Path, out: Path) -> None:
    """Compare an exported folder with transformers and record its perplexities on the held-out text."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    keep_memory()
    tokens = np.fromfile(work / "heldout.bin", dtype=np.uint16)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer((TEXTS / "heldout.txt").read_text(encoding="utf-8"), add_special_tokens=False)[
        "input_ids"
    ]
    if ids != tokens.tolist():
        sys.exit("the exported tokenizer does not give the tokens that the model was trained on")
    model = LanguageModel(shape)
    model.load_state_dict(
        {name: weight.float() for name, weight in load_file(out / "model.safetensors").items()}
    )
    reference = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    window = torch.tensor(ids[:512])[None]
    with torch.no_grad():
        ours = F.linear(model.hidden(window), model.model.embed_tokens.weight)
        difference = float((ours - reference(window).logits).abs().max())
    print(f"largest difference of a logit from transformers: {difference:.1e}")
    if difference > 1e-3:
        sys.exit("this model and that of transformers are not the same")
    record = json.loads((out / "training.json").read_text(encoding="utf-8"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        record["heldout_perplexity"] = {
            str(length): round(math.exp(heldout_loss(model, tokens, length, len(tokens))), 4)
            for length in (512, 1024, 2048)
        }
    print(record["heldout_perplexity"])
    write_json(out / "training.json", record)


def write_texts(work: Path) -> None:
    """Copy the texts next to the models, with where they come from and the licences that go with them."""
    TEXTS.mkdir(parents=True, exist_ok=True)
    for name in ("heldout.txt", "calibration.txt"):
        shutil.copy(work / name, TEXTS / name)
    record = {p["name"]: p for p in json.loads((work / "packages.json").read_text(encoding="utf-8"))}
    rows: list[str] = []
    pages: list[str] = []
    for p in PACKAGES:
        rows.append(f"| {p.name} | {record[p.name]['version']} | {p.licence} | {p.holder} | <{p.home}> |")
        for use in ("held_out", "calibration"):
            listed = ", ".join(f"`{page.lstrip('/')}`" for page in record[p.name][use])
            pages.append(f"- {p.name}, {use.replace('_', '-')}: {listed}")
    notices: list[str] = []
    for title, text in licences(work):
        notices.append(f"### {title}\n\n```text\n{text}\n```")
    page = LICENCE_PAGE.format(rows="\n".join(rows), pages="\n".join(pages), notices="\n\n".join(notices))
    (TEXTS / "LICENSES.md").write_text(page, encoding="utf-8")


LICENCE_PAGE = """# Texts and models: sources and licences

`heldout.txt` (never trained on) and `calibration.txt` (a part of what the models were trained on) are
excerpts of free documentation, from the Debian packages below. The models in `../models` were trained on
the rest of the same packages. Changes made: HTML turned into plain text; navigation, lines repeated on many
pages and paragraphs seen before left out; whole pages selected and joined. `scripts/train_models.py corpus`
does all of it.

Nobody named here has endorsed these excerpts or the models.

`mix/` is what importance matrices are made from, beside pages of `calibration.txt`: `prose.txt` and
`chat.jsonl` (conversations, some with tool calls) were written for ggufrq, `code.txt` is a snapshot of
ggufrq's own sources. All three are under ggufrq's licence, MIT.

| Debian package | version | licence | copyright | project |
|---|---|---|---|---|
{rows}

The Embedded Rust Book, a part of rust-doc, has its prose under CC-BY-SA-4.0; it was trained on and is not in
either text. Code examples in the Python documentation are under 0BSD as well. `MIT OR Apache-2.0` is used
under MIT.

## Pages in the two texts

{pages}

## Licences

{notices}
"""


def licences(work: Path) -> Iterator[tuple[str, str]]:
    """Title and text of every licence, from the copyright files of the packages."""

    def copyright_file(package: str) -> str:
        return next((work / "unpacked" / package).glob("usr/share/doc/*/copyright")).read_text(
            encoding="utf-8"
        )

    def stanza(package: str, name: str) -> str:
        body = re.findall(rf"(?m)^License: {name}\n((?: .*\n?)+)", copyright_file(package))[-1]
        return "\n".join("" if line == " ." else line.removeprefix(" ") for line in body.rstrip().split("\n"))

    yield "PostgreSQL", stanza("postgresql-doc-15", "PostgreSQL")
    python = copyright_file("python3.11-doc")
    begin = python.index("PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2")
    yield "PSF-2.0", python[begin : python.index("BEOPEN.COM LICENSE AGREEMENT", begin)].strip()
    yield "BSD-3-Clause", stanza("python-django-doc", "BSD-3-Clause")
    yield "MIT", stanza("python-sqlalchemy-doc", "Expat")
    yield "Apache-2.0", Path("/usr/share/common-licenses/Apache-2.0").read_text(encoding="utf-8").strip("\n")


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "train", help="where everything is kept"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("corpus", help="download and extract the texts")
    commands.add_parser("tokenizer", help="train the vocabulary, encode the texts")
    training = commands.add_parser("train", help="train a model, or go on training it")
    training.add_argument("name", choices=SHAPES)
    training.add_argument("--minutes", type=float, help="stop after this much training time in all")
    training.add_argument("--steps", type=int, help="stop after this many steps in all")
    training.add_argument("--threads", type=int, default=1)
    exporting = commands.add_parser("export", help="write a Hugging Face folder")
    exporting.add_argument("name", choices=SHAPES)
    exporting.add_argument("--out", type=Path, help="default: ggufrq/data/models/NAME")
    exporting.add_argument("--note", help="a remark on how this one was made, for training.json")
    checking = commands.add_parser("check", help="compare an exported folder with transformers, measure it")
    checking.add_argument("name", choices=SHAPES)
    checking.add_argument("--out", type=Path, help="default: ggufrq/data/models/NAME")
    commands.add_parser("texts", help="write ggufrq/data/texts")
    args = parser.parse_args()
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)
    if args.command == "corpus":
        make_corpus(work)
    elif args.command == "tokenizer":
        make_tokenizer(work)
    elif args.command == "train":
        if (args.minutes is None) == (args.steps is None):
            parser.error("give either --minutes or --steps")
        train(SHAPES[args.name], work, args.minutes, args.steps, args.threads)
    elif args.command == "export":
        export(SHAPES[args.name], work, args.out or MODELS / args.name, args.note)
    elif args.command == "check":
        check(SHAPES[args.name], work, args.out or MODELS / args.name)
    else:
        write_texts(work)


if __name__ == "__main__":
    main()
