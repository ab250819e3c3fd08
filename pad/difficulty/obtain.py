"""Finding a difficulty ranking, or computing and keeping it."""

import contextlib
import logging
from collections.abc import Collection, Sequence
from pathlib import Path

from pad.difficulty.methods import METHODS, Kept, RankingSource, compute_rankings
from pad.difficulty.ranking import Ranking, read_published
from pad.difficulty.training import Progress
from pad.distributed import ALONE, Ranks
from pad.errors import InputError
from pad.store.files import refuse_unwritable
from pad.store.identity import differences, nearest, refuse_difference
from pad.store.locks import claim, in_turn, remove_leftovers
from pad.store.tensors import open_tensors

log = logging.getLogger("pad")

_PUBLISHED_NAMES = {"Tiny": "TinyImageNet"}  # where the published file's name is not the data set's


def _files(stem: Path) -> tuple[Path, Path]:
    """Our form's and the published form's file. Not with_suffix: a name may hold a dot."""
    return stem.with_name(f"{stem.name}.safetensors"), stem.with_name(f"{stem.name}.pt")


def file_name(dataset: str) -> str:
    """A data set's name in files, as published: ``Tiny`` becomes ``TinyImageNet``, a slash a hyphen."""
    return _PUBLISHED_NAMES.get(dataset, dataset.replace("/", "-"))


def ranking_file(folder: Path | str, dataset: str, sort_method: str) -> Path:
    """Where the ranking of a data set lies, ``<folder>/<NAME>_<METHOD>`` without a suffix.

    ``sort_method`` is ``GraNd`` or, with the data set's name before it, ``CIFAR10_GraNd``. NAME is :func:`file_name`.
    Raises InputError for another data set's name, and for a method that cannot be computed unless its file is there.
    """
    name = file_name(dataset)
    method = sort_method
    for prefix in (f"{name}_", f"{dataset}_"):
        if sort_method.startswith(prefix):
            method = sort_method.removeprefix(prefix)
            break
    else:
        other, _, last = sort_method.rpartition("_")
        if other and sort_method not in METHODS:
            raise InputError(
                f"{sort_method} names a ranking of {other}, but the data set is {dataset}: "
                f"write {last} or {name}_{last}"
            )
    stem = Path(folder) / f"{name}_{method}"
    if method not in METHODS and not any(path.is_file() for path in _files(stem)):
        raise InputError(
            f"ranking {sort_method}: {method!r} is not a method that can be computed (the nearest is "
            f"{nearest(method, METHODS)}), and there is no ranking {stem}.pt"
        )
    return stem


def ranking_method(dataset: str, stem: Path) -> str:
    """The method's name in what :func:`ranking_file` gave for a data set."""
    return stem.name.removeprefix(f"{file_name(dataset)}_")


def obtain_rankings(
    source: RankingSource,
    sort_methods: Sequence[str],
    folder: Path | str,
    *,
    asked: Collection[str] = (),
    convert_flat: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Ranking]:
    """The rankings of ``source``, by name in ``sort_methods``: read from ``folder``, or computed and written there.

    Our form is looked for first, then the published one; a ranking that is found is checked against this data set.
    Those that are not there share one training. What is computed is written in our form, and in the published one too
    when the classes have one size. What finished networks said is kept in ``<NAME>.partial`` until the rankings of all
    methods that it was to serve are there; an interrupted run goes on from it.

    Args:
        sort_methods: see :func:`ranking_file`.
        asked: names of the settings in ``source.scoring`` that somebody asked for. A ranking that is there and was made
            with others of these is refused; one that differs in what was not asked for is used, with a warning.
        convert_flat: see :func:`pad.difficulty.ranking.read_published`.
        overwrite: compute also those that are there.
        progress: called as ``progress(repeat, epoch)`` after each epoch of each scoring network.
        ranks: share the work; rank 0 reads and writes the rankings.

    Raises InputError for an unknown method, and for a file that is damaged, ranks other data or was made otherwise,
    before any work.
    """
    folder = Path(folder)
    dataset = source.data.name
    stems = ranks.on_main(lambda: {wanted: ranking_file(folder, dataset, wanted) for wanted in sort_methods})
    keep = folder / f"{file_name(dataset)}.partial"
    lock = folder / f".{file_name(dataset)}.lock"

    def look() -> dict[str, Ranking]:
        """Rankings that need not be computed."""
        found = {}
        for wanted, stem in stems.items() if not overwrite else ():
            if ranking := _read(stem, source, asked, convert_flat):
                found[wanted] = ranking
        if len(found) < len(stems):
            refuse_unwritable(folder)
        return found

    rankings = ranks.on_main(look)
    if len(rankings) == len(stems):
        if ranks.is_main:
            _clean_up(lock, keep, source, {stems[wanted]: ranking for wanted, ranking in rankings.items()})
        return rankings
    with in_turn(lock, f"rankings of {dataset}") if ranks.is_main else contextlib.nullcontext():
        rankings = ranks.on_main(look)  # of the process that was waited for, if there was one
        missing = {wanted: ranking_method(dataset, stem) for wanted, stem in stems.items() if wanted not in rankings}
        if missing:
            methods = list(dict.fromkeys(missing.values()))
            computed = compute_rankings(methods, source, progress=progress, ranks=ranks, keep=keep)
            for method, ranking in computed.items() if ranks.is_main else ():
                _write(ranking, folder / f"{file_name(dataset)}_{method}")
            rankings |= {wanted: computed[method] for wanted, method in missing.items()}
        ranks.barrier()
        done = ranks.on_main(lambda: _given_by(source, folder))
        Kept(keep, source).remove(done)  # by each rank: machines may have folders of their own
        ranks.barrier()  # before another process may write there
    return {wanted: rankings[wanted] for wanted in sort_methods}


