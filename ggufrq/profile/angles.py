"""How far RoPE turns each pair of a layer's heads by a position, from the metadata.

Follows ``llama_context`` (src/llama-context.cpp), ``get_rope_factors`` (src/llama-model.cpp) and
``rope_yarn`` (ggml/src/ggml-cpu/ops.cpp) of llama.cpp with its default options.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ggufrq.profile.facts import Facts
from ggufrq.profile.rope import Rope
from ggufrq.profile.tensors import Tensors

F64 = npt.NDArray[np.float64]


def layer_rope(
    tensors: Tensors, facts: Facts, il: int, *, dim: int, window: bool, windows: bool, n_ctx: int
) -> Rope | None:
    """RoPE of layer ``il`` with heads of ``dim`` values, None where it has none. ``window``: the layer sees a
    window only; ``windows``: some layer does; ``n_ctx``: the context, on which LongRoPE's factors depend.

    Raises ModelError for an architecture that is not known.
    """
    pairing = facts.pairing
    if pairing is None or _without(facts, il, window, windows):
        return None
    rule = facts.rule("windows") if windows else {}
    turned = int(facts.number("rope.dimension_count", dim))
    if window:
        turned = int(facts.number("rope.dimension_count_swa", turned))
    elif rule.get("double"):
        turned //= 2
    base = facts.number("rope.freq_base", 10000.0)
    alpha = facts.number("rope.scaling.alpha", 0.0)
    base *= alpha ** (dim / (dim - 2)) if alpha > 0 else 1.0
    if window:
        base = facts.number("rope.freq_base_swa", rule.get("base", base))
    theta = base ** (-2 * np.arange(turned // 2) / turned)
    factors = _factors(tensors, facts, il, n_ctx) if not window or rule.get("factors", True) else None
    if factors is not None:
        theta = theta / factors[: len(theta)]
    if window and rule.get("plain"):
        return Rope(dim, pairing, theta)
    return Rope(dim, pairing, *_scaled(facts, theta, base, turned))


def _without(facts: Facts, il: int, window: bool, windows: bool) -> bool:
    """Whether the layer has no RoPE in an architecture that has it."""
    rule = facts.rule("without_rope")
    if not rule or (rule.get("windowed") and not windows):
        return False
    if "every" in rule:
        return bool(il % rule["every"] == (0 if rule.get("first") else rule["every"] - 1))
    if "full" in rule:
        return not window and not (rule.get("lead") and il < facts.number("leading_dense_block_count", 0))
    if "pattern" in rule:
        pattern = facts.get(rule["pattern"], ())
        # llama.cpp reads a list only, and turns every layer where there is none
        return isinstance(pattern, tuple) and il < len(pattern) and not pattern[il]
    if "switch" in rule:
        return not facts.get(rule["switch"], True)
    return facts.number("block_count", 0) != int(rule["layers"])


def _factors(tensors: Tensors, facts: Facts, il: int, n_ctx: int) -> F64 | None:
    """Divisors of the angles: those of Llama 3, else LongRoPE's for this context, None without any."""
    long = n_ctx > facts.number(
        "rope.scaling.original_context_length", facts.number("context_length", math.inf)
    )
    for name in ("rope_freqs", "rope_factors_long" if long else "rope_factors_short"):
        for where in (f"{name}.weight", f"blk.{il}.{name}.weight"):
            found = tensors.vector(where)
            if found is not None:
                return found.reshape(-1)
    return None


def _scaled(facts: Facts, theta: F64, base: float, turned: int) -> tuple[F64, float]:
    """Angles and magnitude after linear scaling or YaRN."""
    kind = facts.get("rope.scaling.type", "linear")
    factor = facts.number("rope.scaling.factor", 0.0) or facts.number("rope.scale_linear", 0.0) or 1.0
    magnitude = facts.number("rope.scaling.attn_factor", 1.0)
    if kind == "none":
        return theta, magnitude
    yarn = facts.rule("yarn")
    mix = 1.0 if kind == "yarn" else 0.0
    fast, slow = yarn.get("fast", 32.0), 1.0
    if yarn:
        mix = facts.number("rope.scaling.yarn_ext_factor", mix)
        fast = facts.number("rope.scaling.yarn_beta_fast", fast)
        slow = facts.number("rope.scaling.yarn_beta_slow", slow)
    if mix == 0:
        return theta / factor, magnitude
    original = facts.number("rope.scaling.original_context_length", facts.number("context_length", 0))

    def pair_that_turns(times: float) -> float:
        """The pair that turns so often within the original context."""
        return turned * math.log(original / (times * 2 * math.pi)) / (2 * math.log(base))

    low = max(0.0, math.floor(pair_that_turns(fast)))
    high = min(turned - 1.0, math.ceil(pair_that_turns(slow)))
    ramp = 1 - np.clip((np.arange(len(theta)) - low) / max(0.001, high - low), 0, 1)
    kept = ramp * mix
    return theta / factor * (1 - kept) + theta * kept, magnitude * _yarn_magnitude(facts, factor)


def _yarn_magnitude(facts: Facts, factor: float) -> float:
    """Factor that cos and sin get: 1 + 0.1 ln(factor), or against it that of ``yarn_log_multiplier``."""

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1

    against = facts.number("rope.scaling.yarn_log_multiplier", 0.0)
    return magnitude(1.0) / magnitude(against) if against else magnitude(1.0)
