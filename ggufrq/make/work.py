"""One run over the folder of a family: each file is made, checked, entered in the record, and named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ggufrq.base import log
from ggufrq.base.errors import GgufrqError
from ggufrq.base.progress import Listener, progress
from ggufrq.ggufs.drafts import SIMPLE, draft_kind
from ggufrq.ggufs.files import GgufFacts, read_gguf
from ggufrq.ggufs.values import DAMAGED, require_numbers
from ggufrq.make import matrix as matrices
from ggufrq.make import profile as profiles
from ggufrq.make import quantizer, split, verify
from ggufrq.make.fold import fold_file as folds
from ggufrq.make.fold.folding import Folding
from ggufrq.make.plan import Conversion, Family, FamilyPlan, Made, Output
from ggufrq.make.planner import Planner
from ggufrq.make.quantizer import Job
from ggufrq.make.record import require_free
from ggufrq.models import convert, hub, sound
from ggufrq.models.as_gguf import Source

#: Models of which all files together take less than this are converted before they are planned.
_SMALL = 4 << 30


class Work:
    """Makes what a planner plans. The caller holds the folder's lock."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self.request = planner.request
        self.record = planner.record
        self.folder = planner.folder
        self.build = planner.build
        self.log = planner.log
        self._fresh: set[str] = set()
        self._folding: Folding | None = None
        self._foreseen: dict[str, tuple[int, list[str]]] = {}

    def source(self) -> tuple[Source, Path]:
        """The source, and the model as GGUF, converted if need be."""
        self.record.clean()
        self._look_ahead()
        found = self.planner.find()
        if (
            self.record.base == self.planner.base or "source" not in self.record.data
        ):  # a draft is not the model
            self.record.data["source"] = found.identity
        self.record.data["llama_cpp"] = self.build.manifest.get("llama_cpp", {}).get("commit", "")
        gguf = self.planner.converted(found)
        if gguf is None:
            self._foresee(found)
            model = self.planner.conversions(found)[0]
            self._convert(model, found)
            gguf = self.folder / model.name
        return found, gguf

    def make(self) -> Family:
        """Make what is not there yet."""
        found, gguf = self.source()
        plan = self.planner.plan(found, gguf)
        names = [output.name for output in plan.outputs if not output.kept]
        self.record.refuse_foreign(names, force=self.request.force)
        profiles.refuse(self.record, self._profile_base, gguf, force=self.request.force)
        if names:
            require_free(self.folder, plan.disk_needed, ", ".join(names))
            if found.hf is None:
                require_numbers(gguf, gguf.name, remedy=DAMAGED)
        for line in plan.told if names else ():
            log.say(line)
        parts = [self._convert(part, found) for part in plan.conversions if part.part != "model"]
        if self.make_matrix(plan, found):
            plan = self.planner.plan(found, gguf)  # whose files name the matrix that is there now
        outputs = {output.want.label: output for output in plan.outputs}
        files = [
            self._quantize(outputs[want.label])
            if want.label in outputs
            else self._convert(plan.conversions[0], found)
            for want in self.request.wants
        ]
        profile = self._profile(found, gguf, files)
        self.record.clean()  # a program of a run that was killed may have gone on for a while
        return Family(plan.base, self.folder, found.identity, (*files, *parts), profile)

    def _look_ahead(self) -> None:
        """Refuse what would be refused later before the weights of a model on the Hub are fetched, by their
        headers. Mirrors that send no parts of files leave that for later."""
        if self.planner.model.kind != "hub" or self.planner.model.label:
            return
        try:
            found = self.planner.find(weights=False)
        except hub.NoParts:
            return
        if self.planner.converted(found) is None:
            self._foresee_whole(found)

    def _foresee(self, found: Source) -> None:
        """Refuse a run that would fill the disk or fail later on, before it starts. A small model is
        converted about as fast as it is planned, and looked at then."""
        assert found.hf is not None
        bound = int(1.05 * found.hf.data_bytes) * (2 + len(self.request.wants))
        if bound < _SMALL:
            try:
                require_free(self.folder, bound, self.planner.base)
                return
            except GgufrqError:
                pass
        self._foresee_whole(found)

    def _foresee_whole(self, found: Source) -> None:
        """As ``_foresee``, by a plan. What it needs of the disk is kept, to be asked for once more when the
        weights of a model on the Hub are there, which may have been fetched to the same one."""
        if found.key not in self._foreseen:
            with self.planner.header(found) as header:
                plan = self.planner.plan(found, header)
            names = [part.name for part in plan.conversions if not part.kept]
            names += [output.name for output in plan.outputs if not output.kept]
            self._foreseen[found.key] = plan.disk_needed, names
        need, names = self._foreseen[found.key]
        require_free(self.folder, need, ", ".join(names))

    def make_matrix(self, plan: FamilyPlan, found: Source) -> bool:
        """Make or publish the importance matrix if a file needs one that is not there; whether it was."""
        path, files = self.planner.matrix, self.request.imatrix
        if not any(output.job.imatrix == path and not output.kept for output in plan.outputs):
            return False
        key = self.planner.matrix_from(found)
        if self.record.kept(path.name, key) is not None:
            return False
        if len(files) == 1 and path.is_file() and path.samefile(files[0]):
            self.record.finish(path.name, [(path, path.name)], key, {"type": "imatrix"})
            return True
        self.record.refuse_foreign([path.name], force=self.request.force)
        self._tell_of_others(plan)
        with self.record.making(path.name) as temporary:
            if self.planner.given is not None:
                self.planner.given.publish(temporary)
            else:
                texts, model = self.request.calibrate, plan.outputs[0].job.source
                matrices.make(model, texts, temporary, self.build, self.log, key)
            matrices.check(temporary, plan.model)
            self.record.finish(path.name, [(temporary, path.name)], key, {"type": "imatrix"})
        return True

    def _tell_of_others(self, plan: FamilyPlan) -> None:
        """Say which files stay that were made with the matrix that is replaced now."""
        path = self.planner.matrix
        before = [part["sha256"] for part in self.record.files.get(path.name, {}).get("parts", [])]
        now = {output.name for output in plan.outputs}
        others = [
            n for n, entry in self.record.files.items() if entry.get("imatrix") in before and n not in now
        ]
        if others:
            log.say(f"{path.name} is replaced: the one before was for {', '.join(others)}")

    def _quantize(self, output: Output) -> Made:
        entry = self.record.kept(output.name, output.made_from)
        if entry is not None:
            return self._as_made(output.name, entry)
        types = output.forecast.types
        with (
            self._folded(output) as job,
            progress(output.name.removesuffix(".gguf"), len(types), unit="tensors") as bar,
            self.record.making(output.name) as temporary,
            self.record.making(output.name) as shards,
        ):
            facts = self._fill(job, output, temporary, bar)
            bar.update(len(types), "check")
            ran = verify.check_file(temporary, facts, self.build, self.log, run=self.request.run)
            parts = [(temporary, output.name)]
            if self.request.split_size is not None:
                parts = split.split(
                    temporary, output.name, self.request.split_size, shards, self.build, types, self.log
                )
                self.record.refuse_foreign([name for _, name in parts], force=self.request.force)
            recipe = output.want.recipe
            more = {
                "type": output.job.type_name,
                "recipe": recipe.name if recipe is not None else "",
                "fold": self.request.fold or "",
                "imatrix": output.job.metadata.get("ggufrq.imatrix.sha256", ""),
                "fallbacks": max(len(output.fallbacks), output.forecast.fallbacks),
                "tokens_run": ran,
            }
            if output.codes:
                more["codes"] = len(output.codes)
            entry = self.record.finish(output.name, parts, output.made_from, {**more, **_told(facts)})
        if entry["fallbacks"]:
            log.say(
                f"{output.name}: {entry['fallbacks']} tensors have rows that the type asked for cannot hold; "
                "they got a larger one"
            )
        self._fresh.add(output.name)
        return self._as_made(output.name, entry)

    def _fill(self, job: Job, output: Output, out: Path, listener: Listener) -> GgufFacts:
        """Make the file of a job at ``out``."""
        return quantizer.make(job, out, self.build, output.forecast.types, log=self.log, listener=listener)

    @contextmanager
    def _folded(self, output: Output) -> Iterator[Job]:
        """The job of an output; when the run folds, from a folded copy of the model that goes away with the
        context."""
        job = output.job
        if self.request.fold is None:
            yield job
            return
        with self.record.making(output.name) as folder:
            made = folds.fold(
                self.request.fold,
                job.source,
                folder,
                output.forecast.types,
                self.build,
                matrix=job.imatrix,
                known=self._folding,
            )
            if self.request.fold == "kv":  # which is the same for all types
                self._folding = made.folding
            yield replace(job, source=made.model, imatrix=made.imatrix)

    def _profile(self, found: Source, gguf: Path, files: Sequence[Made]) -> Path | None:
        """The profile of K beside the files; folding changes it, and of a folded model the files are all that
        is left."""
        if draft_kind(gguf) != SIMPLE:  # whose cache is its own
            return None
        fold = self.request.fold or ""
        made_from = {"source": found.key, "fold": fold}
        model = files[0].path if fold else gguf
        build = self.build if self.request.run else None
        force = self.request.force
        return profiles.keep(self.record, self._profile_base, model, made_from, build, force=force)

    @property
    def _profile_base(self) -> str:
        fold = self.request.fold
        return f"{self.planner.base}-{fold}" if fold else self.planner.base

    def _convert(self, part: Conversion, found: Source) -> Made:
        assert found.hf is not None
        entry = self.record.kept(part.name, part.made_from)
        if entry is not None:
            return self._as_made(part.name, entry)
        self.record.refuse_foreign([part.name], force=self.request.force)
        what = part.type if part.part == "model" else part.part
        with progress(f"Converting to {what}", 100, unit="%") as bar:
            with self.record.making(part.name) as temporary:
                convert.convert_to(
                    temporary,
                    found.hf,
                    self.build.source,
                    pre_tokenizer=self.request.pre_tokenizer,
                    part=part.part,
                    mtp=self.planner.options.mtp,
                    log=self.log,
                    listener=bar,
                )
                convert.require_kind(temporary, found.hf, part.part)
                bar.step("looking at the values")
                sound.require_numbers(temporary, found.hf, what)
                if part.part == "model":
                    self.planner.plan(found, temporary)  # what is refused leaves nothing behind
                entry = self.record.finish(
                    part.name,
                    [(temporary, part.name)],
                    part.made_from,
                    {"type": what, **_told(read_gguf(temporary))},
                )
            bar.update(100)
        self._fresh.add(part.name)
        return self._as_made(part.name, entry)

    def _as_made(self, name: str, entry: dict[str, Any]) -> Made:
        parts = [part["name"] for part in entry["parts"]]
        return Made(
            name=name,
            type=entry["type"],
            path=self.folder / parts[0],
            bytes=sum(part["bytes"] for part in entry["parts"]),
            bits=entry["bits"],
            imatrix=bool(entry.get("imatrix")),
            fresh=name in self._fresh,
            fallbacks=entry.get("fallbacks", 0),
            recipe=entry.get("recipe", ""),
            fold=entry.get("fold", ""),
            codes=entry.get("codes", 0),
            sha256=tuple(part["sha256"] for part in entry["parts"]),
            parts=tuple(parts),
        )


def _told(facts: GgufFacts) -> dict[str, Any]:
    return {"bits": facts.bits, "tensors": facts.tensors, "types": facts.types}