def _clean_up(lock: Path, keep: Path, source: RankingSource, found: dict[Path, Ranking]) -> None:
    """Finish what a command left that was killed when all was computed, unless another is at work."""
    remove_leftovers(lock.parent)
    if keep.exists():
        with contextlib.suppress(OSError), claim(lock) as mine:
            if mine:
                for stem, ranking in found.items():
                    ours, published = _files(stem)
                    if ours.is_file() and not published.is_file() and ranking.has_equal_classes:
                        ranking.write_published(published)
                Kept(keep, source).remove(_given_by(source, lock.parent))


def _given_by(source: RankingSource, folder: Path) -> list[str]:
    """The methods whose rankings are in the folder, and are what ``source`` gives."""
    found = []
    for method in METHODS:
        ours, _ = _files(folder / f"{file_name(source.data.name)}_{method}")
        with contextlib.suppress(InputError), open_tensors(ours) as (_, made):
            if (made.get("settings"), made.get("data")) == (source.recorded_settings(method), source.data.identity):
                found.append(method)
    return found


def _write(ranking: Ranking, stem: Path) -> None:
    """Both forms, or ours alone for classes of unequal size."""
    ours, published = _files(stem)
    written = str(ours)
    ranking.save(ours)
    if ranking.has_equal_classes:
        ranking.write_published(published)
        written = f"{ours} and {published}"
    log.info("difficulty ranking: computed %s and wrote %s", ranking.metadata["method"], written)


def _read(stem: Path, source: RankingSource, asked: Collection[str], convert_flat: bool) -> Ranking | None:
    """The ranking that is there, if one is.

    Refuses one that was made otherwise than asked, and warns in one line of other differences.
    """
    ours, published = _files(stem)
    data = source.data
    if not ours.is_file():
        if not published.is_file():
            return None
        ranking = read_published(published, data.train_labels, data.num_classes, convert_flat)
        log.info("difficulty ranking: using %s", published)
        return ranking

    ranking = Ranking.load(ours)
    made_of = ranking.metadata.get("data")
    if isinstance(made_of, dict) and made_of.get("fingerprint") != data.fingerprint:
        refuse_difference(
            f"{ours} ranks other images",
            made_of,
            data.identity,
            there_is="the ranking",
            here_is="the data set",
            remedy="move it away to have a ranking computed, or name another folder",
            whole=True,
            every=True,
        )
    ranking.validate(data.train_labels, data.num_classes, str(ours))

    method = ranking_method(data.name, stem)
    settings = source.recorded_settings(method)
    made_with = ranking.metadata.get("settings")
    made_with = made_with if isinstance(made_with, dict) else settings
    there = {name: made_with.get(name) for name in settings}
    refuse_difference(
        ours,
        {
            "method": ranking.metadata.get("method", method),
            **{name: value for name, value in there.items() if name in asked},
        },
        {"method": method, **settings},
        there_is="the ranking",
        here_is="the settings",
        remedy="move it away to have one computed, or ask for no other",
    )
    others = [f"{name} {theirs} (now {now})" for name, theirs, now in differences(there, settings)]
    if others:
        what = ", ".join(others)
        log.warning("difficulty ranking: using %s, computed with %s; remove the file to compute it anew", ours, what)
    else:
        log.info("difficulty ranking: using %s", ours)
    return ranking
