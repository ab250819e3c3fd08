"""The three commands as two processes: the same files as by one, written once, and endings that are said and not hung.

All but one run fork their two ranks from the test process, which stands in for torchrun by keeping their store but,
unlike torchrun, ends nobody.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    CHECKOUT,
    EXPERTS,
    RUN,
    command_line,
    events_in,
    files_in,
    losses_in,
    run_command,
    slow,
    two_ranks,
    wait_for,
)

from pad import cli
from pad.commands import bench as workbench
from pad.errors import InputError
from pad.store.tensors import load_tensors

MODEL = "ConvNetD1W8"
DATA = {"dataset": "FashionMNISTMini", "train_per_class": 12, "model": MODEL, "zca": True}


def record_args(folder: Path) -> list[str]:
    here = {"buffer_path": folder / "buffer", "ranking_path": folder / "rankings"}
    return command_line(
        **DATA | here | EXPERTS | {"num_experts": 3, "train_epochs": 2}, batch_train=40, score_repeats=3
    )


def distil_args(folder: Path, runs: Path, *more: str) -> list[str]:
    """Steps of 3 and 7 images, which two ranks cannot halve."""
    here = {"buffer_path": folder / "buffer", "log_dir": runs, "ipc": 1, "pix_init": "real", "compile": "off"}
    asked = {"Iteration": 5, "syn_steps": 3, "batch_syn": 7, "checkpoint_every": 2, "num_eval": 3}
    return command_line(*more, **DATA | here | RUN | asked, epoch_eval_train=2)


def evaluation_args(folder: Path, runs: Path, out: Path) -> list[str]:
    asked = {"synthetic": run_folder(runs), "buffer_path": folder / "buffer", "out": out, "baselines": "hard"}
    return command_line(**asked, num_eval=3, epoch_eval_train=2)


def run_folder(runs: Path) -> Path:
    return runs / "FashionMNISTMini" / "1" / MODEL / "run"


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """Experts in ``buffer``, a run in ``runs``, its scores in ``scores.json``, all by one process."""
    folder = tmp_path_factory.mktemp("one")
    assert cli.buffer(record_args(folder)) == 0
    assert cli.distill(distil_args(folder, folder / "runs")) == 0
    assert cli.evaluate(evaluation_args(folder, folder / "runs", folder / "scores.json")) == 0
    return folder


# ---- the same as by one process


def test_experts_are_the_same_bytes_whichever_process_records_them(one, tmp_path):
    codes, out, err = two_ranks(tmp_path, cli.buffer, record_args(tmp_path))
    assert codes == [0, 0], err
    for part in ("buffer", "rankings"):
        assert files_in(tmp_path / part) == files_in(one / part), part
    assert out == ["", ""] and err[1] == "", "rank 0 alone talks"
    assert err[0].count("3 experts are in") == 1 and err[0].count("computed GraNd") == 1

    before = files_in(tmp_path / "buffer")
    more = [*record_args(tmp_path), "--num_experts", "4"]
    codes, _, err = two_ranks(tmp_path, cli.buffer, more)
    assert codes == [0, 0] and "4 experts are in" in err[0], err
    assert before.items() < files_in(tmp_path / "buffer").items(), "those that were there are kept"
    codes, _, err = two_ranks(tmp_path, cli.buffer, more)
    assert codes == [0, 0] and "all 4 experts are in" in err[0], err


@pytest.mark.slow
def test_a_distilled_set_is_the_same_up_to_rounding_and_written_once(one, tmp_path):
    codes, out, err = two_ranks(tmp_path, cli.distill, distil_args(one, tmp_path / "runs"))
    assert codes == [0, 0], err
    assert out[1] == "" and err[1] == "", "rank 0 alone talks"
    assert out[0].count("iteration 3:") == 1 and err[0].count("the synthetic set is in") == 1

    ours, theirs = run_folder(tmp_path / "runs"), run_folder(one / "runs")
    assert files_in(ours).keys() == files_in(theirs).keys()
    times, others = (len((folder / "timing.jsonl").read_text().splitlines()) for folder in (ours, theirs))
    assert times == others
    found, expected = events_in(ours), events_in(theirs)
    assert len(set(losses_in(ours))) == 6
    for event, other in zip(found, expected, strict=True):
        assert event.keys() == other.keys()
        for name, value in event.items():
            exact = name not in ("loss", "lr")
            assert value == (other[name] if exact else pytest.approx(other[name], rel=1e-6)), (event, other)
    for name in ("Normal/synthetic_last.safetensors", "checkpoint.safetensors"):
        (tensors, metadata), (wanted, about) = load_tensors(ours / name), load_tensors(theirs / name)
        for key, tensor in wanted.items():
            assert (tensors[key].double() - tensor.double()).norm() <= 1e-5 * tensor.double().norm(), (name, key)
    assert metadata["arithmetic"].pop("processes") == 2 and about["arithmetic"].pop("processes") == 1
    assert metadata == about

    # One process goes on where two stopped, saying that it rounds otherwise.
    codes, _, err = two_ranks(tmp_path, cli.distill, distil_args(one, tmp_path / "runs", "--resume"))
    assert codes == [0, 0] and "is finished" in err[0], err
    assert cli.distill(distil_args(one, tmp_path / "runs", "--resume --Iteration 6")) == 0
    assert [event["iteration"] for event in events_in(ours, "match")] == list(range(7))


def test_evaluation_gives_the_same_accuracies(one, tmp_path):
    codes, out, err = two_ranks(tmp_path, cli.evaluate, evaluation_args(one, one / "runs", tmp_path / "scores.json"))
    assert codes == [0, 0], err
    assert out[1] == "" and err[1] == "" and "accuracy on 1000 test images" in out[0]
    assert (tmp_path / "scores.json").read_bytes() == (one / "scores.json").read_bytes()
    scores = json.loads((tmp_path / "scores.json").read_text())["results"]
    assert [(row["set"], row["network"], row["n"]) for row in scores] == [
        (name, MODEL, 3) for name in ("synthetic", "synthetic, hard labels", "random real, hard labels")
    ]
    assert len({accuracy for row in scores for accuracy in row["accuracies"]}) > 3, "an order would be seen"


# ---- endings


def test_wrong_input_is_said_once_and_ends_all_processes(one, tmp_path, monkeypatch):
    before = files_in(one)

    def refused(front_door, argv):
        codes, out, err = two_ranks(tmp_path, front_door, argv)
        assert codes == [2, 2] and out == ["", ""], (codes, out, err)
        assert sum(text.count("\n") for text in err) == 1, err
        return "".join(err)

    assert "unknown option '--lr_imag'; the nearest is --lr_img" in refused(cli.distill, ["--lr_imag", "3"])
    assert "holds a finished run" in refused(cli.distill, distil_args(one, one / "runs")), "which rank 0 alone looks at"

    def load_data(*args, **kwargs):
        if os.environ.get("RANK") == "1":
            raise InputError("the images are damaged")
        return loaded(*args, **kwargs)

    loaded = workbench.load_data
    monkeypatch.setattr(workbench, "load_data", load_data)
    assert refused(cli.buffer, record_args(tmp_path)) == "error: the images are damaged\n", "which rank 1 alone finds"
    assert files_in(one) == before and not (tmp_path / "buffer").exists()


def test_an_error_of_one_process_in_the_middle_ends_all_and_keeps_what_is_finished(one, tmp_path, monkeypatch):
    def write_text(path, text):
        if "finished" in str(path):
            raise OSError(28, "No space left on device", str(path))
        return written(path, text)

    from pad.store import run as tracking

    written = tracking.write_text
    monkeypatch.setattr(tracking, "write_text", write_text)
    codes, _, err = two_ranks(tmp_path, cli.distill, distil_args(one, tmp_path / "runs"))
    assert codes == [1, 1], err
    assert err[0].count("error: No space left on device: ") == 1 and err[1] == ""
    assert (run_folder(tmp_path / "runs") / "checkpoint.safetensors").is_file()


ENDLESS = "--Iteration 1000000 --eval_it 1000000 --skip_first_eva --checkpoint_every 3"


def wait_for_iterations(runs: Path, count: int) -> None:
    metrics = run_folder(runs) / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= count, 100)


@pytest.mark.parametrize("told", [slow((0, 1)), (1,)], ids=["all", "one"])
def test_processes_stop_together_and_the_run_goes_on_to_what_it_would_have_been(one, tmp_path, told):
    def stop(processes):
        wait_for_iterations(tmp_path / "stopped", 4)
        for number in told:
            os.kill(processes[number].pid, signal.SIGTERM)

    codes, _, err = two_ranks(tmp_path, cli.distill, distil_args(one, tmp_path / "stopped", ENDLESS), stop)
    said = "".join(err)
    assert codes == [143, 143] and said.count("stopped after iteration") == 1, (codes, said)
    command = said.partition("go on with: ")[2].splitlines()[0]
    assert command.startswith("torchrun --nproc_per_node=2 ") and command.endswith(" --resume")
    last = int(said.partition("stopped after iteration ")[2].partition(";")[0])
    _, metadata = load_tensors(run_folder(tmp_path / "stopped") / "checkpoint.safetensors")
    assert metadata["iteration"] == last + 1
    if told == (1,):
        return

    ends = f"{ENDLESS} --Iteration {last + 2}"
    codes, _, err = two_ranks(tmp_path, cli.distill, distil_args(one, tmp_path / "stopped", ends, "--resume"))
    assert codes == [0, 0] and f"going on from iteration {last + 1}" in err[0], err
    codes, _, err = two_ranks(tmp_path, cli.distill, distil_args(one, tmp_path / "whole", ends))
    assert codes == [0, 0], err
    resumed, whole = (run_folder(tmp_path / name) for name in ("stopped", "whole"))
    for name in ("metrics.jsonl", "checkpoint.safetensors", "Normal/images_last.pt"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name


def children(parent: int) -> dict[str, int]:
    """Ids of a process's children, by their rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(") ")[2].split()[1]) == parent:
                environment = (folder / "environ").read_text().split("\0")
                found |= {entry[5:]: int(folder.name) for entry in environment if entry.startswith("RANK=")}
        except OSError:
            continue
    return found


