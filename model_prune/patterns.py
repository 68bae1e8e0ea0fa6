"""A library of what tasks ask of a mixture's experts, and which of them a query is nearest to.

    library = Patterns("patterns")
    library.add("mathematics", "MODEL", calibration)
    nearest, *others = library.nearest("MODEL", ids)         # of a query's tokens
    library.plan(nearest.task, "MODEL", PreMoe(keep=4)).apply(model)

    patterns.json         which tasks, from what text, their experts from best to last, by layer
    TASK.safetensors      float64 [experts] of every mixture: "3.probability", "3.frequency"

PreMoe's "task-adaptive expert retrieval" (Pei et al. 2025, arXiv:2505.17639) compares the scores of
the first mixture, as a query then has to go no further into the model, and so does this. The code
takes the Euclidean distance of sums of raw logits. Here scores become shares, so that neither a
text's length nor how sure a router is of itself counts, and the distance is Hellinger's, the
Euclidean one of the shares' roots over √2: from 0 to 1, it is defined where an expert is not used,
and an expert that only one side uses weighs more than as much of a difference among busy ones.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from model_prune.core.calibration import Calibration
from model_prune.core.decoder import Decoder
from model_prune.core.work import Tensors, Work
from model_prune.methods.premoe import PreMoe, ranking
from model_prune.plan import Plan
from prune_core.errors import InputError, did_you_mean
from prune_core.storage import StrPath, atomic_write, write_json


@dataclass(frozen=True)
class Nearest:
    """A task of the library and its distance from a query, 0 to 1."""

    task: str
    distance: float


class Patterns:
    """A folder of patterns of one model; made when the first is added.

    All methods raise InputError for a folder that holds something else, a task that it does not
    know, and a model of other sizes than the library's.
    """

    def __init__(self, folder: StrPath) -> None:
        self.folder = Path(folder)

    @property
    def tasks(self) -> list[str]:
        """The names of those that are known, in the order in which they came."""
        return list(self._index["tasks"])

    def add(
        self,
        task: str,
        model: nn.Module | StrPath,
        calibration: Calibration | Tensor,
        method: PreMoe | None = None,
        *,
        device: str | None = None,
        progress: bool = True,
    ) -> None:
        """Remember a task by a text of it; one that is known under the name is replaced.

        method: whose `top` and `threshold` count; all patterns of a library should have the same.
        A run that was stopped goes on: scores of layers are kept in `TASK.work` of the folder.

        Raises InputError as Method.plan does, and for a name that is no file's.
        """
        if not re.fullmatch(r"\w[\w.-]*", task):
            raise InputError(f"A task is named by letters, digits, '.', '_' and '-', got '{task}'.")
        method, index = method or PreMoe(), self._index
        decoder, read = method.opened(model, calibration, device)
        assert read is not None  # or it would have been refused
        self._check(decoder)
        about = method.about(decoder, read.to_dict())
        work = Work(self.folder / f"{task}.work", about)
        scores = method.scores(decoder, read, work, progress)
        tensors = {f"{i}.{kind}": x for i, found in enumerate(scores) for kind, x in found.items()}
        with atomic_write(self._path(task), "wb") as file:
            file.write(save({name: tensor.cpu() for name, tensor in tensors.items()}))
        index["model"] = about["model"]
        index["tasks"][task] = {
            "calibration": about["calibration"],
            "settings": {name: about["settings"][name] for name in ("top", "threshold")},
            "experts": {
                i: ranking((found["probability"], found["frequency"])).tolist()
                for i, found in enumerate(scores)
                if found
            },
        }
        write_json(self.folder / "patterns.json", index)
        shutil.rmtree(self.folder / f"{task}.work")

    def nearest(
        self, model: nn.Module | StrPath, ids: Tensor, *, device: str | None = None
    ) -> list[Nearest]:
        """All tasks, the nearest to a query first; equal ones as they came.

        ids: the query's tokens, int64 [tokens]; the model is passed through up to its first
        mixture only.
        """
        if not self.tasks:
            raise InputError(f"'{self.folder}' knows no task yet: add one first.")
        method = PreMoe()
        decoder, read = method.opened(model, ids.view(1, -1), device)
        self._check(decoder)
        first = next(i for i, dims in enumerate(decoder.dims) if dims.experts)
        mine = method.scores(decoder, read, Work(), progress=False, until=first + 1)[first]
        found = [
            Nearest(task, distance(mine["probability"], self._scores(task)[first]["probability"]))
            for task in self.tasks
        ]
        return sorted(found, key=lambda one: one.distance)

    def plan(
        self,
        task: str,
        model: nn.Module | StrPath,
        method: PreMoe | None = None,
        *,
        device: str | None = None,
    ) -> Plan:
        """The experts of a task, to be applied or written as any plan; no text is read.

        method: whose `keep` and `score` count.
        """
        method = method or PreMoe()
        scores = self._scores(task)
        decoder, _ = method.opened(model, None, device)
        self._check(decoder)
        known = self._index["tasks"][task]["calibration"]
        about = method.about(decoder, known | {"source": f"{known['source']}, pattern '{task}'"})
        return Plan(**about, layers=method.choose(decoder, scores))

    # ------------------------------------------------------------------ the folder
    @property
    def _index(self) -> dict[str, Any]:
        path = self.folder / "patterns.json"
        if not path.exists():
            return {"format": 1, "model": None, "tasks": {}}
        try:
            index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if index["format"] != 1 or not isinstance(index["tasks"], dict):
                raise ValueError(f"its format is {index['format']!r}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"'{path}' is no library of patterns ({error}): give a folder that `add` made."
            ) from error
        return index

    def _path(self, task: str) -> Path:
        return self.folder / f"{task}.safetensors"

    def _check(self, decoder: Decoder) -> None:
        known = self._index["model"]
        if known and known["dims"] != [asdict(dims) for dims in decoder.dims]:
            raise InputError(
                f"The patterns in '{self.folder}' are of '{known['name']}', a model of other sizes "
                f"than '{decoder.name}': keep a library for each model."
            )

    def _scores(self, task: str) -> list[Tensors]:
        """By layer, as of PreMoe.scores."""
        index = self._index
        if task not in index["tasks"]:
            raise InputError(
                f"'{self.folder}' knows no task '{task}'. {did_you_mean(task, index['tasks'])}"
            )
        try:
            stored = load_file(self._path(task))
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"'{self._path(task)}' cannot be read ({error}): add the task again."
            ) from error
        scores: list[Tensors] = [{} for _ in index["model"]["dims"]]
        for name, tensor in stored.items():
            layer, _, kind = name.partition(".")
            scores[int(layer)][kind] = tensor
        return scores


def distance(one: Tensor, other: Tensor) -> float:
    """Hellinger's, of scores [experts] that become shares: 0 if the same, 1 if none is common."""
    roots: Sequence[Tensor] = [(x.double() / x.double().sum()).sqrt() for x in (one, other)]
    return float((roots[0] - roots[1]).norm() / 2**0.5)
