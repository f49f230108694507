"""From embeddings of nodes to logits of links."""

from __future__ import annotations

from torch import Tensor


def pair_logits(embeddings: Tensor, pairs: Tensor) -> Tensor:
    """Return `s_k = ⟨z_u, z_v⟩` of pairs k = (u, v), [m, 1]: the link's probability is σ(s_k).

    embeddings: z, [n, d]. pairs: int64 [m, 2], rows of embeddings.
    """
    return (embeddings[pairs[:, 0]] * embeddings[pairs[:, 1]]).sum(dim=1, keepdim=True)
