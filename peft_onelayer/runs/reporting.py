"""Where TRL's trainers report to, checked before a model is loaded; what is reported are the trainer's own logs."""

from __future__ import annotations

from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)


def reporters(report_to: str) -> list[str]:
    """The integrations that a text such as "wandb" or "trackio,tensorboard" names; [] for "none".

    Raises:
        ValueError: in one line: one that transformers does not know, or that is not installed.

    >>> reporters("none")
    []
    """
    if report_to == "none":
        return []
    installed = get_available_reporting_integrations()
    if report_to == "all":
        return installed
    names = [name.strip() for name in report_to.split(",")]
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ValueError(f"--report-to takes none, all, or some of {known}; got {name!r}")
        if name not in installed:
            raise ValueError(f"--report-to {name}: {name} is not installed; pip install {name}, or leave it out")
    return names
