"""Let OpenVINO run the network on a CPU: fused operations, in bfloat16 where the processor has it.

Source: https://docs.openvino.ai, conversion of PyTorch models and `INFERENCE_PRECISION_HINT`.
Cost: some seconds to compile, at the first passage and again at the first question of `late`.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rag_prune.context.model import PrunerModel, fast_bfloat16


def run_in_openvino(model: PrunerModel) -> None:
    """Replace `joint` and `states` of this model by compiled ones; ImportError without openvino."""
    import openvino  # noqa: F401

    for name in ("joint", "states"):
        setattr(model, name, _Compiled(model, getattr(model, name)))


class _Traced(nn.Module):
    """What the tracer needs: a module whose `forward` is the method."""

    def __init__(self, model: PrunerModel, method: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.method(ids, mask)


class _Compiled:
    """A method of the network, compiled when it is first called, for rows of any length."""

    def __init__(self, model: PrunerModel, method: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._network = _Traced(model, method)
        self._compiled: Any = None
        self._lock = threading.Lock()

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        with self._lock:
            self._compiled = self._compiled or self._compile()
        # A request of its own, since one cannot serve two threads.
        result = self._compiled.create_infer_request().infer([ids.numpy(), mask.numpy()])
        return torch.from_numpy(result[0].copy())

    def _compile(self) -> Any:
        import openvino

        # One row is padded, or the tracer would see that no mask is needed.
        ids, mask = torch.ones(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.long)
        mask[1, 5:] = 0
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's, on shapes that it takes for constant
            converted = openvino.convert_model(self._network, example_input=(ids, mask))
        options = {
            "INFERENCE_PRECISION_HINT": "bf16" if fast_bfloat16() else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        return openvino.compile_model(converted, "CPU", options)
