"""Expert trajectories in other forms: ``replay_buffer_<k>.pt``, which published code reads, and lines (MCT).

python scripts/import_buffer.py --dataset CIFAR10 --model ConvNet --zca --buffer_path buffer_storage
python scripts/export_buffer.py buffer_storage/CIFAR10/ConvNet exported/CIFAR10/ConvNet
python scripts/convexify_buffer.py buffer_storage/CIFAR10/ConvNet lines/CIFAR10/ConvNet
"""

from dataclasses import dataclass
from pathlib import Path

from pad.commands.bench import set_up
from pad.commands.common import Common
from pad.config import DETAIL, PLACE, FilePath, Settings, setting
from pad.data.sources import data_set
from pad.distributed import ALONE, Ranks
from pad.errors import InputError
from pad.store.files import refuse_unwritable
from pad.store.published import export_published, import_published, importable_files
from pad.store.trajectories import LINE, TrajectoryStore, buffer_folder, expert_path, recorded, write_line


@dataclass(frozen=True, kw_only=True)
class ImportSettings(Common):
    """``scripts/import_buffer.py``: turn published expert trajectories into the files that distillation reads.

    The published form does not say what its experts were trained on: the flags do, and the data set is read for its
    identity.
    """

    data_path: FilePath = setting("dataset", "folder of the data set", PLACE)
    buffer_path: FilePath = setting("./buffer_storage", "folder of the trajectories", PLACE)
    source: FilePath | None = setting(
        None, "folder of the replay_buffer_<k>.pt; default: where the experts are to be", PLACE
    )


@dataclass(frozen=True, kw_only=True)
class ExportSettings(Settings):
    """``scripts/export_buffer.py FOLDER OUT``: write recorded trajectories as published code reads them."""

    folder: FilePath | None = setting(None, "folder of expert files, as stage 1 records them", PLACE)
    out: FilePath | None = setting(None, "folder for the replay_buffer_<k>.pt", PLACE)
    save_interval: int = setting(10, "experts a file", DETAIL, low=1)

    arguments = ("folder", "out")

    def check(self) -> None:
        super().check()
        if not self.folder or not self.out:
            raise InputError("give two folders: that of the experts, and one for the replay_buffer_<k>.pt")


@dataclass(frozen=True, kw_only=True)
class ConvexifySettings(Settings):
    """``scripts/convexify_buffer.py FOLDER OUT``: write recorded trajectories as lines: two epochs of each (MCT)."""

    folder: FilePath | None = setting(None, "folder of expert files, as stage 1 records them", PLACE)
    out: FilePath | None = setting(None, "folder for those of the lines", PLACE)

    arguments = ("folder", "out")

    def check(self) -> None:
        super().check()
        if not self.folder or not self.out:
            raise InputError("give two folders: that of the experts, and one for their lines")


def import_buffer(settings: ImportSettings, ranks: Ranks = ALONE) -> Path:
    """Import published trajectories; returns the folder of the experts."""
    row = data_set(settings.dataset)
    subset, res = settings.subset if row.subsets else None, settings.res or row.default_size
    folder = buffer_folder(settings.buffer_path, settings.dataset, settings.model, settings.zca, subset, res)
    source = settings.source or folder
    importable_files(source, folder)  # before the data set is read and whitened, which can take minutes
    refuse_unwritable(folder)
    bench = set_up(settings, ranks)
    description = bench.describe(settings.model, bench.flat_model(settings.model))
    count = ranks.on_main(lambda: import_published(source, folder, description))
    print(f"imported {count} experts into {folder}")
    return folder


def export_buffer(settings: ExportSettings, ranks: Ranks = ALONE) -> list[Path]:
    """Export recorded trajectories; returns the files."""
    store = TrajectoryStore.open(str(settings.folder))
    refuse_unwritable(str(settings.out))
    paths = ranks.on_main(lambda: export_published(store, str(settings.out), settings.save_interval))
    print(f"exported {len(store)} experts to {len(paths)} files in {settings.out}")
    return paths


def convexify_buffer(settings: ConvexifySettings, ranks: Ranks = ALONE) -> Path:
    """Write the line of each expert; those that are there already stay. Returns their folder."""
    store, out = TrajectoryStore.open(str(settings.folder)), Path(str(settings.out))
    refuse_unwritable(out)
    there = recorded(out)
    lines = TrajectoryStore.open(out) if there else store
    for k in there:
        if k not in store.experts or lines.header(k) != store.header(k) | {"kind": LINE}:
            raise InputError(f"{expert_path(out, k)} is not the line of an expert in {store.folder}; give another out")

    def write() -> None:
        for k in store.experts:
            if k not in there:
                write_line(store, k, out)

    ranks.on_main(write)
    print(f"wrote {len(store)} experts as lines into {out}")
    return out
