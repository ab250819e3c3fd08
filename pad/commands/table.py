"""The commands by name: what each asks, and what it does.

A command of one's own is a line here, which may be written from outside: ``COMMANDS["mine"] = Command(...)``, then
``pad.cli.door("mine")``. Where it makes a synthetic set (its settings are a :class:`~pad.commands.distil.Distilling`),
studies know it by that name, too.
"""

from collections.abc import Callable
from dataclasses import dataclass

from pad.commands.coreset import CoresetSettings, select_coreset
from pad.commands.distil import distill
from pad.commands.distribution import DMSettings, NCFMSettings, TGDDSettings
from pad.commands.evaluate import EvaluationSettings, evaluate
from pad.commands.gradient import DCSettings
from pad.commands.influence import InfluenceSettings
from pad.commands.published import (
    ConvexifySettings,
    ExportSettings,
    ImportSettings,
    convexify_buffer,
    export_buffer,
    import_buffer,
)
from pad.commands.published_scale import PublishedScaleSettings, published_scale
from pad.commands.quantise import QuantiseSettings, quantise
from pad.commands.rank import ScoreSettings, score_difficulty
from pad.commands.record import BufferSettings, record_experts
from pad.commands.trajectory import DistillSettings
from pad.commands.travel import ExportSetSettings, ImportSetSettings, export_synthetic, import_synthetic
from pad.config import Settings


@dataclass(frozen=True)
class Command:
    """A command.

    program: what --help calls it. settings: what it asks. recipe: ``recipe(settings, ranks)`` does it. resumes: whether
    it goes on, where it was interrupted, only with --resume.
    """

    program: str
    settings: type[Settings]
    recipe: Callable
    resumes: bool = False


COMMANDS: dict[str, Command] = {
    "buffer": Command("buffer_CL.py", BufferSettings, record_experts),
    "PAD": Command("PAD.py", DistillSettings, distill, resumes=True),
    "DC": Command("DC.py", DCSettings, distill, resumes=True),
    "DM": Command("DM.py", DMSettings, distill, resumes=True),
    "TGDD": Command("TGDD.py", TGDDSettings, distill, resumes=True),
    "NCFM": Command("NCFM.py", NCFMSettings, distill, resumes=True),
    "InfMatch": Command("InfMatch.py", InfluenceSettings, distill, resumes=True),
    "evaluate": Command("evaluation.py", EvaluationSettings, evaluate),
    "score": Command("score_difficulty.py", ScoreSettings, score_difficulty),
    "coreset": Command("select_coreset.py", CoresetSettings, select_coreset),
    "import": Command("import_buffer.py", ImportSettings, import_buffer),
    "export": Command("export_buffer.py", ExportSettings, export_buffer),
    "convexify": Command("convexify_buffer.py", ConvexifySettings, convexify_buffer),
    "import_set": Command("import_set.py", ImportSetSettings, import_synthetic),
    "export_set": Command("export_set.py", ExportSetSettings, export_synthetic),
    "quantise": Command("quantise.py", QuantiseSettings, quantise),
    "published_scale": Command("published_scale.py", PublishedScaleSettings, published_scale),
}
