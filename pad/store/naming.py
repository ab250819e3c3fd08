"""What networks are called: in settings, in records, and as folders.

A network has a published name, such as ``ConvNet``; or it is torchvision's, ``torchvision:resnet18``; or a function of
a file makes it, ``path/to/file.py:function``. The last is called ``file.py:function@digest`` from where it is first
read: a record means the same on another machine, and what was made with other code is not taken for this.
"""

import os
import re
from importlib.util import decode_source
from pathlib import Path
from typing import NamedTuple

from pad.errors import InputError
from pad.store.identity import digest

_IN_A_FILE = re.compile(r"(?P<file>.*\.py)(:(?P<function>[^:@]*)(@(?P<digest>[0-9a-f]{8}))?)?")


class Source(NamedTuple):
    """Where a network of a file comes from. text: the file's, as it was when its name was read."""

    path: Path
    text: str
    function: str


_sources: dict[str, Source] = {}  # by name


def network_name(given: str) -> str:
    """What the network ``given`` is called from here on; only that of a file is called otherwise than given.

    A name with a digest, as records have it, is that of a file of the same text. Raises InputError for a file that
    cannot be read, and one of another text.
    """
    match = _IN_A_FILE.fullmatch(given)
    if match is None or given in _sources:
        return given
    path = Path(os.path.expanduser(match["file"]))
    if not match["function"]:
        raise InputError(f"{given} names no function: write {path}:function")
    advice = f"; name the file where it lies, as path/to/{path.name}:{match['function']}" * bool(match["digest"])
    try:
        text = decode_source(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"there is no file {path}{advice}") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    name = f"{path.name}:{match['function']}@{digest(text, 8)}"
    if match["digest"] and not name.endswith(match["digest"]):
        raise InputError(f"{path} is not the file any more that it was in {given}: its text is another{advice}")
    _sources[name] = Source(path.absolute(), text, match["function"])
    return name


def source_of(name: str) -> Source | None:
    """Where the network that :func:`network_name` has called ``name`` comes from; None where it is of no file."""
    return _sources.get(name)


def folder_of(network: str) -> str:
    """A network's name as that of one folder: ``file.function`` of a file's, ``torchvision-resnet18``, or as it is."""
    match = _IN_A_FILE.fullmatch(network)
    if match is not None:
        network = f"{Path(match['file']).stem}.{match['function']}"
    return re.sub(r"[/\\:]", "-", network)
