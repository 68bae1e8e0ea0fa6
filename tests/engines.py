"""vLLM's engine on the CPU in a process of its own, for tests that ask it without a server."""

import multiprocessing
import os
from contextlib import contextmanager

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


class Engine:
    """Of the other process."""

    def __init__(self, **arguments):
        from vllm import LLM

        self.llm = LLM(
            dtype="float32",
            enforce_eager=True,
            disable_log_stats=False,
            use_tqdm_on_load=False,
            **arguments,
        )
        self.core = self.llm.llm_engine.engine_core.engine_core

    def architecture(self):
        """The classes that vLLM took for the model and its layers."""
        model = self.core.model_executor.driver_worker.worker.model_runner.model
        return type(model).__name__, type(model.model.layers[0]).__name__

    def blocks(self):
        return self.core.scheduler.kv_cache_config.num_blocks

    def counter(self, name):
        return sum(m.value for m in self.llm.get_metrics() if m.name == f"vllm:{name}")

    def answer(self, prompts, tokens):
        """Greedy tokens of prompts that are token ids; all are asked together."""
        from vllm import SamplingParams

        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True),
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def replies(self, requests):
        """What `pipelines.ask.AskVllm` makes of requests."""
        from pipelines.ask import AskVllm

        return list(AskVllm(self.llm, "engine")(requests))


def _serve(pipe, arguments):
    os.environ.update(ENVIRONMENT)  # not the parent's, whose servers would inherit it
    try:
        engine = Engine(**arguments)
        pipe.send(None)
        while True:
            name, *given = pipe.recv()
            pipe.send(getattr(engine, name)(*given))
    except EOFError:
        return
    except BaseException as error:
        pipe.send(error)
        raise


@contextmanager
def engine(folder, **arguments):
    """Ask it by name: `ask("answer", prompts, 16)`."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(
        target=_serve, args=(there, {"model": str(folder), **arguments}), daemon=True
    )
    process.start()
    there.close()

    def ask(*message):
        here.send(message)
        return received()

    def received():
        answer = here.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    try:
        received()
        yield ask
    finally:
        here.close()
        process.join()
