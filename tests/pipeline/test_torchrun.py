"""The three commands as two processes: the same files as by one, written once, and endings that are said and not hung.

All but one run fork their two ranks from the test process, which stands in for torchrun by keeping their store but,
unlike torchrun, ends nobody.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pad import cli
from pad.commands import bench as workbench
from pad.errors import InputError
from pad.store.tensors import load_tensors

CHECKOUT = Path(__file__).resolve().parents[2]
FORK = multiprocessing.get_context("fork")
MODEL = "ConvNetD1W8"
DATA = ["--dataset", "FashionMNISTMini", "--train_per_class", "12", "--model", MODEL, "--zca", "True"]


def two_ranks(
    folder: Path, front_door, argv: list[str], meanwhile=lambda processes: None, timeout: float = 120
) -> tuple[list[int], list[str], list[str]]:
    """Run a front door as two processes: their exit codes, and what each wrote on stdout and on stderr."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))
    files = [[folder / f"{name} of rank {number}" for name in ("stdout", "stderr")] for number in range(2)]

    def rank(number: int) -> None:
        os.environ.update(
            RANK=str(number),
            LOCAL_RANK=str(number),
            WORLD_SIZE="2",
            LOCAL_WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(store.port),
            TORCHELASTIC_USE_AGENT_STORE="True",
        )
        with open(files[number][0], "w") as sys.stdout, open(files[number][1], "w") as sys.stderr:
            os.dup2(sys.stdout.fileno(), 1)
            os.dup2(sys.stderr.fileno(), 2)
            sys.exit(front_door(argv))

    processes = [FORK.Process(target=rank, args=(number,), daemon=True) for number in range(2)]
    for process in processes:
        process.start()
    meanwhile(processes)
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    out, err = ([pair[i].read_text() for pair in files] for i in range(2))
    assert "Traceback" not in "".join(err), err
    return codes, out, err


def record_args(folder: Path) -> list[str]:
    return [
        *DATA,
        "--buffer_path",
        str(folder / "buffer"),
        "--ranking_path",
        str(folder / "rankings"),
        "--num_experts",
        "3",
        "--train_epochs",
        "2",
        "--batch_train",
        "40",
        "--lr_teacher",
        "0.05",
        "--rho_max",
        "0.01",
        "--rho_min",
        "0.01",
        "--init_ratio",
        "0.5",
        "--add_end_epoch",
        "1",
        "--score_repeats",
        "3",
        "--score_epochs",
        "1",
    ]


def distil_args(folder: Path, runs: Path, *more: str) -> list[str]:
    """Steps of 3 and 7 images, which two ranks cannot halve."""
    return [
        *DATA,
        "--ipc",
        "1",
        "--buffer_path",
        str(folder / "buffer"),
        "--log_dir",
        str(runs),
        "--name",
        "run",
        "--pix_init",
        "real",
        "--Iteration",
        "5",
        "--syn_steps",
        "3",
        "--batch_syn",
        "7",
        "--expert_epochs",
        "1",
        "--max_start_epoch",
        "2",
        "--current_max_start_epoch",
        "1",
        "--expansion_end_epoch",
        "4",
        "--threshold",
        "10",
        "--lr_img",
        "10",
        "--eval_it",
        "3",
        "--save_it",
        "4",
        "--checkpoint_every",
        "2",
        "--num_eval",
        "3",
        "--epoch_eval_train",
        "2",
        "--batch_train",
        "4",
        "--compile",
        "off",
        *more,
    ]


def evaluation_args(folder: Path, runs: Path, out: Path) -> list[str]:
    return [
        "--synthetic",
        str(run_folder(runs)),
        "--buffer_path",
        str(folder / "buffer"),
        "--out",
        str(out),
        "--num_eval",
        "3",
        "--epoch_eval_train",
        "2",
        "--baselines",
        "hard",
    ]


def run_folder(runs: Path) -> Path:
    return runs / "FashionMNISTMini" / "1" / MODEL / "run"


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def events(runs: Path) -> list[dict]:
    return [json.loads(line) for line in (run_folder(runs) / "metrics.jsonl").read_text().splitlines()]


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


