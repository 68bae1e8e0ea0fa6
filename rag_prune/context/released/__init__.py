"""Pruners that others released, run by our own code: which family a config.json is of.

One file a family: its config fields, its tensors' names, its network, its input and its rule for
what is kept. A family's checkpoint asks for code of its own (`auto_map`); that is never run.
docs/checkpoints.md has what each was checked against and where we differ on purpose.
"""

from collections.abc import Mapping
from typing import Any

_BY_TYPE = {
    "provence": "provence_debertav3",
    "xprovence": "xprovence",
    "open_provence": "open_provence",
    "openprovence": "open_provence",
}


def family(config: Mapping[str, Any], name: str, method: str | None) -> str | None:
    """The row of METHODS that reads a checkpoint, by its config.json; None for prunekit's own.

    A token classifier does not say what it was trained for, so one of LLMLingua-2's kind is known
    by its name, as the owners' code does it, or by the method that was asked for.
    """
    if "prunekit" in config:
        return None
    architectures = config.get("architectures") or [""]
    for given in (config.get("model_type"), str(architectures[0]).partition("For")[0]):
        if found := _BY_TYPE.get(str(given).lower()):
            return found
    classifies = str(architectures[0]).endswith("ForTokenClassification")
    if classifies and (method == "llmlingua2" or "llmlingua-2" in name.lower()):
        return "llmlingua2"
    return None
