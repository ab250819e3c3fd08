"""Turn published expert trajectories, replay_buffer_<k>.pt, into the expert files that distillation reads.

python scripts/import_buffer.py --dataset CIFAR10 --model ConvNet --zca --buffer_path buffer_storage

The published form does not say what its experts were trained on: the flags do, and the data set is read for its
identity.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pad.data.preprocessing import fit_preprocessing
from pad.data.sources import data_set, load_data
from pad.errors import InputError
from pad.nn import networks
from pad.store.published import import_published, importable_files
from pad.store.trajectories import buffer_folder, describe


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="CIFAR10", help="data set the experts were trained on")
    parser.add_argument("--data_path", default="dataset", help="where the data set lies, or is downloaded to")
    parser.add_argument("--model", default="ConvNet", help="network the experts are")
    parser.add_argument("--zca", action="store_true", help="the experts saw ZCA-whitened images")
    parser.add_argument("--subset", help="ImageNet subset, such as imagenette")
    parser.add_argument("--res", type=int, help="image size in pixels, for data sets that are resized")
    parser.add_argument("--buffer_path", default="./buffer_storage", help="root of all buffers")
    parser.add_argument("--source", help="folder of the replay_buffer_<k>.pt (default: where the experts go)")
    args = parser.parse_args(arguments)
    try:
        data_set(args.dataset)  # a name that is none would only be missed among the folders
        folder = buffer_folder(args.buffer_path, args.dataset, args.model, args.zca, args.subset, args.res)
        source = folder if args.source is None else args.source
        importable_files(source, folder)  # before the data set is read and whitened, which can take minutes
        data = load_data(args.dataset, args.data_path, subset=args.subset, res=args.res)
        model = networks.build(args.model, data.channels, data.num_classes, data.size, 0)
        parameters = [(name, parameter.shape) for name, parameter in model.named_parameters()]
        preprocessing = fit_preprocessing(data, args.zca)
        description = describe(data.identity, args.model, parameters, preprocessing.identity)
        count = import_published(source, folder, description)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"imported {count} experts into {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
