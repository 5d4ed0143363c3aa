"""Time from the command to the first completed step of a 4-rank run: `make bench-startup`."""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from trainer.events import read_events

SETTINGS = [
    "train.total_tokens=1",
    "optimizer.warmup_tokens=0",
    "evaluation.max_sequences=8",
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    arguments = parser.parse_args()
    broadgauge = str(Path(sys.executable).with_name("broadgauge"))
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        subprocess.run([broadgauge, "prepare", arguments.config, "--out", str(data)], check=True)
        to_first_step, whole = [], []
        for number in range(arguments.rounds):
            run_dir = Path(folder) / f"run-{number}"
            command = [broadgauge, "train", arguments.config, "--run-dir", str(run_dir)]
            started = time.time()
            subprocess.run(
                [*command, "--set", f"data.prepared={data}", *SETTINGS], check=True, stdout=subprocess.DEVNULL
            )
            whole.append(time.time() - started)
            first = next(event for event in read_events(run_dir / "events.jsonl") if event["kind"] == "step")
            to_first_step.append(first["time"] - started)
    for name, values in (("command to first completed step", to_first_step), ("whole command", whole)):
        print(f"{name:34} median {statistics.median(values):.1f} s, min {min(values):.1f}, max {max(values):.1f}")


if __name__ == "__main__":
    main()
