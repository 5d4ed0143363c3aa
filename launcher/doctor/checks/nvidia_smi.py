"""What `nvidia-smi` says of the GPUs: it asks NVML, so no CUDA context is made."""

import subprocess

from trainer.config import UserError

_ANSWER_SECONDS = 30.0  # without its persistence daemon the driver initialises every GPU first


def query(*fields: str) -> list[tuple[str, ...]]:
    """These fields of every GPU; none where no NVIDIA driver is installed.

    Raises:
        UserError: it is, and does not work.
    """
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=False)
    except FileNotFoundError:
        return []
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"nvidia-smi has not answered in {_ANSWER_SECONDS:g} s; look for Xid errors in dmesg, reset the GPU or "
            "restart the machine"
        ) from error
    if done.returncode:
        reason = " ".join((done.stdout + done.stderr).split()) or f"exit code {done.returncode}"
        raise UserError(
            f"nvidia-smi fails ({reason}); install the driver again, or restart the machine after an update"
        )
    return [tuple(part.strip() for part in line.split(",")) for line in done.stdout.splitlines() if line.strip()]
