"""How the files here were made, and the commands that go on with them, which tests/pipeline/test_earlier_files.py runs.

    git worktree add ../old 8f86ba8
    OMP_NUM_THREADS=1 python tests/data/earlier/make.py ../old

They were made by version 0.1.0 of this toolkit, commit 8f86ba8, from whose checkout the commands below are run.
``begun`` is what ``BEGIN`` leaves: things that are done, and runs that were stopped halfway. ``finished`` is what the
same version made of it by ``GO_ON``, each part on its own. ``finished.json`` has, for each part, a digest of every
file that it made or changed (see :func:`digest`), also of those that are not kept here because others say the same;
"any" for pictures, which hang on a font, and times; "gone" for what it removed. ``made_on.json`` says on what machine,
see :func:`machine`.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCRIPTS = {  # by the name of the function of pad.cli that does the same
    "buffer": "buffer/buffer_CL.py",
    "distill": "distill/PAD.py",
    "match_gradients": "distill/DC.py",
    "match_distributions": "distill/DM.py",
    "evaluate": "distill/evaluation.py",
    "score": "scripts/score_difficulty.py",
    "coreset": "scripts/select_coreset.py",
    "study": "scripts/study.py",
    "export_buffer": "scripts/export_buffer.py",
    "import_buffer": "scripts/import_buffer.py",
}

# ---- the data: a part of the embedded images, and a folder of tiny ones

CLASSES = ("ant", "bee", "cat")


def make_images(root: Path) -> None:
    """An ImageFolder of three classes, grey, 6 x 6: patterns and noise, of whole numbers, so the same everywhere."""
    from PIL import Image

    patterns = (lambda y, x: y // 2 % 2, lambda y, x: x // 2 % 2, lambda y, x: (x + y) // 3 % 2)
    for part, count in (("train", 12), ("test", 40)):
        for name, pattern in zip(CLASSES, patterns):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                noise = hashlib.sha512(f"{part} {name} {i}".encode()).digest()[:36]
                pixels = bytes(90 * pattern(*divmod(at, 6)) + value * 150 // 255 for at, value in enumerate(noise))
                Image.frombytes("L", (6, 6), pixels).save(root / part / name / f"{i:02d}.png")


# ---- the commands: (function of pad.cli, arguments), in a folder where begun's files lie, and images/

MINI = "--dataset FashionMNISTMini --train_per_class 20 --model ConvNetW8"
TINY = "--dataset ImageFolder --data_path images --model ConvNetD2W8"
OFF = "--compile off"  # elsewhere, by default, the kernels that the compiler g++ makes, where there is one
SCORING = {"repeats": 2, "epochs": 2, "lr": 0.05, "batch": 50}
SCORE = " ".join(f"--{name} {value}" for name, value in SCORING.items())
LIKE_IT = " ".join(f"--score_{name} {value}" for name, value in SCORING.items())
CURRICULUM = (
    "--init_ratio 0.5 --add_end_epoch 1 --rm_epoch_first 1 --rm_epoch_second 2 --rm_easy_ratio_first 0.1 "
    "--rm_easy_ratio_second 0.2 --lr_teacher 0.05 --rho_max 0.01 --rho_min 0.01 --alpha 0.3"
)

RANK_MINI = "score", f"{MINI} --out mini/rankings --methods GraNd,Herding {SCORE}".split()
RANK_TINY = "score", f"{TINY} --out tiny/rankings --methods GraNd,Herding {SCORE}".split()
RANK_HALF = "score", f"{TINY} --out tiny/half --methods GraNd,EL2N {SCORE}".split()
MINI_RANKING = f"--ranking_path mini/rankings {LIKE_IT}"
TINY_RANKING = f"--ranking_path tiny/rankings {LIKE_IT}"
MINI_BUFFER = (
    f"{MINI} --buffer_path mini/buffer {MINI_RANKING} --sort_method FashionMNISTMini_GraNd --batch_train 40 "
    f"--train_epochs 2 {CURRICULUM} {OFF}"
)
MINI_SET = "mini/runs/FashionMNISTMini/1/ConvNetW8/set"
TINY_SET = "tiny/runs/ImageFolder/1/ConvNetD2W8/set"
NETWORKS = "--num_eval 2 --epoch_eval_train 3"
EVALUATE_TINY = "evaluate", f"--synthetic {TINY_SET} --data_path images {NETWORKS} {OFF}".split()

RUN = (
    f"{TINY} --ipc 1 --log_dir tiny/runs --num_eval 2 --epoch_eval_train 2 --batch_train 8 --checkpoint_every 2 "
    "--eval_it 4 --save_it 3"
)
PAD = (
    f"{RUN} --name PAD --zca --buffer_path tiny/buffer --Iteration 7 --syn_steps 3 --batch_syn 2 --expert_epochs 1 "
    "--max_start_epoch 3 --current_max_start_epoch 1 --expansion_end_epoch 4 --depth_ratio 0.25 --threshold 10 "
    f"--lr_img 10 --pix_init real {OFF}"
)
DC = f"{RUN} --name DC --Iteration 5 --batch_real 6 --outer_loop 2 --inner_loop 1 --depth_ratio 0.25"
DM = f"{RUN} --name DM --batch_real 6 {TINY_RANKING} --drop_hard 0.2 --depth_ratio 0.5"
CORESET = f"{TINY} --method Herding --ipc 2 {TINY_RANKING}"

STUDY = """
out: study
seeds: [0, 1]
ipc: [1]
reference: easiest
common: {dataset: ImageFolder, data_path: images, model: ConvNetD2W8, compile: "off", score_repeats: 1, score_epochs: 1}
buffers:
  curriculum:
    {num_experts: 1, train_epochs: 2, batch_train: 9, lr_teacher: 0.05, rho_max: 0.01, rho_min: 0.01, alpha: 0.3,
     init_ratio: 0.5, add_end_epoch: 1}
