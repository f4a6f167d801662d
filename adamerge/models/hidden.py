"""Hidden states of an image tower: what its transformer blocks put out."""

from collections.abc import Sequence

from torch import Tensor, nn

from adamerge.errors import ConfigError


class HiddenStates:
    """Catches the outputs of some blocks at every forward pass, until it is closed.

    Args:
        network: An image tower with its blocks in one ``resblocks`` list, as open_clip's have.
        layers: Blocks by number, from 0, or from the end below 0.

    Raises:
        ConfigError: If the tower has no such list, or fewer blocks.
    """

    def __init__(self, network: nn.Module, layers: Sequence[int]) -> None:
        self._caught: dict[int, Tensor] = {}
        self._handles = []
        self._layers: list[int] = []
        if not layers:
            return
        transformer = next((module for module in network.modules() if hasattr(module, "resblocks")), None)
        if transformer is None:
            raise ConfigError("this image tower has no list of residual blocks. Use objective.layers=[].")
        blocks: nn.ModuleList = transformer.resblocks  # pyright: ignore[reportAssignmentType]
        if bad := [layer for layer in layers if not -len(blocks) <= layer < len(blocks)]:
            raise ConfigError(f"objective.layers: no block {bad[0]}; this image tower has {len(blocks)}.")
        self._batch_first = getattr(transformer, "batch_first", True)
        self._layers = [layer % len(blocks) for layer in layers]
        for layer in dict.fromkeys(self._layers):
            self._handles.append(blocks[layer].register_forward_hook(self._catch(layer)))

    def _catch(self, layer: int):
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            self._caught[layer] = output if self._batch_first else output.transpose(0, 1)

        return hook

    def take(self) -> tuple[Tensor, ...]:
        """The states of the last pass, (B, L, w) each, in the order that was asked for; they are forgotten here."""
        taken = tuple(self._caught[layer] for layer in self._layers)
        self._caught = {}
        return taken

    def close(self) -> None:
        """Catch nothing more."""
        for handle in self._handles:
            handle.remove()
