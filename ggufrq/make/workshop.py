"""A model that recipes are tried on: its 16-bit GGUF, its importance matrix, and what recipes would make."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ggufrq.base.errors import ModelError
from ggufrq.ggufs.files import read_model
from ggufrq.ggufs.tensors import Inventory
from ggufrq.make.plan import FamilyPlan, Output, Want
from ggufrq.make.recipe import Recipe
from ggufrq.make.work import Work


class Workshop:
    """``gguf`` is the model in 16 bits, ``model`` its tensors. The caller holds the folder's lock.

    Raises ModelError when the model is quantized already.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self.folder = work.folder
        self.base = work.planner.base
        self._found, self.gguf = work.source()
        facts = read_model(self.gguf)
        if facts.is_quantized:
            raise ModelError(
                f"{self.gguf.name} is quantized already ({facts.file_type}); what quantizing costs is "
                "measured against the unquantized model",
                remedy="start from the F16 or BF16 file or the original model",
            )
        self.model: Inventory = self._plan(()).model

    def output(self, want: Want) -> Output:
        """What ``ggufrq quantize`` would make, its size to the byte. Raises UsageError for a recipe that does
        not fit the model."""
        return self._plan((want,)).outputs[0]

    def matrix_for(self, recipe: Recipe) -> Path | None:
        """The importance matrix that a file of this recipe is made with, made if need be; None without
        one."""
        plan = self._plan((Want(recipe.name, recipe),))
        self.work.make_matrix(plan, self._found)
        return plan.outputs[0].job.imatrix

    def _plan(self, wants: tuple[Want, ...]) -> FamilyPlan:
        planner = self.work.planner
        planner.request = replace(planner.request, wants=wants)
        return planner.plan(self._found, self.gguf)