def test_a_distilled_set_is_the_same_up_to_rounding_and_written_once(one, tmp_path):
    codes, out, err = two_ranks(tmp_path, cli.distill, distil_args(one, tmp_path / "runs"))
    assert codes == [0, 0], err
    assert out[1] == "" and err[1] == "", "rank 0 alone talks"
    assert out[0].count("iteration 3:") == 1 and err[0].count("the synthetic set is in") == 1

    ours, theirs = run_folder(tmp_path / "runs"), run_folder(one / "runs")
    assert files_in(ours).keys() == files_in(theirs).keys()
    assert len((ours / "timing.jsonl").read_text().splitlines()) == len(
        (theirs / "timing.jsonl").read_text().splitlines()
    )
    found, expected = events(tmp_path / "runs"), events(one / "runs")
    assert len({event["loss"] for event in found if event["event"] == "match"}) == 6
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
    assert cli.distill(distil_args(one, tmp_path / "runs", "--resume", "--Iteration", "6")) == 0
    assert [event["iteration"] for event in events(tmp_path / "runs") if event["event"] == "match"] == list(range(7))


def test_evaluation_gives_the_same_accuracies(one, tmp_path):
    codes, out, err = two_ranks(tmp_path, cli.evaluate, evaluation_args(one, one / "runs", tmp_path / "scores.json"))
    assert codes == [0, 0], err
    assert out[1] == "" and err[1] == "" and "accuracy on 1000 test images" in out[0]
    assert (tmp_path / "scores.json").read_bytes() == (one / "scores.json").read_bytes()
    scores = json.loads((tmp_path / "scores.json").read_text())["results"]
    assert [(row["set"], row["network"], row["n"]) for row in scores] == [
        (name, MODEL, 3) for name in ("synthetic", "random real, hard labels")
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


ENDLESS = ("--Iteration", "1000000", "--eval_it", "1000000", "--skip_first_eva", "--checkpoint_every", "3")


def wait_for_iterations(runs: Path, count: int) -> None:
    metrics, deadline = run_folder(runs) / "metrics.jsonl", time.monotonic() + 100
    while not metrics.exists() or metrics.read_text().count("\n") < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("told", [(0, 1), (1,)], ids=["all", "one"])
def test_processes_stop_together_and_the_run_goes_on_to_what_it_would_have_been(one, tmp_path, told):
    def stop(processes):
        wait_for_iterations(tmp_path / "stopped", 4)
        for number in told:
            os.kill(processes[number].pid, signal.SIGTERM)

    codes, _, err = two_ranks(tmp_path, cli.distill, distil_args(one, tmp_path / "stopped", *ENDLESS), stop)
    said = "".join(err)
    assert codes == [143, 143] and said.count("stopped after iteration") == 1, (codes, said)
    command = said.partition("go on with: ")[2].splitlines()[0]
    assert command.startswith("torchrun --nproc_per_node=2 ") and command.endswith(" --resume")
    last = int(said.partition("stopped after iteration ")[2].partition(";")[0])
    _, metadata = load_tensors(run_folder(tmp_path / "stopped") / "checkpoint.safetensors")
    assert metadata["iteration"] == last + 1
    if told == (1,):
        return

    ends = [*ENDLESS, "--Iteration", str(last + 2)]
    codes, _, err = two_ranks(tmp_path, cli.distill, distil_args(one, tmp_path / "stopped", *ends, "--resume"))
    assert codes == [0, 0] and f"going on from iteration {last + 1}" in err[0], err
    codes, _, err = two_ranks(tmp_path, cli.distill, distil_args(one, tmp_path / "whole", *ends))
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


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
def test_a_killed_process_ends_torchrun_with_a_sentence(one, tmp_path):
    runs, errors = tmp_path / "runs", tmp_path / "stderr"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(CHECKOUT / "distill" / "PAD.py"),
        *distil_args(one, runs, *ENDLESS),
    ]
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
        argv = distil_args(one, tmp_path / name, "--device", "cuda")
        done = subprocess.run([sys.executable, *launcher, script, *argv], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    found, expected = (
        [event["loss"] for event in events(tmp_path / name) if event["event"] == "match"]
        for name in ("double", "single")
    )
    assert found == pytest.approx(expected, rel=1e-3) and len(set(found)) == 6
