"""Write recorded expert trajectories as replay_buffer_<k>.pt, the form that published trajectory-matching code reads.

python scripts/export_buffer.py buffer_storage/CIFAR10/ConvNet exported/CIFAR10/ConvNet
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pad.errors import InputError
from pad.store.published import export_published
from pad.store.trajectories import TrajectoryStore


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="folder of expert files, as buffer/buffer_CL.py records them")
    parser.add_argument("out", help="folder for the replay_buffer_<k>.pt")
    parser.add_argument("--save_interval", type=int, default=10, help="experts a file (default 10, as published)")
    args = parser.parse_args(arguments)
    try:
        store = TrajectoryStore.open(args.folder)
        paths = export_published(store, args.out, args.save_interval)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"exported {len(store)} experts to {len(paths)} files in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