methods:
  easiest: {by: coreset, method: EL2N, lr: 0.05}
  PAD:
    {by: PAD, buffer: curriculum, depth_ratio: 0.25, Iteration: 2, syn_steps: 2, expert_epochs: 1, max_start_epoch: 2,
     Sequential_Generation: False, pix_init: real, threshold: 10, lr_img: 10, eval_it: 9, skip_first_eva: True,
     num_eval: 1, epoch_eval_train: 1}
evaluation: {num_eval: 2, epoch_eval_train: 3}
"""

# What the old version was asked to do first; a third entry names where it was stopped, see :func:`stopped`.
BEGIN = [
    RANK_MINI,
    ("buffer", f"{MINI_BUFFER} --num_experts 2".split()),
    (
        "distill",
        (
            f"{MINI} --zca False --buffer_path mini/buffer --log_dir mini/runs --name set --ipc 1 --Iteration 2 "
            "--syn_steps 3 --batch_syn 5 --expert_epochs 1 --max_start_epoch 2 --Sequential_Generation False "
            "--depth_ratio 0.25 --threshold 10 --lr_img 10 --eval_it 9 --skip_first_eva "
            "--num_eval 1 --epoch_eval_train 1"
        ).split(),
    ),
    RANK_TINY,
    (
        "buffer",
        (
            f"{TINY} --zca --buffer_path tiny/buffer {LIKE_IT} --num_experts 2 --train_epochs 3 --batch_train 9 "
            f"{CURRICULUM} {OFF}"
        ).split(),
    ),
    ("coreset", f"{CORESET} --out tiny/coresets".split()),
    ("match_distributions", f"{RUN} --name set --batch_real 6 --Iteration 1 --skip_first_eva".split()),
    ("distill", PAD.split(), "killed in iteration 5"),
    ("match_gradients", DC.split(), "told to end in iteration 3"),
    ("match_distributions", f"{DM} --Iteration 3".split()),
    (*EVALUATE_TINY, "killed after 3 networks"),
    (*RANK_HALF, "killed after a network"),
    ("study", "study.yaml --seeds 0".split()),
]

# What goes on with it, by what it is about.
GO_ON = {
    "buffer": [("buffer", f"{MINI_BUFFER} --num_experts 3".split())],
    "published buffer": [
        ("export_buffer", "tiny/buffer/ImageFolder/ConvNetD2W8 exported --save_interval 1".split()),
        ("import_buffer", f"{TINY} --zca --buffer_path imported --source exported".split()),
    ],
    "set": [
        (
            "evaluate",
            (
                f"--synthetic {MINI_SET} --buffer_path mini/buffer {MINI_RANKING} --baselines hard,soft,Herding "
                f"--seed 1 {NETWORKS}"
            ).split(),
        )
    ],
    "published set": [
        (
            "evaluate",
            (
                f"{TINY} --data_dir {TINY_SET}/Normal/images_last.pt --label_dir {TINY_SET}/Normal/labels_last.pt "
                f"--lr_dir {TINY_SET}/Normal/lr_last.pt --baselines none {NETWORKS}"
            ).split(),
        )
    ],
    "coreset": [("coreset", f"{CORESET} --out tiny/coresets_again".split())],
    "old coreset": [
        (
            "evaluate",
            (f"--synthetic tiny/coresets/ImageFolder_Herding_2.safetensors --data_path images {NETWORKS}").split(),
        )
    ],
    "study": [("study", ["study.yaml"])],
    "PAD": [("distill", f"{PAD} --resume".split())],
    "DC": [("match_gradients", f"{DC} --resume".split())],
    "DM": [("match_distributions", f"{DM} --Iteration 7 --resume".split())],
    "evaluation": [EVALUATE_TINY],
    "half a ranking": [RANK_HALF],
}

# ---- on what machine


def machine() -> dict[str, str]:
    """What the last bits of a result hang on: digests, none of which is made by this toolkit's code.

    Where all of them are the same, so are all bytes that the toolkit's own CPU kernels have no part in.
    """
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        images, kernel, matrix = torch.rand(4, 3, 12, 12), torch.rand(8, 3, 3, 3), torch.rand(1152, 50)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    maps = torch.nn.functional.conv2d(images, kernel.requires_grad_(), padding=1)
    out = (torch.nn.functional.group_norm(maps, 8).relu().flatten(1) @ matrix / 100).exp()
    (gradient,) = torch.autograd.grad(out.sum(), kernel)
    torch.set_num_threads(threads)
    arithmetic = b"".join(tensor.detach().numpy().tobytes() for tensor in (maps, out, out.sum(), gradient))

    kept = ("vendor_id", "cpu family", "model", "model name", "stepping", "cache size", "flags", "Features")
    lines = {platform.machine(), platform.system()}
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        lines |= {line for line in cpuinfo.read_text().splitlines() if line.split(":")[0].strip() in kept}
    compiler = shutil.which(os.environ.get("CXX") or "g++")  # of the kernels for the CPU
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout if compiler else b"none"
    libraries = torch.__config__.show().encode()
    found = {"cpu": "\n".join(sorted(lines)).encode(), "arithmetic": arithmetic, "libraries": libraries, "g++": version}
    return {"torch": torch.__version__} | {name: hashlib.sha256(data).hexdigest()[:16] for name, data in found.items()}


# ---- making


def stopped(how: str, program: str, argv: list[str]) -> None:
    """Run a command of the old version in this process and end it where ``how`` says."""
    from pad.stages.evaluating import _Finished

    from pad import cli
    from pad.difficulty import methods
    from pad.matching.gradient import GradientObjective
    from pad.matching.trajectory import TrajectoryObjective

    def end(cls, name: str, number: int, when, after: bool = False) -> None:
        """Let a method of ``cls`` send this process a signal, before or after its work, where ``when`` holds."""
        function = getattr(cls, name)

        def ending(*arguments):
            if not after and when(*arguments):
                os.kill(os.getpid(), number)
            value = function(*arguments)
            if after and when(*arguments):
                os.kill(os.getpid(), number)
            return value

        setattr(cls, name, ending)

    if how == "killed in iteration 5":
        end(TrajectoryObjective, "gradients", signal.SIGKILL, lambda self, it, *_: it == 5)
    elif how == "told to end in iteration 3":
        end(GradientObjective, "steps", signal.SIGTERM, lambda self, it, *_: it == 3)
    elif how == "killed after 3 networks":
        kept = []
        end(_Finished, "keep", signal.SIGKILL, lambda *_: kept.append(1) or len(kept) == 3, after=True)
    elif how == "killed after a network":
        end(methods._Kept, "save", signal.SIGKILL, lambda self, repeat, *_: repeat == 0, after=True)
        consult = methods._consult

        def turned_round(*arguments):
            """What no training says: the ranking then shows that what was kept of this network was used."""
            found = consult(*arguments)
            return methods.replace(found, scores={name: -values for name, values in found.scores.items()})

        methods._consult = turned_round
    sys.exit(getattr(cli, program)(argv))


def run(old: Path, program: str, argv: list[str], how: str | None = None) -> None:
    script = [str(HERE / "make.py"), "--stopped", str(old), how, program] if how else [str(old / SCRIPTS[program])]
    code = subprocess.run([sys.executable, *script, *argv], stdout=subprocess.DEVNULL).returncode
    expected = 0 if how is None else 143 if "told" in how else -signal.SIGKILL
    if code != expected:
        sys.exit(f"{program} {' '.join(argv)} ended with {code}")


def files(root: Path) -> dict[str, bytes]:
    """What lies under ``root``, but for what is not of a command, and for locks, which name a machine."""
    leave = re.compile(r"images/.*|study\.yaml|.*\.lock|cache/compiled.*")
    found = {str(path.relative_to(root)): path for path in sorted(root.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not leave.fullmatch(name)}


def plain(name: str, data: bytes) -> bytes:
    """A file's bytes without what a study notes of time and memory, and without what later versions say beside."""
    if name.endswith("config.yaml"):
        return data.replace(b"together: null\n", b"")
    if name.endswith(".evaluation.json"):
        later = ("synthetic", "settings", "data", "experts", "metrics", "metrics_of", "protocol", "bits")
        results = {key: value for key, value in json.loads(data).items() if key not in later}
        rows = ("set", "network", "mean", "std", "n", "accuracies")
        there = [row for row in results["results"] if row.get("row") != "syn_hard"]  # a later one
        results["results"] = [{key: row[key] for key in rows} for row in there]
        return (json.dumps(results, indent=2, sort_keys=True) + "\n").encode()
    if name.startswith("study/cells/"):
        record = {key: value for key, value in json.loads(data).items() if key not in ("seconds", "distilling")}
        return json.dumps(record, indent=1).encode()
    if name.endswith("results.csv"):
        lines = [line.split(",") for line in data.decode().splitlines()]
        return "\n".join(",".join(line[:8] + line[9:]) for line in lines).encode()
    return data


