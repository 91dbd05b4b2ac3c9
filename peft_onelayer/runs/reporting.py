"""Where TRL's trainers report to; what is reported are the trainer's own logs."""

from __future__ import annotations

import importlib.util
import os

from peft_onelayer.records.text import meant

# transformers' integrations and what is imported for each; of a tuple one is enough. pip knows them by the same names.
INTEGRATIONS: dict[str, list[str | tuple[str, ...]]] = {
    "azure_ml": ["azureml"],
    "clearml": ["clearml"],
    "codecarbon": ["codecarbon"],
    "comet_ml": ["comet_ml"],
    "dagshub": ["dagshub", "mlflow"],
    "dvclive": ["dvclive"],
    "flyte": ["flytekit"],
    "kubeflow": [],
    "mlflow": ["mlflow"],
    "neptune": ["neptune"],
    "swanlab": ["swanlab"],
    "tensorboard": [("tensorboard", "tensorboardX")],
    "trackio": ["trackio"],
    "wandb": ["wandb"],
}
PACKAGES = {"azureml": "azureml-core"}
KUBEFLOW = "KUBEFLOW_TRAINER_SERVER_URL"
# transformers has them and does not count them as there: Azure's where MLflow is there too, and Flyte's never.
NOT_COUNTED = {"azure_ml", "flyte"}


def check_reporters(report_to: str) -> list[str]:
    """The integrations that a text such as "wandb" or "trackio,tensorboard" names; [] for "none" and "all".

    Raises:
        ValueError: in one line: one that transformers does not know, or that is not installed.

    >>> check_reporters("none")
    []
    >>> check_reporters("wnadb")
    Traceback (most recent call last):
    ValueError: --report-to wnadb is not known; did you mean wandb?
    """
    if report_to in ("none", "all"):
        return []
    names = [name.strip() for name in report_to.split(",")]
    for name in names:
        if name not in INTEGRATIONS:
            near = meant(name, ["none", "all", *INTEGRATIONS])
            raise ValueError(f"--report-to {name} is not known{near or '; give none, all, or some of ' + _known()}")
        if missing := [needed for needed in INTEGRATIONS[name] if not _installed(needed)]:
            first = [needed if isinstance(needed, str) else needed[0] for needed in missing]
            install = " ".join(PACKAGES.get(library, library) for library in first)
            there = "are" if len(first) > 1 else "is"
            raise ValueError(
                f"--report-to {name}: {' and '.join(first)} {there} not installed; pip install {install}, or leave it "
                "out"
            )
        if name == "kubeflow" and not os.environ.get(KUBEFLOW):
            raise ValueError(f"--report-to kubeflow is of a Kubeflow job, which sets {KUBEFLOW}; leave it out")
    return names


def reporters(report_to: str) -> list[str]:
    """As `check_reporters`, and "all" is what is installed.

    Raises:
        ValueError: in one line: also one that transformers cannot use as it is.
    """
    names = check_reporters(report_to)
    if report_to == "none":
        return []
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    usable = get_available_reporting_integrations()
    if report_to == "all":
        return usable
    if unusable := [name for name in names if name not in {*usable, *NOT_COUNTED}]:
        raise ValueError(
            f"--report-to {unusable[0]}: {unusable[0]} is installed, and transformers cannot use it: its version is "
            "too old, it has no API key, or a variable such as DISABLE_MLFLOW_INTEGRATION forbids it"
        )
    return names


def _known() -> str:
    return ", ".join(INTEGRATIONS)


def _installed(needed: str | tuple[str, ...]) -> bool:
    return any(importlib.util.find_spec(module) for module in ((needed,) if isinstance(needed, str) else needed))
