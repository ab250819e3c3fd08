"""Finding a difficulty ranking, or computing and keeping it."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from pad.data.placement import Images
from pad.difficulty.methods import METHODS, compute_rankings, nearest_method, recorded_settings
from pad.difficulty.ranking import Ranking, read_published
from pad.difficulty.training import ScoringSettings
from pad.distributed import ALONE, Ranks
from pad.errors import InputError
from pad.store.locks import claim, in_turn, remove_leftovers

if TYPE_CHECKING:
    from pad.data.images import ImageData


__all__ = ["Ranking", "obtain_rankings", "ranking_file", "ranking_method", "read_published"]

log = logging.getLogger("pad")

_PUBLISHED_NAMES = {"Tiny": "TinyImageNet"}  # where the published file's name is not the data set's


def _files(stem: Path) -> tuple[Path, Path]:
    """Our form's and the published form's file. Not with_suffix: a name may hold a dot."""
    return stem.with_name(f"{stem.name}.safetensors"), stem.with_name(f"{stem.name}.pt")


def _file_name(dataset: str) -> str:
    """A data set's name in files, as published."""
    return _PUBLISHED_NAMES.get(dataset, dataset.replace("/", "-"))


def ranking_file(folder: Path | str, dataset: str, sort_method: str) -> Path:
    """Where the ranking of a data set lies, ``<folder>/<NAME>_<METHOD>`` without a suffix.

    ``sort_method`` is ``GraNd`` or, with the data set's name before it, ``CIFAR10_GraNd``. NAME is the data set's, as
    published: ``Tiny`` becomes ``TinyImageNet``, ``ImageNet/imagenette`` ``ImageNet-imagenette``. Raises InputError for
    another data set's name, and for a method that cannot be computed unless its file is there.
    """
    name = _file_name(dataset)
    for prefix in (name, dataset):
        if sort_method.startswith(f"{prefix}_"):
            method = sort_method.removeprefix(f"{prefix}_")
            break
    else:
        other, _, method = sort_method.rpartition("_")
        if other:
            raise InputError(
                f"sort_method {sort_method} names a ranking of {other}, but the data set is {dataset}: "
                f"write {method} or {name}_{method}"
            )
    stem = Path(folder) / f"{name}_{method}"
    if method not in METHODS and not any(path.is_file() for path in _files(stem)):
        raise InputError(
            f"sort_method {sort_method}: {method!r} is not a method that can be computed (the nearest is "
            f"{nearest_method(method)}), and there is no ranking {stem}.pt"
        )
    return stem


def ranking_method(dataset: str, stem: Path) -> str:
    """The method's name in what :func:`ranking_file` gave for a data set."""
    return stem.name.removeprefix(f"{_file_name(dataset)}_")


def obtain_rankings(
    data: ImageData,
    images: Images,
    labels: Tensor,
    sort_methods: Sequence[str],
    folder: Path | str,
    scoring: ScoringSettings,
    *,
    asked: Collection[str] = (),
    seed: int,
    preprocessing: dict,
    progress: Callable[[int, int], None] | None = None,
    convert_flat: bool = False,
    overwrite: bool = False,
    ranks: Ranks = ALONE,
) -> dict[str, Ranking]:
    """The rankings of ``data``, by name in ``sort_methods``: read from ``folder``, or computed and written there.

    Our form is looked for first, then the published one; a ranking that is found is checked against this data set.
    Those that are not there share one training. What is computed is written in our form, and in the published one too
    when the classes have one size. Until all is written, what finished networks said is kept in ``<NAME>.partial``,
    from which an interrupted run goes on.

    Args:
        images, labels: preprocessed training images ``[N, C, H, W]`` float32 and labels ``[N]``, on the device to use.
        sort_methods: see :func:`ranking_file`.
        scoring, seed: how to compute them.
        asked: names of the settings in ``scoring`` that somebody asked for. A ranking that is there and was made with
            others of these is refused; one that differs in what was not asked for is used, with a warning.
        preprocessing: identity of what made ``images``, for the record.
        progress: called as ``progress(repeat, epoch)`` after each epoch of each scoring network.
        convert_flat: see :func:`read_published`.
        overwrite: compute also those that are there.
        ranks: share the work; rank 0 reads and writes the rankings.

    Raises InputError for an unknown method, and for a file that is damaged, ranks other data or was made otherwise,
    before any work.
    """
    folder, name = Path(folder), _file_name(data.name)

    def there() -> tuple[dict[str, Ranking], dict[str, str]]:
        """Rankings that need not be computed, and the methods of the others."""
        found, missing = {}, {}
        for wanted in sort_methods:
            stem = ranking_file(folder, data.name, wanted)
            method = ranking_method(data.name, stem)
            ours, published = _files(stem)
            if ours.is_file() and not overwrite:
                settings = recorded_settings(method, scoring, seed, preprocessing)
                found[wanted] = _reuse(ours, data, method, settings, asked)
            elif published.is_file() and not overwrite:
                found[wanted] = read_published(published, data.train_labels, data.num_classes, convert_flat)
                log.info("difficulty ranking: using %s", published)
            else:
                missing[wanted] = method
        if missing:
            _check_writable(folder)
        return found, missing

    keep, lock = folder / f"{name}.partial", folder / f".{name}.lock"
    rankings, missing = ranks.on_main(there)
    if not missing:
        if ranks.is_main:
            _clean_up(
                lock, keep, [(ranking, ranking_file(folder, data.name, wanted)) for wanted, ranking in rankings.items()]
            )
        return rankings
    turn = in_turn(lock, f"rankings of {data.name}")
    with turn if ranks.is_main else contextlib.nullcontext():
        rankings, missing = ranks.on_main(there)  # of the process that was waited for, if there was one
        computed = (
            compute_rankings(
                list(dict.fromkeys(missing.values())),
                data,
                images,
                labels,
                scoring,
                seed=seed,
                preprocessing=preprocessing,
                progress=progress,
                ranks=ranks,
                keep=keep,
            )
            if missing
            else {}
        )
        if ranks.is_main:
            for method, ranking in computed.items():
                _write(ranking, folder / f"{name}_{method}")
        ranks.barrier()
        shutil.rmtree(keep, ignore_errors=True)  # by each rank: machines may have folders of their own
        ranks.barrier()  # before another process may write there
    rankings |= {wanted: computed[method] for wanted, method in missing.items()}
    return {wanted: rankings[wanted] for wanted in sort_methods}


