"""The weights of a model in a type that it does not have yet, from llama-quantize's own dry run."""

from __future__ import annotations

from ggufrq.build.builds import require_build
from ggufrq.make import family
from ggufrq.make.plan import Request
from ggufrq.models.convert import ANY_TOKENIZER


def weight_sizes(model: str, kind: str, revision: str | None = None) -> dict[str, int]:
    """Bytes of the tensors of ``model`` (as ``resolve`` takes it) by name, in a type or recipe. Raises
    UsageError for one that does not exist, ModelError for a quantized model, BuildError without a build."""
    build = require_build()
    wants = family.parse_wants([kind], build)
    request = Request(model, wants, pre_tokenizer=ANY_TOKENIZER, revision=revision, requantize=True)
    plan = family.plan_family(request, build)
    types = {tensor.name: tensor.type for tensor in plan.model}
    if plan.outputs:  # none for the type that the model has, or is converted to
        types = plan.outputs[0].forecast.types
    return {tensor.name: tensor.bytes_as(types[tensor.name]) for tensor in plan.model}
