"""A frozen network called with merged weights."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from adamerge.bank import ParameterBank
from adamerge.bank.streaming import lie_on
from adamerge.errors import ConfigError, KeyMismatchError, shortlist
from adamerge.merging.merge import Contraction, check_coefficients, contract, merge_into
from adamerge.merging.partition import Partition

_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


class MergedModel:
    """``network`` with ``merge(bank, λ, partition)`` in place of its own weights.

    The merged tensors are separate leaves that live as long as this object: any number of backward passes add up in
    their gradients, and one contraction turns the sum into ∂L/∂λ. Where there is a single backward pass, each gradient
    is contracted and freed as soon as it exists. Not an ``nn.Module``, so that neither the bank nor the network is ever
    broadcast or checkpointed with the coefficients.

    Args:
        network: Frozen; its parameter names include the bank's keys.
        bank: θ₀ and τ.
        partition: Groups of the coefficients.
        compiled: A mode of ``torch.compile`` for the network (``default``, ``reduce-overhead``, which is CUDA graphs,
            ``max-autotune``); None to run it as it is.

    Raises:
        KeyMismatchError: If the network lacks a key of the bank.
        ConfigError: If there is no such mode.
    """

    def __init__(
        self, network: nn.Module, bank: ParameterBank, partition: Partition, *, compiled: str | None = None
    ) -> None:
        if missing := bank.pretrained.keys() - dict(network.named_parameters()).keys():
            raise KeyMismatchError(
                f"the network has no parameters named {shortlist(missing)}. "
                "Wrap it so that its names are the bank's keys."
            )
        self.network = network
        self.bank = bank
        self.partition = partition
        self._call = functional_call
        self._compiled = compiled is not None
        if compiled is not None:
            if compiled not in _MODES:
                raise ConfigError(f"model.compile: expected null or one of {', '.join(_MODES)}, found '{compiled}'.")
            self._call = torch.compile(functional_call, mode=compiled)
        self._leaves: dict[str, Tensor] = {}
        self._contraction: Contraction | None = None

    def to(self, device: torch.device | str) -> "MergedModel":
        """Move network and bank; the merged weights are made anew by the next ``update``."""
        self.network.to(device)
        self.bank = self.bank.to(device)
        self._leaves = {}
        return self

    @torch.inference_mode(False)  # leaves that are made in inference mode could never be trained
    @torch.no_grad()
    def update(self, coefficients: Tensor, *, single_backward: bool = False) -> None:
        """Merge with λ (K, G) and forget all gradients.

        Args:
            coefficients: λ, (K, G).
            single_backward: Promises at most one backward pass until the next update: no gradient is then kept longer
                than its contraction takes.
        """
        check_coefficients(self.bank, coefficients, self.partition)
        self._contraction = Contraction(self.bank, self.partition) if single_backward else None
        if not self._leaves:
            for key, base in self.bank.pretrained.items():
                leaf = torch.empty_like(base).requires_grad_()
                leaf.register_post_accumulate_grad_hook(partial(self._arrived, key))
                self._leaves[key] = leaf
        for leaf in self._leaves.values():
            leaf.requires_grad_(False).grad = None
        merge_into(self._leaves, self.bank, coefficients, self.partition)
        for leaf in self._leaves.values():
            leaf.requires_grad_()

    def __call__(self, *args: Tensor) -> Tensor:
        """The network's output under the weights of the last ``update``.

        Raises:
            RuntimeError: If there has been none.
        """
        if not self._leaves:
            raise RuntimeError("nothing has been merged yet. Call update(coefficients) first.")
        return self._call(self.network, self._leaves, args)

    def coefficient_gradient(self) -> Tensor:
        """∂L/∂λ, (K, G), of all losses that were back-propagated since the last ``update``."""
        if self._contraction is not None:
            return self._contraction.result()
        return contract(self.bank, self.gradients, self.partition)

    @property
    def gradients(self) -> dict[str, Tensor | None]:
        """∂L/∂θ by key, of the same losses; None where there is none, or where a single backward pass was promised."""
        return {key: leaf.grad for key, leaf in self._leaves.items()}

    def _arrived(self, key: str, leaf: Tensor) -> None:
        """A gradient has been added to a leaf."""
        if self._contraction is not None and leaf.grad is not None:
            self._contraction.add(key, leaf.grad)
            leaf.grad = None

    @property
    def recordable(self) -> bool:
        """Whether all of a step's work is launched by torch itself, on memory that stays where it is."""
        device = next(iter(self.bank.pretrained.values())).device
        return not self._compiled and lie_on(device, self.bank.task_vectors, self.bank.pretrained)

    def weights(self) -> dict[str, Tensor]:
        """The merged tensors, detached."""
        return {key: leaf.detach() for key, leaf in self._leaves.items()}
