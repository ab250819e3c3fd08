"""Kill -9 real commands at random moments, again and again, and see that nothing was lost.

    python scripts/soak.py --kills 30          # of each stage; about 5 s a kill, which is what starting Python takes
    python scripts/soak.py --minutes 60

Experts, a distillation and an evaluation run on the embedded images with tiny settings. Each is started, killed at a
random moment and started again until it is done; then its files must be those of an uninterrupted run, byte for byte,
with nothing beside them. Meanwhile no file of a finished expert may change, and a checkpoint may not go back. A table
follows; the exit code is 1 if anything was lost.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # runs from a checkout, from any working directory

from pad.show.tables import result_table
from pad.store.tensors import load_tensors

DEVICE = ["--compile", "off", "--device", "cpu"]
DATA = ["--dataset", "FashionMNISTMini", "--train_per_class", "12", "--model", "ConvNetD1W8", *DEVICE]
EXPERTS = [
    "--num_experts",
    "3",
    "--train_epochs",
    "3",
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
    "2",
    "--score_epochs",
    "1",
]
RUN = [
    "--ipc",
    "1",
    "--name",
    "run",
    "--Iteration",
    "60",
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
    "20",
    "--save_it",
    "16",
    "--checkpoint_every",
    "5",
    "--num_eval",
    "2",
    "--epoch_eval_train",
    "2",
    "--batch_train",
    "4",
    "--resume",
]
SCORES = ["--num_eval", "4", "--epoch_eval_train", "20", "--baselines", "hard"]


@dataclass
class Stage:
    """A command that writes under ``folder``, killed until it is done."""

    name: str
    command: list[str]  # {} stands for the folder
    seconds: float = 0  # of an uninterrupted run
    expected: dict[str, bytes] = field(default_factory=dict)
    kills: int = 0
    completed: int = 0
    lost: list[str] = field(default_factory=list)

    def start(self, folder: Path) -> subprocess.Popen:
        argv = [word.replace("{}", str(folder)) for word in self.command]
        with open(folder.with_suffix(".log"), "w") as log:
            one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
            return subprocess.Popen([sys.executable, *argv], stdout=log, stderr=log, env=one_thread)

    def measure(self, folder: Path) -> None:
        """Run without a kill: what it writes, and how long that takes."""
        began = time.monotonic()
        if self.start(folder).wait() != 0:
            sys.exit(folder.with_suffix(".log").read_text())
        self.seconds, self.expected = time.monotonic() - began, contents(folder)

    def kill_until_done(self, folder: Path, rng: random.Random) -> None:
        """One run, killed at random moments; what was lost is noted."""
        while True:
            experts, iteration = finished_experts(folder), last_checkpoint(folder)
            process, began = self.start(folder), time.monotonic()
            try:
                code = process.wait(rng.uniform(0, 1.2 * self.seconds))
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
            if not experts.items() <= finished_experts(folder).items():
                self.lost.append("a finished expert was recorded again")
            if last_checkpoint(folder) < iteration:
                self.lost.append("a checkpoint went back")
            if code == 0:
                if not experts and not iteration:  # a whole run; the first one measured had more to load
                    self.seconds = min(self.seconds, time.monotonic() - began)
                break
            self.kills += 1
            if code != -9:
                self.lost.append(f"exit code {code}: {folder.with_suffix('.log').read_text()[-300:]}")
                return
        found = contents(folder)
        names = sorted(found.keys() | self.expected)
        self.lost += [f"{name} differs" for name in names if found.get(name) != self.expected.get(name)]
        self.completed += 1


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of all files but those of times and of settings, which name folders; these are there, too."""
    return {
        str(path.relative_to(folder)): b"" if path.name in ("timing.jsonl", "config.yaml") else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def finished_experts(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("expert_*.safetensors")}


def last_checkpoint(folder: Path) -> int:
    return max((load_tensors(path)[1]["iteration"] for path in folder.rglob("checkpoint.safetensors")), default=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=30, help="of each stage (default: 30)")
    parser.add_argument("--minutes", type=float, help="go on for so long instead")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng, work = random.Random(arguments.seed), Path(tempfile.mkdtemp(prefix="soak-"))
    os.environ["PAD_CACHE"] = str(work / "cache")
    buffer, run = (
        work / "whole-record" / "buffer",
        work / "whole-distil" / "FashionMNISTMini" / "1" / "ConvNetD1W8" / "run",
    )
    record = [*DATA, *EXPERTS, "--zca", "--buffer_path", "{}/buffer", "--ranking_path", "{}/rankings"]
    distil = [*DATA, *RUN, "--zca", "True", "--buffer_path", str(buffer), "--log_dir", "{}"]
    scores = [*DEVICE, *SCORES, "--synthetic", str(run), "--out", "{}/scores.json"]
    stages = [
        Stage("record", [f"{ROOT}/buffer/buffer_CL.py", *record]),
        Stage("distil", [f"{ROOT}/distill/PAD.py", *distil]),
        Stage("evaluate", [f"{ROOT}/distill/evaluation.py", *scores]),
    ]
    for stage in stages:
        folder = work / f"whole-{stage.name}"
        folder.mkdir()
        stage.measure(folder)
    began, turn = time.monotonic(), 0

    def enough(stage: Stage) -> bool:
        return (
            time.monotonic() - began > 60 * arguments.minutes if arguments.minutes else stage.kills >= arguments.kills
        )

    while not all(enough(stage) for stage in stages):
        for stage in stages:
            if not enough(stage):
                folder = work / f"{stage.name}-{turn}"
                folder.mkdir()
                stage.kill_until_done(folder, rng)
                shutil.rmtree(folder)
        turn += 1
    rows = [
        {
            "stage": stage.name,
            "seconds": f"{stage.seconds:.1f}",
            "kills": stage.kills,
            "runs completed": stage.completed,
            "lost": len(stage.lost),
        }
        for stage in stages
    ]
    print(result_table(rows, list(rows[0])))
    for stage in stages:
        for what in stage.lost:
            print(f"{stage.name}: {what}")
    shutil.rmtree(work)
    return int(any(stage.lost for stage in stages))


if __name__ == "__main__":
    sys.exit(main())
