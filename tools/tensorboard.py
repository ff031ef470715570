"""Show a run's metrics.csv in TensorBoard, while it grows (pip install tensorboard).

    python tools/tensorboard.py runs/gspo          # until Ctrl-C; then: tensorboard --logdir runs
    python tools/tensorboard.py runs/gspo ONCE     # what there is, and end
"""

import contextlib
import os
import sys
import time
from pathlib import Path

import pandas as pd


def main(arguments):
    """Write the rows that are new, again and again."""
    folder = Path(os.path.expanduser(arguments[0])) if arguments else Path()
    if not (folder / "metrics.csv").exists():
        sys.exit(f"error: {folder} has no metrics.csv; expected a run's folder, such as runs/gspo")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        sys.exit("error: the package tensorboard is missing; pip install tensorboard")
    board, rows, shown = SummaryWriter(folder), [], 0
    while True:
        with contextlib.suppress(PermissionError):  # on Windows, while the run replaces it
            rows = pd.read_csv(folder / "metrics.csv").to_dict("records")
        for row in rows[shown:]:
            for name, value in row.items():
                if value == value:  # what a step did not measure is NaN
                    board.add_scalar(name, value, int(row["step"]))
        shown = len(rows)
        board.flush()
        if "ONCE" in arguments:
            return
        time.sleep(5)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show stops nothing
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        pass
