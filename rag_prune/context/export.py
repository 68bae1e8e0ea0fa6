"""Write a pruner as the stock token classifier that it is, for servers that host such models.

    python -m rag_prune.context.export FOLDER [--pruner FOLDER] [--overwrite]

The bundled checkpoint keeps int8 rows on disk, which only prunekit reads. What is written here is
plain float32 `BertForTokenClassification`: row 0 says whether a token's sentence helps, row 1, read
at the first token, whether the passage does. Its config.json also names the plugin with which
vLLM answers questions about passages, see rag_prune/integrations/vllm_pooling.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

VLLM_PLUGIN = "prunekit"


def export(folder: Path, pruner: str | Path | None = None, *, overwrite: bool = False) -> None:
    """Write `pruner` (the bundled one by default) to `folder`; it appears whole or not at all.

    Raises:
        CheckpointError: There is no such pruner, or it cannot be loaded.
        InputError: The folder exists, is not empty and shall not be overwritten.
    """
    from rag_prune.context.checkpoints import load, save
    from rag_prune.context.pruner import checkpoint_folder

    checkpoint = load(checkpoint_folder(pruner))
    checkpoint.model.classifier.config.io_processor_plugin = VLLM_PLUGIN
    save(folder, checkpoint.model, checkpoint.tokenizer, checkpoint.settings, overwrite=overwrite)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pruner", default=None)
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args()
    export(args.folder, args.pruner, overwrite=args.overwrite)
    print(f"Serve it with: vllm serve {args.folder} --runner pooling")


if __name__ == "__main__":
    main()
