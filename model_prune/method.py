"""What every method of weight pruning is: its settings, checked, and a recipe of parts."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from model_prune.core.allocate import check_share
from model_prune.core.calibration import Calibration
from model_prune.core.decoder import Decoder
from model_prune.core.plan import LayerPlan
from model_prune.core.structure import NM
from model_prune.core.target import matching
from model_prune.core.work import Work
from model_prune.plan import Plan
from prune_core.errors import InputError
from prune_core.storage import StrPath


class Recipe(Protocol):
    """A way to find what each layer loses."""

    def layers(
        self, decoder: Decoder, calibration: Calibration | None, work: Work, progress: bool
    ) -> Sequence[LayerPlan]:
        """What each layer loses; the model is not changed."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Base of all methods. A method is its settings: `dataclasses.replace` makes a variant."""

    name: ClassVar[str]
    windows: ClassVar[int] = 0
    """Calibration windows that the paper takes; 0 where it takes none."""
    tokens: ClassVar[int] = 0
    """Tokens of each."""
    mixtures: ClassVar[bool] = False
    """Whether it chooses among the experts of a mixture; all others know models without any."""

    @property
    def reads(self) -> int:
        """Windows that it takes as it is set."""
        return self.windows

    @abstractmethod
    def recipe(self, decoder: Decoder) -> Recipe:
        """The parts, put together for a model."""

    def plan(
        self,
        model: nn.Module | StrPath,
        calibration: Calibration | Tensor | None = None,
        *,
        work: StrPath | None = None,
        device: str | None = None,
        progress: bool = True,
    ) -> Plan:
        """Find what goes; nothing is changed.

        model: of transformers, or a folder, of which one layer is in memory at a time.
        calibration: windows of token ids, int64 [windows, tokens].
        work: a folder in which every layer's result is kept, so that a stopped run goes on; it
        is refused for another model, method or calibration.

        Raises InputError for a model that cannot be pruned, calibration that is missing or not
        fit, and activations that are not finite; CheckpointError for a folder that cannot be read.
        """
        decoder, read = self.opened(model, calibration, device)
        if self.reads and read is None:
            raise InputError(
                f"{self.name} reads calibration text, and none is given: name a text file with "
                f"--calibration, or pass windows of token ids, int64 [windows, tokens]."
            )
        about = self.about(decoder, read.to_dict() if read else None)
        results = Work(Path(work), about) if work else Work()
        layers = self.recipe(decoder).layers(decoder, read, results, progress)
        return Plan(**about, layers=layers)

    def opened(
        self,
        model: nn.Module | StrPath,
        calibration: Calibration | Tensor | None,
        device: str | None,
    ) -> tuple[Decoder, Calibration | None]:
        """The model to look at, and the text, checked; None of it for a method that reads none."""
        decoder = Decoder.of(model, device)
        if self.mixtures != any(dims.experts for dims in decoder.dims):
            raise InputError(
                f"{self.name} chooses among experts, and '{decoder.name}' has none: take a method "
                f"of another family."
                if self.mixtures
                else f"'{decoder.name}' is a mixture of experts, of which {self.name} knows "
                f"nothing: take premoe, which removes whole experts."
            )
        if isinstance(calibration, Tensor):
            calibration = Calibration(calibration)
        read = calibration if self.reads else None
        if read is not None:
            read.check(decoder.config)
        return decoder, read

    def about(self, decoder: Decoder, calibration: dict[str, Any] | None) -> dict[str, Any]:
        """What a plan says besides its layers, of a model and a text that were read."""
        return {
            "method": self.name,
            "settings": self.settings(),
            "model": {
                "name": decoder.name,
                "type": decoder.config.model_type,
                "fingerprint": decoder.fingerprint,
                "dims": [asdict(dims) for dims in decoder.dims],
            },
            "calibration": calibration,
        }

    def settings(self) -> dict[str, Any]:
        """The fields, JSON-serialisable."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class Elements(Method):
    """Base of methods that zero single weights.

    sparsity: share of zeros in the targeted matrices, [0, 1); 0.5 unless a pattern says it.
    pattern: N:M, such as "2:4": of every 4 neighbours in a row 2 stay.
    targets: names or globs of the matrices to prune, such as "mlp.*"; all seven of every layer.
    sparsities: shares of some of these, by name or glob ({"layers.0.*": 0.3}); the last that fits
    counts.
    """

    sparsity: float | None = None
    pattern: str | None = None
    targets: tuple[str, ...] | None = None
    sparsities: dict[str, float] | None = None

    def __post_init__(self) -> None:
        check_share("sparsity", self.share)
        for name, share in (self.sparsities or {}).items():
            check_share(f"The sparsity of '{name}'", share)
        if self.sparsities and self.pattern:
            raise InputError(
                f"{self.pattern} makes the same share of every matrix zero: leave sparsities out."
            )
        if self.nm and not math.isclose(self.share, self.nm.sparsity):
            raise InputError(
                f"{self.pattern} makes a share of {self.nm.sparsity:g} zero, and sparsity is "
                f"{self.share:g}: leave one out."
            )

    @property
    def nm(self) -> NM | None:
        """The pattern."""
        return NM.parse(self.pattern) if self.pattern else None

    @property
    def share(self) -> float:
        """Of zeros, by sparsity or pattern."""
        if self.sparsity is not None:
            return self.sparsity
        return self.nm.sparsity if self.nm else 0.5

    def shares(self, decoder: Decoder) -> dict[str, float]:
        """Of zeros of every targeted matrix, by "layers.3.mlp.down_proj"."""
        layers = len(decoder.dims)
        shares = dict.fromkeys(matching(self.targets, layers), self.share)
        for pattern, share in (self.sparsities or {}).items():
            shares |= {name: share for name in matching([pattern], layers) if name in shares}
        return shares


@dataclass(frozen=True, kw_only=True)
class Units(Method):
    """Base of methods that cut whole units.

    remove: share of the decoder layers' weights that goes, [0, 1).
    """

    remove: float = 0.2

    def __post_init__(self) -> None:
        check_share("remove", self.remove)


@dataclass(frozen=True, kw_only=True)
class Either(Elements):
    """Base of baselines that zero single weights, or cut whole units when `remove` is given.

    remove: share of the decoder layers' weights that goes, the same in every layer.
    """

    remove: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.remove is not None:
            check_share("remove", self.remove)
            if any((self.sparsity is not None, self.pattern, self.targets, self.sparsities)):
                raise InputError(
                    "remove cuts whole units, and sparsity, sparsities, pattern and targets are "
                    "for single weights: give one or the other."
                )


@dataclass(frozen=True, kw_only=True)
class Depth(Method):
    """Base of methods that remove whole layers.

    remove: share of the layers that goes, [0, 1), rounded to whole ones.
    """

    remove: float = 0.2

    def __post_init__(self) -> None:
        check_share("remove", self.remove)

    def count(self, decoder: Decoder) -> int:
        """Layers to remove; raises InputError where none would stay beside the first."""
        layers = len(decoder.dims)
        count = int(self.remove * layers + 0.5)
        if count >= layers:
            raise InputError(f"remove={self.remove:g} of {layers} layers leaves none: remove less.")
        return count