def _clean_up(lock: Path, keep: Path, found: list[tuple[Ranking, Path]]) -> None:
    """Finish what a command left that was killed when all was computed, unless another is at work."""
    remove_leftovers(lock.parent)
    if keep.exists():
        with contextlib.suppress(OSError), claim(lock) as mine:
            if mine:
                for ranking, stem in found:
                    ours, published = _files(stem)
                    if ours.is_file() and not published.is_file() and len({len(row) for row in ranking.rows}) == 1:
                        ranking.write_published(published)
                shutil.rmtree(keep, ignore_errors=True)


def _write(ranking: Ranking, stem: Path) -> None:
    """Both forms, or ours alone for classes of unequal size."""
    ours, published = _files(stem)
    written = [ours]
    ranking.save(ours)
    if len({len(row) for row in ranking.rows}) == 1:
        ranking.write_published(published)
        written.append(published)
    files = " and ".join(map(str, written))
    log.info("difficulty ranking: computed %s and wrote %s", ranking.metadata["method"], files)


def _reuse(path: Path, data: ImageData, method: str, settings: dict, asked: Collection[str]) -> Ranking:
    """Read a ranking in our form; refuse one that was made otherwise than asked, warn in one line of other differences."""
    ranking = Ranking.load(path)
    made_for = ranking.metadata.get("data")
    if isinstance(made_for, dict) and made_for.get("fingerprint") != data.fingerprint:
        theirs, these = (
            f"{about.get('dataset')} at {' x '.join(map(str, about.get('size', '?')))} pixels, "
            f"fingerprint {about.get('fingerprint')}"
            for about in (made_for, data.identity)
        )
        raise InputError(
            f"{path} ranks other images: {theirs}, where these are {these}; "
            "move it away to have a ranking computed, or name another folder"
        )
    ranking.validate(data.train_labels, data.num_classes, str(path))
    made_with = ranking.metadata.get("settings")
    made_with = {
        "method": ranking.metadata.get("method", method),
        **(made_with if isinstance(made_with, dict) else settings),
    }
    wanted = {"method": method, **settings}
    for name in wanted:
        if name in ("method", *asked) and made_with.get(name) != wanted[name]:
            raise InputError(
                f"{path}: {name}: {made_with.get(name)} in the ranking, {wanted[name]} in the settings; "
                "move it away to have one computed, or ask for no other"
            )
    differences = [
        f"{name} {made_with.get(name)} (now {value})" for name, value in wanted.items() if made_with.get(name) != value
    ]
    if differences:
        what = ", ".join(differences)
        log.warning("difficulty ranking: using %s, computed with %s; remove the file to compute it anew", path, what)
    else:
        log.info("difficulty ranking: using %s", path)
    return ranking


def _check_writable(folder: Path) -> None:
    """Find out before hours of training that the result can be kept."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder for rankings, {folder}, cannot be made ({error.strerror})") from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"the folder for rankings, {folder}, cannot be written to")
