"""GraNd: a row is hard as far as its own gradient would move a young model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_prune.metric import Columns, Difficulty, Given
from data_prune.training_log import early
from prune_core.errors import InputError, check_count

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class GraNd(Difficulty):
    """Keep rows whose loss has a large gradient early in training, or a small one.

    Source: Paul et al., "Deep learning on a data diet" (NeurIPS 2021, arXiv:2107.07075),
    section 2: the expectation over initialisations of ‖∇_w loss(x, y)‖₂, the mean of ten runs
    in the paper (`training_log.runs`). The paper also takes it at initialisation; that did not
    reproduce (Kirsch, 2023, arXiv:2303.14753), so take it after some epochs.
    Cost: the first epochs of training, once a run, and a gradient of each row by itself at the one
    that is scored (`gradient_norms`); EL2N approximates it at no extra cost.

    epoch: after which the norm is taken, from 1. By default 20, or the last one of a shorter log.
    """

    name = "grand"
    epoch: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epoch is not None:
            check_count("epoch", self.epoch)

    def difficulty(self, given: Given) -> NDArray[np.float64]:
        """See Difficulty."""
        return early(given, "gradient_norm", self.name, self.epoch)

    def describe(self, columns: Columns, i: int) -> str:
        """See Metric."""
        return f"gradient norm {columns['difficulty'][i]:.3g} early in training"


def gradient_norms(
    model: nn.Module,
    loss: Callable[..., Tensor],
    *batch: Tensor,
    at_once: int | None = None,
) -> Tensor:
    """(b,) the norm of the gradient of each row's own loss, over all parameters that train.

        gradient_norms(model, lambda model, x, y: cross_entropy(model(x), y), inputs, labels)

    model: in eval mode, as batch norm and dropout are not of one row.
    loss: takes the model and the tensors of one row as a batch of one; gives a scalar.
    batch: tensors (b, …).   at_once: rows whose gradients are in memory together; all by default.

    Raises InputError for a model in training mode or of which nothing trains.
    """
    from torch.func import functional_call, grad, vmap

    weights = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    if model.training or not weights:
        raise InputError(
            f"The gradient of one row needs a model in eval mode with parameters that train, got "
            f"one in {'training' if model.training else 'eval'} mode with {len(weights)} of them: "
            f"call model.eval(), and model.train() afterwards."
        )

    def of_weights(weights: dict[str, Tensor], row: tuple[Tensor, ...]) -> Tensor:
        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(model, weights, args, kwargs)

        return loss(call, *(tensor[None] for tensor in row))

    def norm(*row: Tensor) -> Tensor:
        gradients: dict[str, Tensor] = grad(of_weights)(weights, row)
        first, *rest = [gradient.square().sum() for gradient in gradients.values()]
        return sum(rest, start=first).sqrt()

    norms: Tensor = vmap(norm, chunk_size=at_once)(*batch)
    return norms.detach()
