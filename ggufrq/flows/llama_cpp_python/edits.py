"""What is changed in the files of llama-cpp-python: calls of ``_ggufrq.py``, which lies beside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ggufrq.base.errors import SourceError


@dataclass(frozen=True)
class Edit:
    """Text in a file, by its name in the package, that must be there once, and what takes its place."""

    file: str
    old: str
    new: str


_ARGUMENTS = "kv_layers", "kv_profile", "kv_recent", "kv_first"

_LOADER = Edit(
    "_ctypes_extensions.py",
    "    # Try to load the shared library, handling potential errors\n",
    "    # each library is here once, by the name that the others ask for\n"
    '    lib_paths += sorted(base_path.glob(f"lib{lib_base_name}.so.*"))\n'
    '    lib_paths += sorted(base_path.glob(f"lib{lib_base_name}.*.dylib"))\n'
    "\n"
    "    # Try to load the shared library, handling potential errors\n",
)

_LLAMA = (
    ("from ._logger import set_verbose\n", "from . import _ggufrq\nfrom ._logger import set_verbose\n"),
    (
        "        type_k: Optional[int] = None,\n        type_v: Optional[int] = None,\n",
        "        type_k: Optional[Union[int, str]] = None,\n"
        "        type_v: Optional[Union[int, str]] = None,\n"
        "        kv_layers: Optional[str] = None,\n"
        "        kv_profile: Optional[str] = None,\n"
        "        kv_recent: Optional[int] = None,\n"
        "        kv_first: Optional[int] = None,\n",
    ),
    (
        "            type_k: KV cache data type for K (default: f16)\n"
        "            type_v: KV cache data type for V (default: f16)\n",
        '            type_k: KV cache data type for K (default: f16), by name ("iso3") or number\n'
        "            type_v: KV cache data type for V (default: f16), by name or number\n"
        '            kv_layers: Types of some layers apart: "0-1,-1:q8_0;5:iso4/iso3"\n'
        '            kv_profile: Metric of K in a type of ggufrq: a file, "weights" or "none" (default:'
        " NAME-kv.gguf beside the model, or else one of ggufrq's)\n"
        "            kv_recent: Newest tokens that a query sees in f16 (default: 32 with a type of ggufrq)\n"
        "            kv_first: And the first ones (default: 1 with a type of ggufrq)\n",
    ),
    (
        "        if type_k is not None:\n"
        "            self.context_params.type_k = type_k\n"
        "        if type_v is not None:\n"
        "            self.context_params.type_v = type_v\n",
        "        self._kv = _ggufrq.Cache(\n"
        "            model_path, self.context_params, type_k, type_v,\n"
        "            kv_layers, kv_profile, kv_recent, kv_first,\n"
        "        )\n",
    ),
    (
        "                internals.LlamaContext(\n"
        "                    model=self._model,\n"
        "                    params=self.context_params,\n",
        "                self._kv.context(\n"
        "                    model=self._model,\n"
        "                    params=self.context_params,\n",
    ),
    (
        "            type_v=self.context_params.type_v,\n",
        "            type_v=self.context_params.type_v,\n            **self._kv.asked,\n",
    ),
    (
        "            llama_cpp.llama_state_set_data(self._ctx.ctx, llama_state, state_size)\n",
        "            _ggufrq.call(llama_cpp.llama_state_set_data, self._ctx.ctx, llama_state, state_size)\n",
    ),
)

_SETTINGS = (
    (
        "    type_k: Optional[int] = Field(\n",
        "    kv_layers: Optional[str] = Field(\n"
        '        default=None, description="Cache types of some layers apart."\n'
        "    )\n"
        "    kv_profile: Optional[str] = Field(\n"
        '        default=None, description="Metric of K: a file, weights or none."\n'
        "    )\n"
        "    kv_recent: Optional[int] = Field(\n"
        '        default=None, description="Newest tokens that a query sees in f16."\n'
        "    )\n"
        "    kv_first: Optional[int] = Field(\n"
        '        default=None, description="First tokens that a query sees in f16."\n'
        "    )\n"
        "    type_k: Optional[Union[str, int]] = Field(\n",
    ),
    ("    type_v: Optional[int] = Field(\n", "    type_v: Optional[Union[str, int]] = Field(\n"),
)

_PASSED_ON = "".join(f"            {name}=settings.{name},\n" for name in _ARGUMENTS)


def edits(release: str, version: str) -> list[Edit]:
    """All edits of this release of llama-cpp-python, which calls itself ``version`` then."""
    return [
        _LOADER,
        *(Edit("llama.py", old, new) for old, new in _LLAMA),
        *(Edit("server/settings.py", old, new) for old, new in _SETTINGS),
        Edit(
            "server/model.py",
            "            type_v=settings.type_v,\n",
            "            type_v=settings.type_v,\n" + _PASSED_ON,
        ),
        Edit("__init__.py", f'__version__ = "{release}"', f'__version__ = "{version}"'),
    ]


def edited(package: Path, release: str, version: str) -> dict[str, str]:
    """The edited files of the package in a folder, by their names in it.

    Raises SourceError when one of them is not as the edits expect it.
    """
    texts: dict[str, str] = {}
    for edit in edits(release, version):
        path = package / edit.file
        text = texts.get(edit.file)
        if text is None:
            text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if text.count(edit.old) != 1:
            raise SourceError(
                f"llama-cpp-python {release} is not as ggufrq edits it: {edit.file} has not once "
                f"'{edit.old.strip().splitlines()[0]}'",
                remedy="bring ggufrq/flows/llama_cpp_python/edits.py up to this release",
            )
        texts[edit.file] = text.replace(edit.old, edit.new)
    return texts
