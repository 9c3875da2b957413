"""``ggufrq bundle``: options and rendering only, the work is in ``flows.binaries.job``."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import click

from ggufrq.base import log
from ggufrq.build import backends, debian


@click.command()
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("dist"),
    show_default=True,
    help="Folder of the archive and the wheel.",
)
@click.option(
    "--system",
    type=click.Choice(["linux", "windows", "macos"]),
    help="The system that it is for: Windows, on x86-64, by mingw-w64 on Linux; macOS on a Mac.  "
    "[default: this one]",
)
@click.option(
    "--arch",
    type=click.Choice([*debian.ARCHITECTURES, "arm64"]),
    help="The processor that it is for.  [default: this one]",
)
@click.option(
    "--here",
    is_flag=True,
    help="Link against this system's libraries, not those of Debian 11, which apt-get fetches.",
)
@click.option(
    "--backend",
    type=click.Choice(list(backends.BACKENDS)),
    help="With a GPU's a further module, which is loaded where the driver is; cuda and hip take --here.  "
    "[default: cpu; of macOS on arm64 metal]",
)
@click.option("--cuda-arch", metavar="ARCH", help="With cuda: what to generate code for, as CMake names it.")
@click.option(
    "--models/--no-models",
    "with_models",
    default=True,
    show_default=True,
    help="With the embedded models, ready to run; making them takes PyTorch.",
)
@click.option("--source", "where", default="auto", show_default=True, help="As in ggufrq build.")
@click.option("-j", "--jobs", type=click.IntRange(min=1), help="Compilers at once; by cores and memory.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def bundle(
    out: Path,
    system: str | None,
    arch: str | None,
    here: bool,
    backend: str | None,
    cuda_arch: str | None,
    with_models: bool,
    where: str,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Build for other machines, and write an archive and a wheel: programs and libraries that run wherever
    they are unpacked, on Linux, Windows or macOS, with code for every kind of processor, of which the best is
    loaded.

    In both: licences, a manifest, sha256 of every file, the embedded models ready to run, and the converter
    of models. The same source and compiler give the same bytes. Unpacked, with GGUFRQ_BIN=FOLDER, or by
    `pip install` of the wheel, all commands use it where there is no build of one's own.

    \b
    Examples:
      ggufrq bundle
      ggufrq bundle --arch aarch64 -o dist
      ggufrq bundle --system windows
      ggufrq bundle --backend cuda --cuda-arch 90 --here
    """
    from ggufrq.flows.binaries import job

    cmake_args = (f"-DCMAKE_CUDA_ARCHITECTURES={cuda_arch}",) if cuda_arch else ()
    made = job.make(
        out,
        arch=arch or platform.machine(),
        system=system or {"Darwin": "macos", "Windows": "windows"}.get(platform.system(), "linux"),
        here=here,
        backend=backend,
        with_models=with_models,
        cmake_args=cmake_args,
        jobs=jobs,
        source=where,
    )
    if as_json:
        files = {"archive": str(made.archive), "wheel": str(made.wheel)}
        click.echo(json.dumps({**files, **made.manifest}, indent=2))
        return
    if made.needs.versions:
        log.say(f"it takes {', '.join(f'{name} {least}' for name, least in made.needs.versions.items())}")
    for library, file in made.needs.outside.items():
        wheel = made.needs.wheels.get(library)
        log.say(f"{file} takes {library}, " + (f"of {wheel} by pip" if wheel else "which is not in it"))
    for path in (made.archive, made.wheel):
        log.say(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
        click.echo(path)
