"""A profile from a text: sums of what goes into RoPE, averaged over all positions of the context."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ggufrq.base.errors import ModelError
from ggufrq.ggufs.fingerprint import fingerprint
from ggufrq.profile.file import LayerProfile, Profile, Source
from ggufrq.profile.moments import Moments
from ggufrq.profile.rope import Rope
from ggufrq.profile.sums import Layers, LayerSums
from ggufrq.profile.weights import layer_from_weights, moments_from_weights
from ggufrq.profile.whole import Whole

F64 = npt.NDArray[np.float64]

#: How much the moments that the weights foretell count beside those of the text, which does not reach all
#: directions and may be of another kind than what is read later.
WEIGHTS_SHARE = 0.2


def profile_from_sums(whole: Whole, sums: Layers, source: Source = "text") -> Profile:
    """The profile of a model, with ``sums`` over a text by layer, and a fifth of what the weights foretell.
    Layers with K that a text does not reach, those that foretell further tokens, are from the weights alone.

    Raises ModelError when RoPE is not where the architecture is known to have it.
    """

    def layer(il: int) -> LayerProfile:
        if il not in sums:
            return layer_from_weights(whole, il)
        return whole.solved(*moments_from_text(whole, il, sums[il]))

    tokens = max((part.tokens for part in sums.values()), default=0)
    return Profile(fingerprint(whole.tensors.path), source, whole.n_ctx, dict(whole.by_layer(layer)), tokens)


def moments_from_text(whole: Whole, il: int, sums: LayerSums) -> tuple[Moments, F64]:
    """``averaged`` over all positions, with a share of what the weights foretell unless it is not known which
    tensors K and the queries of layer ``il`` come from. Raises ModelError as ``profile_from_sums``."""
    k, q = averaged(whole, il, sums, 0, whole.n_ctx)
    try:
        foretold, of_q = moments_from_weights(whole, il)
    except ModelError:
        return k, q
    around = _with_share(k.covariance, foretold.covariance)
    return Moments(k.mean, around + k.mean[:, :, None] * k.mean[:, None, :]), _with_share(q, of_q)


def _with_share(text: F64, foretold: F64) -> F64:
    """Moments [heads, dim, dim] of a text with their share of those foretold, whose size is made theirs."""
    size = np.trace(text, axis1=1, axis2=2) / np.maximum(np.trace(foretold, axis1=1, axis2=2), 1e-30)
    return np.asarray((1 - WEIGHTS_SHARE) * text + WEIGHTS_SHARE * size[:, None, None] * foretold, np.float64)


def averaged(whole: Whole, il: int, sums: LayerSums, first: int, n: int) -> tuple[Moments, F64]:
    """Moments of K of layer ``il``, and second moments of the queries, as attention reads them, averaged over
    positions ``first`` … ``first + n - 1``. Raises ModelError as ``profile_from_sums``."""
    rope = whole.rope(il, sums.k.shape[-1])
    known = "plain" if rope is None else "norm" if whole.facts.rule("qk_norm").get("after") else "rope"
    if sums.how != known:
        raise ModelError(
            f"it is not known what RoPE is given in layer {il} of {whole.facts.architecture}, so no profile "
            "can be made from a text",
            remedy="take the one from the weights: --kv-profile weights",
        )
    if rope is None:
        return sums.moments, sums.queries
    turn = Rope(rope.dim, rope.pairing, rope.theta).matrix(first)
    mean = rope.mean(sums.moments.mean, n) @ turn.T
    k, q = (turn @ rope.second_moment(second, n) @ turn.T for second in (sums.moments.second, sums.queries))
    if known == "rope":
        return Moments(mean, k), q
    of_k, of_q = (whole.tensors.vector(f"blk.{il}.attn_{letter}_norm.weight") for letter in "kq")
    if of_k is not None:
        mean, k = mean * of_k, k * of_k[:, None] * of_k
    return Moments(mean, k), q if of_q is None else q * of_q[:, None] * of_q


def noise(whole: Whole, profile: Profile | None, sums: Layers, first: int, n: int) -> dict[int, F64]:
    """By layer and KV head [heads], in proportion, the squared error of scores that a code with one scale
    makes of K stored by ``profile``, for the moments in ``sums`` at positions ``first`` … ``first + n - 1``:
    tr(A Σk A) · tr(A⁻¹ Σq A⁻¹), as in solve.py, Σk being around the profile's mean."""
    found = {}
    for il, layer in sums.items():
        k, q = averaged(whole, il, layer, first, n)
        if profile is None:
            found[il] = np.trace(k.second, axis1=1, axis2=2) * np.trace(q, axis1=1, axis2=2)
            continue
        made = profile.layers[il]
        forward, inverse = made.k_map.astype(np.float64), made.q_map.astype(np.float64)
        mean = np.zeros_like(k.mean) if made.k_mean is None else made.k_mean.astype(np.float64)
        cross = k.mean[:, :, None] * mean[:, None, :]
        around = k.second - cross - np.swapaxes(cross, 1, 2) + mean[:, :, None] * mean[:, None, :]
        stored = np.einsum("hij,hjk,hki->h", forward, around, forward, optimize=True)
        found[il] = stored * np.einsum("hij,hjk,hki->h", inverse, q, inverse, optimize=True)
    return found
