"""Descriptions of what something was made from: compared, refused, digested; words looked up."""

import hashlib
import re

import pytest

from pad.errors import InputError
from pad.store.identity import differences, digest, nearest, refuse_difference

THERE = {"model": "ConvNet", "data": {"dataset": "CIFAR10", "size": [32, 32]}, "settings": {"ipc": 1, "lr": {"y": 5.0}}}


@pytest.mark.parametrize(
    "here, found",
    [
        (THERE, None),
        (THERE | {"newer": 1}, None),  # what was not said there is not compared
        (THERE | {"data": THERE["data"] | {"newer": 1}}, None),
        (THERE | {"model": "MLP", "data": {}}, ("model", "ConvNet", "MLP")),
        (THERE | {"data": {"dataset": "CIFAR10", "size": [64, 64]}}, ("data size", [32, 32], [64, 64])),
        (THERE | {"data": {}}, ("data dataset", "CIFAR10", "nothing")),
        (THERE | {"data": "CIFAR10"}, ("data", THERE["data"], "CIFAR10")),
        (THERE | {"settings": {"ipc": 1, "lr": {"y": 5.5}}}, ("settings lr y", 5.0, 5.5)),
        ({}, ("model", "ConvNet", "nothing")),
    ],
)
def test_the_first_difference_is_named_with_both_values(here, found):
    assert next(differences(THERE, here), None) == found


def test_of_two_whole_descriptions_neither_says_more_than_the_other():
    here = {"newer": 1} | THERE | {"data": {"size": [1, 1], "newer": 2}}
    assert list(differences(THERE, here, whole=True)) == [
        ("newer", "nothing", 1),
        ("data size", [32, 32], [1, 1]),
        ("data newer", "nothing", 2),
        ("data dataset", "CIFAR10", "nothing"),
    ]
    assert not list(differences({}, {"a": 1})) and list(differences({}, {"a": 1}, whole=True)) == [("a", "nothing", 1)]


def test_a_refusal_names_file_place_both_values_and_what_to_do(tmp_path):
    here = {"model": "MLP", "data": {"dataset": "CIFAR10", "size": [32, 32]}, "settings": {"ipc": 2}}
    remedy = "make it anew"
    refuse_difference(tmp_path / "x", THERE, THERE, there_is="the file", remedy=remedy)
    begin = re.escape(f"{tmp_path / 'x'}: model: ConvNet in the file, MLP in ")
    with pytest.raises(InputError, match=f"^{begin}the config; make it anew$"):
        refuse_difference(tmp_path / "x", THERE, here, there_is="the file", remedy=remedy)
    with pytest.raises(InputError, match=f"^{begin}expert_0000.safetensors; make it anew$"):
        refuse_difference(
            tmp_path / "x", THERE, here, there_is="the file", here_is="expert_0000.safetensors", remedy=remedy
        )
    with pytest.raises(InputError, match=f"^{begin}the config; settings ipc: 1 in the file, 2 in the config; settings"):
        refuse_difference(tmp_path / "x", THERE, here, there_is="the file", remedy=remedy, every=True)


def test_a_digest_is_of_the_values_and_not_of_their_order():
    assert digest({"b": [1, None], "a": 0.1}) == digest({"a": 0.1, "b": (1, None)}) != digest({"a": 0.1, "b": [1, 0]})
    text = b'{"a": 0.1, "b": [1, null]}'  # names of kept files hang on it
    assert digest({"b": [1, None], "a": 0.1}) == hashlib.sha256(text).hexdigest()[:16]
    assert digest([], 8) == hashlib.sha256(b"[]").hexdigest()[:8] and len(digest([], 64)) == 64


@pytest.mark.parametrize(
    "name, word", [("convnet", "ConvNet"), ("RESNET", "ResNet18"), ("ConvNetD9", "ConvNetD4"), (18, "ResNet18")]
)
def test_the_nearest_word_is_found_whatever_its_case(name, word):
    assert nearest(name, ["ConvNetD4", "ConvNet", "ResNet18"]) == word


def test_some_word_is_always_nearest_and_none_only_where_none_is_known():
    assert nearest("??", ["a", "b"]) in ("a", "b") and nearest("x", []) == "none"