@pytest.mark.parametrize("killed", [True, False], ids=["one killed", "all told"])
def test_a_survivor_told_to_end_before_it_notices_says_why(tmp_path, killed):
    """As torchrun does it. While experts are trained, no rank asks for another."""

    def end(processes):
        wait_for(lambda: len([*(tmp_path / "buffer").rglob("*.partial")]) == 2, 100)
        if killed:
            processes[0].kill()
            processes[0].join()
        for process in processes[killed:]:
            os.kill(process.pid, signal.SIGTERM)

    codes, _, err = two_ranks(tmp_path, cli.buffer, [*record_args(tmp_path), "--train_epochs", "2000"], end)
    said = "".join(err)
    assert codes == ([-signal.SIGKILL, 1] if killed else [143, 143]), (codes, said)
    sentences = ("another process of this run ended, so this one cannot go on; what was", "interrupted; what was")
    assert [said.count(sentence) for sentence in sentences] == [killed, not killed], said


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
def test_a_killed_process_ends_torchrun_with_a_sentence(one, tmp_path):
    runs, errors = tmp_path / "runs", tmp_path / "stderr"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, str(CHECKOUT / "distill" / "PAD.py"), *distil_args(one, runs, ENDLESS)]
    with open(errors, "w") as stderr, subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr) as torchrun:
        try:
            wait_for_iterations(runs, 4)
            ranks = children(torchrun.pid)
            assert ranks.keys() == {"0", "1"}
            os.kill(ranks["0"], signal.SIGKILL)
            assert torchrun.wait(30) != 0
        finally:
            torchrun.terminate()  # which ends its processes, where the test has not
    said = errors.read_text()
    assert said.count("\nanother process of this run ended, so this one cannot go on") == 1, said
    assert "what was finished is kept" in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    assert load_tensors(run_folder(runs) / "checkpoint.safetensors")[1]["iteration"] >= 3


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_cuda_devices_give_what_one_gives(one, tmp_path):
    """In processes of their own: CUDA does not survive a fork."""
    script = str(CHECKOUT / "distill" / "PAD.py")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for name, launcher in (("single", []), ("double", torchrun)):
        argv = distil_args(one, tmp_path / name, "--device cuda")
        done = run_command([sys.executable, *launcher, script, *argv], tmp_path)
        assert done.returncode == 0, done.stderr
    found, expected = (losses_in(run_folder(tmp_path / name)) for name in ("double", "single"))
    assert found == pytest.approx(expected, rel=1e-3) and len(set(found)) == 6
