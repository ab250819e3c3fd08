"""What the source promises: contracts that a machine can hold over all files. Those of imports are lint-imports'."""

import ast
import dataclasses
import functools
import re
import tokenize

import pytest
from helpers import CHECKOUT

from pad import cli
from pad.commands.table import COMMANDS
from pad.config import RECIPE, Role, Settings, setting

PROGRAMS = ("pad", "buffer", "distill", "scripts")
FILES = sorted(path for folder in (*PROGRAMS, "tests") for path in (CHECKOUT / folder).rglob("*.py"))


@functools.cache
def trees(*folders: str) -> dict[str, ast.Module]:
    """The files of some folders."""
    names = {str(path.relative_to(CHECKOUT)): path for path in FILES}
    return {
        name: ast.parse(path.read_text(encoding="utf-8"))
        for name, path in names.items()
        if name.split("/")[0] in folders
    }


def all_of(kind: type[ast.AST], parsed: dict[str, ast.Module]):
    """``(file, node)`` of every node of a kind."""
    return ((name, node) for name, tree in parsed.items() for node in ast.walk(tree) if isinstance(node, kind))


def test_the_source_is_found():
    assert {"pad/cli.py", "buffer/buffer_CL.py", "scripts/study.py"} <= trees(*PROGRAMS).keys()


# ---- how the source is written


def test_calls_pass_at_most_six_arguments_by_position():
    """Two that are swapped pass every other check. Starred ones count as one."""
    long = [
        f"{name}:{call.lineno}: {len(call.args)}"
        for name, call in all_of(ast.Call, trees(*PROGRAMS))
        if len(call.args) > 6
    ]
    assert long == []


def test_nothing_is_kept_from_the_formatter():
    found = []
    for path in FILES:
        with tokenize.open(path) as file:
            comments = [token for token in tokenize.generate_tokens(file.readline) if token.type == tokenize.COMMENT]
        found += [f"{path}:{token.start[0]}" for token in comments if re.match(r"#\s*(fmt|yapf):", token.string)]
    assert found == []


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def test_private_names_stay_in_their_module():
    """What two modules of the package use is public."""
    found = []
    for file, tree in trees("pad").items():
        modules = set()  # names of modules of the package in this one
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "pad"):
                names = [alias.name for alias in node.names]
                found += [f"{file}:{node.lineno}: {name}" for name in names if is_private(name)]
                inside = CHECKOUT / (node.module or "").replace(".", "/")
                modules |= {
                    alias.asname or alias.name
                    for alias in node.names
                    if (inside / alias.name).is_dir() or (inside / f"{alias.name}.py").is_file()
                }
        found += [
            f"{file}:{node.lineno}: {node.value.id}.{node.attr}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            if node.value.id in modules and is_private(node.attr)
        ]
    assert found == []


# ---- settings


def test_a_setting_says_which_part_it_plays():
    assert setting(1, "a number", RECIPE).metadata["role"] is RECIPE
    with pytest.raises(TypeError, match="role"):
        setting(1, "a number")


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_all_settings_of_a_command_are_declared_with_their_role(command):
    cls = command.settings
    assert issubclass(cls, Settings)
    asked = {field.name: field.metadata for field in dataclasses.fields(cls) if field.name != "given"}
    assert asked.keys() == cls.fields().keys(), "a field that is no setting"
    assert all(isinstance(metadata["role"], Role) and metadata["help"] for metadata in asked.values())
    assert sorted(cls.names(*Role)) == sorted(asked)


def test_no_list_says_once_more_which_part_a_setting_plays():
    """A role stands at the field. (What a command refuses or ignores are names that it does not have.)"""
    names = {name for command in COMMANDS.values() for name in command.settings.fields()}
    found = []
    for kind in (ast.Tuple, ast.List, ast.Set):
        for file, node in all_of(kind, trees("pad")):
            words = [part.value for part in node.elts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            if len(words) > 3 and len(words) == len(node.elts) and names.issuperset(words):
                found.append(f"{file}:{node.lineno}: {words}")
    assert found == []


# ---- commands


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_a_front_door(name):
    """A script of the checkout and one that is installed, which both run it."""
    doors = {word for word, door in vars(cli).items() if isinstance(door, functools.partial) and door.args == (name,)}
    assert len(doors) == 1
    folders = [CHECKOUT / folder for folder in ("buffer", "distill", "scripts")]
    (script,) = (folder / COMMANDS[name].program for folder in folders if (folder / COMMANDS[name].program).is_file())
    tree = {name: ast.parse(script.read_text(encoding="utf-8"))}
    assert doors <= {alias.name for _, node in all_of(ast.ImportFrom, tree) for alias in node.names}
    installed = re.findall(r'^pad-[\w-]+ = "pad\.cli:(\w+)"$', (CHECKOUT / "pyproject.toml").read_text(), re.MULTILINE)
    assert doors <= set(installed)
