"""Checks that a saved adapter, loaded by a fresh process, is bit for bit the model that was trained.

    python -m peft_onelayer.adapter.reload ADAPTER DEVICE [--trust-remote-code] < token_ids.json

prints the fingerprint of the adapter loaded from the folder ADAPTER to DEVICE, on the token ids from standard input.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model_state_dict


def fingerprint(model: PeftModel, token_ids: list[list[int]]) -> dict[str, str]:
    """SHA-256 of the active adapter's tensors (name, dtype, shape, bytes) and of the logits on `token_ids`, (B, T)."""
    weights = hashlib.sha256()
    state = get_peft_model_state_dict(model, adapter_name=model.active_adapters[0], save_embedding_layers=False)
    for name, tensor in sorted(state.items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + _bytes(tensor))
    training = model.training
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor(token_ids, device=model.device)).logits  # (B, T, V)
    model.train(training)
    return {"weights": weights.hexdigest(), "logits": hashlib.sha256(_bytes(logits)).hexdigest()}


def fingerprint_in_fresh_process(
    adapter: Path, token_ids: list[list[int]], *, device: str | torch.device = "cpu", trust_remote_code: bool = False
) -> dict[str, str]:
    """`fingerprint` of the adapter saved in `adapter`, computed by a new Python process that loads it from there.

    Args:
        device: to compute on: that of the model to compare with, since logits depend on it.
        trust_remote_code: run the Python code that comes with the base model.

    Raises:
        RuntimeError: the process failed; the message is the last line it printed.
    """
    command = [sys.executable, "-m", "peft_onelayer.adapter.reload", str(adapter), str(device)]
    command += ["--trust-remote-code"] if trust_remote_code else []
    # the same number of threads: another one may sum in another order
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        command,
        input=json.dumps(token_ids),
        env=environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(f"reloading {adapter} in a fresh process failed: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


if __name__ == "__main__":
    import peft_onelayer  # noqa: F401  (registers the method: this is what a user's process does)

    loaded = AutoPeftModelForCausalLM.from_pretrained(
        sys.argv[1],
        local_files_only=Path(sys.argv[1]).is_dir(),
        trust_remote_code="--trust-remote-code" in sys.argv[3:],
    )
    print(json.dumps(fingerprint(loaded.to(sys.argv[2]), json.load(sys.stdin))))
