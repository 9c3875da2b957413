"""Runs llama.cpp's own converter in a process of its own: ``_hf_to_gguf.py SOURCE DECLARED WHAT ARGUMENTS…``.

SOURCE is the llama.cpp tree. The converter knows byte-pair tokenizers by a hash and refuses unknown ones; for
those, and only those, the pre-tokenizer DECLARED for the model is written into the GGUF (``-`` when none is
declared, ``*`` when it does not matter). WHAT is ``all``, or ``header`` for a file of the same length that
has everything but the weights: a hole takes their place, so that sizes can be told of a model that is not
converted, or not even downloaded; or ``keys`` for a file with those weights alone that Q and K come from.
``sources:FILE`` is as ``header``, and tells FILE of every tensor which files of the model it comes from, with
an end when some are read before anything is written; ``only:FILE`` is a file with all metadata and only the
tensors whose names FILE lists.
"""

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

#: Starts the lines that are meant for ggufrq.
MARK = "ggufrq: "
#: Tensors that Q and K come from, and the last norm, which names the model.
KEYS = re.compile(r"^blk\.\d+\.attn_(?!v\.|output\.|gate\.)|^(output|token_embd)_norm\.|rope_")


class _Lines:
    """stderr whose progress bars end their lines, so that they can be followed line by line."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def write(self, text: str) -> int:
        return int(self._inner.write(text.replace("\r", "\n")))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def write_hole(self: Any, *, progress: bool = False) -> None:
    """Stands in for ``GGUFWriter.write_tensors_to_file``: the list of tensors, and a hole for their data."""
    self.write_ti_data_to_file()
    for file, tensors in zip(self.fout, self.tensors, strict=True):
        self.write_padding(file, file.tell())
        size = sum(self.ggml_pad(tensor.nbytes, self.data_alignment) for tensor in tensors.values())
        file.truncate(file.tell() + size)
        file.flush()


def files_of(tensor: Any) -> set[str]:
    """Names of the files that a tensor is going to be read from, when it is written."""
    found: set[str] = set()
    seen: set[int] = set()
    open_ends = [tensor]
    while open_ends:
        part = open_ends.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        place = getattr(part, "data_range", None) if type(part).__name__ == "LocalTensor" else None
        if place is not None:
            found.add(Path(place.filename).name)
        elif isinstance(part, (list, tuple)):
            open_ends += part
        elif "_args" in getattr(part, "__dict__", {}):
            open_ends += [part._args, list(part._kwargs.values())]
    return found


def tell_sources(base: Any, out: Path) -> None:
    """Let the converter write ``out`` and a file without weights."""

    def write(self: Any, *, progress: bool = False) -> None:
        told = [
            {"name": name, "bytes": tensor.nbytes, "files": sorted(files_of(tensor.tensor))}
            for tensors in self.tensors
            for name, tensor in tensors.items()
        ]
        out.write_text(json.dumps(told), encoding="utf-8")
        write_hole(self, progress=progress)

    def read_too_early(self: Any) -> None:
        sys.exit(MARK + f"reads {Path(self.data_range.filename).name} before it writes")

    base.gguf.GGUFWriter.write_tensors_to_file = write
    base.gguf.utility.LocalTensor.mmap_bytes = read_too_early


def keep_only(base: Any, names: set[str]) -> None:
    """Let the converter write the tensors with these names."""
    begin = base.gguf.GGUFWriter.write_header_to_file

    def write(self: Any, *arguments: Any, **named: Any) -> None:
        self.tensors = [{n: t for n, t in tensors.items() if n in names} for tensors in self.tensors]
        begin(self, *arguments, **named)

    base.gguf.GGUFWriter.write_header_to_file = write


def main(source: Path, declared: str, what: str, arguments: list[str]) -> None:
    """Import the converter's classes, put the declaration in, and run the script."""
    sys.stderr = _Lines(sys.stderr)
    sys.path[0] = str(source)  # not this folder, whose modules would shadow others
    sys.path.insert(0, str(source / "gguf-py"))
    from conversion import base  # type: ignore[import-not-found,unused-ignore]

    known = base.TextModel.get_vocab_base_pre

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        try:
            name = str(known(self, tokenizer))
        except NotImplementedError:
            if declared == "-":
                sys.exit(MARK + "unknown pre-tokenizer")
            return "default" if declared == "*" else declared
        if declared not in ("-", "*", name):
            sys.exit(MARK + f"known pre-tokenizer {name}")
        return name

    base.TextModel.get_vocab_base_pre = get_vocab_base_pre
    if what == "header":
        base.gguf.GGUFWriter.write_tensors_to_file = write_hole
    elif what == "keys":
        add_all = base.gguf.GGUFWriter.add_tensor

        def add_keys(self: Any, name: str, *arguments: Any, **named: Any) -> None:
            if KEYS.search(name):
                add_all(self, name, *arguments, **named)

        base.gguf.GGUFWriter.add_tensor = add_keys
    elif what.startswith("sources:"):
        tell_sources(base, Path(what.partition(":")[2]))
    elif what.startswith("only:"):
        keep_only(base, set(json.loads(Path(what.partition(":")[2]).read_text(encoding="utf-8"))))
    if "--no-mtp" in arguments:
        import conversion  # type: ignore[import-not-found,unused-ignore]

        get_class = conversion.get_model_class

        def get_model_class(*named: Any, **more: Any) -> Any:
            found = get_class(*named, **more)
            found.supports_mtp_export = True  # without it a model whose head is never converted is refused
            return found

        conversion.get_model_class = get_model_class
    script = source / "convert_hf_to_gguf.py"
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
