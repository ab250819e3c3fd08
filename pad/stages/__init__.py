"""The three stages, and what goes with the first, as flat recipes: settings in, files out."""

from pad.stages.distilling import distill
from pad.stages.evaluating import evaluate
from pad.stages.recording import record_experts
from pad.stages.scoring import score_difficulty, select_coreset
from pad.stages.studying import study

__all__ = ["distill", "evaluate", "record_experts", "score_difficulty", "select_coreset", "study"]