ANY = re.compile(r".*\.png|.*/timing\.jsonl|study/.*/config\.yaml")  # the last have whole paths
# Of ``begun``, nobody goes on with these.
SPARE = re.compile(
    r".*\.png|.*/timing\.jsonl|.*/(set|PAD-.*)/(config\.yaml|checkpoint\.safetensors|metrics\.jsonl|finished\.json)|"
    r".*/(DC|DM|PAD)/Normal/.*|.*/(set|PAD-.*)/Normal/.*_(0|best)\..*|(mini/runs|study/sets|tiny/coresets)/.*\.pt|"
    r"tiny/buffer/data_indices/.*"
)
# Of ``finished``, these have numbers that are in other files.
DERIVED = re.compile(r"(.*/)?(images|images_zca|labels|lr)_[^/]*\.pt|exported/.*|imported/.*")


def write(folder: Path, kept: dict[str, bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in kept.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def enter(folder: Path, kept: dict[str, bytes]) -> None:
    """Make ``folder`` the current one, with the files that all commands work on."""
    write(folder, kept)
    folder.mkdir(exist_ok=True)
    make_images(folder / "images")
    (folder / "study.yaml").write_text(STUDY)
    os.chdir(folder)
    os.environ["PAD_CACHE"] = str(folder / "cache")


def digest(name: str, data: bytes) -> str:
    """The beginning of the SHA-256 of :func:`plain`."""
    return "any" if ANY.fullmatch(name) else hashlib.sha256(plain(name, data)).hexdigest()[:32]


def main(old: Path) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1"}
    made_on, made, finished = machine(), {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "begun")
        enter(folder, {})
        for entry in BEGIN:
            run(old, *entry)
        begun = {name: data for name, data in files(folder).items() if not SPARE.fullmatch(name)}
        for number, (about, commands) in enumerate(GO_ON.items()):
            folder = Path(scratch, str(number))
            enter(folder, begun)
            for entry in commands:
                run(old, *entry)
            after = files(folder)
            changed = {name: data for name, data in after.items() if begun.get(name) != data}
            made[about] = {name: digest(name, data) for name, data in changed.items()}
            made[about] |= {name: "gone" for name in begun if name not in after}
            for name, data in changed.items():
                said = ANY.fullmatch(name) or DERIVED.fullmatch(name) or data in {*begun.values(), *finished.values()}
                finished |= {} if said else {name: data}
        os.chdir(HERE)
    write(HERE / "begun", begun)
    write(HERE / "finished", finished)
    for name, value in (("finished", made), ("made_on", made_on)):
        (HERE / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "--stopped":
        sys.path.insert(0, sys.argv[2])
        stopped(sys.argv[3], sys.argv[4], sys.argv[5:])
    main(Path(sys.argv[1]).resolve())
