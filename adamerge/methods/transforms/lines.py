"""LiNeS, as a transform of task vectors: the deeper a tensor, the larger its scale."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from adamerge.bank import ParameterBank
from adamerge.bank.keys import block_of
from adamerge.bank.parameter_bank import ApplyTransform
from adamerge.errors import ConfigError
from adamerge.methods.protocol import NOTHING, Context, Transform


@dataclass(frozen=True)
class Lines(Transform):
    """Scale every tensor of all task vectors by α + β · depth, depth going from 0 in the first block to 1 in the last.

    Before a learner it is an initialiser: with ``method.init=1`` learning starts from λ[k, p] = α + β · depth(p), and
    what is learned are factors of that. (With ``constraint=clamp`` they could only fall from there: take ``identity``.)

    Args:
        alpha: Scale of the first block; 1/K by default, which is the published one for summed task vectors.
        beta: What the last block has besides.
        embedding_depth: Depth of tensors before the blocks.
        output_depth: Depth of tensors after the blocks.

    Raises:
        ConfigError: In ``fit``, if no merged tensor belongs to a block.

    Source: LiNeS, arXiv:2410.17146; there both outer depths are 0.
    """

    alpha: float | None
    beta: float
    embedding_depth: float
    output_depth: float

    def fit(self, bank: ParameterBank, context: Context = NOTHING) -> ApplyTransform:
        depth = depths(bank.pretrained, self.embedding_depth, self.output_depth)
        alpha = 1 / bank.num_tasks if self.alpha is None else self.alpha
        return lambda key, task_vectors: task_vectors * (alpha + self.beta * depth[key])

    def to_json(self) -> dict[str, Any]:
        return {"name": "lines", **asdict(self)}


def depths(keys: Iterable[str], embedding: float, output: float) -> dict[str, float]:
    """By key b/(B - 1) for a tensor of block b = 0 … B - 1, 0 where B = 1; the given depths outside of blocks.

    Raises:
        ConfigError: If no key belongs to a block.
    """
    blocks = {key: block_of(key) for key in keys}
    last = max(
        (int(block.removeprefix("block.")) for block in blocks.values() if block.startswith("block.")), default=None
    )
    if last is None:
        raise ConfigError(
            f"LiNeS scales by depth, and none of the {len(blocks)} merged tensors belongs to a transformer block. "
            "Loosen model.include and model.exclude."
        )
    outside = {"embedding": embedding, "output": output}
    return {
        key: outside[block] if block in outside else int(block.removeprefix("block.")) / max(last, 1)
        for key, block in blocks.items()
    }
